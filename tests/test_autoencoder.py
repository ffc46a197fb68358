"""The frozen autoencoders: TinyRAE, and the paper's RAE against its official code."""
import shutil

import huggingface_hub
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
    """-> a TinyRAE that learned for a second, its images, other images."""
    train, test = [sl.load_images(CONFIG, split) for split in ("train", "test")]
    torch.manual_seed(0)
    autoencoder = sl.fit_tiny_rae(sl.load_autoencoder("tiny", CONFIG), train, CONFIG)
    return autoencoder, train.pixels / 255, test.pixels / 255


def test_patches_overlap_and_nothing_is_lost():
    """With as many channels as numbers PCA is invertible; one token draws into the next patch."""
    pca, images = sl.PatchPCA(16, 8, 3 * 8 * 8), torch.rand(300, 3, 16, 16)
    pca.fit(images)
    torch.testing.assert_close(pca.decode(pca.encode(images)), images, rtol=0, atol=1e-4)
    z = torch.zeros(2, 4, 192)
    z[0, 0] = torch.randn(192)                               # the upper left patch
    effect = (pca.decode(z[:1]) - pca.decode(z[1:])).abs().amax((0, 1))                      # [H, W]
    assert effect[:10, :10].min() > 0 and effect[10:].max() == effect[:, 10:].max() == 0


def test_pca_is_the_best_linear_code(tiny):
    autoencoder, images, _ = tiny
    patches = autoencoder.pca.patches(images).flatten(0, 1)
    lost = torch.linalg.svdvals(patches - patches.mean(0))[6:].square().sum() / patches.numel()
    rebuilt = autoencoder.pca.decode(autoencoder.pca.encode(images))
    torch.testing.assert_close((rebuilt - images).square().mean(), lost, rtol=1e-3, atol=0)


def test_latents_have_mean_0_and_variance_1_over_all_channels(tiny):
    z = tiny[0].encode(tiny[1])
    assert z.shape == (240, 4, 6) and z.mean((0, 1)).abs().max() < 1e-4
    assert z.square().mean().item() == pytest.approx(1, abs=0.01)


def test_a_new_decoder_corrects_nothing():
    new = sl.load_autoencoder("tiny", CONFIG)
    z = torch.randn(2, *new.latent_shape)
    assert torch.equal(new.decode_unclamped(z), new.pca.decode(z))


def test_training_raises_the_psnr_of_held_out_images(tiny):
    autoencoder, _, images = tiny
    linear = autoencoder.pca.decode(autoencoder.encode(images))
    linear_psnr = -10 * (linear - images).square().mean((1, 2, 3)).log10()
    assert sl.rebuild(autoencoder, images)[1].mean() > linear_psnr.mean() + 0.1


def test_a_trained_tiny_rae_is_frozen_and_gives_images_from_0_to_1(tiny):
    images = tiny[0].decode(10 * torch.randn(2, 4, 6))
    assert images.shape == (2, 3, 16, 16) and images.min() == 0 and images.max() == 1
    assert not any(parameter.requires_grad for parameter in tiny[0].parameters())


def fixture(name):
    if not (FIXTURES / name).exists():
        pytest.skip(f"{FIXTURES / name} is not here")
    return torch.load(FIXTURES / name, weights_only=True)


@pytest.fixture
def official():
    """-> a new decoder of the fixture's sizes, what is in the fixture."""
    data = fixture("rae_decoder_a.pt")
    names = ("encoder_width", "patches", "width", "depth", "heads", "mlp", "patch")
    return RAE_DECODER(*[data["config"][name] for name in names]), data


def test_decoder_is_the_official_one(official):
    decoder, data = official
    torch.testing.assert_close(decoder.decoder_pos_embed, data["state_dict"]["decoder_pos_embed"])
    decoder.load_state_dict(data["state_dict"])
    tokens = data["z"] * (data["var"] + data["eps"]).sqrt() + data["mean"]
    images = decoder(tokens.flatten(2).mT)
    torch.testing.assert_close(images, data["image"], rtol=0, atol=2e-6)     # measured: 2e-7


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("decoder_layers.1.attention.attention.key.bias"), "Missing.*in_proj"),
    (lambda state: state.pop("decoder_pos_embed"), "Missing.*decoder_pos_embed"),
    (lambda state: state.update(mask_token=torch.zeros(1)), "Unexpected.*mask_token")])
