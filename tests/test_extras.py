"""The paper's autoencoder, FID, the perceptual loss, other people's data, latents on disk."""
import dataclasses
import errno
import importlib.util
import os
import pathlib
import re
import shutil
import types

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import scipy.io
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.models import inception

import extras
import sphere_latent as sl
from conftest import SMALL

FIXTURES = pathlib.Path(__file__).resolve().parents[2] / "shared/fixtures"
MEAN, STD = torch.tensor([[.485, .456, .406], [.229, .224, .225]]).view(2, 1, 3, 1, 1)
QUICK = [*SMALL, "--autoencoder-steps", "2", "--train-steps", "2", "--eval-samples", "4"]
PUBLISHED_INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def fixture(name):
    if not (FIXTURES / name).exists():
        pytest.skip(f"{name} is not here")
    return torch.load(FIXTURES / name, weights_only=True)


def random_weights(module):
    """No weight without effect: not the ones of a norm, not the zeros of a bias."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(0, 0.2, generator=generator) if weight.dim() == 1 else weight.normal_(
                0, weight[0].numel() ** -0.5, generator=generator)
            weight.add_("norm" in name and name.endswith("weight"))
    return module


def pictures(folder, count=6, size=40):
    """A folder of noise, smooth enough to be rebuilt."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (5, 5, 3), np.uint8)
        Image.fromarray(noise).resize((size, size)).save(folder / f"{i}.png")
    return folder


def one_line(capsys):
    """What was said on stderr at the end, which is a single line without a traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.endswith("\n")
    return error.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer to draw than such runs."""
    monkeypatch.setattr(sl, "picture", lambda *a: None)
    monkeypatch.setattr(sl, "loss_figure", lambda *a: None)


@pytest.fixture
def offline(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")
    flowers = torchvision.datasets.flowers102
    for module, name in ((torch.hub, "download_url_to_file"), (huggingface_hub, "hf_hub_download"),
                         (flowers, "download_and_extract_archive"), (flowers, "download_url")):
        monkeypatch.setattr(module, name, no_network)


@pytest.fixture
def no_cache(monkeypatch, tmp_path, offline):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "no cache"))


# 1. the decoder

def small_decoder(depth=2):
    return random_weights(extras.RAEDecoder(latent_channels=12, tokens=9, width=32, depth=depth, heads=4, mlp_width=48,
                                            patch_size=4))


def test_the_decoder_is_the_official_one():
    data = fixture("rae_decoder_a.pt")
    c = data["config"]
    decoder = sl.RAEDecoder(c["encoder_width"], c["patches"], c["width"], c["depth"], c["heads"], c["mlp"], c["patch"])
    decoder.load_state_dict(data["state_dict"])
    raw = data["z"] * (data["var"] + data["eps"]).sqrt() + data["mean"]
    with torch.no_grad():
        images = decoder(raw.flatten(2).transpose(1, 2))
    torch.testing.assert_close(images, data["image"], rtol=0, atol=1e-4)


