"""The command of the README, whole, and an independent judge of what it made."""
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import sphere_latent as sl
from judge import judge_run, train_judge


# Where the CPU does not multiply bf16, the default takes about a quarter of an hour: there, two fifths of its updates.
UPDATES = [] if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else [
    "--autoencoder-steps", "450", "--train-steps", "700"]


@pytest.mark.slow
def test_default_run_makes_flowers(whole, tmp_path):
    began = time.time()
    done = subprocess.run([sys.executable, str(ROOT / "sphere_latent.py"), "train", *UPDATES], cwd=tmp_path,
                          capture_output=True, text=True)
    minutes = (time.time() - began) / 60
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Fréchet distance") == 5
    run = tmp_path / "runs/drawn"
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20         # GiB on Linux
    judge, right = train_judge(sl.drawn_images("train", 64), sl.drawn_images("test", 64))
    results = judge_run(judge, run, 300, {"1": {"steps": 1}, "4": {"steps": 4}})
    print(f"\n{minutes:.1f} minutes, {memory:.2f} GiB, judge {right:.3f}, {results}\n{done.stdout}")
    assert right >= 0.97                                            # the judge knows its flowers
    assert results["4"][0] >= 0.95                                  # and recognises the samples
    assert results["4"][1] < results["1"][1]                        # four steps are better than one
    rows = np.genfromtxt(run / "frechet.csv", delimiter=",", names=True)
    assert rows["frechet_distance"][2] < rows["frechet_distance"][0]
    assert memory < 3
    for name in ("samples.png", "loss.png", "reconstructions.png"):
        assert (run / name).stat().st_size > 5000
