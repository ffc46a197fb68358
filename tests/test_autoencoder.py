"""The frozen autoencoders: TinyRAE, and the paper's RAE against its official code."""
import importlib.util
import shutil

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT

import sphere_latent as sl

FIXTURES = ROOT.parent / "shared" / "fixtures"
CONFIG = sl.Config(image_size=16, patch_size=8, latent_channels=12, autoencoder_steps=20)
RAE_DECODER = sl.RAEDecoder


def fixture(name):
    """What the official code of RAE makes of random weights."""
    if not (FIXTURES / name).exists():
        pytest.skip(f"{FIXTURES / name} is not here")
    return torch.load(FIXTURES / name, weights_only=True)


@pytest.fixture(scope="module")
def tiny(small_sizes):
    """-> a TinyRAE that learned for a second, its images, other images."""
    train, test = [sl.load_images(CONFIG, split) for split in ("train", "test")]
    torch.manual_seed(0)
    autoencoder = sl.fit_tiny_rae(sl.load_autoencoder("tiny", CONFIG), train, CONFIG)
    return autoencoder, train.pixels / 255, test.pixels / 255


def test_pca_is_the_best_linear_code(tiny):
    autoencoder, images, _ = tiny
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).transpose(1, 3).reshape(-1, 3 * 8 * 8)
    lost = torch.linalg.svdvals(patches - patches.mean(0))[12:].square().sum() / patches.numel()
    rebuilt = autoencoder.pca.decode(autoencoder.pca.encode(images))
    torch.testing.assert_close((rebuilt - images).square().mean(), lost, rtol=1e-3, atol=0)


def test_latents_have_mean_0_and_variance_1_over_all_channels(tiny):
    z = tiny[0].encode(tiny[1]).flatten(0, 1)
    assert z.mean(0).abs().max() < 1e-4 and z.square().mean().item() == pytest.approx(1, abs=0.01)


def test_a_channel_keeps_the_root_of_the_standard_deviation_of_its_pattern(tiny):
    deviation = tiny[0].encode(tiny[1]).flatten(0, 1).std(0)
    ratio = deviation ** 2 / (deviation * tiny[0].pca.synthesis.norm(dim=1))
    torch.testing.assert_close(ratio, ratio[0].expand(12), rtol=1e-3, atol=0)


def test_a_new_decoder_corrects_nothing(tiny):
    new = sl.load_autoencoder("tiny", CONFIG)
    z = torch.randn(2, *new.latent_shape)
    assert torch.equal(new.decode_unclamped(z), new.pca.decode(z))


def test_training_raises_the_psnr_of_held_out_images(tiny):
    autoencoder, _, images = tiny
    linear = autoencoder.pca.decode(autoencoder.encode(images))
    assert sl.rebuild(autoencoder, images)[1].mean() > -10 * F.mse_loss(linear, images).log10() + 0.1


def test_a_trained_tiny_rae_is_frozen_and_gives_images_from_0_to_1(tiny):
    images = tiny[0].decode(10 * torch.randn(2, 4, 12))
    assert images.shape == (2, 3, 16, 16) and images.min() == 0 and images.max() == 1
    assert not tiny[0].training and not any(p.requires_grad for p in tiny[0].parameters())


