"""The sphere: its geometry, and the angles of the noise."""
import math

import pytest
import torch
from conftest import angle_between, points
from hypothesis import given, settings, strategies as st

import sphere_latent as sl

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")
seeds, angles = st.integers(0, 10**6), st.floats(0, math.pi / 2 - 0.02)


def assert_close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, torch.as_tensor(b).expand_as(a), rtol=tolerance, atol=tolerance)


@given(seeds, st.sampled_from([(4, 2), (16, 8), (1, 64), (3, 5, 7), (200,)]), st.floats(0.1, 1e4))
def test_spherify_scales_to_norm_sqrt_L(seed, shape, scale):
    z = scale * points(seed, 3, *shape).flatten(1)
    expected = z / z.norm(dim=1, keepdim=True) * math.sqrt(math.prod(shape))
    assert_close(sl.spherify(z.view(3, *shape)).flatten(1), expected)


def test_spherify_is_float32_and_finite_at_zero():
    z = torch.zeros(2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    v = sl.spherify(z)
    v.sum().backward()
    assert v.dtype == torch.float32 and not v.any() and z.grad.isfinite().all()


@given(seeds, angles)
def test_orthogonal_noise_tilts_each_image_by_exactly_its_angle(seed, alpha):
    v, e = sl.spherify(points(seed, 3, 16, 8)), points(seed + 1, 3, 16, 8)
    assert_close(sl.noisy_spherify(v, e, 0.0), v, 2e-6)
    assert_close(sl.noisy_spherify(v, e, math.pi / 2), sl.spherify(e), 1e-5)
    e = sl.spherify(e - (e * v).mean((1, 2), keepdim=True) * v)
    alphas = torch.tensor([alpha, alpha / 2, 1e-4])
    assert_close(angle_between(v, sl.noisy_spherify(v, e, alphas)), alphas, 2e-6)


@pytest.mark.parametrize("name, level, mean, std", [
    ("logit-normal", lambda large: torch.logit(large / 1.4), 0.8, 0.7),
    ("uniform", lambda large: large / 1.4, 0.5, 12 ** -0.5),
    ("uniform-tangent", lambda large: large.tan() / math.tan(1.4), 0.5, 12 ** -0.5)])
def test_distribution_of_the_noise_angles(name, level, mean, std, generator):
    config = sl.Config(noise_distribution=name, max_angle=math.degrees(1.4), noise_mean=0.8,
                       noise_std=0.7, small_ratio=0.25)
    small, large = sl.sample_angles(4000, config, generator)
    share = 4 * small.tan() / large.tan()                    # of small_ratio
    for values, m, s in ((level(large), mean, std), (share, 0.5, 12 ** -0.5)):
        assert values.mean().item() == pytest.approx(m, abs=0.04)
        assert values.std().item() == pytest.approx(s, abs=0.04)
    assert torch.corrcoef(torch.stack([share, large]))[0, 1].abs() < 0.06
    hit = len((4000 * level(large)).floor().unique())        # of 4,000 intervals: all, or 63%
    assert (hit > 3900) == (name == "uniform-tangent")


def test_no_angle_is_above_90_degrees(generator):
    for alpha in sl.sample_angles(1000, sl.Config(noise_mean=20.0, small_ratio=1.0), generator):
        assert alpha.min() >= 0 and alpha.max() <= torch.tensor(math.pi / 2)