def test_the_decoder_is_a_transformer_encoder_of_torch_and_a_patch_a_token():
    """The same weights in torch's own layers; what a token says is laid out row by row, colours innermost."""
    decoder, z = small_decoder(), torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))
    state = decoder.state_dict()
    x = torch.cat([state["trainable_cls_token"].expand(2, 1, 32), F.linear(
        z, state["decoder_embed.weight"], state["decoder_embed.bias"])], 1) + state["decoder_pos_embed"]
    for i in range(2):
        layer = nn.TransformerEncoderLayer(32, 4, 48, 0, "gelu", 1e-12, batch_first=True, norm_first=True)
        own = {name.removeprefix(f"decoder_layers.{i}."): w for name, w in state.items() if f"layers.{i}." in name}
        taken = {}
        for kind in ("weight", "bias"):
            taken[f"self_attn.in_proj_{kind}"] = torch.cat(
                [own.pop(f"attention.attention.{name}.{kind}") for name in ("query", "key", "value")])
            for theirs, ours in {"self_attn.out_proj": "attention.output.dense", "linear1": "intermediate.dense",
                                 "linear2": "output.dense", "norm1": "layernorm_before",
                                 "norm2": "layernorm_after"}.items():
                taken[f"{theirs}.{kind}"] = own.pop(f"{ours}.{kind}")
        assert not own
        layer.load_state_dict(taken)
        x = layer(x)
    x = F.linear(F.layer_norm(x, (32,), state["decoder_norm.weight"], state["decoder_norm.bias"], 1e-12),
                 state["decoder_pred.weight"], state["decoder_pred.bias"])[:, 1:]
    expected = torch.zeros(2, 3, 12, 12)
    for token in range(9):
        for row in range(4):
            for column in range(4):
                at = 3 * (4 * row + column)
                expected[:, :, 4 * (token // 3) + row, 4 * (token % 3) + column] = x[:, token, at:at + 3]
    torch.testing.assert_close(decoder(z), expected * STD[0] + MEAN[0], rtol=1e-4, atol=1e-5)


def test_missing_and_unexpected_keys_of_the_decoder_are_errors():
    decoder = small_decoder(1)
    state = decoder.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected.*mask_token"):
        decoder.load_state_dict(state | {"mask_token": torch.zeros(1)})
    state.pop("decoder_pos_embed")
    with pytest.raises(RuntimeError, match="Missing.*decoder_pos_embed"):
        decoder.load_state_dict(state)


def test_the_sizes_of_the_published_decoder(rae):
    state = rae.decoder.state_dict()
    assert state["decoder_embed.weight"].shape == (1152, 768) and state["decoder_pos_embed"].shape == (1, 257, 1152)
    assert state["decoder_pred.weight"].shape == (768, 1152) and state["trainable_cls_token"].shape == (1, 1, 1152)
    assert state["decoder_layers.27.intermediate.dense.weight"].shape == (4096, 1152)
    assert len(rae.decoder.decoder_layers) == 28


# 2. the encoder, and both

@pytest.fixture(scope="module")
def rae():
    """The paper's autoencoder at its size, with random weights."""
    return sl.load_autoencoder("dinov2-b", pretrained=False)


def test_the_autoencoder_without_its_weights(rae):
    assert rae.latent_shape == (256, 768) and not rae.training and not any(w.requires_grad for w in rae.parameters())
    assert torch.equal(rae.latent_mean, torch.zeros(1, 768)) and torch.equal(rae.latent_var, torch.ones(1, 768))
    with torch.no_grad():
        z = rae.encode(torch.rand(1, 3, 256, 256))
        images = rae.decode(z)
    assert z.shape == (1, 256, 768) and z.isfinite().all() and z.dtype == torch.float32
    assert images.shape == (1, 3, 256, 256) and 0 <= images.min() and images.max() <= 1 and images.std() > 0
    # normed, without affine weights
    torch.testing.assert_close(z.var(2, correction=0), torch.ones(1, 256), rtol=1e-2, atol=0)


def test_the_encoder_is_the_official_one(rae, monkeypatch):
    data = fixture("rae_encoder_a.pt")
    spec = importlib.util.spec_from_file_location("seeded_weights", FIXTURES / "seeded_weights.py")
    spec.loader.exec_module(seeded := importlib.util.module_from_spec(spec))
    seeded.fill_timm(rae.encoder, data["seed"])
    images = seeded.seeded_images(data["seed"])
    if abs(images.mean() - data["image_checksum"]) > 1e-5:
        pytest.skip("this torch draws other random numbers")
    mean, var = (moment.flatten(1).T for moment in seeded.seeded_stats(data["seed"]))
    monkeypatch.setattr(rae, "latent_mean", mean)
    monkeypatch.setattr(rae, "latent_var", var)
    with torch.no_grad():
        z = rae.encode(images)
    n, c = data["normalised_token_stride"], data["normalised_channel_stride"]
    torch.testing.assert_close(z[:, ::n, ::c], data["normalised"], rtol=0, atol=1e-3)
    tokens, n, c = z * (var + 1e-5).sqrt() + mean, data["token_stride"], data["channel_stride"]
    torch.testing.assert_close(tokens[:, ::n, ::c], data["tokens"], rtol=0, atol=1e-3)
    torch.testing.assert_close(tokens @ data["probe"], data["tokens_probe"], rtol=0, atol=1e-3)
    torch.testing.assert_close(tokens.sum(1), data["channel_sums"], rtol=0, atol=1e-2)


@pytest.fixture
def shallow(monkeypatch):
    """One block in place of 12 and of 28: the same code in a fraction of the time."""
    create, decoder = timm.create_model, extras.RAEDecoder
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, depth=1))
    monkeypatch.setattr(extras, "RAEDecoder", lambda: decoder(depth=1))


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Files as published, at 518 pixels and with statistics [768, 16, 16], but of one block and random."""
    folder = tmp_path_factory.mktemp("weights")
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, depth=1)
    assert encoder.pos_embed.shape == (1, 37 * 37, 768)
    safetensors.torch.save_file(random_weights(encoder).state_dict(), folder / "model.safetensors")
    torch.save(random_weights(extras.RAEDecoder(depth=1)).state_dict(), folder / "model.pt")
    torch.save({"mean": torch.randn(768, 16, 16), "var": torch.rand(768, 16, 16) + 0.1}, folder / "stat.pt")
    yield folder
    shutil.rmtree(folder)


def test_files_placed_by_hand_are_what_is_loaded(placed, shallow, offline):
    """The encoder written once more, from timm at 518 pixels with its own way to a smaller grid of positions."""
    loaded = sl.load_autoencoder("dinov2-b", sl.Config(weights_dir=str(placed)))
    x = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True).eval()
    encoder.load_state_dict(safetensors.torch.load_file(placed / "model.safetensors"))
    encoder.norm = nn.Identity()
    decoder = extras.RAEDecoder()
    decoder.load_state_dict(torch.load(placed / "model.pt"))
    stat = torch.load(placed / "stat.pt")
    with torch.no_grad():
        small = F.interpolate(x, size=224, mode="bicubic", align_corners=False, antialias=False)
        tokens = F.layer_norm(encoder.forward_features((small - MEAN[0]) / STD[0])[:, 5:], (768,), eps=1e-6)
        grid = tokens.transpose(1, 2).view(2, 768, 16, 16)
        grid = (grid - stat["mean"]) / (stat["var"] + 1e-5).sqrt()
        z = loaded.encode(x)
        torch.testing.assert_close(z, grid.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded.decode(z), decoder(tokens).clamp(0, 1), rtol=1e-4, atol=1e-4)
        assert loaded.decode(z).std() > 0.05


def truncated(path):
    path.write_bytes(path.read_bytes()[:1000])


def other_names(path):
    path.unlink()
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)({"a": torch.zeros(3)}, path)


def other_shape(path):
    path.unlink()
    torch.save({"mean": torch.zeros(48, 4, 4), "var": torch.ones(48, 4, 4)}, path)


@pytest.mark.parametrize("name, damage", [("stat.pt", other_shape), *(
    (name, damage) for name in ("model.safetensors", "model.pt", "stat.pt")
    for damage in (truncated, other_names, pathlib.Path.unlink))])
def test_weights_that_cannot_be_used_end_in_one_line(placed, shallow, offline, tmp_path, capsys, name, damage):
    folder = tmp_path / "weights"
    folder.mkdir()
    for path in placed.iterdir():
        shutil.copy(path, folder) if path.name == name else (folder / path.name).symlink_to(path)
    damage(folder / name)
    data = pictures(tmp_path / "data")
    assert sl.main(["train", "--dataset", "folder", "--data-dir", str(data), "--autoencoder", "dinov2-b",
                    "--image-size", "256", "--weights-dir", str(folder), "--out", str(tmp_path / "run")]) == 2
    said = one_line(capsys)
    assert said.startswith("sphere_latent.py: ") and len(said) < 900 and str(folder) in said and name in said
    if damage is pathlib.Path.unlink:
        assert "huggingface.co" in said and "--weights-dir" in said and "--autoencoder tiny" in said
    else:
        assert str(folder / name) in said
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_a_missing_tensor_of_the_encoder_is_not_passed_over(placed, shallow, tmp_path):
    state = safetensors.torch.load_file(placed / "model.safetensors")
    for name in ("model.pt", "stat.pt"):
        (tmp_path / name).symlink_to(placed / name)
    for changed in ({k: w for k, w in state.items() if k != "reg_token"}, state | {"more": torch.zeros(1)}):
        safetensors.torch.save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(sl.UserError, match="(?s)model.safetensors.*(reg_token|more)"):
            sl.load_autoencoder("dinov2-b", sl.Config(weights_dir=str(tmp_path)))


# 3. Inception

class PoolA(inception.InceptionA):
    """An average pool that does not count the padding."""

    def _forward(self, x):
        pool = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), self.branch_pool(pool)]


class PoolC(inception.InceptionC):
    def _forward(self, x):
        wide = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_1(x)
        for number in (2, 3, 4, 5):
            twice = getattr(self, f"branch7x7dbl_{number}")(twice)
        pool = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return [self.branch1x1(x), wide, twice, self.branch_pool(pool)]


class PoolE(inception.InceptionE):
    def pool(self, x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def _forward(self, x):
        wide, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), torch.cat([self.branch3x3_2a(wide), self.branch3x3_2b(wide)], 1),
                torch.cat([self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)], 1),
                self.branch_pool(self.pool(x))]


class PoolLast(PoolE):
    def pool(self, x):
        return F.max_pool2d(x, 3, 1, 1)


def reference_inception(state):
    """The network of FID built block by block: the same names, other pools."""
    network = inception.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    network.Mixed_5b, network.Mixed_5c, network.Mixed_5d = PoolA(192, 32), PoolA(256, 64), PoolA(288, 64)
    network.Mixed_6b, network.Mixed_6c = PoolC(768, 128), PoolC(768, 160)
    network.Mixed_6d, network.Mixed_6e = PoolC(768, 160), PoolC(768, 192)
    network.Mixed_7b, network.Mixed_7c = PoolE(1280), PoolLast(2048)
    network.load_state_dict(state)
    return network.eval()


@pytest.fixture(scope="module")
def inceptions(tmp_path_factory):
    """Ours and the reference with the same weights: random ones that let a signal through and whose norms matter."""
    network = inception.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.1), nn.init.normal_(module.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return sl.InceptionFID(path), reference_inception(torch.load(path))


@pytest.mark.parametrize("shape", [(2, 3, 299, 299), (1, 3, 64, 64), (1, 3, 32, 32)])
def test_inception_is_the_network_of_fid(inceptions, shape):
    (ours, theirs), pooled = inceptions, []
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    hook = theirs.avgpool.register_forward_hook(lambda *a: pooled.append(a[2].flatten(1)))
    with torch.no_grad():
        features, logits = ours(x)
        expected = theirs(2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1)
    hook.remove()
    assert features.shape == (len(x), 2048) and logits.shape == (len(x), 1008) and features.std() > 0.1
    for found, wanted in ((features, pooled[0]), (logits, expected)):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert not ours.training and not any(weight.requires_grad for weight in ours.parameters())


def test_inception_of_the_wrong_hash_is_refused(run, tmp_path, no_cache, capsys):
    (tmp_path / PUBLISHED_INCEPTION).write_bytes(b"something else")
    words = ["evaluate", "--checkpoint", str(run), "--features", "inception", "--out", str(tmp_path / "a.csv")]
    assert sl.main([*words, "--weights-dir", str(tmp_path)]) == 2
    said = one_line(capsys)
    assert f"{tmp_path / PUBLISHED_INCEPTION} is damaged" in said and "6726825d" in said
    (tmp_path / PUBLISHED_INCEPTION).unlink()
    assert sl.main([*words, "--weights-dir", str(tmp_path)]) == 2
    said = one_line(capsys)
    assert PUBLISHED_INCEPTION in said and "no network" in said and "--weights-dir FOLDER" in said
    assert not (tmp_path / "a.csv").exists() and not (run / "reference.npz").exists()


# 4. FID

class FewFeatures(nn.Module):
    """In the place of Inception: a random projection of a small copy of the image."""

    def __init__(self, weights=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("project", torch.randn(3 * 16, 2048, generator=generator))
        self.fc = nn.Linear(2048, 1008).requires_grad_(False)
        self.fc.weight.normal_(0, 0.05, generator=generator), self.fc.bias.normal_(0, 3, generator=generator)

    def forward(self, images):
        features = (F.adaptive_avg_pool2d(images, 4).flatten(1) @ self.project).relu()
        assert features.dtype == torch.float32
        return features, self.fc(features)


@pytest.fixture
def few_features(monkeypatch):
    """No published weights, and a distance that takes no seconds: that of the means and the traces."""
    def distance(*moments):
        m_a, c_a, m_b, c_b = (torch.as_tensor(x).double() for x in moments)
        assert m_a.shape == m_b.shape == (2048,) and c_a.shape == c_b.shape == (2048, 2048)
        return float((m_a - m_b).square().sum() + (c_a.trace() - c_b.trace()).abs())
    monkeypatch.setattr(extras, "InceptionFID", FewFeatures)
    monkeypatch.setattr(extras, "published", lambda *a: "")
    monkeypatch.setattr(extras, "frechet_distance", distance)


def test_statistics_are_those_of_all_features_at_once(generator):
    model, images = FewFeatures(), (255 * torch.rand(50, 3, 8, 8, generator=generator)).round() / 255
    features, logits = model(images)
    (mean, covariance), score = extras.statistics(model, images.split(16), torch.device("cpu"))
    torch.testing.assert_close(mean, features.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(covariance, torch.cov(features.double().T), rtol=1e-6, atol=1e-4)
    p = (logits - model.fc.bias).double().softmax(1)
    divergence = (p * (p.log() - p.mean(0).log())).sum(1).mean()
    assert score == pytest.approx(float(divergence.exp()), rel=1e-4) and score > 1.5
    (rounded, _), _ = extras.statistics(model, [images + 0.4 / 255], "cpu")
    torch.testing.assert_close(rounded, mean)


def test_a_network_that_makes_images_in_half_precision_does_not_make_the_features_so(generator):
    """Whoever yields inside autocast leaves it on for the one who asked."""
    images = torch.rand(20, 3, 8, 8, generator=generator)

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            yield images
    (mean, _), _ = extras.statistics(FewFeatures(), inside(), torch.device("cpu"))
    (expected, _), _ = extras.statistics(FewFeatures(), [images], torch.device("cpu"))
    assert torch.equal(mean, expected) and not torch.is_autocast_enabled("cpu")


@pytest.fixture
def copied(run, tmp_path):
    return pathlib.Path(shutil.copytree(run, tmp_path / "copy"))


def test_fid_says_how_many_samples_and_against_what(copied, few_features, capsys, monkeypatch):
    words = ["evaluate", "--checkpoint", str(copied), "--features", "inception", "--eval-samples", "24"]
    assert sl.main(words) == 0
    said, count = capsys.readouterr().out, len(sl.drawn_images("train", 16))
    assert said.count("Fréchet distance FID-24 ") == 4 and said.count("Inception Score") == 4
    assert f"{count} training images of drawn, 16 px" in said and str(copied / "reference.npz") in said
    assert "24 samples are fewer than 2048" in said and "--eval-samples" in said
    header, *rows = (copied / "frechet.csv").read_text().split()
    assert header == "steps,fid_24,inception_score" and [row[0] for row in rows] == [*"1246"]
    assert len({row.split(",")[1] for row in rows}) == 4 and all(float(row.split(",")[2]) >= 1 for row in rows)

    def again(*args):
        raise AssertionError("the reference was there already")
    monkeypatch.setattr(sl, "drawn_images", again)                  # it is not computed a second time
    assert sl.main(words) == 0
    assert said in capsys.readouterr().out


def test_no_warning_from_2048_samples_on():
    assert extras.few(range(2048)) == "" and "2047" in extras.few(range(2047))


def test_a_reference_of_other_images_is_computed_anew(copied, few_features, tmp_path, capsys):
    """Two runs may be evaluated into one folder: the second must not be measured against the first's images."""
    config = sl.load_run(copied)[0]
    _, first, _ = extras.inception_and_reference(config, tmp_path, "cpu")
    other = dataclasses.replace(config, dataset="folder", data_dir=str(pictures(tmp_path / "data")))
    _, second, words = extras.inception_and_reference(other, tmp_path, "cpu")
    assert "4 training images of folder, 16 px" in words and not np.allclose(first[0], second[0])
    assert not [path for path in tmp_path.iterdir() if "part" in path.name]


