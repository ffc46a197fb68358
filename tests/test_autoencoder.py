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
CONFIG = sl.Config(image_size=16, patch_size=8, latent_channels=12, autoencoder_steps=40)


def fixture(name):
    """Outputs of the official RAE code on random weights."""
    if not (FIXTURES / name).exists():
        pytest.skip(f"{FIXTURES / name} is not here")
    return torch.load(FIXTURES / name, weights_only=True)


# ---- TinyRAE

@pytest.fixture(scope="module")
def drawings(small_sizes):
    return sl.load_images(CONFIG, "train")


@pytest.fixture(scope="module")
def tiny(drawings):
    """A TinyRAE for 16 pixels; its decoder learned for two seconds."""
    torch.manual_seed(0)
    return sl.fit_tiny_rae(sl.load_autoencoder("tiny", CONFIG), drawings, CONFIG)


def test_pca_with_all_channels_loses_nothing():
    pca, images = sl.PatchPCA(patch_size=4, channels=48), torch.rand(64, 3, 16, 16)
    pca.fit(images)
    assert pca.encode(images).shape == (64, 16, 48)
    torch.testing.assert_close(pca.decode(pca.encode(images)), images, rtol=0, atol=1e-4)


def test_pca_is_the_best_linear_code(tiny, drawings):
    images = drawings.pixels / 255
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).transpose(1, 3).reshape(-1, 3 * 8 * 8)
    lost = torch.linalg.svdvals(patches - patches.mean(0))[12:].square().sum() / patches.numel()
    rebuilt = tiny.pca.decode(tiny.pca.encode(images))
    torch.testing.assert_close((rebuilt - images).square().mean(), lost, rtol=1e-3, atol=0)


def test_latents_have_mean_0_and_variance_1_and_coarse_channels_are_larger(tiny, drawings):
    z = tiny.encode(drawings.pixels / 255).flatten(0, 1)
    assert z.mean(0).abs().max() < 1e-4
    assert z.square().mean().item() == pytest.approx(1, abs=0.01)
    # a channel's variance is the standard deviation that its pattern has in the images, scaled
    strength = z.std(0) * tiny.pca.synthesis.norm(dim=1)
    ratio = z.var(0) / strength
    torch.testing.assert_close(ratio, ratio.mean().expand(12), rtol=1e-3, atol=0)


def test_a_new_decoder_corrects_nothing(drawings):
    new, images = sl.load_autoencoder("tiny", CONFIG), drawings.pixels[:4] / 255
    new.pca.fit(images)
    assert torch.equal(new.decode_unclamped(new.encode(images)),
                       new.pca.decode(new.pca.encode(images)))


def test_training_raises_the_psnr_of_held_out_images(tiny):
    images = sl.load_images(CONFIG, "test").pixels / 255
    linear = -10 * (tiny.pca.decode(tiny.encode(images)) - images).square().mean().log10()
    assert sl.rebuild(tiny, images)[1].mean() > linear + 0.2


def test_a_trained_tiny_rae_is_frozen_and_decodes_to_0_to_1(tiny):
    assert not tiny.training and not any(p.requires_grad for p in tiny.parameters())
    assert tiny.latent_shape == (4, 12)
    images = tiny.decode(10 * torch.randn(2, *tiny.latent_shape))
    assert images.shape == (2, 3, 16, 16) and images.min() == 0 and images.max() == 1


def test_latents_are_kept_in_half_precision_with_those_of_mirror_images(tiny, drawings, tmp_path):
    data = sl.encode_images(tiny, drawings, CONFIG, tmp_path)
    assert len(data) == 2 * len(drawings)
    for number, image in ((3, drawings[3][0]), (243, drawings[3][0].flip(-1))):
        z, label = data[number]
        assert z.dtype == torch.float16 and label == drawings[3][1]
        torch.testing.assert_close(z.float(), tiny.encode(image[None])[0], rtol=0.02, atol=0.02)


def test_without_room_for_latents_the_images_are_learned_from(tiny, drawings, tmp_path, monkeypatch,
                                                              capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10_000))
    assert sl.encode_images(tiny, drawings, CONFIG, tmp_path) is drawings
    assert "no room" in capsys.readouterr().out and not list(tmp_path.iterdir())


# ---- RAE

def test_decoder_is_the_official_one():
    data = fixture("rae_decoder_a.pt")
    c = data["config"]
    decoder = sl.RAEDecoder(c["encoder_width"], c["patches"], c["width"], c["depth"], c["heads"],
                            c["mlp"], c["patch"])
    torch.testing.assert_close(decoder.decoder_pos_embed, data["state_dict"]["decoder_pos_embed"])
    decoder.load_state_dict(data["state_dict"])
    raw = data["z"] * (data["var"] + data["eps"]).sqrt() + data["mean"]
    with torch.no_grad():
        images = decoder(raw.flatten(2).transpose(1, 2))
    torch.testing.assert_close(images, data["image"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("decoder_layers.0.attention.attention.key.bias"), "Missing"),
    (lambda state: state.pop("decoder_pos_embed"), "Missing.*decoder_pos_embed"),
    (lambda state: state.update(mask_token=torch.zeros(1)), "Unexpected.*mask_token")])
