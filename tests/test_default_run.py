"""The command of the README with no flags, run as a user runs it, and judged by a network it has never seen."""
import csv
import subprocess
import sys

import pytest
from conftest import ROOT

import sphere_latent as sl

sys.path.insert(0, str(ROOT / "tests" / "experiments"))


@pytest.mark.slow
def test_the_default_run_makes_flowers(tmp_path):
    command = [sys.executable, str(ROOT / "sphere_latent.py"), "train"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "drawn"
    for name in ("checkpoint.pt", "log.csv", "loss.png", "samples.png", "reconstructions.png"):
        assert (run / name).stat().st_size > 0
    with open(run / "evaluation.csv") as file:
        rows = {row["images"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["rebuilt", "1 steps", "2 steps", "4 steps", "6 steps"]
    assert float(rows["rebuilt"]["psnr"]) > 29
    assert float(rows["4 steps"]["frechet_distance"]) < float(rows["1 steps"]["frechet_distance"])

    from judge import Scores, judge_run
    train, held_out = sl.drawn_images("train", 64), sl.drawn_images("test", 64)
    scores = Scores(train, held_out)
    found = {what: score for what, _, score in judge_run(scores, run, held_out, step_counts=(1, 4))}
    assert found["rebuilt"]["named"] > 0.99
    assert found["4 steps"]["named"] > 0.98
    assert found["4 steps"]["judge"] < 0.07 < found["1 steps"]["judge"]
    assert found["4 steps"]["seams"] < 1.5
