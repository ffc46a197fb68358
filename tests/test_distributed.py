"""Two processes under torchrun, on the CPU, make the run that one process makes; and how they end.

The tests start this file itself under torchrun: each process then runs the commands in a JSON file.
"""
import contextlib
import functools
import io
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL
from PIL import Image

import sphere_latent as sl

pytestmark = pytest.mark.slow
TRAIN = ["train", *SMALL, "--autoencoder-steps", "12", "--train-steps", "12"]        # saved after the last update
PIXELS = [*TRAIN, "--method", "sphere-encoder"]
AUTOENCODER = 12                                             # its updates come first


@functools.cache
def few_drawings(split, size):
    labels = torch.arange({"train": 240, "test": 60}[split]) % len(sl.SPECIES)
    pixels = 255 * sl.draw_flowers(labels, size, torch.Generator().manual_seed(len(labels)))
    return sl.Images(pixels.byte(), labels, [species[0] for species in sl.SPECIES])


# --------------------------------------------------------------------------------------------------
# In each of the two processes
# --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def at_update(when, action):
    updates, original = [], sl.learning_rate_at

    def learning_rate_at(*arguments):
        updates.append(1)
        if len(updates) == when:
            action()
        return original(*arguments)
    sl.learning_rate_at = learning_rate_at
    yield
    sl.learning_rate_at = original


def wait_for_ctrl_c(folder):
    """Tell the tests that it is time; go on when torchrun has passed the signal on."""
    (folder / "ready").touch()
    until = time.time() + 20
    while not (folder / "pressed").exists() and time.time() < until:
        time.sleep(0.05)
    time.sleep(1)


def on_a_slow_disk(path, state, save=sl.save_checkpoint):
    time.sleep(0.3)                                          # the other process is ahead by then
    save(path, state)


def run_commands(folder):
    """The commands in folder/commands.json in turn, with a pause in the last; exit codes to folder/codes-RANK."""
    sl.drawn_images, sl.MODEL_SIZES["tiny"], sl.save_checkpoint = few_drawings, (64, 2, 2), on_a_slow_disk
    sl.time = types.SimpleNamespace(time=time.time, sleep=lambda seconds: None)      # both go on to the next command
    streams = sys.stdout, sys.stderr
    commands = json.loads((folder / "commands.json").read_text())
    for number, words in enumerate(commands, 1):
        pause = AUTOENCODER + 3 if number == len(commands) else 0
        with at_update(pause, lambda: wait_for_ctrl_c(folder)), open(folder / f"codes-{sl.RANK}", "a") as codes:
            codes.write(f"{sl.main(words)} ")
        sys.stdout, sys.stderr = streams
        dist.init_process_group = lambda _: None             # once for all commands
        sl.summed(torch.zeros(1))
        sl.RANK or print("----", flush=True)


def run_file_with_an_error(number):
    """sphere_latent.py itself; the second process fails at a call of all_reduce."""
    original, calls = dist.all_reduce, []

    def all_reduce(x):
        calls.append(x)
        return original(x) if sl.RANK == 0 or len(calls) < number else 1 / 0
    dist.all_reduce = all_reduce
    runpy.run_path(str(ROOT / "sphere_latent.py"), run_name="__main__")


# --------------------------------------------------------------------------------------------------
# In the process of pytest
# --------------------------------------------------------------------------------------------------

def torchrun(folder, *words):
    """-> the started process; what it says goes to folder/out and folder/err."""
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)],
            stdout=out, stderr=err, start_new_session=True)


def ended(process, seconds):
    """-> its exit code; it has to end by itself."""
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:                           # torchrun ends its own on SIGTERM
            process.terminate()
            process.wait(60)


def said(folder):
    """What the program, not torchrun, has to say at the end."""
    return [line for line in (folder / "err").read_text().splitlines() if line.startswith("sphere_latent.py:")]


