"""Training: a run that is stopped, wherever it may be, goes on as if nothing had happened."""
import csv
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import sphere_latent as sl
from conftest import ROOT, SMALL


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Here only weights matter. Pictures and distances would take longer than the training."""
    for name in ("sample_figure", "reconstruction_figure", "loss_figure"):
        monkeypatch.setattr(sl, name, lambda *arguments: None)
    monkeypatch.setattr(sl, "evaluate", lambda runs: [{"frechet_distance": 0.0}])


def train(folder, *flags):
    return sl.main(["train", *SMALL, "--save-every", "3", *flags, "--out", str(folder)])


def resume(folder, *flags):
    return sl.main(["train", "--resume", str(folder), "--device", "cpu", *flags])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A function: flags -> the folder of a run with these flags that was never stopped."""
    @functools.cache
    def run(*flags):
        folder = tmp_path_factory.mktemp("unbroken") / "run"
        assert train(folder, *flags) == 0
        return folder
    return run


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_weights(a, b, tolerance=0.0):
    """Two runs have the same model, average and autoencoder. No tolerance: bit for bit."""
    for part in ("model", "average", "autoencoder"):
        torch.testing.assert_close(saved(a)[part], saved(b)[part], rtol=0, atol=tolerance)


def read_log(folder):
    with open(folder / "log.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def at_update(number, action, monkeypatch):
    """Let `action` change the losses of update `number`, counted from 1, and of all after it."""
    original, calls = sl.sphere_losses, []

    def losses(*arguments):
        calls.append(arguments)
        computed = original(*arguments)
        return action(computed) if len(calls) >= number else computed
    monkeypatch.setattr(sl, "sphere_losses", losses)


class Killed(BaseException):
    """As kill -9: nothing in the program can react to it."""


def kill(losses):
    raise Killed


def send(number):
    def action(losses):
        os.kill(os.getpid(), number)
        return losses
    return action


# --------------------------------------------------------------------------------------------------
# Stop and go on
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, action, saved_step", [
    (1, kill, None),                                         # the autoencoder alone is finished
    (5, kill, 3),                                            # after the checkpoint of update 3
    (4, send(signal.SIGINT), 4),
    (1, send(signal.SIGTERM), 1),
], ids=["autoencoder only", "killed", "SIGINT", "SIGTERM"])
@pytest.mark.parametrize("flips", ["--flips", "--no-flips"])
def test_a_resumed_run_equals_the_unbroken_one(unbroken, tmp_path, monkeypatch, number, action,
                                               saved_step, flips):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_update(number, action, patch)
        try:
            assert train(folder, flips) == 130
        except Killed:
            pass
    assert (folder / "checkpoint.pt").exists() == (saved_step is not None)
    assert saved_step is None or saved(folder)["step"] == saved_step
    assert resume(folder) == 0
    assert_same_weights(folder, unbroken(flips))
    steps = [row["step"] for row in read_log(folder)]
    assert steps == sorted(set(steps)) and steps[-1] == 6


def test_a_stopped_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    at_update(2, send(signal.SIGINT), monkeypatch)
    assert train(tmp_path / "run") == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"python sphere_latent.py train --resume {tmp_path / 'run'}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("stage", ["config.json", "checkpoint.pt"], ids=["autoencoder", "denoiser"])
def test_a_signal_from_outside(whole, unbroken, tmp_path, number, stage):
    """Ctrl-C, and SIGTERM from a cluster's scheduler, sent to the program when a file is there."""
    for i in range(24):
        Image.new("RGB", (16, 16), (9 * i, 5 * i, 200)).save(tmp_path / f"{i}.png")
    flags = ["--data-dir", str(tmp_path), "--train-steps", "60", "--save-every", "20"]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sphere_latent.py"), "train", *SMALL,
         "--autoencoder-steps", "200", *flags, "--out", str(folder)], stderr=subprocess.PIPE)
    while not (folder / stage).exists():
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate()[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in error and "--resume" in error.splitlines()[-1]
    assert resume(folder) == 0
    assert_same_weights(folder, unbroken("--autoencoder-steps", "200", *flags))


def test_a_finished_run_can_be_trained_longer(unbroken, tmp_path, monkeypatch):
    folder = shutil.copytree(unbroken(), tmp_path / "run")
    monkeypatch.setattr(sl, "fit_tiny_rae", lambda *arguments: pytest.fail("trained once more"))
    assert resume(folder, "--train-steps", "9") == 0
    before, after = saved(unbroken()), saved(folder)
    assert after["step"] == 9
    torch.testing.assert_close(after["autoencoder"], before["autoencoder"], rtol=0, atol=0)
    assert not torch.equal(after["model"]["head.weight"], before["model"]["head.weight"])


def test_another_seed_gives_another_run(unbroken, tmp_path):
    assert train(tmp_path / "run", "--seed", "1") == 0
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "run", unbroken(), tolerance=1e-3)


# --------------------------------------------------------------------------------------------------
# One update
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step, share", [(0, 1 / 50), (24, 0.5), (49, 1), (500, 1), (750, 0.5),
                                         (999, 0.002)])
