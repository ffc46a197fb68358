"""What an image costs at the published sizes, counted by torch on the meta device (2 operations a multiply-add).

Sphere Encoder's public code needs 15.2 (XL) and 10.5 (L) TFLOPs for an image of 256 px at 4 steps with guidance in both
halves; 1,024 tokens of 64 channels, MLP-Mixer layers included, which are left out here.
"""
import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sphere_latent as sl


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
        layer = torch.nn.TransformerEncoderLayer(1152, 16, 4096, batch_first=True, norm_first=True)
        ends = torch.nn.Sequential(torch.nn.Linear(768, 1152), torch.nn.Linear(1152, 768))
        decoder = 28 * teraflops(layer, torch.empty(1, 257, 1152)) + teraflops(ends, torch.empty(1, 256, 768))
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
