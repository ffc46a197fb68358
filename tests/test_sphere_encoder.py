"""Sphere Encoder, the predecessor: the same losses and the same loop, but through pixels."""
import math
import types

import pytest
import torch
import torchvision
from PIL import Image

import sphere_latent as sl

FLAGS = ("--method sphere-encoder --image-size 16 --patch-size 8 --latent-channels 8 "
         "--train-steps 6 --batch-size 8 --eval-samples 24 --device cpu").split()
LABELS, NULL = torch.tensor([0, 2]), torch.tensor([3, 3])


@pytest.fixture
def model(generator):
    """Untrained, but its labels and transformers matter, as after training."""
    config = sl.Config(method="sphere-encoder", image_size=16, patch_size=8, latent_channels=8)
    model = sl.SphereEncoder(config, num_classes=3).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return model


def test_the_encoder_gives_points_on_the_sphere_and_both_halves_see_the_label(model, generator):
    x = torch.rand(2, 3, 16, 16, generator=generator)
    v = model.encode(x, LABELS)
    torch.testing.assert_close(v.flatten(1).norm(dim=1), torch.full((2,), math.sqrt(4 * 8)))
    assert (v - model.encode(x, NULL)).abs().max() > 1e-3
    assert (model.decode(v, LABELS) - model.decode(v, NULL)).abs().max() > 1e-3


def test_it_shares_the_losses_of_its_successor(model, monkeypatch, generator):
    """decode is D, encode is f(E), the target is the image: smooth L1 between images."""
    seen = []
    monkeypatch.setattr(sl, "sphere_losses", lambda *arguments: seen.extend(arguments))
    x = torch.rand(2, 3, 16, 16, generator=generator)
    model.losses(x, LABELS, "e", "alpha_small", "alpha_large", "config")
    decode, encode, v, target, labels, *others = seen
    torch.testing.assert_close(v, model.encode(x, LABELS))
    torch.testing.assert_close(encode(x), v)
    torch.testing.assert_close(decode(v, labels), model.decode(v, LABELS))
    assert target is x and others == ["e", "alpha_small", "alpha_large", "config", None]


@pytest.mark.parametrize("scale", [1.0, 2.25])
def test_each_step_decodes_encodes_and_tilts_by_the_same_noise(model, generator, scale):
    def guided(half, x):                                     # each has the root of the scale
        return half(x, NULL) + math.sqrt(scale) * (half(x, LABELS) - half(x, NULL))

    e = torch.randn(2, 4, 8, generator=generator)
    x = guided(model.decode, sl.spherify(e))
    for _ in range(2):
        v = sl.spherify(guided(model.encode, x))
        x = guided(model.decode, sl.noisy_spherify(v, e, math.radians(85)))
    images = model.sample(LABELS, steps=3, cfg_scale=scale, noise=e)
    torch.testing.assert_close(images, x.clamp(0, 1), rtol=0, atol=1e-3)


def test_it_is_trained_sampled_and_evaluated(tmp_path, capsys):
    assert sl.main(["train", *FLAGS, "--out", str(tmp_path)]) == 0
    _, autoencoder, model = sl.load_run(tmp_path)
    assert autoencoder is model
    for head in (model.encoder.head, model.decoder.transformer.head):
        assert head.weight.any()                             # zero before the first update
    assert sl.main(["sample", "--checkpoint", str(tmp_path), "--classes", "poppy"]) == 0
    assert Image.open(tmp_path / "sampled.png").size[0] > 128
    capsys.readouterr()
    assert sl.main(["evaluate", "--checkpoint", str(tmp_path)]) == 0
    assert "rebuilt" in capsys.readouterr().out


def test_the_perceptual_distance_is_zero_for_equal_images_alone(monkeypatch, generator):
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])        # of VGG16
    monkeypatch.setattr(torchvision.models, "vgg16", lambda: types.SimpleNamespace(features=layers))
    monkeypatch.setattr(sl, "load_weights", lambda network, path: None)
    a, b = torch.rand(2, 2, 3, 32, 32, generator=generator)
    distance = sl.PerceptualDistance("random weights")
    assert distance(a, a) == 0
    assert distance(a, b) > 0


def test_without_the_network_of_the_perceptual_distance_it_says_so(tmp_path, monkeypatch, capsys):
    for name in ("sample_figure", "reconstruction_figure", "loss_figure"):
        monkeypatch.setattr(sl, name, lambda *arguments: None)               # they take long
    monkeypatch.setattr(sl, "evaluate", lambda runs: [{"frechet_distance": 0.0}])
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / sl.VGG).write_text("damaged")
    flags = ["--data-dir", str(tmp_path), "--weights-dir", str(tmp_path)]
    assert sl.main(["train", *FLAGS, *flags, "--out", str(tmp_path / "run")]) == 0
    assert "without the perceptual distance" in capsys.readouterr().out
