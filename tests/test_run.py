"""Whole runs through the command line: train, resume, sample, evaluate, reconstruct, and what goes wrong."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL

import sphere_latent as sl


def command(*arguments):
    return sl.main([str(argument) for argument in arguments])


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return [value for part in ("model", "ema", "autoencoder") for value in state[part].values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def table(path):
    return np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))


def refused(capsys, *arguments):
    assert command(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sphere_latent.py: ") and "Traceback" not in error
    return error


def test_a_run_leaves_what_it_promises(run):
    names = {path.name for path in run.iterdir()}
    assert {"checkpoint.pt", "config.json", "log.csv", "loss.png", "samples.png", "frechet.csv"} <= names
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and isinstance(state["step"], int)
    assert json.loads((run / "config.json").read_text())["image_size"] == 16
    assert table(run / "frechet.csv")["steps"].tolist() == [1, 2, 4, 6]
    config, autoencoder, denoiser = sl.load_run(run)
    assert not denoiser.training and config == sl.load_run(run / "checkpoint.pt")[0]
    assert denoiser.classes == [species[0] for species in sl.SPECIES]


def test_the_same_seed_gives_the_same_run(run, tmp_path):
    assert command("train", *SMALL, "--out", tmp_path / "again") == 0
    assert same(run, tmp_path / "again")
    assert command("train", *SMALL, "--out", tmp_path / "other", "--seed", 1) == 0
    assert not same(run, tmp_path / "other")


@pytest.mark.parametrize("stage, press_at", [("autoencoder", 3), ("denoiser", 9)])
def test_ctrl_c_then_resume_equals_the_unbroken_run(run, tmp_path, monkeypatch, capsys, stage, press_at):
    """A real SIGINT in either stage; nothing is lost and the end is the same, bit for bit."""
    calls, original = [], sl.learning_rate_at

    def press_ctrl_c(step, steps, config):
        calls.append(step)
        if len(calls) == press_at:
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, steps, config)
    monkeypatch.setattr(sl, "learning_rate_at", press_ctrl_c)
    out = tmp_path / "run"
    assert command("train", *SMALL, "--out", out) == 130
    assert f"--resume {out}" in capsys.readouterr().err
    monkeypatch.setattr(sl, "learning_rate_at", original)
    assert command("train", "--resume", out, "--device", "cpu") == 0
    assert same(run, out)
    steps = table(out / "log.csv")["step"].tolist()
    assert steps == sorted(set(steps)) and steps[-1] == 6


def test_kill_between_checkpoints_loses_only_the_steps_since(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass
    original, calls = sl.learning_rate_at, []

    def die(step, steps, config):
        calls.append(step)
        if len(calls) == 6 + 5:
            raise Killed
        return original(step, steps, config)
    monkeypatch.setattr(sl, "learning_rate_at", die)
    with pytest.raises(Killed):
        command("train", *SMALL, "--out", tmp_path / "run", "--save-every", 3)
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(sl, "learning_rate_at", original)
    assert command("train", "--resume", tmp_path / "run", "--device", "cpu") == 0
    assert same(run, tmp_path / "run")


def test_a_run_is_not_overwritten_unless_asked(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    assert "--overwrite" in refused(capsys, "train", *SMALL, "--out", run)
    assert (run / "checkpoint.pt").read_bytes() == before


def test_overwrite_leaves_strangers_files_alone(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "checkpoint.pt").write_text("old")
    assert command("train", *SMALL, "--out", out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine" and sl.load_run(out)


def test_killed_before_the_first_checkpoint_the_same_command_begins_again(run, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text((run / "config.json").read_text())
    assert "start again" in refused(capsys, "train", "--resume", out)       # no silent fresh start
    assert command("train", *SMALL, "--out", out) == 0 and same(run, out)


def test_resume_does_not_need_the_log_file(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/log.csv").write_text("step,recon")
    assert command("train", "--resume", tmp_path / "run", "--device", "cpu") == 0
    assert same(run, tmp_path / "run")
    assert (tmp_path / "run/log.csv").read_text() == (run / "log.csv").read_text()


def test_out_cannot_hit_a_checkpoint(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    for words in (["evaluate", "--eval-samples", 24], ["sample"], ["reconstruct"]):
        assert "ends in" in refused(capsys, *words, "--checkpoint", run, "--out", run / "checkpoint.pt")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_resume_of_nothing_or_of_damage_is_an_error(run, tmp_path, capsys):
    assert "no checkpoint in" in refused(capsys, "train", "--resume", tmp_path)
    half = (run / "checkpoint.pt").read_bytes()[:5000]
    (tmp_path / "checkpoint.pt").write_bytes(half)
    assert "checkpoint.pt is no checkpoint" in refused(capsys, "train", "--resume", tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == half
    assert "damaged" in refused(capsys, "sample", "--checkpoint", tmp_path)
    assert "absent.pt is no checkpoint" in refused(capsys, "sample", "--checkpoint", tmp_path / "absent.pt")
    assert "no other flag" in refused(capsys, "train", "--resume", run, "--seed", 3)


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"step": 1, "config": Attack()}, tmp_path / "checkpoint.pt")
    refused(capsys, "sample", "--checkpoint", tmp_path)
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)            # the attack is a real one
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("save_every", [3, 500])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys, save_every):
    original = sl.sphere_losses
    calls = []

    def blow_up(*arguments):
        calls.append(1)
        losses = original(*arguments)
        return {name: loss * (float("nan") if len(calls) > 4 else 1) for name, loss in losses.items()}
    monkeypatch.setattr(sl, "sphere_losses", blow_up)
    out = tmp_path / "run"
    assert "not finite" in refused(capsys, "train", *SMALL, "--out", out, "--save-every", save_every)
    saved = torch.load(out / ("checkpoint.pt" if save_every == 3 else "autoencoder.pt"), weights_only=True)
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_sample_evaluate_reconstruct(run, tmp_path, capsys):
    for name in ("a", "b"):
        assert command("sample", "--checkpoint", run, "--classes", "poppy", "3", "--steps", 2, "--count", 2,
                       "--seed", 5, "--out", tmp_path / f"{name}.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    capsys.readouterr()
    assert command("evaluate", "--checkpoint", run, "--eval-samples", 24, "--out", tmp_path / "e.csv") == 0
    printed = capsys.readouterr().out
    assert printed.count("Fréchet distance") == 5 and "24 samples against 240 held-out" in printed
    assert "FID" not in printed
    assert command("reconstruct", "--checkpoint", run / "checkpoint.pt", "--out", tmp_path / "r.png") == 0
    assert "PSNR" in capsys.readouterr().out and (tmp_path / "r.png").exists()


@pytest.mark.parametrize("arguments, expected", [
    ("train --train-steps 0", "--train-steps 0"), ("train --learning-rate nan", "--learning-rate nan"),
    ("train --batch-size many", "batch-size"), ("train --dataset dogs", "--dataset dogs"),
    ("train --image-size 50", "multiple"), ("train --image-size 16", "multiple"),
    ("train --autoencoder-width 130", "--autoencoder-width"), ("train --max-angle 120", "--max-angle"),
    ("train --noise-distribution uniform-tangent", "--max-angle"), ("train --seed 100000000000000", "--seed"), ("train --noise-distribution cosine", "noise-distribution"),
    ("train --no-such-flag", "no-such-flag"), ("train --device potato", "--device potato"),
    ("paint", "paint"), ("", "COMMAND"), ("sample", "--checkpoint"),
    ("sample --checkpoint RUN --classes weed", "anemone"), ("sample --checkpoint RUN --steps 0", "--steps"),
    ("sample --checkpoint RUN --classes 12", "12"), ("sample --checkpoint RUN --count 0", "--count")])
def test_wrong_words_end_in_one_line(run, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, *arguments.replace("RUN", str(run)).split())
    assert not any(tmp_path.rglob("checkpoint.pt"))


def test_help_explains_every_field(capsys):
    assert command("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in sl.dataclasses.fields(sl.Config):
        assert "--" + field.name.replace("_", "-") in text
        assert " ".join(field.metadata["help"].split()[:3]) in text
    assert "(default: logit-normal)" in text


def test_every_dataset_has_a_preset():
    for name in ("drawn", "folder", "cifar10"):
        assert sl.preset(name).dataset == name
    assert sl.preset("drawn") == sl.Config()


def test_import_is_quick_and_without_side_effects(tmp_path):
    code = ("import torch; before = torch.random.get_rng_state(), torch.get_num_threads(); import sphere_latent, sys; "
            "assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == torch.get_num_threads(); "
            "assert 'matplotlib' not in sys.modules and 'timm' not in sys.modules")
    began = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    assert time.time() - began < 12 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_file_alone_runs_the_default_and_says_when_it_needs_the_other(tmp_path):
    shutil.copy(ROOT / "sphere_latent.py", tmp_path)
    code = ("import sys, sphere_latent as sl; few = sys.argv[1:]\n"
            "sl.MODEL_SIZES['tiny'], draw = (32, 1, 1), sl.draw_flowers(sl.torch.arange(24) % 12, 16, sl.seeded(0, 0))\n"
            "sl.drawn_images = lambda *a: sl.Images((255 * draw).byte(), sl.torch.arange(24) % 12, map(str, range(12)))\n"
            "print([sl.main(words) for words in (['train', *few], ['sample', '--checkpoint', 'runs/drawn', '--count', '1'],\n"
            "       ['evaluate', '--checkpoint', 'runs/drawn'], ['train', '--dataset', 'flowers'])])")
    done = subprocess.run([sys.executable, "-c", code, *SMALL], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("[0, 0, 0, 2]\n"), done.stderr[-2000:]
    assert "needs the file extras.py" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "extras.py").exists() and (tmp_path / "runs/drawn/samples.png").exists()
