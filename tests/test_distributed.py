"""Two processes under torchrun, on the CPU, train as one; none is left when one of them ends."""
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from conftest import SMALL, fewer_drawings                   # it knows where the next one is
import sphere_latent as sl

FLAGS = [*SMALL, "--precision", "float32", "--batch-size", "10", "--micro-batch", "2",
         "--eval-samples", "110", "--autoencoder-steps", "2", "--train-steps", "2"]


def torchrun(out, *words):
    """Start two processes that train. Each keeps its first update in a file: see below."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", __file__, str(out), "train", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sphere-latent", "sphere-encoder"])
def test_two_processes_train_with_the_gradient_of_the_whole_batch(tmp_path, method):
    run = tmp_path / "run"
    process = torchrun(tmp_path, *FLAGS, "--method", method, "--out", str(run))
    assert process.communicate(timeout=300)[0] and process.returncode == 0
    first, second = [torch.load(tmp_path / f"update{rank}", weights_only=True) for rank in (0, 1)]
    sizes = [len(part[0]) for part in first["inputs"]]
    assert sizes == [2, 2, 1]                                # the last micro-batch is smaller
    for a, b in zip(first["inputs"], second["inputs"]):
        assert not torch.equal(a[0], b[0]) and not torch.equal(a[2], b[2])   # images and noise
    torch.testing.assert_close(first["gradients"], second["gradients"], rtol=0, atol=0)

    config = sl.read_checkpoint(run)["config"]
    model = (sl.SphereEncoder(config, 12) if method == "sphere-encoder"
             else sl.denoiser_for(config, (4, 8), 12))
    model.load_state_dict(first["model"])
    inputs = [torch.cat(tensors) for tensors in zip(*first["inputs"], *second["inputs"])]
    sl.loss_function(config, torch.device("cpu"))(model, *inputs, config)["total"].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.testing.assert_close(first["gradients"], gradients, rtol=0, atol=1e-5)

    rows = [line.split(",") for line in (run / "evaluation.csv").read_text().splitlines()[1:]]
    for row, alone in zip(rows, sl.evaluate({"run": sl.load_run(run)}), strict=True):
        assert float(row[-1]) == pytest.approx(float(alone["frechet_distance"]), abs=2e-3)
    longer = ["--resume", str(run), "--train-steps"]
    assert sl.main(["train", *longer, "3"]) == 0             # with one process
    assert torchrun(tmp_path, *longer, "4").wait(timeout=300) == 0           # and with two again
    assert [row["step"] for row in sl.read_checkpoint(run)["log"]] == [2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "error"])
def test_no_process_is_left_after_half_a_minute(tmp_path, how):
    process = torchrun(tmp_path, *FLAGS, "--train-steps", "1000", "--out", str(tmp_path / "run"))
    while not (tmp_path / "update0").exists() or not (tmp_path / "update1").exists():
        assert process.poll() is None
        time.sleep(0.1)
    if how == "SIGTERM":
        process.terminate()
    else:
        (tmp_path / "fail").touch()                          # see below
    process.communicate(timeout=30)                          # until nobody writes to the pipe
    assert process.returncode != 0


def main(out, words):
    """One of the two processes. It writes what its first update was made of, and made."""
    sl.drawn_images, sl.MODEL_SIZES["tiny"] = fewer_drawings, (64, 2, 2)     # as in the tests
    step = sl.training_step

    def training_step(network, average, optimizer, batch, config, generator, loss_of):
        found = {"model": {name: x.clone() for name, x in network.module.state_dict().items()},
                 "inputs": []}

        def losses(network, *inputs):
            found["inputs"].append(inputs[:5])
            return loss_of(network, *inputs)

        result = step(network, average, optimizer, batch, config, generator, losses)
        found["gradients"] = [p.grad for p in network.parameters() if p.grad is not None]
        if not (out / f"update{sl.rank()}").exists():
            torch.save(found, out / f"update{sl.rank()}")
        if sl.rank() == 1 and (out / "fail").exists():
            raise RuntimeError("a fault in one process")
        return result

    sl.training_step = training_step
    return sl.main(words)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2:]))