def test_a_given_reference_is_what_samples_are_measured_against(copied, few_features, tmp_path, capsys):
    words = ["evaluate", "--checkpoint", str(copied), "--features", "inception", "--eval-samples", "24", "--reference"]
    path = tmp_path / "given.npz"
    np.savez(path, mu=np.full(2048, 7.0), sigma=np.zeros((2048, 2048)))
    assert sl.main([*words, str(path)]) == 0
    said = capsys.readouterr().out
    assert f"against {path} (an unknown number of images)" in said and not (copied / "reference.npz").exists()
    assert all(float(line.split("FID-24 ")[1].split()[0]) > 2048 for line in said.splitlines() if "FID-24" in line)
    for wrong in (dict(mu=np.zeros(2048)), dict(mu=np.zeros(64), sigma=np.zeros((64, 64)))):
        np.savez(path, **wrong)
        assert sl.main([*words, str(path)]) == 2
        assert f"{path} has no mu and sigma of Inception features" in one_line(capsys)
    path.write_text("no array")
    assert sl.main([*words, str(path)]) == 2
    assert str(path) in one_line(capsys)
    assert sl.main([*words, str(tmp_path / "absent.npz")]) == 2
    assert "absent.npz" in one_line(capsys)


def test_reconstructions_are_measured_against_their_originals(copied, few_features, capsys, monkeypatch, no_pictures):
    words = ["reconstruct", "--checkpoint", str(copied), "--features", "inception", "--eval-samples", "20"]
    assert sl.main(words) == 0
    said = capsys.readouterr().out
    assert "Fréchet distance rFID-20 " in said and "against the images themselves" in said
    assert "fewer than 2048" in said
    assert float(said.split("rFID-20 ")[1].split()[0]) > 0
    monkeypatch.setattr(sl.TinyRAE, "encode", lambda self, x: x)    # nothing is lost: no distance
    monkeypatch.setattr(sl.TinyRAE, "decode", lambda self, z: z)
    assert sl.main(words) == 0
    assert float(capsys.readouterr().out.split("rFID-20 ")[1].split()[0]) == pytest.approx(0, abs=1e-6)


