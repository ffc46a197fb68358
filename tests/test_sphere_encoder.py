"""Sphere Encoder, the predecessor: the same loop, but through pixels."""
import math

import pytest
import torch
from PIL import Image

import sphere_latent as sl
from conftest import SMALL

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


def test_it_is_trained_and_sampled(tmp_path):
    flags = [*SMALL[:6], *SMALL[8:], "--method", "sphere-encoder"]
    assert sl.main(["train", *flags, "--out", str(tmp_path)]) == 0
    _, autoencoder, model = sl.load_run(tmp_path)
    assert autoencoder is model
    for head in (model.encoder.head, model.decoder.transformer.head):
        assert head.weight.any()                             # zero before the first update
    assert sl.main(["sample", "--checkpoint", str(tmp_path), "--classes", "poppy"]) == 0
    assert Image.open(tmp_path / "sampled.png").size[0] > 128