def test_decoder_is_strict_about_keys(change, message):
    state = published_names(sl.RAEDecoder(12, 9, 32, 1, 4, 48, 4))
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        sl.RAEDecoder(12, 9, 32, 1, 4, 48, 4).load_state_dict(state)


def published_names(decoder):
    """The weights of a decoder under the names of the published file."""
    names = {"self_attn.out_proj": "attention.output.dense", "linear1": "intermediate.dense",
             "linear2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    state = {}
    for key, weight in decoder.state_dict().items():
        if "in_proj" in key:
            start, kind = key.split("self_attn.in_proj_")
            for name, part in zip(("query", "key", "value"), weight.chunk(3)):
                state[f"{start}attention.attention.{name}.{kind}"] = part
        else:
            for name, published in names.items():
                key = key.replace(f".{name}.", f".{published}.")
            state[key] = weight
    return state


@pytest.fixture
def shallow(monkeypatch):
    """One block in the place of DINOv2's 12 and of the decoder's 28."""
    create, decoder = timm.create_model, sl.RAEDecoder
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, depth=1))
    monkeypatch.setattr(sl, "RAEDecoder", lambda: decoder(depth=1))


@pytest.mark.slow
def test_encoder_is_the_official_one(monkeypatch):
    data, decoder = fixture("rae_encoder_a.pt"), sl.RAEDecoder
    monkeypatch.setattr(sl, "RAEDecoder", lambda: decoder(depth=1))
    spec = importlib.util.spec_from_file_location("seeded", FIXTURES / "seeded_weights.py")
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    rae = sl.load_autoencoder("dinov2-b", pretrained=False)
    seeded.fill_timm(rae.encoder, data["seed"])
    images = seeded.seeded_images(data["seed"])
    if abs(images.mean() - data["image_checksum"]) > 1e-5:
        pytest.skip("this torch draws other random numbers")
    mean, var = [moment.flatten(1).T for moment in seeded.seeded_stats(data["seed"])]
    rae.latent_mean, rae.latent_var = mean, var
    z = rae.encode(images)
    tokens = z * (var + 1e-5).sqrt() + mean
    torch.testing.assert_close(z[:, ::5, ::5], data["normalised"], rtol=0, atol=1e-3)
    torch.testing.assert_close(tokens[:, ::3, ::3], data["tokens"], rtol=0, atol=1e-3)
    torch.testing.assert_close(tokens @ data["probe"], data["tokens_probe"], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Files as published: positions for 518 pixels, statistics [768, 16, 16]; but of one block."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, depth=1)
    torch.nn.init.normal_(encoder.pos_embed)
    safetensors.torch.save_file(encoder.state_dict(), folder / "model.safetensors")
    torch.save(published_names(sl.RAEDecoder(depth=1)), folder / "model.pt")
    torch.save({"mean": torch.randn(768, 16, 16), "var": torch.rand(768, 16, 16) + 0.1},
               folder / "stat.pt")
    return folder


def test_files_placed_by_hand_are_what_is_loaded(placed, shallow):
    """The encoder once more, by timm's own way from its positions at 518 pixels to others."""
    rae = sl.load_autoencoder("dinov2-b", sl.Config(weights_dir=str(placed)))
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True)
    encoder.load_state_dict(safetensors.torch.load_file(placed / "model.safetensors"))
    encoder.norm = torch.nn.LayerNorm(768, 1e-6, elementwise_affine=False)
    decoder, statistics = sl.RAEDecoder(), torch.load(placed / "stat.pt")
    decoder.load_state_dict(torch.load(placed / "model.pt"))
    images = torch.rand(1, 3, 256, 256)
    small = (F.interpolate(images, 224, mode="bicubic") - sl.IMAGENET_MEAN) / sl.IMAGENET_STD
    with torch.no_grad():
        tokens = encoder.eval().forward_features(small)[:, 5:]
        expected = decoder(tokens).clamp(0, 1)
    grid = tokens.mT.unflatten(2, (16, 16))
    grid = (grid - statistics["mean"]) / (statistics["var"] + 1e-5).sqrt()
    z = rae.encode(images)
    torch.testing.assert_close(z, grid.flatten(2).mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rae.decode(z), expected, rtol=0, atol=1e-4)
    assert not rae.training and not any(p.requires_grad for p in rae.parameters())


@pytest.mark.parametrize("name", sl.HUGGING_FACE_FILES)
@pytest.mark.parametrize("damage", ["cut", "other weights", "absent"])
def test_an_error_about_weights_names_the_file(placed, shallow, tmp_path, monkeypatch, name, damage):
    def refuse(*args):
        raise OSError("no network")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    shutil.copytree(placed, tmp_path, dirs_exist_ok=True)
    if damage == "cut":
        (tmp_path / name).write_bytes((placed / name).read_bytes()[:1000])
    elif damage == "absent":
        (tmp_path / name).unlink()
    elif name == "model.safetensors":
        safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / name)
    else:
        torch.save({"a": torch.zeros(3)}, tmp_path / name)
    with pytest.raises(sl.UserError) as error:
        sl.load_autoencoder("dinov2-b", sl.Config(weights_dir=str(tmp_path)))
    expected = f"no {name} from timm|no {name} from nyu" if damage == "absent" else tmp_path / name
    assert any(text in str(error.value) for text in str(expected).split("|"))