# 5. latents on disk

def latents_of(n, seed=0):
    """A stand-in for an autoencoder over n images, which counts what it was asked for."""
    z, asked = torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(seed)), []

    def encode(numbers):
        asked.extend(numbers.tolist())
        return z[numbers]
    return z, encode, asked


CPU = torch.device("cpu")


def test_latents_are_written_once_in_half_precision(tmp_path, capsys):
    z, encode, asked = latents_of(600)
    path = tmp_path / "new folder" / "latents.npy"
    read = extras.latent_file(path, (600, 3, 5), encode, CPU)
    assert f"{path} will take 0.0 GB" in capsys.readouterr().out
    stored = np.load(path)
    assert stored.dtype == np.float16 and np.array_equal(stored, z.half().numpy())
    chosen = torch.tensor([599, 0, 7, 7])
    assert torch.equal(read(chosen), z[chosen].half().float()) and read(chosen[::2]).shape == (2, 3, 5)
    assert sorted(set(asked)) == [*range(600)]
    asked.clear()
    assert torch.equal(extras.latent_file(path, (600, 3, 5), encode, CPU)(chosen), read(chosen))
    assert len(asked) < 10                                          # a few, to compare
    assert "will take" not in capsys.readouterr().out


@pytest.mark.parametrize("gone", [
    slice(0, 600), slice(255, 600), slice(300, 512), slice(590, 600), slice(0, 256), slice(0, 300)])
