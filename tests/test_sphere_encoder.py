"""Sphere Encoder, the predecessor: the same loop, but through pixels."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.models import vgg

import sphere_latent as sl
from conftest import SMALL, points

LABELS, NULL = torch.tensor([0, 2]), torch.tensor([3, 3])


@pytest.mark.parametrize("scale", [1.0, 2.25])
def test_each_step_decodes_encodes_and_tilts_by_the_same_noise(generator, scale):
    config = sl.Config(method="sphere-encoder", image_size=16, patch_size=8, latent_channels=8)
    model = sl.SphereEncoder(config, num_classes=3).eval().requires_grad_(False)
    for weight in model.parameters():                        # all of it matters, as after training
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)

    def guided(half, x):                                     # each has the root of the scale
        return half(x, NULL) + math.sqrt(scale) * (half(x, LABELS) - half(x, NULL))

    e = torch.randn(2, 4, 8, generator=generator)
    x = guided(model.decode, sl.spherify(e))
    for _ in range(2):
        v = sl.spherify(guided(model.encode, x))
        x = guided(model.decode, sl.noisy_spherify(v, e, math.radians(85)))
    images = model.sample(LABELS, steps=3, cfg_scale=scale, noise=e)
    torch.testing.assert_close(images, x.clamp(0, 1), rtol=0, atol=1e-3)


def test_losses_of_an_autoencoder_that_only_reshapes(monkeypatch):
    """A latent has as many numbers as its image; the distances are then known."""
    config = sl.Config(image_size=16, patch_size=8, latent_channels=192, reconstruction_weight=2,
                       consistency_weight=3, latent_consistency_weight=5, perceptual_weight=7)
    model, images, e = sl.SphereEncoder(config, 3), points(0, 2, 3, 16, 16), points(1, 2, 4, 192)
    monkeypatch.setattr(model, "encode", lambda x, labels: sl.spherify(x.view(-1, 4, 192)))
    monkeypatch.setattr(model, "decode", lambda v, labels: v.view(-1, 3, 16, 16))
    v = sl.spherify(images.view(2, 4, 192))
    small, large = [sl.noisy_spherify(v, e, alpha) for alpha in (0.2, 1.2)]
    x_small, x_large = small.view_as(images), large.view_as(images)
    cosine = F.cosine_similarity(large.flatten(1), v.flatten(1)).mean()
    expected = {"reconstruction": F.smooth_l1_loss(x_small, images),
                "consistency": F.smooth_l1_loss(x_large, x_small), "latent_consistency": 1 - cosine,
                "perceptual": (x_small - images).abs().max() + (x_large - x_small).abs().max()}
    expected["total"] = sum(w * loss for w, loss in zip((2, 3, 5, 7), expected.values()))
    found = model(images, LABELS, e, torch.full((2,), 0.2), torch.full((2,), 1.2), config,
                  lambda a, b: (a - b).abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_perceptual_distance_is_that_of_the_features_before_each_pooling(monkeypatch):
    network = torch.nn.ModuleDict({"features": vgg.make_layers([8, "M"] * 5)})       # a small VGG
    monkeypatch.setattr(torchvision.models, "vgg16", lambda: copy.deepcopy(network))
    monkeypatch.setattr(sl, "fetch_vgg", network.state_dict)
    a, b = torch.rand(2, 2, 3, 32, 32)
    x = torch.cat([a, b]) - sl.per_channel(sl.IMAGENET_MEAN)
    x = x / sl.per_channel(sl.IMAGENET_STD)
    expected = 0
    for end in (2, 5, 8, 11, 14):                            # the poolings
        features_a, features_b = F.normalize(network.features[:end](x), dim=1).chunk(2)
        expected += (features_a - features_b).square().sum(1).mean()
    torch.testing.assert_close(sl.PerceptualDistance()(a, b), expected.detach())


@pytest.mark.parametrize("flags", [["--train-steps", "80"], pytest.param(
    ["--train-steps", "160", "--method", "sphere-encoder"], marks=pytest.mark.slow)])
def test_a_run_learns_which_class_has_which_colour(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(sl, "evaluate", lambda *arguments: [{"frechet_distance": 0.0}])
    monkeypatch.setattr(sl, "sample_figure", lambda *arguments: None)
    colours = {"blue": (30, 60, 240), "green": (40, 240, 60), "red": (240, 50, 30)}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for n in range(12):                                  # darker and lighter ones
            pixel = tuple(value * (n + 12) // 24 for value in colour)
            Image.new("RGB", (16, 16), pixel).save(tmp_path / name / f"{n}.png")
    flags = [*SMALL, *flags, "--dataset", "folder", "--data-dir", str(tmp_path), "--ema-decay",
             "0.9", "--perceptual-weight", "0"]
    assert sl.main(["train", *flags, "--out", str(tmp_path / "run")]) == 0
    images = sl.sample_images(sl.load_run(tmp_path / "run"), torch.arange(30) % 3, 4)
    brightest = images.mean((2, 3)).argmax(1)                # of red, green and blue
    assert (brightest == 2 - torch.arange(30) % 3).float().mean() > 0.9
