"""Fréchet distance, Inception, and the statistics of features."""
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import inception_v3

import sphere_latent as sl


def test_frechet_distance_against_scipy():
    random = np.random.default_rng(0)
    (m_a, m_b), (x, y) = random.normal(size=(2, 12)), random.normal(size=(2, 12, 12))
    a, b = x @ x.T, y @ y.T
    expected = ((m_a - m_b) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert sl.frechet_distance(m_a, a, m_b, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [299, 64])
def test_inception_is_the_network_of_fid(tmp_path, monkeypatch, generator, size):
    """torchvision's network, with another average pool put under it: the ninth one is a maximum."""
    torch.manual_seed(0)
    network = inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    images = torch.rand(2, 3, size, size, generator=generator)
    features, logits = sl.InceptionFID(tmp_path / "weights.pth")(images)
    average_pool, pooled = F.avg_pool2d, []                  # what each average pool is given

    def pool(x, **options):
        pooled.append(x)
        if len(pooled) == 9:
            return F.max_pool2d(x, 3, 1, 1)
        return average_pool(x, 3, 1, 1, count_include_pad=False)
    monkeypatch.setattr(F, "avg_pool2d", pool)
    network.avgpool.register_forward_hook(lambda *inputs: pooled.append(inputs[-1].flatten(1)))
    expected = network(2 * F.interpolate(images, (299, 299), mode="bilinear") - 1)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and len(pooled) == 10
    for found, wanted in ((features, pooled[9]), (logits, expected)):
        assert (found - wanted).abs().max() < 1e-3 * wanted.std()


class FewFeatures(nn.Module):
    """In the place of Inception: 48 features and 10 logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(48, 10)

    def forward(self, images):
        features = 9 * F.adaptive_avg_pool2d(images, 4).flatten(1)
        return features, self.fc(features)


def test_statistics_are_those_of_all_batches_at_once_in_8_bits(generator):
    network, images = FewFeatures(), torch.randint(256, (50, 3, 8, 8), generator=generator)
    features, logits = network(images / 255)
    noise = 0.98 * torch.rand(images.shape, generator=generator) - 0.49      # is rounded away
    mean, covariance, score = sl.feature_statistics(network, ((images + noise) / 255).split(16))
    torch.testing.assert_close(mean, features.double().mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(covariance, torch.cov(features.double().T), rtol=0, atol=1e-5)
    p = (logits - network.fc.bias).double().softmax(1)       # the Inception Score leaves it out
    divergence = (p * (p.log() - p.mean(0).log())).sum(1).mean()
    assert score == pytest.approx(divergence.exp().item(), rel=1e-5)
