"""Fréchet distance against what is known."""
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import sphere_latent as sl


def random_gaussian(seed, n=12):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return a[0], a @ a.T


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    mean, cov = random_gaussian(0)
    assert sl.frechet_distance(mean, cov, mean + 0.5, cov) == pytest.approx(12 * 0.25)
    assert sl.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-8)


def test_diagonal_case_by_hand():
    assert sl.frechet_distance([0.0, 0.0], np.diag([1.0, 4.0]), [1.0, 0.0], np.diag([9.0, 4.0])) == pytest.approx(5)


@pytest.mark.parametrize("seed", range(5))
def test_against_scipy_sqrtm(seed):
    (m1, c1), (m2, c2) = random_gaussian(seed), random_gaussian(seed + 100)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert sl.frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-6)


def test_singular_covariances_are_allowed():
    cov = np.diag([1.0, 0.0])
    assert sl.frechet_distance([0, 0], cov, [0, 0], np.diag([0.0, 1.0])) == pytest.approx(2)


def test_features_see_a_difference_and_tell_better_from_worse(generator):
    images = sl.drawn_images("test", 64).pixels[:200] / 255
    half, other = sl.gaussian(images[:100]), sl.gaussian(images[100:])
    blurred = F.interpolate(F.avg_pool2d(images[:100], 8), 64)
    grainy = (images[:100] + 0.2 * torch.randn(100, 3, 64, 64, generator=generator)).clamp(0, 1)
    same = sl.frechet_distance(*half, *other)
    for worse in (blurred, grainy, torch.rand(100, 3, 64, 64, generator=generator)):
        assert 0 <= same < 0.8 * sl.frechet_distance(*sl.gaussian(worse), *other)


def test_features_are_the_same_for_everyone_and_leave_the_seed_alone(generator):
    """They belong to no run: neither a seed nor the size of a batch changes them."""
    images, before = torch.rand(5, 3, 16, 16, generator=generator), torch.random.get_rng_state()
    features = sl.untrained_features(images)
    assert features.shape == (5, 256) and torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(7)
    torch.testing.assert_close(sl.untrained_features(images[:2]), features[:2], rtol=1e-4, atol=1e-5)
    mean, cov = sl.gaussian(images)
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(cov, torch.from_numpy(np.cov(features.double().numpy().T)))