def alone(*words):
    """A command in one process -> the lines that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert sl.main(list(map(str, words))) == 0
    return out.getvalue().splitlines()


def numbers(lines):
    return [float(x) for line in lines for x in re.findall(r"\d+\.\d+", line)]


def words(lines):
    return [re.sub(r"\d+\.\d+|/\S+", "", line) for line in lines]


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_weights(a, b):
    """The same but for rounding."""
    a, b = state(a), state(b)
    assert a["step"] == b["step"] and a.keys() == b.keys()
    for part in ("autoencoder", "model", "ema"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def both(small, tmp_path_factory):
    """-> folder, lines, lines: of one process, in folder/one, and of two, in folder/two."""
    base = tmp_path_factory.mktemp("both")
    one, two = base / "one", base / "two"
    jobs = [[*TRAIN, "--out", "sphere"], [*PIXELS, "--out", "pixels"],
            ["sample", "--checkpoint", one / "pixels", "--count", 9, "--out", "pixels.png"],
            ["evaluate", "--checkpoint", one / "sphere", "--eval-samples", 130, "--out", "again.csv"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sl, "drawn_images", few_drawings)
        lines = [alone(*words, one / out) for *words, out in jobs]
        with at_update(AUTOENCODER + 8, lambda: os.kill(os.getpid(), signal.SIGINT)):
            assert sl.main([*TRAIN, "--out", str(base / "half")]) == 130
        commands = [[*map(str, words), two / out] for *words, out in jobs]
        commands += [["train", "--resume", base / "half", "--device", "cpu"],
                     [*TRAIN, "--out", one / "sphere"],      # there is a run
                     [*TRAIN, "--out", two / "stopped"]]
        two.mkdir()
        (two / "commands.json").write_text(json.dumps(commands, default=str))
        process = torchrun(two, __file__, two)
        until = time.time() + 120
        while not (two / "ready").exists() and time.time() < until and process.poll() is None:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):        # it has failed: the tests will say where
            os.killpg(process.pid, signal.SIGINT)            # Ctrl-C in the terminal
        (two / "pressed").touch()
        ended(process, 60)
        yield base, lines, [turn.strip().splitlines() for turn in (two / "out").read_text().split("----\n")[:-1]]


def test_both_processes_end_each_command_alike(both):
    for rank in (0, 1):
        assert (both[0] / f"two/codes-{rank}").read_text() == "0 0 0 0 0 2 130 "


@pytest.mark.parametrize("number, name", [(0, "sphere"), (1, "pixels")])
def test_two_processes_train_as_one(both, number, name):
    base, lines, turns = both
    one, two = base / "one" / name, base / "two" / name
    assert_same_weights(one, two)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    a, b = state(one)["log"], state(two)["log"]
    assert a[0] == b[0] and [row[0] for row in a[1:]] == [row[0] for row in b[1:]]
    assert [row[1:-1] for row in b[1:]] == [pytest.approx(row[1:-1], abs=1e-5) for row in a[1:]]     # not the seconds
    assert words(lines[number]) == words(turns[number]) and len(numbers(turns[number])) == 5
    assert numbers(turns[number]) == pytest.approx(numbers(lines[number]), abs=2e-4)
    for table in ("log.csv", "frechet.csv"):
        assert words((one / table).read_text().split()) == words((two / table).read_text().split())


def test_two_processes_sample_and_measure_as_one(both):
    base, lines, turns = both
    for name in ("pixels.png", "again.csv"):
        assert (base / "one" / name).read_bytes() == (base / "two" / name).read_bytes()
    assert turns[2:4] == [[str(base / "two/pixels.png")], lines[3]] and len(lines[3]) == 5


def test_only_one_process_talks(both):
    bars = (both[0] / "two/err").read_text()
    assert [bars.count(f"{name}:   0%") for name in ("autoencoder", "encoding")] == [2, 3]   # of three runs, one resumed
    assert [len(turn) for turn in both[2]] == [6, 6, 1, 5, 6, 0, 0]


def test_one_process_begins_and_two_go_on(both):
    assert_same_weights(both[0] / "one/sphere", both[0] / "half")


def test_ctrl_c_in_the_terminal_saves_and_one_process_goes_on(both):
    """torchrun passes it on, and waits for half a minute."""
    stopped = both[0] / "two/stopped"
    assert state(stopped)["step"] == 10 and not list(both[0].rglob("*.part"))
    assert f"sphere_latent.py: stopped; training goes on with train --resume {stopped}" in said(both[0] / "two")
    alone("train", "--resume", stopped, "--device", "cpu")
    assert_same_weights(both[0] / "one/sphere", stopped)


def test_a_run_is_not_overwritten(both):
    assert any("already holds a run" in line for line in said(both[0] / "two"))


@pytest.mark.parametrize("cuda, backends", [(False, {"cpu": "gloo"}), (True, {"cpu": "gloo", "cuda": "nccl"})])
def test_tensors_of_every_device_are_summed(monkeypatch, cuda, backends):
    """Left to itself, torch takes the GPU's backend alone, which cannot sum what is on the CPU."""
    asked = []
    monkeypatch.setattr(sl, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(dist, "init_process_group", asked.append)
    assert sl.main(["--help"]) == 0
    assert dist.distributed_c10d.BackendConfig(dist.Backend(asked[0])).get_device_backend_map() == backends


def test_an_error_in_one_process_ends_both_and_is_shown(tmp_path):
    process = torchrun(tmp_path, __file__, 1, *TRAIN, "--out", tmp_path / "run")
    assert ended(process, 60) == 1
    assert (tmp_path / "err").read_text().count("ZeroDivisionError: division by zero") == 1
    assert not list((tmp_path / "run").glob("c*"))


def test_without_the_perceptual_network_both_go_on(tmp_path):
    (tmp_path / "vgg16-397923af.pth").write_text("damaged")
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    process = torchrun(tmp_path, ROOT / "sphere_latent.py", *PIXELS, "--train-steps", 2, "--dataset", "folder", "--out",
                       tmp_path / "run", "--data-dir", tmp_path / "images", "--weights-dir", tmp_path)
    assert ended(process, 120) == 0 and (tmp_path / "run/checkpoint.pt").exists()
    assert (tmp_path / "out").read_text().count("learns without its perceptual loss") == 1


def test_the_file_itself_refuses_in_one_line(tmp_path):
    process = torchrun(tmp_path, ROOT / "sphere_latent.py", *TRAIN, "--batch-size", 9, "--out", tmp_path / "run")
    assert ended(process, 60) == 1
    assert said(tmp_path) == ["sphere_latent.py: --batch-size 9: must be a multiple of 2, the processes"]
    assert (tmp_path / "out").read_text() == "" and not (tmp_path / "run").exists()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        run_commands(pathlib.Path(sys.argv[1]))
    else:
        run_file_with_an_error(int(sys.argv.pop(1)))
