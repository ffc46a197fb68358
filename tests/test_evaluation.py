"""The table: Fréchet distance, Inception, statistics, and what is compared with what."""
import csv
import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from conftest import fewer_drawings, points
from PIL import Image
from pytorch_fid import inception

import sphere_latent as sl

CPU = torch.device("cpu")


def test_frechet_distance_against_scipy():
    random = np.random.default_rng(0)
    (m_a, m_b), (x, y) = random.normal(size=(2, 12)), random.normal(size=(2, 12, 12))
    a, b = x @ x.T, y @ y.T
    expected = ((m_a - m_b) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert sl.frechet_distance(m_a, a, m_b, b) == pytest.approx(expected, rel=1e-6)


def test_features_for_fid_are_those_of_pytorch_fid_in_eval_mode(monkeypatch):
    class InceptionV3(nn.Module):                            # in the place of the large one
        def __init__(self):
            super().__init__()
            assert inception.load_state_dict_from_url("url", progress=True) == "weights"

        def forward(self, images):
            assert not self.training and images.dtype == torch.float32
            return [images.mean((2, 3), keepdim=True)]
    monkeypatch.setattr(inception, "InceptionV3", InceptionV3)
    monkeypatch.setattr(inception, "load_state_dict_from_url", None)         # and back again
    monkeypatch.setattr(sl, "fetch_inception", lambda: "weights")
    images = torch.rand(2, 3, 8, 8).bfloat16()
    torch.testing.assert_close(sl.InceptionFID()(images), images.float().mean((2, 3)))


class FewFeatures(nn.Module):
    """In the place of Inception: the 12 colours of a coarse image."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0), requires_grad=False)

    def forward(self, images):
        return self.scale * F.adaptive_avg_pool2d(images, 2).flatten(1)


def statistics(images):
    features = FewFeatures()((255 * images).round() / 255).double()
    return features.mean(0), torch.cov(features.T)


def test_statistics_are_those_of_all_images_in_8_bits_and_in_shares(generator, monkeypatch):
    pixels = torch.randint(256, (250, 3, 8, 8), generator=generator)
    noise = 0.98 * torch.rand(pixels.shape, generator=generator) - 0.49      # is rounded away
    features = FewFeatures()(pixels / 255).double()
    expected = features.mean(0), torch.cov(features.T)
    found = sl.feature_statistics(FewFeatures(), ((pixels + noise) / 255).split(16))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    images, sums = sl.Images(torch.zeros(250), ["a"], pixels=pixels.byte()), []

    def share(process, sum_over_processes):
        for name, function in (("rank", lambda: process), ("world_size", lambda: 2),
                               ("sum_over_processes", sum_over_processes)):
            monkeypatch.setattr(sl, name, function)
        return sl.feature_statistics(FewFeatures(), sl.all_batches(images, CPU))
    share(1, lambda x: sums.append(x.clone()))
    found = share(0, lambda x: x.add_(sums.pop(0)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Pixels(nn.Module):
    """An autoencoder whose latents are the pixels; it darkens what it decodes."""
    latent_shape = (1, 192)

    def __init__(self, light):
        super().__init__()
        self.light = nn.Parameter(torch.full((5,), light), requires_grad=False)

    def encode(self, images):
        return images.flatten(1)[:, None]

    def decode(self, z):
        return (self.light[0] * z.view(-1, 3, 8, 8)).clamp(0, 1)


@pytest.mark.parametrize("autoencoder", ["dinov2-b", "tiny"])
def test_what_each_row_compares(monkeypatch, capsys, autoencoder):
    def sample(denoiser, labels, steps, *options):           # shows labels and steps
        z = 0.2 + labels.view(-1, 1, 1) / 5 + 0.1 * steps
        return z + 0.1 * points(steps, 60, 1, 192)[:len(labels)]

    for name in ("InceptionFID", "UntrainedFeatures"):
        monkeypatch.setattr(sl, name, FewFeatures)
    monkeypatch.setattr(sl, "sample", sample)
    config = sl.Config(image_size=8, eval_samples=30, autoencoder=autoencoder)
    denoiser, runs = nn.Linear(2, 2, bias=False).requires_grad_(False), {}
    denoiser.num_classes, denoiser.latent_shape = 4, (1, 192)
    for light in (0.8, 0.6):
        runs[f"run {light}"] = config, Pixels(light), denoiser
    x, others = [(0.15 * points(count, count, 3, 8, 8) + 0.5).clamp(0, 1) for count in (120, 150)]
    x, others = [(255 * images).byte() for images in (x, 0.8 * others)]
    train, held_out = [sl.Images(torch.zeros(len(pixels)), "abcd", pixels=pixels)
                       for pixels in (others, x)]
    monkeypatch.setattr(sl, "load_both_splits", lambda config: (train, held_out))
    monkeypatch.setattr(sl, "load_images", lambda config, split: held_out)
    rows, x = sl.evaluate(runs), x / 255
    out = capsys.readouterr().out
    reference, unit = statistics(x), statistics(x)[1].trace()
    assert ("FID-30 to 150 training images" in out) == (autoencoder == "dinov2-b")
    assert ("30 samples to 120 held-out images" in out) == (autoencoder == "tiny")
    if autoencoder == "dinov2-b":
        reference, unit = statistics(others / 255), 1.0
    for name, (_, model, _) in runs.items():
        rebuilt = (x * model.light[0]).clamp(0, 1)
        expected = {"rebuilt": sl.frechet_distance(*statistics(rebuilt), *statistics(x))}
        for steps, what in ((1, "1 step"), (2, "2 steps"), (4, "4 steps"), (6, "6 steps")):
            samples = model.decode(sample(denoiser, torch.arange(30) % 4, steps))
            expected[what] = sl.frechet_distance(*statistics(samples), *reference)
        psnr = -10 * (x - rebuilt).square().mean((1, 2, 3)).log10().mean()
        assert float(rows[0]["psnr"]) == pytest.approx(psnr.item(), abs=0.006)
        for what, distance in expected.items():
            row = rows.pop(0)
            assert (row["run"], row["images"], row["parameters"]) == (name, what, 9)
            assert float(row["frechet_distance"]) == pytest.approx(float(distance / unit), abs=1e-4)
            assert f"{what}  " in out and row["frechet_distance"] in out
    assert rows == [] and sl.balanced_labels(4, 1000).tolist() == [0, 250, 500, 750]


def test_what_each_picture_shows(small_run, monkeypatch):
    """With twelve classes or more an image of each, with fewer several of the same."""
    run, sheets, words = sl.load_run(small_run), [], []

    def picture(path, rows, *names):
        sheets.append(rows)
        words.append((path, *names))
    images, held_out = fewer_drawings("train", 16), fewer_drawings("test", 16)
    monkeypatch.setattr(sl, "picture", picture)
    sl.sample_figure(run, images, "samples.png")
    sl.reconstruction_figure(run, held_out, CPU, "rebuilt.png")
    samples = [sl.sample_images(run, torch.arange(12), steps) for steps in (1, 2, 4, 6)]
    x = held_out.pixels[::4] / 255
    rebuilt = run[1].decode(run[1].encode(x))
    names = ["training image", "steps: 1", "steps: 2", "steps: 4", "steps: 6"]
    psnr = -10 * (x - rebuilt).square().mean((1, 2, 3)).log10().mean().item()
    torch.testing.assert_close(sheets, [[images.pixels[:12] / 255, *samples], [x, rebuilt]])
    assert words == [("samples.png", names, images.classes),
                     ("rebuilt.png", ["image", f"rebuilt, {psnr:.1f} dB"])]
    two = sl.Images(torch.arange(240) // 234, ["many", "few"], pixels=images.pixels)
    sl.sample_figure(run, two, "samples.png")
    few, many = images.pixels[234:] / 255, images.pixels[:6] / 255
    torch.testing.assert_close(sheets[-1][0], torch.stack([many, few], 1).flatten(0, 1))


def test_a_sheet_shows_rows_from_top_to_bottom(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: (
        figures.append(figure), save(figure, *arguments, **options)))
    colours = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 1, 0], [0, 1, 1], [1, 0, 1]]])
    rows = colours[..., None, None].expand(2, 3, 3, 8, 8).float()
    sl.picture(tmp_path / "a.png", list(rows), ["up", "down"], ["$x", "y", "z"])
    with Image.open(tmp_path / "a.png") as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))            # [H, W, 3]
    centres = [(pixels == 255 * colour).all(2).nonzero().float().mean(0)
               for colour in colours.flatten(0, 1)]
    y, x = torch.stack(centres).view(2, 3, 2).unbind(2)
    side = y[1, 0] - y[0, 0]
    assert side > 100 and (x.diff(dim=1) - side).abs().max() < 2
    assert y[:, 0].diff() > 0 and (y - y[:, :1]).abs().max() < 2
    [axes] = figures[0].axes
    for axis, names in ((axes.xaxis, ["$x", "y", "z"]), (axes.yaxis, ["up", "down"])):
        assert axis.get_ticklocs().tolist() == [4, 12, 20][:len(names)]      # in the middle
        assert [label.get_text() for label in axis.get_ticklabels()] == names


@pytest.mark.parametrize("change", [
    {"dataset": "folder"}, {"data_dir": "x"}, {"image_size": 32}, {"eval_samples": 40},
    {"autoencoder": "dinov2-b"}])
def test_runs_that_differ_are_not_compared(small_run, change):
    config, *models = sl.load_run(small_run)
    other = dataclasses.replace(config, **change)
    with pytest.raises(sl.UserError, match="one by one"):
        sl.evaluate({"a": (config, *models), "b": (other, *models)})


def test_evaluate_prints_again_what_train_has_found(small_run, capsys):
    assert sl.main(["evaluate", "--checkpoint", str(small_run), str(small_run)]) == 0
    lines = capsys.readouterr().out.strip().split("\n")[-5:]
    with open(small_run / "evaluation.csv") as file:
        rows = list(csv.DictReader(file))
    for line, row in zip(lines, rows, strict=True):
        assert line.split()[-1] == row["frechet_distance"] and row["images"] in line
