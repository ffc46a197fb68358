"""Training: a run that is stopped, wherever it may be, goes on as if nothing had happened."""
import os
import shutil
import signal

import pytest
import torch

import sphere_latent as sl
from conftest import SMALL
from sphere_latent import read_checkpoint as saved


@pytest.fixture(autouse=True)
def no_pictures(small_run, monkeypatch):
    """Here only weights matter. Pictures and distances would take longer than the training."""
    for name in ("sample_figure", "reconstruction_figure", "loss_figure"):
        monkeypatch.setattr(sl, name, lambda *arguments: None)
    monkeypatch.setattr(sl, "evaluate", lambda runs: [{"frechet_distance": 0.0}])


def train(folder, *flags):
    return sl.main(["train", *SMALL, "--save-every", "3", *flags, "--out", str(folder)])


def assert_same_weights(a, b, tolerance=0.0):                # bit for bit, if nothing else is said
    for part in ("model", "average", "autoencoder"):
        torch.testing.assert_close(saved(a)[part], saved(b)[part], rtol=0, atol=tolerance)


def at_update(number, action, monkeypatch):
    """Let action(losses) replace the losses of update `number`, counted from 1, and later ones."""
    original, calls = sl.sphere_losses, []
    def losses(*arguments):
        calls.append(arguments)
        computed = original(*arguments)
        return action(computed) if len(calls) >= number else computed
    monkeypatch.setattr(sl, "sphere_losses", losses)


def die(losses):
    raise KeyboardInterrupt                                  # at once: nothing more is saved


def ctrl_c(losses):
    os.kill(os.getpid(), signal.SIGINT)                      # a request: this update is saved
    return losses


@pytest.mark.parametrize("number, action, step", [(1, die, 0), (5, die, 3), (4, ctrl_c, 4)])
def test_resuming_changes_no_weight(small_run, tmp_path, monkeypatch, capsys, number, action, step):
    with monkeypatch.context() as patch:
        at_update(number, action, patch)
        assert train(tmp_path) == 130
    assert "train --resume" in capsys.readouterr().err.splitlines()[-1]
    assert step == 0 or saved(tmp_path)["step"] == step      # at 0 only the autoencoder is saved
    assert sl.main(["train", "--resume", str(tmp_path), "--device", "cpu"]) == 0
    assert_same_weights(tmp_path, small_run)


def test_ctrl_c_while_the_last_pictures_are_drawn(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sl, "sample_figure", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert train(tmp_path, "--save-every", "500") == 130 and saved(tmp_path)["step"] == 6
    assert (tmp_path / "latents.bin").exists()               # nothing has to be encoded again


def test_a_finished_run_can_be_trained_longer(small_run, tmp_path, monkeypatch):
    folder = shutil.copytree(small_run, tmp_path / "run")
    monkeypatch.setattr(sl, "fit_tiny_rae", lambda *arguments: pytest.fail("trained once more"))
    assert sl.main(["train", "--resume", str(folder), "--train-steps", "9"]) == 0
    assert [row["step"] for row in saved(folder)["log"]] == [6, 9]
    assert len((folder / "log.csv").read_text().splitlines()) == 3           # with a heading
    before, after = saved(small_run), saved(folder)
    torch.testing.assert_close(after["autoencoder"], before["autoencoder"], rtol=0, atol=0)
    sl.write_table(tmp_path / "log.csv", [{"a": 1}, {"b": 2}])               # VGG was found later
    assert (tmp_path / "log.csv").read_text().split() == ["a,b", "1,", ",2"]


def test_the_learning_rate_warms_up_holds_and_decays():
    rates = [sl.learning_rate_at(step, 1000, 3.0) for step in (0, 24, 49, 500, 750, 999)]
    assert rates == pytest.approx([3 / 50, 1.5, 3, 3, 1.5, 0.006])


def test_the_average_is_an_exponential_moving_average():
    average, model = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    expected = 0.9 * average.weight + 0.1 * model.weight
    sl.update_average(average, model, decay=0.9)
    torch.testing.assert_close(average.weight, expected)


def test_a_batch_in_parts_gives_the_same_gradients_and_weights(small_run, tmp_path):
    assert train(tmp_path, "--accumulate", "4", "--save-every", "500") == 0
    assert_same_weights(tmp_path, small_run, 1e-6)
    [row], [other] = saved(small_run)["log"], saved(tmp_path)["log"]
    assert other["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    at_update(6, lambda losses: {name: x * torch.nan for name, x in losses.items()}, monkeypatch)
    assert train(tmp_path) == 2
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    assert saved(tmp_path)["step"] == 3                      # the last good one


def test_a_checkpoint_is_whole_at_every_moment(tmp_path, monkeypatch):
    def fail_halfway(state, target):
        target.write_bytes(b"half")
        raise RuntimeError("file write failed")              # what torch says of a full disk
    path = tmp_path / "checkpoint.pt"
    sl.save_checkpoint(path, {"step": 3})
    with open(path, "rb") as reader:                         # has the old file open, reads it late
        sl.save_checkpoint(path, {"step": 6})
        assert torch.load(reader)["step"] == 3
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(torch, "save", fail_halfway)
    with pytest.raises(sl.UserError, match="kept"):
        sl.save_checkpoint(path, {"step": 9})
    assert torch.load(path)["step"] == 6


def test_without_room_for_latents_every_update_encodes(tmp_path, monkeypatch, capsys):
    assert train(tmp_path / "file", "--no-flips") == 0
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert train(tmp_path / "none", "--no-flips") == 0
    assert "no room" in capsys.readouterr().out
    loss, other = [saved(tmp_path / name)["log"][-1]["total"] for name in ("file", "none")]
    assert other == pytest.approx(loss, rel=1e-3)            # in the file they are float16
