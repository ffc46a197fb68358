"""Fréchet distance, Inception, and the statistics of features."""
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import inception

import sphere_latent as sl

EYE, ZERO = torch.eye(3), torch.zeros(3)


@pytest.mark.parametrize("mean, a, b, expected", [
    (ZERO, 2 * EYE, 2 * EYE, 0.0),
    (ZERO + 0.5, EYE, EYE, 3 * 0.5 ** 2),                                    # the means alone
    (ZERO, 4 * EYE, 9 * EYE, 3 * (2 - 3) ** 2),                              # standard deviations
    (ZERO, torch.diag(torch.tensor([1.0, 0, 0])), torch.diag(torch.tensor([0, 1.0, 0])), 2.0)])
def test_frechet_distance_by_hand(mean, a, b, expected):
    assert sl.frechet_distance(mean, a, ZERO, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_frechet_distance_against_scipy(seed):
    random = np.random.default_rng(seed)
    (m_a, m_b), (x, y) = random.normal(size=(2, 12)), random.normal(size=(2, 12, 12))
    a, b = x @ x.T, y @ y.T
    expected = ((m_a - m_b) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert sl.frechet_distance(m_a, a, m_b, b) == pytest.approx(expected, rel=1e-6)


# ---- Inception, written once more: torchvision's blocks with the pools of the original graph

def pool(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def block_a(m, x, pooled):
    return [m.branch1x1(x), m.branch5x5_2(m.branch5x5_1(x)),
            m.branch3x3dbl_3(m.branch3x3dbl_2(m.branch3x3dbl_1(x))), m.branch_pool(pooled)]


def block_c(m, x, pooled):
    twice = m.branch7x7dbl_3(m.branch7x7dbl_2(m.branch7x7dbl_1(x)))
    return [m.branch1x1(x), m.branch7x7_3(m.branch7x7_2(m.branch7x7_1(x))),
            m.branch7x7dbl_5(m.branch7x7dbl_4(twice)), m.branch_pool(pooled)]


def block_e(m, x, pooled):
    wide, twice = m.branch3x3_1(x), m.branch3x3dbl_2(m.branch3x3dbl_1(x))
    return [m.branch1x1(x), m.branch3x3_2a(wide), m.branch3x3_2b(wide),
            m.branch3x3dbl_3a(twice), m.branch3x3dbl_3b(twice), m.branch_pool(pooled)]


def reference_inception(network, images):
    """The features and logits of FID, from a plain torchvision network."""
    x = 2 * F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) - 1
    for name, m in network.named_children():
        kind = {"A": block_a, "C": block_c, "E": block_e}.get(type(m).__name__[-1])
        if name == "avgpool":
            features = x.mean((2, 3))
            return features, network.fc(features)
        if name.startswith("Mixed") and kind:
            pooled = F.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else pool(x)
            x = torch.cat(kind(m, x, pooled), 1)
        elif name != "AuxLogits":
            x = m(x)


@pytest.mark.slow
@pytest.mark.parametrize("size", [299, 64])
def test_inception_is_the_network_of_fid(tmp_path, size, generator):
    torch.manual_seed(0)
    network = inception.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    images = torch.rand(2, 3, size, size, generator=generator)
    with torch.no_grad():
        found = sl.InceptionFID(tmp_path / "weights.pth")(images)
        expected = reference_inception(network, images)
    for a, b, width in zip(found, expected, (2048, 1008)):
        assert a.shape == (2, width) and b.std() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


# ---- statistics

class FewFeatures(nn.Module):
    """In the place of Inception: 20 numbers of an image, and logits with a bias."""

    def __init__(self, generator):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 20, generator=generator))
        self.fc = nn.Linear(20, 10)

    def forward(self, images):
        features = F.adaptive_avg_pool2d(images, 4).flatten(1) @ self.weight
        return features, self.fc(features)


def test_statistics_are_those_of_all_batches_at_once(generator):
    network = FewFeatures(generator)
    images = torch.randint(256, (50, 3, 8, 8), generator=generator) / 255
    features, logits = network(images)
    mean, covariance, score = sl.feature_statistics(network, images.split(16))
    torch.testing.assert_close(mean, features.double().mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(covariance, torch.cov(features.double().T), rtol=0, atol=1e-5)
    p = (logits - network.fc.bias).double().softmax(1)       # the Inception Score leaves it out
    divergence = (p * (p.log() - p.mean(0).log())).sum(1).mean()
    assert score == pytest.approx(divergence.exp().item(), rel=1e-5)


def test_images_are_rounded_to_8_bits(generator):
    network, images = FewFeatures(generator), torch.full((3, 3, 8, 8), 100 / 255)
    mean, _, _ = sl.feature_statistics(network, [images])
    assert torch.equal(sl.feature_statistics(network, [images + 0.4 / 255])[0], mean)
    assert not torch.equal(sl.feature_statistics(network, [images + 0.6 / 255])[0], mean)


def test_untrained_features_are_the_same_for_everyone(generator):
    images, before = torch.rand(5, 3, 16, 16, generator=generator), torch.get_rng_state()
    features, _ = sl.UntrainedFeatures()(images)
    assert features.shape == (5, 256) and torch.equal(before, torch.get_rng_state())
    torch.manual_seed(7)
    torch.testing.assert_close(sl.UntrainedFeatures()(images[:2])[0], features[:2])


@pytest.mark.parametrize("spoil", [
    lambda x: F.interpolate(F.avg_pool2d(x, 8), 64), lambda x: 0.8 * x,
    lambda x: (x + 0.2 * torch.randn(x.shape, generator=torch.Generator())).clamp(0, 1)])
def test_untrained_features_tell_worse_images(spoil):
    images, network = sl.load_images(sl.Config(), "train").pixels / 255, sl.UntrainedFeatures()
    real, same, worse = [sl.feature_statistics(network, [x])[:2]
                         for x in (images[:120], images[120:], spoil(images[120:]))]
    assert sl.frechet_distance(*same, *real) < 0.8 * sl.frechet_distance(*worse, *real)


def test_psnr_by_hand():
    class Darker:
        parameters = nn.Linear(1, 1).parameters
        encode = staticmethod(lambda x: x)
        decode = staticmethod(lambda z: z - 0.1)
    y, psnr = sl.rebuild(Darker, torch.full((2, 3, 4, 4), 0.5))
    torch.testing.assert_close(psnr, torch.full((2,), 20.0))                 # -10 log10(0.1^2)
    torch.testing.assert_close(y, torch.full((2, 3, 4, 4), 0.4))