def test_a_half_written_file_is_completed(tmp_path, gone):
    z, encode, asked = latents_of(600)
    path = tmp_path / "a.npy"
    extras.latent_file(path, (600, 3, 5), encode, CPU)
    data = np.load(path, mmap_mode="r+")
    data[gone] = 0
    data[gone.stop - 1, 0] = 1                                      # stopped in the middle of a latent
    data.flush()
    extras.latent_file(path, (600, 3, 5), encode, CPU)
    assert np.array_equal(np.load(path), z.half().numpy())


def test_latents_of_something_else_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    extras.latent_file(path, (60, 3, 5), latents_of(60)[1], CPU)
    before = path.read_bytes()
    for shape, seed in (((61, 3, 5), 0), ((60, 5, 3), 0), ((60, 3, 5), 1)):
        with pytest.raises(sl.UserError, match="other images or of another autoencoder.*delete it.*--latents"):
            extras.latent_file(path, shape, latents_of(shape[0], seed)[1], CPU)
    z, encode, _ = latents_of(60)
    with pytest.raises(sl.UserError, match="another autoencoder"):  # the first image is the same, the others are not
        extras.latent_file(path, (60, 3, 5), lambda i: torch.where(i.view(-1, 1, 1) > 0, -1, 1) * encode(i), CPU)
    assert path.read_bytes() == before
    for wrong in (b"no array", b""):
        path.write_bytes(wrong)
        with pytest.raises(sl.UserError, match="is no file of latents: delete it"):
            extras.latent_file(path, (60, 3, 5), encode, CPU)
    for save, content in ((np.savez, {"a": np.zeros(3)}), (np.save, {"arr": np.zeros((60, 3, 5))})):
        with open(path, "wb") as file:
            save(file, **content)
        with pytest.raises(sl.UserError, match="is no file of latents: delete it"):
            extras.latent_file(path, (60, 3, 5), encode, CPU)