def test_the_learning_rate_warms_up_holds_and_decays(step, share):
    assert sl.learning_rate_at(step, 1000, 3e-3) == pytest.approx(3e-3 * share)


def test_the_loop_uses_that_learning_rate(unbroken):
    rate = saved(unbroken())["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(sl.learning_rate_at(5, 6, 3e-3))


def test_the_average_is_an_exponential_moving_average():
    average, model = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    expected = 0.9 * average.weight + 0.1 * model.weight
    sl.update_average(average, model, decay=0.9)
    torch.testing.assert_close(average.weight, expected)


def test_the_average_forgets_its_start_at_first(tmp_path, monkeypatch):
    """Its decay grows from update to update, up to --ema-decay."""
    decays = []
    monkeypatch.setattr(sl, "update_average", lambda average, model, decay: decays.append(decay))
    assert train(tmp_path / "run", "--ema-decay", "0.3") == 0
    assert decays == pytest.approx([2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3])


def test_a_batch_in_parts_gives_the_same_gradients(generator):
    config = sl.Config(image_size=16, patch_size=8, latent_channels=8, batch_size=8)
    z, labels = torch.randn(8, 4, 8, generator=generator), torch.arange(8) % 3
    results = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = sl.denoiser_for(config, (4, 8), num_classes=3)
        torch.nn.init.normal_(model.head.weight, std=0.1)    # else the other gradients are zero

        def losses(z, labels, e, alpha_small, alpha_large):
            return sl.sphere_losses(model, sl.spherify, sl.spherify(z), z, labels, e, alpha_small,
                                    alpha_large, config)
        config.accumulate = accumulate
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        sl.update(model, sl.Objective(model, losses), optimizer, z, labels, config, step=3)
        gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
        results.append([gradients, list(model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def spoil_loss(losses):
    return {name: loss * math.nan for name, loss in losses.items()}


def spoil_gradient(losses):
    """The loss keeps its value. Its gradient is not a number: infinity times zero."""
    return {**losses, "total": losses["total"] + (0 * losses["total"]).sqrt()}


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, spoil):
    at_update(6, spoil, monkeypatch)
    assert train(tmp_path / "run") == 2
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    state = saved(tmp_path / "run")
    assert state["step"] == 3                                # the last good one
    assert all(value.isfinite().all() for value in state["model"].values())


# --------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("file write failed")])
def test_a_failing_write_keeps_the_old_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pt"
    sl.save_checkpoint(path, {"step": 3})

    def fail_halfway(state, target):
        target.write_bytes(b"half")
        raise error
    monkeypatch.setattr(torch, "save", fail_halfway)
    with pytest.raises(sl.UserError, match="kept"):
        sl.save_checkpoint(path, {"step": 6})
    assert torch.load(path)["step"] == 3


class Attack:
    """Unpickling it makes a folder."""
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"step": Attack(tmp_path / "made")}, tmp_path / "checkpoint.pt")
    with pytest.raises(sl.UserError, match="cannot be read"):
        sl.load_run(tmp_path)
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (tmp_path / "made").exists()                      # the attack is a real one


def test_the_log_has_a_row_for_every_save(unbroken):
    rows = read_log(unbroken())
    assert [row["step"] for row in rows] == [3, 6]
    assert list(rows[0]) == ["step", "reconstruction", "consistency", "latent_consistency", "total",
                             "gradient_norm", "seconds"]
    last = rows[-1]
    total = last["reconstruction"] + last["consistency"] + 0.1 * last["latent_consistency"]
    assert last["total"] == pytest.approx(total, rel=1e-5)
    assert rows == saved(unbroken())["log"]


# --------------------------------------------------------------------------------------------------
# Latents
# --------------------------------------------------------------------------------------------------

def test_the_file_of_latents_holds_images_and_mirror_images(small_run, tmp_path):
    config, autoencoder, _ = sl.load_run(small_run)
    images = sl.load_images(config, "test")
    latents, labels = sl.encode_images(autoencoder, images, config, tmp_path).tensors
    pixels = images.pixels / 255
    expected = autoencoder.encode(torch.cat([pixels, pixels.flip(-1)]))
    torch.testing.assert_close(latents.float(), expected, rtol=1e-3, atol=1e-3)  # float16
    assert torch.equal(labels, images.labels.repeat(2))


def test_the_file_of_latents_is_used_again(small_run, tmp_path, monkeypatch):
    config, autoencoder, _ = sl.load_run(small_run)
    images = sl.load_images(config, "test")
    latents, _ = sl.encode_images(autoencoder, images, config, tmp_path).tensors
    monkeypatch.setattr(autoencoder, "encode", lambda x: pytest.fail("encoded once more"))
    again, _ = sl.encode_images(autoencoder, images, config, tmp_path).tensors
    assert torch.equal(latents, again)


def test_without_room_for_latents_every_update_encodes(unbroken, tmp_path, monkeypatch, capsys):
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert train(tmp_path / "run", "--no-flips") == 0
    assert "no room" in capsys.readouterr().out
    for row, expected in zip(read_log(tmp_path / "run"), read_log(unbroken("--no-flips"))):
        assert row["total"] == pytest.approx(expected["total"], rel=1e-3)    # not rounded to float16