def test_decoder_is_strict_about_keys(official, change, message):
    decoder, data = official
    change(data["state_dict"])
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        decoder.load_state_dict(data["state_dict"])


@pytest.mark.slow
def test_encoder_is_the_official_one(monkeypatch):
    data = fixture("rae_encoder_a.pt")
    monkeypatch.syspath_prepend(FIXTURES)
    import seeded_weights as seeded
    monkeypatch.setattr(sl, "RAEDecoder", lambda: RAE_DECODER(depth=1))      # not needed here
    rae = sl.load_autoencoder("dinov2-b", pretrained=False)
    seeded.fill_timm(rae.encoder, data["seed"])
    mean, var = [moment.flatten(1).T for moment in seeded.seeded_stats(data["seed"])]
    rae.latent_mean, rae.latent_var = mean, var
    z = rae.encode(seeded.seeded_images(data["seed"]))
    torch.testing.assert_close(z[:, ::5, ::5], data["normalised"], rtol=0, atol=1e-3)
    tokens = z * (var + 1e-5).sqrt() + mean
    torch.testing.assert_close(tokens @ data["probe"], data["tokens_probe"], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Files as published, with positions for 518 pixels; but of one block, and random."""
    folder = tmp_path_factory.mktemp("weights")
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, depth=1)
    safetensors.torch.save_file(encoder.state_dict(), folder / "model.safetensors")
    torch.save(RAE_DECODER(depth=1).state_dict(), folder / "model.pt")
    statistics = {"mean": torch.randn(768, 16, 16), "var": torch.rand(768, 16, 16)}
    torch.save(statistics, folder / "stat.pt")
    return folder


@pytest.fixture
def load_rae(monkeypatch):
    """-> a function: folder -> RAE, but with one block in the encoder and one in the decoder."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, depth=1))
    monkeypatch.setattr(sl, "RAEDecoder", lambda: RAE_DECODER(depth=1))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: open("/no/network"))
    return lambda folder: sl.load_autoencoder("dinov2-b", sl.Config(weights_dir=str(folder)))


def test_files_placed_by_hand_are_what_is_loaded(placed, load_rae):
    rae, statistics = load_rae(placed), torch.load(placed / "stat.pt")
    encoder = safetensors.torch.load_file(placed / "model.safetensors")
    decoder = torch.load(placed / "model.pt")
    positions = timm.layers.resample_abs_pos_embed(encoder["pos_embed"], [16, 16], None, 0)
    torch.testing.assert_close(rae.encoder.pos_embed, positions)
    assert torch.equal(rae.encoder.cls_token, encoder["cls_token"])
    assert torch.equal(rae.decoder.decoder_embed.weight, decoder["decoder_embed.weight"])
    assert torch.equal(rae.latent_mean[16 * 2 + 5], statistics["mean"][:, 2, 5])         # token 37
    assert torch.equal(rae.latent_var[16 * 2 + 5], statistics["var"][:, 2, 5])


@pytest.mark.parametrize("name", sl.HUGGING_FACE_FILES)
@pytest.mark.parametrize("damage", ["cut", "other weights", "absent"])
def test_an_error_about_weights_names_the_file(placed, load_rae, tmp_path, name, damage):
    shutil.copytree(placed, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if damage == "cut":
        (tmp_path / name).write_bytes((placed / name).read_bytes()[:1000])
    if damage == "other weights":
        torch.save({"weight": torch.zeros(3)}, tmp_path / name)
    expected = f"no {name} from" if damage == "absent" else str(tmp_path / name)
    with pytest.raises(sl.UserError, match=expected):
        load_rae(tmp_path)