def test_without_room_the_autoencoder_runs_in_every_update(tmp_path, capsys, monkeypatch):
    _, encode, _ = latents_of(60)
    path = tmp_path / "a.npy"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    assert extras.latent_file(path, (60, 3, 5), encode, CPU) is encode
    assert "no room" in capsys.readouterr().out and not path.exists()
    np.lib.format.open_memmap(path, "w+", np.float16, (60_000, 3, 5))             # begun, and nearly all still to come
    assert extras.latent_file(path, (60_000, 3, 5), encode, CPU) is encode
    path.unlink()
    monkeypatch.undo()
    extras.latent_file(path, (60, 3, 5), encode, CPU)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))      # a full file needs no room
    assert extras.latent_file(path, (60, 3, 5), encode, CPU) is not encode


def test_a_quota_that_ends_before_the_disk_is_no_room(tmp_path, capsys, monkeypatch):
    """Written to without its room, a mapped file would end the process with a bus error."""
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    _, encode, _ = latents_of(60)
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    assert extras.latent_file(tmp_path / "a.npy", (60, 3, 5), encode, CPU) is encode
    assert "no room" in capsys.readouterr().out and not [*tmp_path.iterdir()]


def test_a_new_file_has_its_room(tmp_path):
    _, encode, _ = latents_of(60_000)
    stop = [0]

    def interrupted(numbers):
        stop.append(1)
        if len(stop) > 3:
            raise KeyboardInterrupt
        return encode(numbers)
    with pytest.raises(KeyboardInterrupt):
        extras.latent_file(tmp_path / "a.npy", (60_000, 3, 5), interrupted, CPU)
    assert 512 * (tmp_path / "a.npy").stat().st_blocks >= 2 * 60_000 * 15


# 6. data

def fake_flowers(root, monkeypatch, count=12):
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for i in range(1, count + 1):
        Image.new("RGB", (40, 50), (i, 100, 0)).save(folder / f"jpg/image_{i:05d}.jpg")
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.arange(1, count + 1)})
    scipy.io.savemat(folder / "setid.mat", {"trnid": [3, 1], "valid": [2, 4], "tstid": [*range(5, count + 1)]})
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)


def test_flowers_are_all_three_parts_in_both_splits(tmp_path, monkeypatch, offline):
    fake_flowers(tmp_path, monkeypatch)
    config = dataclasses.replace(sl.preset("flowers"), data_dir=str(tmp_path), features="untrained", eval_samples=99)
    for split in ("train", "test"):
        images = sl.load_images(config, split)
        assert len(images) == 12 and len(images.classes) == 102 and images.pixels.shape == (12, 3, 256, 256)
        assert (images.labels + 1).tolist() == [3, 1, 2, 4, *range(5, 13)]
        assert (images.pixels[:, 0, 128, 128] - images.labels - 1).abs().max() <= 3         # the picture of its label


@pytest.mark.parametrize("dataset, source", [
    ("flowers", "102flowers.tgz.*robots.ox.ac.uk"), ("animal-faces", "stargan-v2"), ("imagenet", "image-net.org")])
def test_data_that_is_not_there_says_where_it_comes_from(tmp_path, offline, capsys, dataset, source):
    words = ["train", "--dataset", dataset, "--data-dir", str(tmp_path / "absent"), "--out", str(tmp_path / "run")]
    assert sl.main(words) == 2
    said = one_line(capsys)
    assert str(tmp_path / "absent") in said and "--data-dir" in said and "train without flags" in said
    assert re.search(source, said)


@pytest.mark.parametrize("dataset, classes", [
    ("animal-faces", ["cat", "dog", "wild"]), ("imagenet", ["n01440764", "n01443537"])])
