"""What an image costs at the published sizes, counted by torch on the meta device (2 operations a multiply-add).

Sphere Encoder's public code needs 15.2 (XL) and 10.5 (L) TFLOPs for an image of 256 px at 4 steps with guidance in both
halves; 1,024 tokens of 64 channels, MLP-Mixer layers included, which are left out here.
"""
import functools
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT

import speed
import sphere_latent as sl

pytestmark = pytest.mark.slow


def teraflops(network, *inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops() / 1e12


@functools.cache
def sphere_encoder(size, steps=4):
    """Each step decodes, each but the first encodes before; guidance doubles both."""
    with torch.device("meta"):
        labels, pixels, latents = torch.zeros(1, dtype=torch.long), torch.empty(1, 1024, 192), torch.empty(1, 1024, 64)
        encoder = sl.Transformer(1024, 192, 64, *sl.MODEL_SIZES[size], 1000)
        decoder = sl.Transformer(1024, 64, 192, *sl.MODEL_SIZES[size], 1000)
        return 2 * (steps * teraflops(decoder, latents, labels) + (steps - 1) * teraflops(encoder, pixels, labels))


@functools.cache
def sphere_latent(size, steps=4):
    """Each step runs the denoiser, guidance doubles it; RAE's ViT-XL decoder runs once."""
    with torch.device("meta"):
        denoiser = sl.Transformer(256, 768, 768, *sl.MODEL_SIZES[size], 1000)
        decoder = teraflops(sl.RAEDecoder(), torch.empty(1, 256, 768))
        labels = torch.zeros(1, dtype=torch.long)
        return 2 * steps * teraflops(denoiser, torch.empty(1, 256, 768), labels) + decoder


@pytest.mark.parametrize("size, published", [("L", 10.5), ("XL", 15.2)])
def test_sphere_encoder_costs_what_its_public_code_costs(size, published):
    assert sphere_encoder(size) == pytest.approx(published, rel=0.10)
    assert sphere_encoder(size) < published                          # the mixer layers are missing


def test_staying_in_latent_space_is_about_seven_times_cheaper():
    ratio = sphere_encoder("XL") / sphere_latent("XL")
    assert sphere_latent("XL") == pytest.approx(2.13, rel=0.01)
    assert 6.5 <= ratio <= 7.5, ratio


@pytest.mark.parametrize("name, shape, classes", [("drawn", (16, 64), 12), ("cifar10", (64, 16), 10), ("flowers", (256, 768), 102),
                                                  ("animal-faces", (256, 768), 3), ("imagenet", (256, 768), 1000)])
def test_the_rungs_of_the_readme_are_counted(name, shape, classes, monkeypatch):
    """Both views, forward and backward; the table of the README has parameters, GFLOPs an image and exaFLOPs in all."""
    monkeypatch.setitem(sl.MODEL_SIZES, "tiny", (256, 6, 4))
    config, rung = sl.preset(name), "built-in" if name == "drawn" else f"`{name}`"
    readme = (ROOT / "README.md").read_text().replace(",", "")
    row = re.findall(rf"^\| {re.escape(rung)} \|(.* x .*)\|$", readme, re.M)[0].split("|")
    millions, giga, exa = (float(re.search(r"[\d.]+(?= million| *$)", row[i])[0]) for i in (0, 1, 3))
    parameters, total = speed.cost(config, shape, classes)
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01) and total / 1e9 == pytest.approx(giga, rel=0.01)
    assert total * config.batch_size * config.train_steps / 1e18 == pytest.approx(exa, rel=0.12)
    assert [int(number) for number in row[2].split("x")] == [config.train_steps, config.batch_size]
