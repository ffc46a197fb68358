"""The sphere: its geometry, and the angles of the noise."""
import math

import pytest
import torch
from conftest import points

import sphere_latent as sl


@pytest.mark.parametrize("shape", [(4, 2), (16, 8), (1, 64), (3, 5, 7), (200,)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
def test_spherify_scales_to_norm_sqrt_L(shape, scale):
    z = scale * points(0, 3, *shape).flatten(1)
    expected = z / z.norm(dim=1, keepdim=True) * math.sqrt(math.prod(shape))
    found = sl.spherify(z.view(3, *shape)).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_noisy_spherify_at_0_is_v_and_at_90_degrees_pure_noise():
    v, e = sl.spherify(points(0, 3, 16, 8)), points(1, 3, 16, 8)
    torch.testing.assert_close(sl.noisy_spherify(v, e, 0.0), v)
    torch.testing.assert_close(sl.noisy_spherify(v, e, math.pi / 2), sl.spherify(e))


def test_orthogonal_noise_tilts_each_image_by_exactly_its_angle():
    v, e = sl.spherify(points(0, 5, 16, 8)), points(1, 5, 16, 8)
    e = sl.spherify(e - (e * v).mean((1, 2), keepdim=True) * v)
    alphas = torch.tensor([0.0, 1e-4, 0.3, 1.0, 1.55])       # one for each image
    found = sl.angle_between(v, sl.noisy_spherify(v, e, alphas))
    torch.testing.assert_close(found, alphas, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name, level, mean, std", [
    ("logit-normal", lambda large: torch.logit(large / 1.4), 1.2, 0.7),
    ("uniform", lambda large: large / 1.4, 0.5, 12 ** -0.5),
    ("uniform-tangent", lambda large: large.tan() / math.tan(1.4), 0.5, 12 ** -0.5)])
def test_distribution_of_the_noise_angles(name, level, mean, std, generator):
    config = sl.Config(noise_distribution=name, max_angle=math.degrees(1.4), noise_std=0.7)
    small, large = sl.sample_angles(4000, config, generator)
    share = 2 * small.tan() / large.tan()                    # of small_ratio, which is 0.5
    for values, m, s in ((level(large), mean, std), (share, 0.5, 12 ** -0.5)):
        assert values.mean().item() == pytest.approx(m, abs=0.04)
        assert values.std().item() == pytest.approx(s, abs=0.04)
