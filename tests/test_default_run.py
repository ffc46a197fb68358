"""The command of the README, whole, and an independent judge of what it made."""
import os

import numpy as np
import pytest

import sphere_latent as sl
from judge import judge_run, train_judge


@pytest.mark.slow
def test_default_run_makes_flowers(default_run, whole):
    judge, right = train_judge(sl.drawn_images("train", 64), sl.drawn_images("test", 64))
    process, folder = default_run                                   # it may train still
    _, status, used = os.wait4(process.pid, 0)
    said = (folder / "out").read_text()
    assert status == 0, (folder / "err").read_text()[-2000:]
    assert said.count("Fréchet distance") == 5
    run, memory = folder / "runs/drawn", used.ru_maxrss / 2 ** 20                    # GiB on Linux
    results = judge_run(judge, run, 300, {"1": {"steps": 1}, "4": {"steps": 4}})
    print(f"\n{memory:.2f} GiB, judge {right:.3f}, {results}\n{said}")
    assert right >= 0.97                                            # the judge knows its flowers
    assert results["4"][0] >= 0.95                                  # and recognises the samples
    assert results["4"][1] < results["1"][1]                        # four steps are better than one
    rows = np.genfromtxt(run / "frechet.csv", delimiter=",", names=True)
    assert rows["frechet_distance"][2] < rows["frechet_distance"][0]
    assert memory < 3
    for name in ("samples.png", "loss.png", "reconstructions.png"):
        assert (run / name).stat().st_size > 5000
