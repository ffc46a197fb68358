"""The command of the README with half the updates, judged by a network that it has never seen."""
import csv
import sys

import pytest
from conftest import ROOT, WHOLE

import sphere_latent as sl

sys.path.insert(0, str(ROOT / "tests" / "experiments"))
from judge import Scores, judge_run  # noqa: E402


@pytest.mark.slow
def test_the_default_run_makes_flowers(default_run, monkeypatch):
    process, folder = default_run
    assert process.wait() == 0, (folder / "output").read_text()[-2000:]
    run = folder / "runs" / "drawn"
    for name in ("checkpoint.pt", "log.csv", "loss.png", "samples.png", "reconstructions.png"):
        assert (run / name).stat().st_size > 0
    with open(run / "evaluation.csv") as file:
        rows = {row["images"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["rebuilt", "1 step", "2 steps", "4 steps", "6 steps"]
    assert float(rows["rebuilt"]["psnr"]) > 29
    assert float(rows["4 steps"]["frechet_distance"]) < float(rows["1 step"]["frechet_distance"])

    drawn_images, size = WHOLE
    monkeypatch.setitem(sl.MODEL_SIZES, "tiny", size)
    train, held_out = drawn_images("train", 64), drawn_images("test", 64)
    scores = Scores(train, held_out)
    found = {what: score for what, _, score in judge_run(scores, run, held_out, step_counts=(1, 4))}
    assert found["rebuilt"]["named"] > 0.99
    assert found["4 steps"]["named"] > 0.95
    assert found["4 steps"]["judge"] < 0.11 < found["1 step"]["judge"]
    assert found["4 steps"]["seams"] < 2
