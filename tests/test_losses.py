"""The three losses, against numbers worked out by hand."""
import pytest
import torch
from conftest import points

import sphere_latent as sl

A, B = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])            # two latents, N C = 2
IMAGE = torch.zeros(1, 3, 2, 2)
V, E = sl.spherify(points(0, 3, 16, 8)), points(1, 3, 16, 8)
SMALL, LARGE = sl.noisy_spherify(V, E, 0.2), sl.noisy_spherify(V, E, 1.2)    # the two views


def losses_of(decode, target=V, v=V, perceptual=None, **settings):
    """sphere_losses of three images with the labels 0, 1, 2 and the angles 0.2 and 1.2."""
    small, large = torch.full((3,), 0.2), torch.full((3,), 1.2)
    return sl.sphere_losses(decode, sl.spherify, v, target, torch.arange(3), E, small, large,
                            sl.Config(**settings), perceptual)


@pytest.mark.parametrize("loss, a, b, expected", [
    (sl.reconstruction_loss, A, B, (1 ** 2 + 2 ** 2) / 2),
    (sl.latent_consistency_loss, A, B, 1 - (1 * 0 + 2 * 4) / (5 ** 0.5 * 4)),
    (sl.reconstruction_loss, IMAGE, IMAGE + 0.5, 0.5 * 0.5 ** 2),            # images: smooth L1
    (sl.consistency_loss, IMAGE, IMAGE + 3.0, 3.0 - 0.5)])
def test_loss_by_hand(loss, a, b, expected):
    assert loss(a, b).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("weights, moves_small, moves_large", [
    ((1, 0, 0), True, False), ((0, 1, 0), False, True), ((0, 0, 1), False, True)])
def test_reconstruction_moves_z_hat_small_the_others_z_hat_large(weights, moves_small, moves_large):
    names = ("reconstruction_weight", "consistency_weight", "latent_consistency_weight")
    estimates, v = points(2, 6, 16, 8).requires_grad_(), V.clone().requires_grad_()
    losses_of(lambda views, labels: estimates, v=v, **dict(zip(names, weights)))["total"].backward()
    moved = [gradient.abs().sum().item() > 0 for gradient in estimates.grad.chunk(2)]
    assert moved == [moves_small, moves_large] and v.grad is None


def test_losses_where_decode_gives_its_input_back():
    """Each is then a known distance between v, z and the two views, the small one first."""
    def decode(views, labels):
        assert labels.tolist() == [0, 1, 2, 0, 1, 2]
        return views

    z = points(2, 3, 16, 8)
    cosine = torch.cosine_similarity(LARGE.flatten(1), V.flatten(1)).mean()
    expected = {"reconstruction": (SMALL - z).square().mean(), "latent_consistency": 1 - cosine,
                "consistency": (LARGE - SMALL).square().mean(),
                "perceptual": (SMALL - z).abs().max() + (LARGE - SMALL).abs().max()}
    expected["total"] = sum(w * loss for w, loss in zip((2, 5, 3, 1), expected.values()))
    losses = losses_of(decode, z, perceptual=lambda a, b: (a - b).abs().max(),
                       reconstruction_weight=2, consistency_weight=3, latent_consistency_weight=5)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
