"""The frozen autoencoders: TinyRAE, and the paper's RAE against its official code."""
import pytest
import timm
import torch
from conftest import ROOT, fewer_drawings

import sphere_latent as sl

FIXTURES = ROOT / "tests" / "fixtures"                       # what the official code of RAE gives
RAE_DECODER = sl.RAEDecoder


@pytest.fixture(scope="module")
def tiny(small_sizes):
    """A TinyRAE that learned for a second, its images, what its decoder was given."""
    images, given = fewer_drawings("train", 16).pixels / 255, []
    config = sl.Config(autoencoder_steps=60)
    torch.manual_seed(0)
    autoencoder = sl.TinyRAE(16, 8, 6)
    decode = autoencoder.decode_unclamped
    autoencoder.decode_unclamped = lambda z: (given.append(z), decode(z))[1]
    sl.fit_tiny_rae(autoencoder, images, images.repeat(2, 1, 1, 1).split(8), config)
    del autoencoder.decode_unclamped
    return autoencoder, images, given


def test_patches_overlap_and_nothing_is_lost():
    """With as many channels as numbers PCA is invertible; one token draws into the next patch."""
    pca, images = sl.PatchPCA(16, 8, 3 * 8 * 8), torch.rand(300, 3, 16, 16)
    pca.fit(images)
    torch.testing.assert_close(pca.decode(pca.encode(images)), images, rtol=0, atol=1e-4)
    z = torch.zeros(2, 4, 192)
    z[0, 0] = torch.randn(192)                               # the upper left patch
    effect = (pca.decode(z[:1]) - pca.decode(z[1:])).abs().amax((0, 1))      # [H, W]
    assert effect[:10, :10].min() > 0
    assert not effect[10:].any() and not effect[:, 10:].any()


def test_pca_is_the_best_linear_code_and_its_numbers_are_scaled(tiny):
    autoencoder, images, _ = tiny
    patches = autoencoder.pca.patches(images).flatten(0, 1)
    lost = torch.linalg.svdvals(patches - patches.mean(0))[6:].square().sum() / patches.numel()
    rebuilt = autoencoder.pca.decode(autoencoder.pca.encode(images))
    torch.testing.assert_close((rebuilt - images).square().mean(), lost, rtol=1e-3, atol=0)
    z = autoencoder.encode(images)
    assert z.shape == (240, 4, 6) and z.mean((0, 1)).abs().max() < 1e-4
    assert z.square().mean().item() == pytest.approx(1, abs=0.01)
    deviations = torch.linalg.svdvals(patches - patches.mean(0))[:6]         # of the plain numbers
    torch.testing.assert_close(z.std((0, 1)).square() / deviations, (z.std((0, 1)).square().sum()
                               / deviations.sum()).expand(6), rtol=1e-3, atol=0)


def test_the_decoder_learns_clean_images_from_latents_with_new_noise(tiny):
    autoencoder, images, given = tiny
    noise = torch.cat(given) - autoencoder.encode(images).repeat(2, 1, 1)
    sigma = noise.std((1, 2))                                # of 0.25 |normal|, for each image
    assert sigma.mean().item() == pytest.approx(0.25 * 0.8, rel=0.1)
    within_batches = sigma.view(60, 8).std(1).mean().item()
    assert within_batches == pytest.approx(0.25 * 0.6, rel=0.15)
    assert (torch.pdist((noise / sigma.view(-1, 1, 1)).flatten(1)) > 1).all()
    z, rest = autoencoder.encode(images), noise[:240]
    linear, decoded = [(decode(z + rest) - images).square().mean() for decode in
                       (autoencoder.pca.decode, autoencoder.decode)]
    assert decoded < 0.95 * linear
    x = autoencoder.decode(10 * z)
    assert x.shape == images.shape and x.min() == 0 and x.max() == 1
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())


def test_rae_decoder_is_the_official_one_and_strict_about_keys():
    data = torch.load(FIXTURES / "rae_decoder_a.pt", weights_only=True)
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
def test_rae_encoder_is_the_official_one(monkeypatch):
    data = torch.load(FIXTURES / "rae_encoder_a.pt", weights_only=True)
    monkeypatch.syspath_prepend(FIXTURES)
    import seeded_weights as seeded
    monkeypatch.setattr(sl, "RAEDecoder", lambda: RAE_DECODER(depth=1))      # not needed here
    rae = sl.load_autoencoder("dinov2-b", pretrained=False)
    seeded.fill_timm(rae.encoder, data["seed"])
    moments = seeded.seeded_stats(data["seed"])
    rae.latent_mean, rae.latent_var = [moment.flatten(1).T for moment in moments]
    z = rae.encode(seeded.seeded_images(data["seed"]))
    torch.testing.assert_close(z[:, ::5, ::5], data["normalised"], rtol=0, atol=1e-3)


def test_published_files_are_what_rae_decodes_with(tmp_path, monkeypatch):
    """Files as published, but of one block, and random."""
    import huggingface_hub
    wanted, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: (
        wanted.append(pretrained), create(name, depth=1, **options))[1])
    monkeypatch.setattr(sl, "RAEDecoder", lambda: RAE_DECODER(depth=1))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda repository, file: tmp_path / file.split("/")[-1])
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, map_location, weights_only: (
        load(path) if weights_only else pytest.fail("a file may run code")))
    decoder, z = sl.RAEDecoder(), torch.randn(1, 256, 768)
    statistics = {"mean": torch.randn(768, 16, 16), "var": torch.rand(768)}
    torch.save(decoder.state_dict(), tmp_path / "model.pt")
    torch.save(statistics, tmp_path / "stat.pt")
    rae = sl.load_autoencoder("dinov2-b")
    tokens = z * (statistics["var"] + 1e-5).sqrt() + statistics["mean"].flatten(1).T
    torch.testing.assert_close(rae.decode(z), decoder.eval()(tokens).clamp(0, 1))
    assert wanted == [True] and not any(p.requires_grad for p in rae.parameters())
    assert not rae.training
