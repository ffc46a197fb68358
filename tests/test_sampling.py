"""Sampling: denoise, tilt, denoise again; then decode."""
import math

import pytest
import torch
from conftest import angle_between

import sphere_latent as sl

LABELS = torch.tensor([0, 2])
POINTS = math.sqrt(32) * torch.eye(32).view(32, 4, 8)        # on the sphere, at right angles
CLEAN, NOISE = POINTS[0], POINTS[2:14].view(6, 2, 4, 8)      # [N, C], [steps, B, N, C]


class ExactDenoiser(torch.nn.Module):
    """It knows the direction of the answer; the length is 2 + label, for the null label 5."""
    latent_shape = (4, 8)
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))     # says which device it is on
        self.calls = []

    def forward(self, x, labels):
        self.calls.append((x, labels.tolist()))
        return (2 + labels.view(-1, 1, 1)) * CLEAN.expand(len(x), 4, 8)


@pytest.mark.parametrize("steps, degrees", [(2, 90), (6, 60)])
def test_tilts_decay_and_later_steps_share_a_part_of_the_first_noise(steps, degrees):
    _, path = sl.sample(ExactDenoiser(), LABELS, steps, tilt=math.radians(degrees), noise=NOISE,
                        return_path=True)
    assert len(path) == 2 * steps
    torch.testing.assert_close(path[0], NOISE[0])
    for k in range(1, steps):
        alpha = math.radians((1 - k / steps) ** 0.7 * degrees)
        e = 0.4 * NOISE[0] + math.sqrt(1 - 0.4 ** 2) * NOISE[k]
        expected = math.cos(alpha) * CLEAN + math.sin(alpha) * e
        assert angle_between(path[2 * k], expected).max() < 0.003            # 0.92 is rounded


@pytest.mark.parametrize("scale, called_with", [(3.0, [0, 2, 3, 3]), (1.0, [0, 2])])
def test_guidance_pushes_away_from_the_null_label_and_costs_nothing_at_1(scale, called_with):
    denoiser = ExactDenoiser()
    z = sl.sample(denoiser, LABELS, 1, cfg_scale=scale, noise=NOISE)
    assert [labels for _, labels in denoiser.calls] == [called_with]
    conditional, unconditional = torch.stack([2 * CLEAN, 4 * CLEAN]), 5 * CLEAN
    torch.testing.assert_close(z, unconditional + scale * (conditional - unconditional))


class Decoder(torch.nn.Module):
    def decode(self, z):                                     # images as bright as z is long
        return z.norm(dim=(1, 2)).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / math.sqrt(32)


def test_images_of_more_than_a_batch_have_their_labels_and_noise_of_their_own():
    def draw(steps, seed):
        config = sl.Config(image_size=2, cfg_scale=0.5, tilt=60.0, seed=seed)
        run = config, Decoder(), ExactDenoiser()
        images = sl.sample_images(run, torch.arange(230) % 3, steps)
        expected = [(2 + n % 3 + 5) / 2 for n in range(230)]                 # guided halfway from 5
        assert images[:, 0, 0, 0].tolist() == pytest.approx(expected)
        return [x for x, _ in run[2].calls]                  # each with label and null label

    calls, first, others = draw(2, seed=3), draw(1, seed=3), draw(1, seed=4)
    assert [len(x) for x in calls] == [200, 200, 200, 200, 60, 60]           # three batches
    angles = angle_between(calls[1], CLEAN.expand(200, 4, 8))
    assert angles.mean().item() == pytest.approx(math.radians(60 * 0.5 ** 0.7), abs=0.05)
    torch.testing.assert_close(calls[0::2], first)           # the same for any number of steps
    starts = torch.cat([x[:len(x) // 2] for x in first + others]).flatten(1)
    assert (torch.cdist(starts, starts) + 9 * torch.eye(460)).min() > 1
