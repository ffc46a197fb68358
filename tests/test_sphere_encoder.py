"""Sphere Encoder, the predecessor: the same losses and the same loop, but through pixels."""
import math
import types

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import sphere_latent as sl
from conftest import SMALL

FLAGS = [flag for flag in SMALL if flag not in ("--autoencoder-steps", "6")]
FLAGS += ["--train-steps", "6", "--method", "sphere-encoder"]
LABELS = torch.tensor([0, 2])


@pytest.fixture
def model(generator):
    """An untrained model, but its labels and transformers matter, as after training."""
    config = sl.Config(method="sphere-encoder", image_size=16, patch_size=8, latent_channels=8)
    model = sl.SphereEncoder(config, num_classes=3).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def predecessor(small_run, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "predecessor"
    assert sl.main(["train", *FLAGS, "--out", str(folder)]) == 0
    return folder


def test_its_settings_are_those_of_its_paper():
    config = sl.preset("drawn", "sphere-encoder")
    assert config.noise_distribution == "uniform-tangent"
    assert config.max_angle == config.tilt == 85


def test_the_encoder_gives_points_on_the_sphere(model, generator):
    v = model.encode(torch.rand(2, 3, 16, 16, generator=generator), LABELS)
    assert v.shape == (2, 4, 8)
    torch.testing.assert_close(v.flatten(1).norm(dim=1), torch.full((2,), math.sqrt(32)))


def test_both_halves_see_the_label(model, generator):
    x, v = torch.rand(2, 3, 16, 16, generator=generator), torch.randn(2, 4, 8, generator=generator)
    for half, inputs in ((model.encode, x), (model.decode, v)):
        assert (half(inputs, LABELS) - half(inputs, 2 - LABELS)).abs().max() > 1e-3


def test_its_losses_by_hand(model, generator):
    """encode = f(E(image)), decode = D, target = the image."""
    config = sl.preset("drawn", "sphere-encoder")
    x = torch.rand(2, 3, 16, 16, generator=generator)
    e = torch.randn(2, 4, 8, generator=generator)
    small, large = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 1.4])
    losses = model.losses(x, LABELS, e, small, large, config)

    v = model.encode(x, LABELS)
    x_small, x_large = [model.decode(sl.noisy_spherify(v, e, alpha), LABELS)
                        for alpha in (small, large)]
    again = model.encode(x_large, LABELS)
    expected = {"reconstruction": F.smooth_l1_loss(x_small, x),
                "consistency": F.smooth_l1_loss(x_large, x_small),
                "latent_consistency": 1 - torch.cosine_similarity(again.flatten(1), v.flatten(1)).mean()}
    expected["total"] = (config.reconstruction_weight * expected["reconstruction"]
                         + config.consistency_weight * expected["consistency"]
                         + 0.1 * expected["latent_consistency"])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.25])
def test_each_step_decodes_encodes_and_tilts_by_the_same_noise(model, generator, scale):
    def guided(half, x):
        """Each half has the square root of the scale."""
        with_label, without_label = half(x, LABELS), half(x, torch.tensor([3, 3]))
        return without_label + math.sqrt(scale) * (with_label - without_label)

    e = torch.randn(2, 4, 8, generator=generator)
    x = guided(model.decode, sl.spherify(e))
    for _ in range(2):
        v = sl.spherify(guided(model.encode, x))
        x = guided(model.decode, sl.noisy_spherify(v, e, math.radians(85)))
    images = model.sample(LABELS, steps=3, cfg_scale=scale, noise=e)
    torch.testing.assert_close(images, x.clamp(0, 1), rtol=0, atol=1e-3)


def test_both_halves_are_trained(predecessor):
    _, autoencoder, model = sl.load_run(predecessor)
    assert autoencoder is model
    for head in (model.encoder.head, model.decoder.transformer.head):
        assert head.weight.any()                             # zero before the first update


def test_it_can_be_sampled_and_evaluated(predecessor, tmp_path, capsys):
    run = ["--checkpoint", str(predecessor)]
    out = tmp_path / "poppies.png"
    assert sl.main(["sample", *run, "--classes", "poppy", "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 128
    assert sl.main(["evaluate", *run]) == 0
    assert "rebuilt" in capsys.readouterr().out


def test_a_resumed_run_equals_the_unbroken_one(predecessor, tmp_path, monkeypatch):
    original, calls = sl.sphere_losses, []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(sl, "sphere_losses", interrupt)
        assert sl.main(["train", *FLAGS, "--save-every", "3", "--out", str(tmp_path)]) == 130
    assert sl.main(["train", "--resume", str(tmp_path), "--device", "cpu"]) == 0
    a, b = [sl.read_checkpoint(run)["average"] for run in (predecessor, tmp_path)]
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_perceptual_distance_is_zero_for_equal_images_alone(monkeypatch, generator):
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])        # of VGG16
    monkeypatch.setattr(torchvision.models, "vgg16", lambda: types.SimpleNamespace(features=layers))
    monkeypatch.setattr(sl, "load_weights", lambda network, path: None)
    distance = sl.PerceptualDistance("vgg.pth")
    a, b = torch.rand(2, 2, 3, 32, 32, generator=generator)
    assert distance(a, a) == 0 < distance(a, b)


def test_without_the_network_of_the_perceptual_distance_it_says_so(tmp_path, monkeypatch, capsys):
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / sl.VGG).write_text("not weights")
    flags = ["--data-dir", str(tmp_path), "--weights-dir", str(tmp_path)]
    assert sl.main(["train", *FLAGS, *flags, "--out", str(tmp_path / "run")]) == 0
    assert "without the perceptual distance" in capsys.readouterr().out
