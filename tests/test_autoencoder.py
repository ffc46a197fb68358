"""The frozen autoencoders: TinyRAE, and the paper's RAE against its official code."""
import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT

import sphere_latent as sl

FIXTURES = ROOT.parent / "shared" / "fixtures"               # what the official code of RAE gives
CONFIG = sl.Config(image_size=16, patch_size=8, latent_channels=6, autoencoder_steps=40,
                   batch_size=16)
RAE_DECODER = sl.RAEDecoder


@pytest.fixture(scope="module")
def tiny(small_sizes):
    """-> a TinyRAE that learned for a second, its images."""
    images = sl.load_images(CONFIG, "train")
    torch.manual_seed(0)
    autoencoder = sl.fit_tiny_rae(sl.load_autoencoder("tiny", CONFIG), images, CONFIG)
    return autoencoder, images.pixels / 255


def test_patches_overlap_and_nothing_is_lost():
    """With as many channels as numbers PCA is invertible; one token draws into the next patch."""
    pca, images = sl.PatchPCA(16, 8, 3 * 8 * 8), torch.rand(300, 3, 16, 16)
    pca.fit(images)
    torch.testing.assert_close(pca.decode(pca.encode(images)), images, rtol=0, atol=1e-4)
    z = torch.zeros(2, 4, 192)
    z[0, 0] = torch.randn(192)                               # the upper left patch
    effect = (pca.decode(z[:1]) - pca.decode(z[1:])).abs().amax((0, 1))      # [H, W]
    assert effect[:10, :10].min() > 0 and effect[10:].max() == effect[:, 10:].max() == 0


def test_pca_is_the_best_linear_code(tiny):
    autoencoder, images = tiny
    patches = autoencoder.pca.patches(images).flatten(0, 1)
    lost = torch.linalg.svdvals(patches - patches.mean(0))[6:].square().sum() / patches.numel()
    rebuilt = autoencoder.pca.decode(autoencoder.pca.encode(images))
    torch.testing.assert_close((rebuilt - images).square().mean(), lost, rtol=1e-3, atol=0)


def test_latents_have_mean_0_and_variance_1_and_images_are_from_0_to_1(tiny):
    autoencoder, images = tiny
    z = autoencoder.encode(images)
    assert z.shape == (240, 4, 6) and z.mean((0, 1)).abs().max() < 1e-4
    assert z.square().mean().item() == pytest.approx(1, abs=0.01)
    x = autoencoder.decode(10 * z)
    assert x.shape == images.shape and x.min() == 0 and x.max() == 1
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())


def fixture(name):
    if not (FIXTURES / name).exists():
        pytest.skip(f"{FIXTURES / name} is not here")
    return torch.load(FIXTURES / name, weights_only=True)


def test_decoder_is_the_official_one_and_strict_about_keys():
    data = fixture("rae_decoder_a.pt")
    names = ("encoder_width", "patches", "width", "depth", "heads", "mlp", "patch")
    decoder = RAE_DECODER(*[data["config"][name] for name in names])
    torch.testing.assert_close(decoder.decoder_pos_embed, data["state_dict"]["decoder_pos_embed"])
    decoder.load_state_dict(data["state_dict"])
    tokens = data["z"] * (data["var"] + data["eps"]).sqrt() + data["mean"]
    images = decoder(tokens.flatten(2).mT)
    torch.testing.assert_close(images, data["image"], rtol=0, atol=2e-6)     # measured: 2e-7
    del data["state_dict"]["decoder_layers.1.attention.attention.key.bias"]
    with pytest.raises(RuntimeError, match="(?s)Missing.*in_proj"):
        decoder.load_state_dict(data["state_dict"])


@pytest.mark.slow
def test_encoder_is_the_official_one(monkeypatch):
    data = fixture("rae_encoder_a.pt")
    monkeypatch.syspath_prepend(FIXTURES)
    import seeded_weights as seeded
    monkeypatch.setattr(sl, "RAEDecoder", lambda: RAE_DECODER(depth=1))      # not needed here
    rae = sl.load_autoencoder("dinov2-b", pretrained=False)
    seeded.fill_timm(rae.encoder, data["seed"])
    moments = seeded.seeded_stats(data["seed"])
    rae.latent_mean, rae.latent_var = [moment.flatten(1).T for moment in moments]
    z = rae.encode(seeded.seeded_images(data["seed"]))
    torch.testing.assert_close(z[:, ::5, ::5], data["normalised"], rtol=0, atol=1e-3)


def test_files_placed_by_hand_are_what_is_loaded(tmp_path, monkeypatch):
    """Files as published, with positions for 518 pixels; but of one block, and random."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, depth=1))
    monkeypatch.setattr(sl, "RAEDecoder", lambda: RAE_DECODER(depth=1))
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0).state_dict()
    decoder = sl.RAEDecoder().state_dict()
    statistics = {"mean": torch.randn(768, 16, 16), "var": torch.rand(768)}
    safetensors.torch.save_file(encoder, tmp_path / "model.safetensors")
    torch.save(decoder, tmp_path / "model.pt")
    torch.save(statistics, tmp_path / "stat.pt")
    rae = sl.load_autoencoder("dinov2-b", sl.Config(weights_dir=str(tmp_path)))
    positions = timm.layers.resample_abs_pos_embed(encoder["pos_embed"], [16, 16], None, 0)
    torch.testing.assert_close(rae.encoder.pos_embed, positions)
    assert torch.equal(rae.decoder.decoder_embed.weight, decoder["decoder_embed.weight"])
    assert torch.equal(rae.latent_mean[16 * 2 + 5], statistics["mean"][:, 2, 5])         # token 37
    assert torch.equal(rae.latent_var[0], statistics["var"])
