"""Fréchet distance against what is known."""
import numpy as np
import pytest
import scipy.linalg
import torch

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


def test_features_see_a_difference(run):
    _, autoencoder, _ = sl.load_run(run)
    images = sl.drawn_images("test", 16).pixels[:200] / 255
    a, b, noise = (sl.latent_gaussian(autoencoder, x) for x in (images[:100], images[100:], torch.rand(100, 3, 16, 16)))
    assert 0 <= sl.frechet_distance(*a, *b) < 0.2 * sl.frechet_distance(*a, *noise)
