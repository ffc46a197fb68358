"""Two processes under torchrun, on the CPU, make the run that one process makes."""
import subprocess
import sys

import pytest
import torch

from conftest import SMALL, fewer_drawings                   # it knows where the next one is
import sphere_latent as sl

SPHERE_ENCODER = [*SMALL[:6], *SMALL[8:], "--method", "sphere-encoder"]      # of other autoencoder


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[*SMALL, "--accumulate", "2"], SPHERE_ENCODER],
                         ids=["sphere-latent", "sphere-encoder"])
def test_two_processes_train_sample_and_measure_as_one(tmp_path, flags):
    one, two = tmp_path / "one", tmp_path / "two"
    assert sl.main(["train", *flags, "--out", str(one)]) == 0
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "2", __file__, "train", *flags, "--out", str(two)],
                   check=True, timeout=300)
    a, b = sl.read_checkpoint(one), sl.read_checkpoint(two)
    for part in ("model", "average"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=1e-5)
    for row, other in zip(a["log"], b["log"], strict=True):
        del row["seconds"], other["seconds"]                 # losses and the norm of the gradient
        assert other == pytest.approx(row, rel=1e-5, abs=1e-5)
    tables = [(run / "evaluation.csv").read_text().splitlines()[1:] for run in (one, two)]
    for row, other in zip(*tables, strict=True):             # the last column: Fréchet distance
        assert float(other.split(",")[-1]) == pytest.approx(float(row.split(",")[-1]), abs=2e-3)


if __name__ == "__main__":                                   # one of the two processes
    sl.drawn_images, sl.MODEL_SIZES["tiny"] = fewer_drawings, (64, 2, 2)     # as in the tests
    sys.exit(sl.main(sys.argv[1:]))
