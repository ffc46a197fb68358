"""Sampling: denoise, tilt, denoise again; then decode."""
import dataclasses
import math

import pytest
import torch
from conftest import angle_between, points

import sphere_latent as sl

LABELS = torch.tensor([0, 2])
POINTS = math.sqrt(32) * torch.eye(32).view(32, 4, 8)        # on the sphere, at right angles
CLEAN, NOISE = POINTS[:2], POINTS[2:14].view(6, 2, 4, 8)     # [B, N, C], [steps, B, N, C]


class ExactDenoiser(torch.nn.Module):
    """It knows the direction of the answer, but not its length: that shows the label."""
    latent_shape = (4, 8)
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))     # says which device it is on
        self.calls = []

    def forward(self, x, labels):
        self.calls.append((x, labels.tolist(), torch.is_autocast_enabled("cpu")))
        return (2 + labels.view(-1, 1, 1)) * CLEAN[:1].expand(len(x), 4, 8)


@pytest.mark.parametrize("steps, degrees", [(2, 90), (6, 60)])
def test_tilts_decay_and_later_steps_share_a_part_of_the_first_noise(steps, degrees):
    _, path = sl.sample(ExactDenoiser(), LABELS, steps, tilt=math.radians(degrees), noise=NOISE,
                        return_path=True)
    noisy_points = path[0::2]
    assert len(noisy_points) == steps and torch.equal(noisy_points[0], NOISE[0])
    for k in range(1, steps):
        alpha = math.radians((1 - k / steps) ** 0.7 * degrees)
        direction = math.cos(alpha) * CLEAN[0] + math.sin(alpha) * (
            0.4 * NOISE[0] + math.sqrt(1 - 0.4 ** 2) * NOISE[k])
        assert angle_between(noisy_points[k], direction).max() < 0.003       # 0.92 is a rounded root


@pytest.mark.parametrize("scale, called_with", [(3.0, [0, 2, 3, 3]), (1.0, [0, 2])])
def test_guidance_pushes_away_from_the_null_label_and_costs_nothing_at_1(scale, called_with):
    denoiser = ExactDenoiser()
    z = sl.sample(denoiser, LABELS, 1, cfg_scale=scale, noise=NOISE)
    assert [labels for _, labels, _ in denoiser.calls] == [called_with]
    conditional, unconditional = torch.stack([2 * CLEAN[0], 4 * CLEAN[0]]), 5 * CLEAN[0]
    torch.testing.assert_close(z, unconditional + scale * (conditional - unconditional))


def test_noise_that_is_not_given_is_drawn_from_the_generator(generator):
    denoiser = ExactDenoiser()
    sl.sample(denoiser, LABELS, 3, generator=generator)
    sl.sample(denoiser, LABELS, 3, noise=points(0, 3, 2, 4, 8))
    for drawn, given in zip(denoiser.calls[:3], denoiser.calls[3:], strict=True):
        torch.testing.assert_close(drawn[0], given[0])


class Decoder(torch.nn.Module):
    def decode(self, z):
        assert z.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        length = z.norm(dim=(1, 2)) / math.sqrt(32)
        return length.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_images_of_more_than_a_batch_have_their_labels_and_noise_of_their_own(bfloat16):
    config = sl.Config(image_size=2, cfg_scale=2.0, tilt=60.0, seed=3)

    def draw(steps, **changes):
        denoiser = ExactDenoiser()
        run = dataclasses.replace(config, **changes), Decoder(), denoiser
        images = sl.sample_images(run, torch.arange(230) % 3, steps)
        lengths = [2 * (2 + n % 3) - 5 for n in range(230)]  # guided away from 5, the null label's
        assert images[:, 0, 0, 0].tolist() == pytest.approx(list(map(abs, lengths)))
        assert all(in_autocast for _, _, in_autocast in denoiser.calls)
        return denoiser.calls

    calls = draw(2)                                          # three batches, two calls in each
    assert [len(labels) for _, labels, _ in calls] == [200, 200, 200, 200, 60, 60]
    angles = angle_between(calls[1][0], -CLEAN[:1].expand(200, 4, 8))
    assert angles.mean().item() == pytest.approx(math.radians(60 * 0.5 ** 0.7), abs=0.05)
    first = [x for x, _, _ in draw(1)]
    assert [torch.equal(x, y) for x, (y, _, _) in zip(first, calls[0::2])] == [True] * 3
    others = [x for x, _, _ in draw(1, seed=4)]
    starts = torch.cat(first + others).flatten(1)
    assert (torch.cdist(starts, starts) + 9 * torch.eye(460)).min() > 1


def test_a_loaded_run_has_the_averaged_weights(small_run):
    _, autoencoder, denoiser = sl.load_run(small_run)
    average = torch.load(small_run / "checkpoint.pt", weights_only=True)["average"]
    torch.testing.assert_close(denoiser.state_dict(), average, rtol=0, atol=0)
    assert not denoiser.training and not autoencoder.training
