"""Sampling: denoise, tilt, denoise again; an image depends on its seed, label and number alone."""
import math

import pytest
import torch

import sphere_latent as sl

LABELS = torch.tensor([0, 2])
POINTS = math.sqrt(32) * torch.eye(32).view(32, 4, 8)        # on the sphere, at right angles
CLEAN, NOISE = POINTS[:2], POINTS[2:14].view(6, 2, 4, 8)     # [B, N, C], [steps, B, N, C]


class ExactDenoiser:
    """It knows the direction of the answer, but not its length: that shows the label."""
    latent_shape = (4, 8)
    num_classes = 3

    def __init__(self):
        self.calls = []

    def __call__(self, x, labels):
        self.calls.append((x, labels.tolist()))
        return (2 + labels.view(-1, 1, 1)) * CLEAN.repeat(len(x) // 2, 1, 1)


@pytest.mark.parametrize("steps, degrees", [(2, 90), (6, 60)])
def test_tilts_decay_and_each_has_new_noise(steps, degrees):
    _, path = sl.sample(ExactDenoiser(), LABELS, steps, largest_tilt=math.radians(degrees),
                        noise=NOISE, return_path=True)
    noisy_points = path[0::2]
    assert len(noisy_points) == steps
    for k in range(1, steps):
        alpha = math.radians((1 - k / steps) ** 0.7 * degrees)
        to_clean = sl.angle_between(noisy_points[k], CLEAN)
        to_noise = sl.angle_between(noisy_points[k], NOISE[k])
        assert to_clean.tolist() == pytest.approx([alpha] * 2, abs=1e-4)
        assert to_noise.tolist() == pytest.approx([math.pi / 2 - alpha] * 2, abs=1e-4)


@pytest.mark.parametrize("scale, called_with", [(3.0, [0, 2, 3, 3]), (1.0, [0, 2])])
def test_guidance_pushes_away_from_the_null_label_and_costs_nothing_at_1(scale, called_with):
    denoiser = ExactDenoiser()
    z = sl.sample(denoiser, LABELS, 1, cfg_scale=scale, noise=NOISE)
    assert [labels for _, labels in denoiser.calls] == [called_with]
    conditional, unconditional = torch.stack([2 * CLEAN[0], 4 * CLEAN[1]]), 5 * CLEAN
    torch.testing.assert_close(z, unconditional + scale * (conditional - unconditional))


def test_an_image_depends_on_seed_label_and_number_alone(small_run):
    config, autoencoder, denoiser = sl.load_run(small_run)
    torch.nn.init.normal_(denoiser.head.weight)              # six updates have not taught it much

    def images(*labels):
        return sl.sample_images(denoiser, autoencoder, torch.tensor(labels), config, steps=2)

    [first] = images(4)
    many = images(4, *101 * [5])                             # more than a batch of 100
    torch.testing.assert_close(many[0], first, rtol=0, atol=1e-4)
    torch.testing.assert_close(images(*120 * [5])[101], many[101], rtol=0, atol=1e-4)
    assert (many[100] - many[101]).abs().max() > 0.01        # another number
    assert (images(5)[0] - first).abs().max() > 0.001        # another label
    config.seed = 1
    assert (images(4)[0] - first).abs().max() > 0.01         # another seed


def test_a_loaded_run_samples_with_the_averaged_weights(small_run):
    _, autoencoder, denoiser = sl.load_run(small_run)
    average = torch.load(small_run / "checkpoint.pt", weights_only=True)["average"]
    torch.testing.assert_close(denoiser.state_dict(), average, rtol=0, atol=0)
    assert not denoiser.training and not autoencoder.training


def test_later_steps_share_a_part_of_the_first_noise(generator):
    noise = torch.randn(3, 2, 100, 100, generator=generator)
    first, *later = sl.share_noise(noise, share=0.6)
    assert torch.equal(first, noise[0])
    for step, mixed in enumerate(later, 1):
        torch.testing.assert_close(mixed, 0.6 * noise[0] + 0.8 * noise[step])
