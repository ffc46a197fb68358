"""Numbers that stay: defaults, all that is drawn at random and its order, rates, constants.

A change of the file that is not meant to change results fails here if it does. Whoever means to
change them writes the new numbers here. They are those of float32 on any CPU.
"""
import csv

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, WHOLE
from PIL import Image

import sphere_latent as sl


@pytest.mark.parametrize("flags, log, distances", [
    ([], [0.84004, 0.0034176, 0.67916, 0.91137, 2.40947],
     [0.1550, 3.2966, 3.2917, 3.2872, 3.2858]),
    (["--method", "sphere-encoder"], [0.014743, 0.0051687, 0.71162, 0.45007, 0.41681],
     [0.3354, 0.7576, 0.7574, 0.7573, 0.7573])])
def test_a_small_run(tmp_path, monkeypatch, capsys, flags, log, distances):
    """Losses, their weighted sum and the norm of the gradient; distances, rebuilt and sampled."""
    eigh = torch.linalg.eigh

    def with_one_sign(matrix):                               # of two that are both right
        values, vectors = eigh(matrix)
        return values, vectors * vectors.sum(0).sign()
    monkeypatch.setattr(torch.linalg, "eigh", with_one_sign)
    flags = [*SMALL, *flags, "--train-steps", "20", "--precision", "float32"]
    assert sl.main(["train", *flags, "--out", str(tmp_path)]) == 0
    assert "20/20" in capsys.readouterr().err                # the bar
    *_, (step, *losses, seconds) = csv.reader((tmp_path / "log.csv").open())
    assert step == "20" and list(map(float, losses)) == pytest.approx(log, rel=1e-3)
    rows = csv.DictReader((tmp_path / "evaluation.csv").open())
    found = [float(row["frechet_distance"]) for row in rows]
    assert found == pytest.approx(distances, rel=1e-3)


@pytest.mark.parametrize("dataset, images, epochs", [
    ("flowers", 8_189, 1000), ("animal-faces", 14_630, 1000), ("imagenet", 1_281_167, 800)])
def test_epochs_at_the_sizes_of_the_paper(dataset, images, epochs):
    config = sl.preset(dataset)
    assert config.train_steps * config.batch_size / images == pytest.approx(epochs, rel=0.03)
    assert sl.uses_rae(config) and config.eval_samples >= 50_000


def test_the_drawn_flowers():
    """Three of each of twelve kinds, looked at when they were kept."""
    drawn = sl.draw_flowers(torch.arange(36) % 12, 32, torch.Generator().manual_seed(0))
    with Image.open(ROOT / "tests/fixtures/drawn_flowers.png") as image:
        sheet = torch.from_numpy(np.array(image)).view(3, 32, 12, 32, 3)
    kept = sheet.permute(0, 2, 4, 1, 3).flatten(0, 1)                        # [36, 3, 32, 32]
    assert (255 * drawn - kept).abs().max() < 1
    splits = [WHOLE[0](split, 4) for split in ("train", "test")]
    assert [len(images) for images in splits] == [6000, 1200]
    pixels = torch.cat([images.pixels for images in splits])
    assert len(pixels.unique(dim=0)) == 7200                 # none twice, none in both
    for images in splits:
        assert images.labels.bincount().tolist() == [len(images) // 12] * 12
        assert images.classes[images.labels[9]] == "poppy"


@pytest.mark.parametrize("size, kept", [
    (32, [[[69, 224, 60], [53, 133, 200], [196, 30, 187]],
          [[215, 153, 37], [150, 37, 131], [36, 115, 218]],
          [[115, 116, 120], [136, 117, 116], [140, 140, 137]]]),
    (102, [[[218, 65, 146], [28, 208, 81], [225, 33, 196]],                  # half of 204
           [[224, 167, 76], [28, 63, 151], [220, 210, 130]],
           [[150, 213, 177], [129, 49, 58], [100, 191, 208]]])])
def test_a_photograph_becomes_a_square_as_in_adm(tmp_path, size, kept):
    """Compared with ADM's crop, pixel by pixel, when the numbers were kept."""
    y, x = np.indices((204, 301))
    waves = [127 + 100 * np.sin(k * x / 9 + y / 7) for k in (1, 2, 9)]
    Image.fromarray(np.stack(waves, 2).astype(np.uint8)).save(tmp_path / "a.png")
    found = sl.read_image(tmp_path / "a.png", size)[:, 3:36:12, 5:30:12]
    assert (found - torch.tensor(kept)).abs().max() <= 1
