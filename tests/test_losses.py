"""The three losses, against numbers worked out by hand."""
import pytest
import torch
import torch.nn as nn

import sphere_latent as sl

A, B = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])            # two latents, N C = 2
IMAGE = torch.zeros(1, 3, 2, 2)
LABELS = torch.tensor([0, 1, 2])
SMALL, LARGE = torch.full((3,), 0.2), torch.full((3,), 1.2)


def points(seed, batch=3):
    return torch.randn(batch, 16, 8, generator=torch.Generator().manual_seed(seed))


def losses_of(decode, v, target=None, e=points(1), config=sl.Config(), perceptual=None):
    target = v if target is None else target
    return sl.sphere_losses(decode, sl.spherify, v, target, LABELS, e, SMALL, LARGE, config,
                            perceptual)


@pytest.mark.parametrize("loss, a, b, expected", [
    (sl.reconstruction_loss, A, B, (1 ** 2 + 2 ** 2) / 2),
    (sl.consistency_loss, A, B, (1 ** 2 + 2 ** 2) / 2),
    (sl.latent_consistency_loss, A, B, 1 - (1 * 0 + 2 * 4) / (5 ** 0.5 * 4)),
    (sl.latent_consistency_loss, A, 7 * A, 0.0),                             # only the direction
    (sl.latent_consistency_loss, A, -A, 2.0),
    (sl.reconstruction_loss, IMAGE, IMAGE + 0.5, 0.5 * 0.5 ** 2),            # images: smooth L1
    (sl.consistency_loss, IMAGE, IMAGE + 3.0, 3.0 - 0.5)])
def test_loss_by_hand(loss, a, b, expected):
    assert loss(a, b).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", [sl.consistency_loss, sl.latent_consistency_loss])
def test_no_gradient_to_the_target(loss):
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    loss(a, b).backward()
    assert a.grad.abs().sum() > 0 and b.grad is None


@pytest.mark.parametrize("weights, to_small, to_large", [
    ((1.0, 0.0, 0.0), True, False), ((0.0, 1.0, 0.0), False, True), ((0.0, 0.0, 1.0), False, True)])
def test_which_estimate_each_loss_moves(weights, to_small, to_large):
    """Reconstruction moves the estimate from little noise, both others the one from much noise."""
    config = sl.Config(reconstruction_weight=weights[0], consistency_weight=weights[1],
                       latent_consistency_weight=weights[2])
    estimates = points(2, 6).requires_grad_()
    v = sl.spherify(points(0)).requires_grad_()
    losses_of(lambda views, labels: estimates, v, points(3), config=config)["total"].backward()
    small, large = estimates.grad.chunk(2)
    assert (small.abs().sum() > 0, large.abs().sum() > 0) == (to_small, to_large)
    assert v.grad is None or v.grad.abs().sum() == 0         # not to the clean point in any case


@pytest.mark.parametrize("spherify, noisy", [(True, sl.noisy_spherify), (False, sl.tilt)])
def test_decode_is_called_once_with_the_small_view_first(spherify, noisy):
    calls, v, e = [], sl.spherify(points(0)), points(1)

    def decode(views, labels):
        calls.append((views, labels))
        return views
    losses_of(decode, v, e=e, config=sl.Config(spherify=spherify))
    (views, labels), = calls
    torch.testing.assert_close(views, torch.cat([noisy(v, e, 0.2), noisy(v, e, 1.2)]))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_losses_are_zero_where_every_view_is_mapped_to_the_clean_point():
    v = sl.spherify(points(0))
    losses = losses_of(lambda views, labels: v.repeat(2, 1, 1), v)
    assert all(abs(loss.item()) < 1e-6 for loss in losses.values())


def test_losses_of_the_identity():
    """decode gives its input back: each loss is then a known distance between v and its views."""
    v, e, z = sl.spherify(points(0)), points(1), points(2)
    small, large = sl.noisy_spherify(v, e, 0.2), sl.noisy_spherify(v, e, 1.2)
    config = sl.Config(reconstruction_weight=2.0, consistency_weight=3.0,
                       latent_consistency_weight=5.0)
    losses = losses_of(lambda views, labels: views, v, z, e, config)
    expected = {"reconstruction": (small - z).square().mean(),
                "consistency": (large - small).square().mean(),
                "latent_consistency": 1 - torch.cosine_similarity(large.flatten(1),
                                                                  v.flatten(1)).mean()}
    expected["total"] = sum(w * loss for w, loss in zip((2, 3, 5), expected.values()))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_perceptual_distance_is_added_for_both_pairs():
    estimates, v, target = points(2, 6).requires_grad_(), sl.spherify(points(0)), points(3)

    def l1(a, b):
        return (a - b).abs().mean()
    losses = losses_of(lambda views, labels: estimates, v, target, perceptual=l1)
    small, large = estimates.chunk(2)
    torch.testing.assert_close(losses["perceptual"], l1(small, target) + l1(large, small))
    plain = losses_of(lambda views, labels: estimates, v, target)["total"]
    torch.testing.assert_close(losses["total"], plain + losses["perceptual"])
    losses["perceptual"].backward()
    assert torch.equal(estimates.grad[:3].sign(), (small - target).sign())   # stops at z_hat_small


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_perceptual_distance_against_its_definition(tmp_path, size, generator):
    """Unit vectors over the channels, squared differences, mean over places, sum of five depths."""
    from torchvision.models import vgg16
    torch.manual_seed(0)
    network = vgg16()
    torch.save(network.state_dict(), tmp_path / "vgg.pth")
    a, b = torch.rand(2, 2, 3, size, size, generator=generator)
    expected, layers = 0.0, nn.Sequential(*network.features)
    for last in (4, 9, 16, 23, 30):
        x, y = [layers[:last]((image - sl.IMAGENET_MEAN) / sl.IMAGENET_STD) for image in (a, b)]
        difference = x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)
        expected = expected + difference.square().sum(1).mean()
    torch.testing.assert_close(sl.PerceptualDistance(tmp_path / "vgg.pth")(a, b), expected,
                               rtol=1e-4, atol=1e-6)