def test_folders_train_and_val(tmp_path, capsys, dataset, classes):
    for split, count in (("train", 3), ("val", 2)):
        for name in classes:
            pictures(tmp_path / split / name, count)
    config = dataclasses.replace(sl.preset(dataset), data_dir=str(tmp_path), features="untrained", eval_samples=99)
    train, test = sl.load_images(config, "train"), sl.load_images(config, "test")
    assert train.classes == test.classes == classes
    assert train.labels.bincount().tolist() == [3] * len(classes)
    assert test.labels.bincount().tolist() == [2] * len(classes)
    assert train[0][0].shape == (3, 256, 256)
    (tmp_path / "val" / classes[0]).rename(tmp_path / "val/other")
    with pytest.raises(sl.UserError, match=f"val is not {dataset}, with other in it"):
        sl.load_images(config, "test")
    shutil.rmtree(tmp_path / "val")
    words = ["train", "--dataset", dataset, "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert sl.main([*words, "--features", "untrained"]) == 2
    assert "157 GB of samples: lower --eval-samples" in one_line(capsys)
    assert sl.main([*words, "--features", "untrained", "--eval-samples", "99"]) == 2
    assert f"no folder {tmp_path / 'val'}" in one_line(capsys)


def test_absent_weights_of_inception_are_said_before_the_training(tmp_path, offline, capsys):
    pictures(tmp_path / "train/cat", 4), pictures(tmp_path / "val/cat", 4)
    words = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert sl.main(["train", "--dataset", "animal-faces", *words]) == 2
    assert "pt_inception" in (said := one_line(capsys)) and "--weights-dir" in said and "--features untrained" in said


def test_presets_of_the_paper():
    """Where a class has as many samples as any other."""
    for name, size, steps in (("flowers", "B", 8000), ("animal-faces", "B", 14_000), ("imagenet", "XL", 1_000_000)):
        config = sl.preset(name)
        assert (config.autoencoder, config.image_size, config.model_size) == ("dinov2-b", 256, size)
        assert config.train_steps == steps and config.features == "inception"
        plain = dataclasses.asdict(sl.preset(name, autoencoder="tiny"))
        assert plain == {**dataclasses.asdict(sl.preset("folder")), "dataset": name}
    assert sl.preset("flowers").eval_samples % 102 == sl.preset("imagenet").eval_samples % 1000 == 0


def test_images_too_many_for_memory_stay_in_their_files(tmp_path, monkeypatch, capsys):
    pictures(tmp_path / "b", 4), pictures(tmp_path / "a", 5)
    config = sl.Config(dataset="folder", data_dir=str(tmp_path), image_size=16, patch_size=8)
    whole = sl.load_images(config, "train")
    monkeypatch.setattr(extras, "IN_MEMORY", 3 * 16 * 16 * 2)
    lazy = sl.load_images(config, "train")
    assert isinstance(lazy.pixels, extras.ImageFiles) and torch.is_tensor(whole.pixels)
    assert torch.equal(lazy.labels, whole.labels) and lazy.classes == whole.classes and len(lazy) == len(whole) == 7
    numbers = torch.tensor([0, 9, 3, 3, 13])
    assert torch.equal(lazy.batch(numbers), whole.batch(numbers)) and lazy[1][1] == whole[1][1]
    assert torch.equal(lazy[1][0], whole[1][0])
    first, last = lazy.pixels.paths[0], lazy.pixels.paths[6]
    last.write_text("no picture")
    other = [i for i in range(7) if lazy.labels[i] == lazy.labels[6]][0]
    assert other > 0
    for _ in range(2):                                              # the next of its class takes its place
        assert torch.equal(lazy.batch(torch.tensor([1, 6])), whole.batch(torch.tensor([1, other])))
    assert capsys.readouterr().err.count(f"skipped {last} (Unidentified") == 1
    first.write_text("no picture")
    with pytest.raises(sl.UserError, match=f"2 of 7 images cannot be read; see {first.parent}"):
        lazy.batch(torch.tensor([0]))
    (gone := lazy.pixels.paths[3]).unlink()                         # of the disk, not of the image
    with pytest.raises(sl.UserError, match=f"No such file.*{gone}.*--resume"):
        lazy.batch(torch.tensor([3]))


def test_a_run_on_images_that_stay_in_their_files(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr(extras, "IN_MEMORY", 0)
    pictures(tmp_path / "data", 24)
    assert sl.main(["train", *QUICK, "--dataset", "folder", "--data-dir", str(tmp_path / "data"),
                    "--out", str(tmp_path / "run")]) == 0


# 7. the perceptual loss

@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return sl.VGGDistance()


@pytest.mark.parametrize("size", [32, 64])
def test_perceptual_distance(vgg, generator, size):
    a, b = torch.rand(2, 2, 3, size, size, generator=generator)
    near = a + 0.05 * torch.randn(a.shape, generator=generator)
    a.requires_grad_()
    with torch.no_grad():
        assert float(vgg(b, b)) == 0 and 0 < float(vgg(a, near)) < float(vgg(a, b))
    vgg(a, b).backward()
    assert a.grad.isfinite().all() and (a.grad.flatten(1).abs().sum(1) > 0).all()
    assert float(vgg(b, near)) == pytest.approx(float(vgg(near, b)))
    assert all(weight.grad is None for weight in vgg.parameters())


def test_perceptual_distance_is_the_one_of_five_depths(vgg, generator):
    """Written once more: unit vectors over the channels, squared differences, mean over places, sum over depths."""
    a, b = torch.rand(2, 2, 3, 64, 64, generator=generator)
    expected, x, y = 0, (a - MEAN[0]) / STD[0], (b - MEAN[0]) / STD[0]
    for first, last in ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)):
        x, y = vgg.layers[first:last](x.clone()), vgg.layers[first:last](y.clone())
        difference = x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)
        expected = expected + difference.square().sum(1).mean()
    torch.testing.assert_close(vgg(a, b), expected, rtol=1e-4, atol=1e-6)


def test_black_images_have_a_gradient(vgg):
    a = torch.zeros(1, 3, 32, 32, requires_grad=True)
    vgg(a, torch.zeros(1, 3, 32, 32)).backward()
    assert a.grad.isfinite().all()


