"""The three losses: what each compares, and what it moves."""
import pytest
import torch
from conftest import points

import sphere_latent as sl

Z, E = 3 * points(0, 3, 16, 8), points(1, 3, 16, 8)
V = sl.spherify(Z)
SMALL, LARGE = sl.noisy_spherify(V, E, 0.2), sl.noisy_spherify(V, E, 1.2)    # the noisy points


def losses_of(denoiser, *weights):
    """sphere_losses of three latents with the labels 0, 1, 2 and the angles 0.2 and 1.2."""
    names = ("reconstruction_weight", "consistency_weight", "latent_consistency_weight")
    config = sl.Config(**dict(zip(names, weights)))
    small, large = torch.full((3,), 0.2), torch.full((3,), 1.2)
    return sl.sphere_losses(denoiser, Z, torch.arange(3), E, small, large, config)


@pytest.mark.parametrize("weights, moves_small, moves_large", [
    ((1, 0, 0), True, False), ((0, 1, 0), False, True), ((0, 0, 1), False, True)])
def test_reconstruction_moves_z_hat_small_the_others_z_hat_large(weights, moves_small, moves_large):
    estimates = points(2, 6, 16, 8).requires_grad_()
    losses_of(lambda x, labels: estimates, *weights)["total"].backward()
    moved = [gradient.abs().sum().item() > 0 for gradient in estimates.grad.chunk(2)]
    assert moved == [moves_small, moves_large]


def test_losses_of_a_denoiser_that_gives_its_input_back():
    """Each is then a known distance between z, v and the two noisy points, the small one first."""
    def denoiser(x, labels):
        assert labels.tolist() == [0, 1, 2, 0, 1, 2]
        return x

    cosine = torch.cosine_similarity(LARGE.flatten(1), V.flatten(1)).mean()
    expected = {"reconstruction": (SMALL - Z).square().mean(), "latent_consistency": 1 - cosine,
                "consistency": (LARGE - SMALL).square().mean()}
    expected["total"] = sum(w * loss for w, loss in zip((2, 5, 3), expected.values()))
    torch.testing.assert_close(losses_of(denoiser, 2, 3, 5), expected, rtol=1e-5, atol=1e-5)
