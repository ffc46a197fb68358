"""The sphere: its geometry, the noise angles, and the sampler that moves on it."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import sphere_latent as sl

SHAPE = (16, 8)
RADIUS = math.sqrt(16 * 8)
quietly = settings(max_examples=50, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)
angles = st.floats(0.01, 1.55)


def points(seed, shape=SHAPE):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(e, v):
    """e without its part along v, on the sphere."""
    return sl.spherify(e - (e * v).mean((1, 2), keepdim=True) * v)


def assert_close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, torch.as_tensor(b).expand_as(a), rtol=tolerance, atol=tolerance)


# ---- spherify

def test_spherify_by_hand():
    assert_close(sl.spherify(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0, 4.0]]) / 12.5 ** 0.5)


@given(seeds, st.sampled_from([(4, 2), (16, 8), (1, 64), (3, 5, 7), (200,)]), st.floats(0.1, 1e4))
@quietly
def test_spherify_has_norm_sqrt_L(seed, shape, scale):
    v = sl.spherify(scale * points(seed, shape))
    assert_close(v.flatten(1).norm(dim=1), math.sqrt(math.prod(shape)))


@given(seeds, st.floats(1e-3, 1e6))
@quietly
def test_spherify_keeps_the_direction(seed, scale):
    z = points(seed).flatten(1)
    assert_close(torch.cosine_similarity(sl.spherify(scale * z), z), 1.0, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spherify_gives_float32(dtype):
    z = points(0).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sl.spherify(z), sl.spherify(z.float()))


def test_zero_stays_zero_with_a_finite_gradient():
    z = torch.zeros(3, *SHAPE, requires_grad=True)
    v = sl.spherify(z)
    (v * points(0)).sum().backward()
    assert torch.equal(v, z) and z.grad.isfinite().all() and z.grad.abs().sum() > 0


# ---- noise

@given(seeds)
@quietly
def test_noisy_spherify_at_0_is_v_and_at_90_degrees_pure_noise(seed):
    v, e = sl.spherify(points(seed)), points(seed + 1)
    assert_close(sl.noisy_spherify(v, e, 0.0), v, 2e-6)
    assert_close(sl.noisy_spherify(v, e, math.pi / 2), sl.spherify(e), 1e-5)


@given(seeds, angles)
@quietly
def test_noisy_spherify_is_the_form_of_the_papers(seed, alpha):
    v, e = sl.spherify(points(seed)), points(seed + 1)
    assert_close(sl.noisy_spherify(v, e, alpha), sl.spherify(v + math.tan(alpha) * e))


@given(seeds, angles)
@quietly
def test_orthogonal_noise_tilts_by_exactly_the_angle(seed, alpha):
    v = sl.spherify(points(seed))
    e = orthogonal(points(seed + 1), v)
    assert_close(sl.angle_between(v, sl.noisy_spherify(v, e, alpha)), alpha)
    assert_close(sl.tilt(v, e, alpha).flatten(1).norm(dim=1), RADIUS)        # stays on the sphere


def test_each_image_has_its_own_angle():
    v, e = sl.spherify(points(0)), points(1)
    alpha = torch.tensor([0.1, 0.7, 1.5])
    alone = [sl.noisy_spherify(v[i:i + 1], e[i:i + 1], float(alpha[i])) for i in range(3)]
    assert_close(sl.noisy_spherify(v, e, alpha), torch.cat(alone))


# ---- angles and arcs

@pytest.mark.parametrize("alpha", [0.0, 1e-4, 1.0, math.pi])
def test_angle_between_is_exact_for_small_and_large_angles(alpha):
    v = sl.spherify(points(0))
    turned = sl.tilt(v, orthogonal(points(1), v), alpha)
    torch.testing.assert_close(sl.angle_between(v, turned), torch.full((3,), alpha),
                               rtol=1e-3, atol=1e-6)


def test_random_points_are_90_degrees_apart():
    degrees = torch.rad2deg(sl.angle_between(points(0, (64, 32)), points(1, (64, 32))))
    assert_close(degrees, 90.0, 0.1)


@given(seeds, st.floats(0, 1))
@quietly
def test_slerp_moves_at_constant_speed_on_the_shortest_arc(seed, t):
    a, b = sl.spherify(points(seed)), sl.spherify(points(seed + 1))
    p, whole = sl.slerp(a, b, t), sl.angle_between(a, b)
    assert_close(p.flatten(1).norm(dim=1), RADIUS)
    assert_close(sl.angle_between(a, p), t * whole, 1e-3)
    assert_close(sl.angle_between(p, b), (1 - t) * whole, 1e-3)


def test_slerp_begins_at_a_and_ends_at_b_with_one_share_an_image():
    a, b = sl.spherify(points(0)), sl.spherify(points(1))
    p = sl.slerp(a, b, torch.tensor([0.0, 1.0, 0.5]))
    assert_close(p, torch.stack([a[0], b[1], sl.spherify(a + b)[2]]))


@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-4, 1e-2])
def test_slerp_between_near_points_does_not_divide_by_zero(distance):
    a = sl.spherify(points(0))
    b = sl.tilt(a, orthogonal(points(1), a), distance)
    assert_close(sl.slerp(a, b, 0.5), sl.tilt(a, orthogonal(points(1), a), distance / 2), 1e-5)


# ---- the distribution of the noise angles

NOISE = {   # what has the given mean and standard deviation, as a function of tan(large) / tan(max)
    "logit-normal": (lambda tan: torch.logit(torch.atan(tan * math.tan(1.4)) / 1.4), 1.2, 0.7),
    "uniform": (lambda tan: torch.atan(tan * math.tan(1.4)) / 1.4, 0.5, 12 ** -0.5),
    "uniform-tangent": (lambda tan: tan, 0.5, 12 ** -0.5)}


@pytest.mark.parametrize("name", NOISE)
def test_distribution_of_the_large_angle(name, generator):
    config = sl.Config(noise_distribution=name, max_angle=math.degrees(1.4), noise_std=0.7)
    _, large = sl.sample_angles(4000, config, generator)
    level, mean, std = NOISE[name]
    values = level(large.tan() / math.tan(1.4))
    assert values.mean().item() == pytest.approx(mean, abs=0.04)
    assert values.std().item() == pytest.approx(std, abs=0.04)


@pytest.mark.parametrize("name", NOISE)
def test_tangent_of_the_small_angle_is_a_uniform_share_of_the_large_one(name, generator):
    config = sl.Config(noise_distribution=name, max_angle=85.0, small_ratio=0.4)
    small, large = sl.sample_angles(4000, config, generator)
    share = small.tan() / large.tan() / 0.4
    assert 0 <= share.min() and share.max() <= 1 + 1e-4
    assert share.mean().item() == pytest.approx(0.5, abs=0.02)
    assert share.std().item() == pytest.approx(12 ** -0.5, abs=0.02)


def test_uniform_tangents_have_one_value_in_each_part_of_the_range(generator):
    config = sl.Config(noise_distribution="uniform-tangent", max_angle=85.0)
    share = sl.sample_angles(8, config, generator)[1].tan() / math.tan(math.radians(85))
    assert torch.equal((8 * share).floor(), torch.arange(8.0))


def test_angles_are_finite_at_90_degrees(generator):
    for alpha in sl.sample_angles(100, sl.Config(noise_mean=20.0), generator):
        assert alpha.isfinite().all() and 0 <= alpha.min() and alpha.max() <= math.pi / 2 + 1e-6


# ---- sampling

@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    denoiser = sl.Denoiser(SHAPE, 3, 32, 1, 2)
    torch.nn.init.normal_(denoiser.head.weight)                              # not the zero function
    return denoiser.eval().requires_grad_(False)


@pytest.mark.parametrize("sphere", [True, False])
def test_sample_follows_its_description(denoiser, sphere):
    """Denoise, tilt back by two thirds, then one third of the largest tilt, with new noise."""
    labels, noise = torch.tensor([0, 2, 1]), torch.stack([points(1), points(2), points(3)])
    project = sl.spherify if sphere else torch.Tensor.float
    expected = [project(noise[0])]
    expected.append(denoiser(expected[-1], labels))
    for k, angle in ((1, 2 / 3), (2, 1 / 3)):
        expected.append(project(sl.tilt(project(expected[-1]), noise[k], angle * 1.4)))
        expected.append(denoiser(expected[-1], labels))
    z, path = sl.sample(denoiser, labels, steps=3, largest_tilt=1.4, noise=noise, return_path=True,
                        sphere=sphere)
    assert_close(torch.stack(path), torch.stack(expected))
    assert torch.equal(z, path[-1])                          # the last estimate as it is


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_an_extrapolation_from_the_null_label(denoiser, scale):
    labels, noise = torch.tensor([0, 2, 1]), points(1)[None]
    null = sl.sample(denoiser, torch.full((3,), 3), steps=1, noise=noise)
    conditional = sl.sample(denoiser, labels, steps=1, noise=noise)
    guided = sl.sample(denoiser, labels, steps=1, noise=noise, cfg_scale=scale)
    assert_close(guided, null + scale * (conditional - null))


def test_sample_draws_its_noise_from_the_generator(denoiser):
    def draw(seed):
        return sl.sample(denoiser, torch.zeros(2).long(), generator=sl.seeded_generator(seed, 0))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_noise_of_an_image_depends_on_its_number_alone():
    one, six = sl.seeded_noise([2], SHAPE, 0, draws=1), sl.seeded_noise([0, 1, 2], SHAPE, 0, draws=6)
    assert six.shape == (6, 3, *SHAPE) and torch.equal(one[0, 0], six[0, 2])
    assert six.flatten(2).unique(dim=1).shape[1] == 3        # other images have other noise
    assert not torch.equal(six[0], six[1])                   # and so have other steps