def test_without_the_weights_sphere_encoder_says_so_and_learns(tmp_path, no_cache, capsys, no_pictures):
    assert sl.main(["train", *QUICK, "--method", "sphere-encoder", "--dataset", "folder", "--data-dir",
                    str(pictures(tmp_path / "data")), "--out", str(tmp_path / "run")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "perceptual" in line]
    assert len(said) == 1 and said[0].startswith("Sphere Encoder learns without its perceptual loss: ")
    assert "vgg16-397923af.pth" in said[0] and "no network" in said[0] and "--weights-dir" in said[0]


def test_a_weight_of_zero_needs_no_weights(no_cache, capsys):
    assert extras.perceptual_distance(sl.Config(perceptual_weight=0.0), CPU) is None
    assert capsys.readouterr().out == ""


def test_sphere_encoder_learns_with_the_perceptual_loss(tmp_path, monkeypatch, vgg, no_pictures):
    monkeypatch.setattr(extras, "published", lambda *a: "")
    monkeypatch.setattr(extras, "VGGDistance", lambda weights: vgg)
    assert sl.main(["train", *QUICK, "--method", "sphere-encoder", "--dataset", "folder", "--data-dir",
                    str(pictures(tmp_path / "data")), "--out", str(tmp_path / "run")]) == 0
    header, first, *_ = ((tmp_path / "run/log.csv").read_text()).split()
    row = dict(zip(header.split(","), map(float, first.split(","))))
    assert row["perceptual"] > 0


# 8. from end to end

def averaged(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["ema"]


def test_latents_in_memory_on_disk_and_on_the_fly_teach_the_same(tmp_path, monkeypatch, capsys, no_pictures):
    words = ["train", *QUICK, "--dataset", "folder", "--data-dir", str(pictures(tmp_path / "data", 24)), "--out"]
    assert sl.main([*words, str(tmp_path / "memory")]) == 0
    shared = tmp_path / "latents" / "shared.npy"
    for name in ("first", "second"):                                # the second finds the file of the first
        assert sl.main([*words, str(tmp_path / name), "--latents", str(shared)]) == 0
        assert np.load(shared).shape == (2 * 22, 4, 8)
    assert capsys.readouterr().out.count("will take") == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))
    assert sl.main([*words, str(tmp_path / "fly"), "--latents", str(tmp_path / "no.npy")]) == 0
    assert "in every update" in capsys.readouterr().out and not (tmp_path / "no.npy").exists()
    runs = {name: averaged(tmp_path / name) for name in ("memory", "first", "second", "fly")}
    for key, weight in runs["memory"].items():
        assert torch.equal(runs["first"][key], runs["second"][key])
        torch.testing.assert_close(runs["first"][key], weight, rtol=0, atol=0.01)
        torch.testing.assert_close(runs["fly"][key], weight, rtol=0, atol=0.01)


class StandIn(nn.Module):
    """In the place of RAE: patches of a small copy of the image, mixed by a fixed matrix."""

    latent_shape = 16, 12

    def __init__(self, weights_dir="", pretrained=True):
        super().__init__()
        mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
        self.register_buffer("mix", torch.linalg.qr(mix)[0])
        self.register_buffer("latent_mean", torch.full((16, 12), 0.1))
        self.register_buffer("latent_var", torch.ones(16, 12))
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)

    def encode(self, images):
        assert images.shape[1:] == (3, 256, 256)
        return F.pixel_unshuffle(F.adaptive_avg_pool2d(images, 8), 2).flatten(2).transpose(1, 2) @ self.mix

    def decode(self, z):
        x = F.pixel_shuffle((z @ self.mix.T).transpose(1, 2).unflatten(2, (4, 4)), 2)
        return F.interpolate(x.float(), (256, 256)).clamp(0, 1)


@pytest.mark.slow
def test_the_published_autoencoder_in_a_run_stays_outside_of_it(tmp_path, monkeypatch, capsys, few_features):
    monkeypatch.setattr(extras, "RAE", StandIn)
    out, data = tmp_path / "run", pictures(tmp_path / "data", 12)
    words = ["train", "--dataset", "folder", "--data-dir", str(data), "--autoencoder", "dinov2-b",
             "--image-size", "256", "--train-steps", "4", "--batch-size", "4", "--eval-samples", "4",
             "--device", "cpu", "--out", str(out)]
    assert sl.main([*words, "--latents", str(tmp_path / "latents.npy"), "--features", "inception"]) == 0
    assert "4 training images" not in capsys.readouterr().out       # it is 10 of the 12
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["autoencoder"] == {} and not any("mix" in name for name in state["ema"])
    names = {path.name for path in out.iterdir()}
    assert {"samples.png", "reconstructions.png", "loss.png", "reference.npz", "frechet.csv"} <= names
    for name in ("picture", "loss_figure"):                         # they would only be drawn again
        monkeypatch.setattr(sl, name, lambda *a: None)
    config, autoencoder, denoiser = sl.load_run(out)
    assert isinstance(autoencoder, StandIn) and denoiser.latent_shape == (16, 12) and config.autoencoder == "dinov2-b"
    image = sl.sample_images(denoiser, autoencoder, torch.tensor([0, 0]), config)
    assert image.shape == (2, 3, 256, 256)
    for command in (["sample", "--count", "2"], ["reconstruct"], ["reconstruct", "--features", "inception"],
                    ["evaluate", "--features", "untrained"], ["evaluate"]):
        assert sl.main([*command, "--checkpoint", str(out)]) == 0
    said = capsys.readouterr().out
    assert "PSNR" in said and "rFID-2" in said and "10 training images of folder, 256 px" in said
    assert sl.main(["train", "--resume", str(out)]) == 0
