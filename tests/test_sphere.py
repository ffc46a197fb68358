"""The geometry of the sphere, the noise angles and the three losses."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import sphere_latent as sl

L = 16 * 8


def latents(seed, batch=3):
    return torch.randn(batch, 16, 8, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.floats(1e-2, 1e4))
@settings(max_examples=50, deadline=None)
def test_spherify_has_norm_sqrt_L_and_keeps_the_direction(seed, scale):
    z = latents(seed)
    v = sl.spherify(scale * z)
    torch.testing.assert_close(v.flatten(1).norm(dim=1), torch.full((3,), math.sqrt(L)), rtol=1e-2, atol=0)
    torch.testing.assert_close(v, sl.spherify(z), rtol=1e-2, atol=1e-2)
    if scale >= 1:                                           # the 1e-6 under the root is not felt
        torch.testing.assert_close(sl.spherify(v), v, rtol=1e-5, atol=1e-5)


def test_spherify_is_fp32_under_autocast_and_in_half():
    z = latents(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert sl.spherify(z).dtype == torch.float32
        assert torch.equal(sl.spherify(z), F.rms_norm(z, z.shape[1:], eps=1e-6))
    assert sl.spherify(z.bfloat16()).dtype == torch.float32


def test_zero_latent_stays_zero_with_a_finite_gradient():
    z = torch.zeros(2, 16, 8, requires_grad=True)
    sl.latent_consistency_loss(sl.spherify(z), latents(0, 2)).backward()
    assert torch.equal(sl.spherify(z.detach()), torch.zeros(2, 16, 8)) and z.grad.isfinite().all()


@given(st.integers(0, 10_000), st.floats(0.01, 1.4))
@settings(max_examples=50, deadline=None)
def test_noisy_spherify_is_the_tangent_form_and_tilts_by_the_angle(seed, alpha):
    v, e = sl.spherify(latents(seed)), latents(seed + 1)
    noisy = sl.noisy_spherify(v, e, alpha)
    torch.testing.assert_close(noisy, sl.spherify(v + math.tan(alpha) * e), rtol=1e-4, atol=1e-4)
    # exact for noise at right angles to v and of the same length
    e = sl.spherify(e - (e * v).mean((1, 2), keepdim=True) * v)
    torch.testing.assert_close(sl.angle_between(v, sl.noisy_spherify(v, e, alpha)),
                               torch.full((3,), alpha), rtol=1e-4, atol=1e-5)


def test_noisy_spherify_at_its_ends_and_with_one_angle_an_image():
    v, e = sl.spherify(latents(0)), latents(1)
    torch.testing.assert_close(sl.noisy_spherify(v, e, 0.0), v)
    torch.testing.assert_close(sl.noisy_spherify(v, e, math.pi / 2), sl.spherify(e), atol=1e-5, rtol=1e-5)
    alpha = torch.tensor([0.1, 0.7, 1.5])
    both = sl.noisy_spherify(v, e, alpha)
    for i in range(3):
        torch.testing.assert_close(both[i:i + 1], sl.noisy_spherify(v[i:i + 1], e[i:i + 1], float(alpha[i])))


def test_random_points_are_ninety_degrees_apart():
    a, b = (torch.randn(500, 64, 32) for _ in range(2))
    degrees = torch.rad2deg(sl.angle_between(a, b))
    assert abs(degrees.mean() - 90) < 0.3 and degrees.std() < 2


def test_angle_between_is_exact_for_tiny_angles():
    v = sl.spherify(latents(0))
    assert sl.angle_between(v, v).max() < 1e-6
    torch.testing.assert_close(sl.angle_between(v, -v), torch.full((3,), math.pi))


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_slerp_stays_on_the_sphere_at_the_right_share_of_the_angle(seed, t):
    a, b = sl.spherify(latents(seed)), sl.spherify(latents(seed + 1))
    p = sl.slerp(a, b, t)
    torch.testing.assert_close(p.flatten(1).norm(dim=1), torch.full((3,), math.sqrt(L)), rtol=1e-4, atol=0)
    torch.testing.assert_close(sl.angle_between(a, p), t * sl.angle_between(a, b), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sl.slerp(a, a, t), a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["logit-normal", "uniform", "uniform-tangent"])
def test_angles(name, generator):
    config = sl.Config(noise_distribution=name, max_angle=85.0, small_ratio=0.5, noise_std=0.7)
    small, large = sl.sample_angles(4000, config, generator)
    assert (small >= 0).all() and (large <= math.radians(85) + 1e-6).all() and (small <= large).all()
    ratio = small.tan() / large.tan()
    assert ratio.max() <= 0.5 + 1e-3 and abs(ratio.mean() - 0.25) < 0.01
    level = {"logit-normal": torch.logit(large / math.radians(85)), "uniform": large / math.radians(85),
             "uniform-tangent": large.tan() / math.tan(math.radians(85))}[name]
    mean, std = {"logit-normal": (config.noise_mean, 0.7)}.get(name, (0.5, 12 ** -0.5))
    assert abs(level.mean() - mean) < 0.05 and abs(level.std() - std) < 0.05


def test_uniform_tangents_are_stratified_one_in_each_part_of_the_range(generator):
    config = sl.Config(noise_distribution="uniform-tangent", max_angle=85.0)
    share = sl.sample_angles(8, config, generator)[1].tan() / math.tan(math.radians(85))
    assert torch.equal((8 * share).floor(), torch.arange(8.0))
    alone = torch.stack([sl.sample_angles(1, config, generator)[1] for _ in range(50)])     # one image, all angles
    assert alone.min() < math.radians(60) and alone.max() > math.radians(80) and alone.unique().numel() == 50


def test_angles_are_finite_at_ninety_degrees(generator):
    config = sl.Config(noise_distribution="logit-normal", noise_mean=30.0, max_angle=90.0)
    assert all(alpha.isfinite().all() and (alpha >= 0).all() for alpha in sl.sample_angles(100, config, generator))


# ---- losses

def test_losses_by_hand():
    a, b = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])
    assert sl.reconstruction_loss(a, b) == 2.5 and sl.consistency_loss(a, b) == 2.5
    cosine = 8 / (math.sqrt(5) * 4)
    assert abs(float(sl.latent_consistency_loss(a, b)) - (1 - cosine)) < 1e-5
    image = torch.zeros(1, 3, 2, 2)
    assert abs(float(sl.reconstruction_loss(image, image + 0.5)) - 0.125) < 1e-6       # smooth L1: 0.5 * 0.5^2
    assert abs(float(sl.reconstruction_loss(image, image + 3.0)) - 2.5) < 1e-6         # and 3 - 0.5


def test_gradients_stop_where_the_paper_stops_them():
    a, b = latents(0).requires_grad_(), latents(1).requires_grad_()
    (sl.consistency_loss(a, b) + sl.latent_consistency_loss(a, b)).backward()
    assert a.grad.abs().sum() > 0 and b.grad is None
    b.grad, a.grad = None, None
    sl.reconstruction_loss(a, b.detach()).backward()
    assert a.grad.abs().sum() > 0


def test_sphere_losses_vanish_for_a_perfect_decoder_and_run_it_once():
    config, v, calls = sl.Config(), sl.spherify(latents(0)), []

    def decode(views, labels):
        calls.append((views, labels))
        return v.repeat(2, 1, 1)
    small, large = torch.full((3,), 0.2), torch.full((3,), 1.2)
    losses = sl.sphere_losses(decode, sl.spherify, v, v, torch.tensor([0, 1, 2]), latents(1), small, large, config)
    assert all(abs(float(loss)) < 1e-6 for loss in losses.values())
    (views, labels), = calls
    torch.testing.assert_close(views[:3], sl.noisy_spherify(v, latents(1), small))
    torch.testing.assert_close(views[3:], sl.noisy_spherify(v, latents(1), large))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_total_is_the_weighted_sum():
    config = sl.Config(reconstruction_weight=2.0, consistency_weight=3.0, latent_consistency_weight=5.0)
    v = sl.spherify(latents(0))
    losses = sl.sphere_losses(lambda x, y: 0.9 * x, sl.spherify, v, v, torch.zeros(3).long(), latents(1),
                              torch.full((3,), 0.3), torch.full((3,), 1.0), config)
    expected = 2 * losses["reconstruction"] + 3 * losses["consistency"] + 5 * losses["latent_consistency"]
    torch.testing.assert_close(losses["total"], expected)
    assert all(float(losses[name]) > 0.01 for name in losses)


def test_the_same_function_serves_images():
    """Sphere Encoder's form: decode gives images, encode comes back, the target is the image."""
    v, image = sl.spherify(latents(0)), torch.rand(3, 3, 8, 8)
    basis = torch.linalg.qr(torch.randn(192, 192))[0][:L]
    decode = lambda x, y: (x.flatten(1) @ basis).view(-1, 3, 8, 8)
    encode = lambda x: sl.spherify((x.flatten(1) @ basis.T).view(-1, 16, 8))
    losses = sl.sphere_losses(decode, encode, v, image, torch.zeros(3).long(), latents(1),
                              torch.zeros(3), torch.zeros(3), sl.Config())
    torch.testing.assert_close(losses["reconstruction"], F.smooth_l1_loss(decode(v, None), image))
    assert abs(float(losses["latent_consistency"])) < 1e-5 and abs(float(losses["consistency"])) < 1e-6