def test_decoder_is_the_official_one():
    data = fixture("rae_decoder_a.pt")
    c = data["config"]
    decoder = sl.RAEDecoder(c["encoder_width"], c["patches"], c["width"], c["depth"], c["heads"],
                            c["mlp"], c["patch"])
    torch.testing.assert_close(decoder.decoder_pos_embed, data["state_dict"]["decoder_pos_embed"])
    decoder.load_state_dict(data["state_dict"])
    raw = data["z"] * (data["var"] + data["eps"]).sqrt() + data["mean"]
    images = decoder(raw.flatten(2).transpose(1, 2))
    torch.testing.assert_close(images, data["image"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_encoder_is_the_official_one(monkeypatch):
    data = fixture("rae_encoder_a.pt")
    spec = importlib.util.spec_from_file_location("seeded", FIXTURES / "seeded_weights.py")
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    monkeypatch.setattr(sl, "RAEDecoder", lambda: RAE_DECODER(depth=1))
    rae = sl.load_autoencoder("dinov2-b", pretrained=False)
    seeded.fill_timm(rae.encoder, data["seed"])
    mean, var = [moment.flatten(1).T for moment in seeded.seeded_stats(data["seed"])]
    rae.latent_mean, rae.latent_var = mean, var
    z = rae.encode(seeded.seeded_images(data["seed"]))
    torch.testing.assert_close(z[:, ::5, ::5], data["normalised"], rtol=0, atol=1e-3)
    tokens = z * (var + 1e-5).sqrt() + mean
    torch.testing.assert_close(tokens @ data["probe"], data["tokens_probe"], rtol=0, atol=1e-3)


def published_names(decoder):
    """The weights of a decoder as the published file names them."""
    state, names = {}, {
        "self_attn.out_proj": "attention.output.dense", "linear1": "intermediate.dense",
        "linear2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    for key, weight in decoder.state_dict().items():
        for name, published in names.items():
            key = key.replace(f".{name}.", f".{published}.")
        start, joined, kind = key.partition("self_attn.in_proj_")
        for name, part in zip(("query", "key", "value"), weight.chunk(3) if joined else ()):
            state[f"{start}attention.attention.{name}.{kind}"] = part
        if not joined:
            state[key] = weight
    return state


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("decoder_layers.0.attention.attention.key.bias"), "Missing.*in_proj"),
    (lambda state: state.pop("decoder_pos_embed"), "Missing.*decoder_pos_embed"),
    (lambda state: state.update(mask_token=torch.zeros(1)), "Unexpected.*mask_token")])
def test_decoder_is_strict_about_keys(change, message):
    decoder = sl.RAEDecoder(12, 9, 32, 1, 4, 48, 4)
    state = published_names(decoder)
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        decoder.load_state_dict(state)


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Files as published, with positions for 518 pixels; but of one block, and random."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, depth=1)
    torch.nn.init.normal_(encoder.pos_embed)
    safetensors.torch.save_file(encoder.state_dict(), folder / "model.safetensors")
    torch.save(published_names(RAE_DECODER(depth=1)), folder / "model.pt")
    torch.save({"mean": torch.randn(768, 16, 16), "var": torch.rand(768, 16, 16)}, folder / "stat.pt")
    return folder


@pytest.fixture
def load_rae(monkeypatch):
    """-> a function: folder -> RAE of one block in the place of DINOv2's 12 and the decoder's 28."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, depth=1))
    monkeypatch.setattr(sl, "RAEDecoder", lambda: RAE_DECODER(depth=1))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: open("/no/network"))
    return lambda folder: sl.load_autoencoder("dinov2-b", sl.Config(weights_dir=str(folder)))


def test_files_placed_by_hand_are_what_is_loaded(placed, load_rae):
    """The encoder once more, by timm's other way from positions at 518 pixels to those at 224."""
    rae, images = load_rae(placed), torch.rand(1, 3, 256, 256)
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True)
    encoder.load_state_dict(safetensors.torch.load_file(placed / "model.safetensors"))
    encoder.norm = torch.nn.LayerNorm(768, 1e-6, elementwise_affine=False)
    decoder = RAE_DECODER(depth=1)
    decoder.load_state_dict(torch.load(placed / "model.pt"))
    mean, var = [moment.flatten(1).T for moment in torch.load(placed / "stat.pt").values()]
    small = (F.interpolate(images, 224, mode="bicubic") - sl.IMAGENET_MEAN) / sl.IMAGENET_STD
    tokens = encoder.eval().forward_features(small)[:, 5:]
    z = rae.encode(images)
    torch.testing.assert_close(z, (tokens - mean) / (var + 1e-5).sqrt(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rae.decode(z), decoder(tokens).clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sl.HUGGING_FACE_FILES)
@pytest.mark.parametrize("damage", ["cut", "other weights", "absent"])
def test_an_error_about_weights_names_the_file(placed, load_rae, tmp_path, name, damage):
    shutil.copytree(placed, tmp_path, dirs_exist_ok=True)
    if damage == "cut":
        (tmp_path / name).write_bytes((placed / name).read_bytes()[:1000])
    elif damage == "other weights":
        torch.save({"weight": torch.zeros(3)}, tmp_path / name)
    else:
        (tmp_path / name).unlink()
    expected = f"no {name} from" if damage == "absent" else str(tmp_path / name)
    with pytest.raises(sl.UserError, match=expected):
        load_rae(tmp_path)
