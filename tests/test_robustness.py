"""What people do to it: full disks, strange files and folders, wrong words, kills, two runs at once. And kill.py."""
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import pathlib
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import example, given, settings, strategies as st
from PIL import Image

import extras
import sphere_latent as sl

pytestmark = pytest.mark.slow
TINY = ("--image-size 16 --patch-size 8 --latent-channels 8 --autoencoder-width 32 --autoencoder-depth 1 "
        "--autoencoder-steps 4 --train-steps 4 --batch-size 4 --eval-samples 8 --device cpu").split()
SMALLEST = (32, 1, 1)                                          # width, depth, heads of the denoiser
LOSS_FIGURE = sl.loss_figure
FIELDS = {field.name: field for field in dataclasses.fields(sl.Config)}
quietly = settings(derandomize=True, deadline=None, max_examples=60)


def command(*arguments):
    return sl.main([str(argument) for argument in arguments])


def one_line(text):
    """The error line of `text`; there must be one alone, beside progress bars and skipped files."""
    assert "Traceback" not in text, text
    lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith("sphere_latent.py: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], text
    return errors[0]


def refused(capsys, *arguments):
    capsys.readouterr()
    assert command(*arguments) == 2
    return one_line(capsys.readouterr().err)


def photographs(folder, classes=("a", "b"), count=12, side=16):
    """Random images, a class a folder -> folder."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = os.path.join(os.fsencode(folder), os.fsencode(classes[i % len(classes)]))
        os.makedirs(path, exist_ok=True)
        with open(os.path.join(path, b"%d.png" % i), "wb") as file:
            Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return folder


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return [value for part in ("model", "ema", "autoencoder") for value in state[part].values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def start(code, *words, **environment):
    """A new process that has imported the file, with a small denoiser."""
    prelude = f"import sys, sphere_latent as sl; sl.MODEL_SIZES['tiny'] = {SMALLEST}\n"
    words = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in words]
    return subprocess.Popen([sys.executable, "-c", prelude + code, *words], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def quick(patch):
    """A small denoiser; the numbers of a picture in the place of the picture, which takes longer than training."""
    def numbers(path, rows, *arguments, **named):
        pathlib.Path(path).write_bytes(torch.stack(rows).numpy().tobytes())
    patch.setitem(sl.MODEL_SIZES, "tiny", SMALLEST)
    patch.setattr(sl, "picture", numbers)
    patch.setattr(sl, "loss_figure", lambda *arguments: None)
    sl.tqdm.set_lock(threading.RLock())                        # a bar that fails keeps its lock, the next would hang


@pytest.fixture(autouse=True)
def smallest(monkeypatch):
    quick(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> photos, a finished run on them, the flags of that run."""
    root = tmp_path_factory.mktemp("made")
    flags = [*TINY, "--dataset", "folder", "--data-dir", photographs(root / "photos")]
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        assert command("train", *flags, "--out", root / "run") == 0
    return root / "photos", root / "run", flags


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the finished run, to be harmed."""
    return shutil.copytree(made[1], tmp_path / "copy")


def folder_config(path):
    return sl.Config(dataset="folder", data_dir=str(path), image_size=16, patch_size=8)


def change(path, edit):
    """Load a checkpoint, let `edit` change it, save it again."""
    state = torch.load(path, weights_only=True)
    changed = edit(state)
    torch.save(state if changed is None else changed, path)


# ---- kills, two runs at once, the same seed

@pytest.fixture(scope="module")
def killed(made, tmp_path_factory):
    """A run killed in update 3 of 4 of the denoiser; a second one was tried meanwhile; then it was resumed."""
    _, _, flags = made
    root = tmp_path_factory.mktemp("killed")
    out, mark = root / "run", root / "mark"
    code = ("import pathlib, time; rate = sl.learning_rate_at; fit = sl.fit_denoiser\n"
            "def stop(step, *rest):\n"
            "    if step == 2 and began: pathlib.Path(sys.argv.pop()).touch(); time.sleep(120)\n"
            "    return rate(step, *rest)\n"
            "began = []; sl.learning_rate_at = stop\n"
            "sl.fit_denoiser = lambda *a: began.append(1) or fit(*a)\n"
            "sl.main(sys.argv[1:-1])")
    process = start(code, "train", *flags, "--out", out, "--save-every", 2, mark, PYTHONHASHSEED="7")
    until, tried = time.time() + 60, []
    while not mark.exists() and process.poll() is None and time.time() < until:
        time.sleep(0.02)
    assert mark.exists(), process.communicate()[1].decode()
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        patch.setattr(sl, "optimise", lambda *a, **k: (_ for _ in ()).throw(sl.UserError("a second run began")))
        for words in (["--resume", out], [*flags, "--out", out], [*flags, "--out", out, "--overwrite"]):
            with contextlib.redirect_stderr(io.StringIO()) as error:
                tried.append((command("train", *words), error.getvalue()))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
        with contextlib.redirect_stderr(io.StringIO()) as error:
            code = command("train", "--resume", out, "--device", "cpu")
    return out, tried, step, code, error.getvalue()


def test_a_second_run_in_a_folder_in_use_is_refused(killed):
    out, tried, *_ = killed
    for code, error in tried[:2]:
        line = one_line(error)
        assert code == 2 and str(out) in line
    assert " use" in one_line(tried[0][1])


def test_overwrite_does_not_take_a_folder_in_use(killed):
    out, tried, step, *_ = killed
    code, error = tried[2]
    assert code == 2 and " use" in one_line(error) and str(out) in error and step == 2


def test_a_killed_run_leaves_no_lock_and_ends_like_an_unbroken_one_with_other_hashes(killed, made):
    out, _, step, code, error = killed
    assert step == 2 and code == 0, error
    assert same(out, made[1]) and (out / "samples.png").read_bytes() == (made[1] / "samples.png").read_bytes()
    assert not list(out.glob("*.part"))


def test_a_folder_can_be_trained_in_again_by_the_same_process(copy, made):
    assert command("train", *made[2], "--out", copy, "--overwrite") == 0 and same(copy, made[1])


def test_killed_in_the_last_picture_it_is_drawn_again(made, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(denoiser, autoencoder, classes, config, path):
        path.write_bytes(b"half")
        raise Killed
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sl, "sample_figure", die)
        command("train", *made[2], "--out", out)
    assert command("train", "--resume", out, "--device", "cpu") == 0 and same(out, made[1])
    assert (out / "samples.png").read_bytes() == (made[1] / "samples.png").read_bytes()


def test_killed_before_the_first_checkpoint_the_same_command_begins_again(made, tmp_path, monkeypatch, capsys):
    """The kill fell into the first write: what lies there already must not be taken for a run."""
    class Killed(BaseException):
        pass

    def die(source, target):
        raise Killed
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", die)
        command("train", *made[2], "--out", out)
    assert "start again" in refused(capsys, "train", "--resume", out)
    assert command("train", *made[2], "--out", out) == 0 and same(out, made[1])


def test_an_old_part_file_is_in_nobodys_way(copy, made):
    (copy / "checkpoint.pt.part").write_bytes(b"half of a checkpoint")
    assert command("sample", "--checkpoint", copy, "--count", 1, "--steps", 1) == 0
    assert command("train", "--resume", copy, "--device", "cpu") == 0 and same(copy, made[1])


@pytest.mark.parametrize("name", ["load_images", "latent_reader", "evaluate_run", "sample_figure"])
def test_ctrl_c_outside_the_training_loop_is_one_line_and_loses_nothing(made, tmp_path, monkeypatch, capsys, name):
    original = getattr(sl, name)

    def press(*arguments, **named):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return original(*arguments, **named)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(sl, name, press)
        assert command("train", *made[2], "--out", out) == 130
    assert "stopped" in one_line(capsys.readouterr().err)
    words = ["--resume", out, "--device", "cpu"] if list(out.glob("*.pt")) else [*made[2], "--out", out]
    assert command("train", *words) == 0 and same(out, made[1])


def test_the_readers_threads_make_no_difference(made, monkeypatch):
    results, pool, original = [], extras.ThreadPoolExecutor, extras.open_image
    delays = np.random.default_rng(0).uniform(0, 0.01, 100).tolist()

    def late(*arguments):
        time.sleep(delays.pop())
        return original(*arguments)
    monkeypatch.setattr(extras, "open_image", late)
    for workers in (1, 7):
        monkeypatch.setattr(extras, "ThreadPoolExecutor", lambda *a, n=workers, **k: pool(n))
        results.append(sl.load_images(folder_config(made[0]), "train"))
    a, b = results
    assert torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) and a.classes == b.classes == ["a", "b"]


# ---- disks and folders

@pytest.mark.parametrize("when", ["at once", "second"])
@pytest.mark.parametrize("how", ["no space", "size limit"])
def test_a_full_disk_is_one_line_and_keeps_the_previous_checkpoint(made, tmp_path, monkeypatch, capsys, how, when):
    """No space: as a network disk says it, when the file is flushed. Size limit: in the middle of the write."""
    original, calls, out, before = sl.save_checkpoint, [], tmp_path / "run", {}
    full_at = {"at once": 1, "second": 4}[when]                # two saves of the autoencoder, then of the denoiser

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(path, state):
        calls.append(path)
        if len(calls) < full_at:
            return original(path, state)
        before.update({path.name: path.read_bytes() for path in out.glob("*.pt")})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if how == "size limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            with monkeypatch.context() as patch:
                if how == "no space":
                    patch.setattr(os, "fsync", full)
                return original(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with monkeypatch.context() as patch:
        patch.setattr(sl, "save_checkpoint", save)
        line = refused(capsys, "train", *made[2], "--out", out, "--save-every", 2)
    assert calls[-1].name in line or str(out) in line
    assert {path.name: path.read_bytes() for path in out.glob("*.pt")} == before
    if when == "second":
        assert "kept" in line and len(before) == 2
        assert command("train", "--resume", out, "--device", "cpu") == 0 and same(out, made[1])
    else:
        assert not before and command("train", *made[2], "--out", out) == 0 and same(out, made[1])


@pytest.mark.parametrize("below", ["a file", "/proc"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_starts(made, tmp_path, monkeypatch, capsys, below):
    if below == "/proc" and not os.path.isdir("/proc/self"):
        pytest.skip("no /proc here")
    (tmp_path / "file").touch()
    out = {"a file": tmp_path / "file", "/proc": pathlib.Path("/proc")}[below] / "run"
    monkeypatch.setattr(sl, "load_images", lambda *a: pytest.fail("images were read first"))
    refused(capsys, "train", *made[2], "--out", out)


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_folder_is_said_before_training_starts(made, tmp_path, monkeypatch, capsys, resume):
    folder = tmp_path / "read-only"
    folder.mkdir()
    root = os.geteuid() == 0
    if root:                                                   # permissions do not count: a read-only mount
        if shutil.which("mount") is None or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("root is above permissions, and may not mount here")
    try:
        if resume:
            shutil.copytree(made[1], folder, dirs_exist_ok=True)
        if root:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            folder.chmod(0o555)
        monkeypatch.setattr(sl, "optimise", lambda *a, **k: pytest.fail("training began"))
        words = ["--resume", folder] if resume else [*made[2], "--out", folder]
        refused(capsys, "train", *words)
        if resume:
            refused(capsys, "sample", "--checkpoint", folder, "--count", 1, "--steps", 1)
    finally:
        subprocess.run(["umount", folder]) if root else folder.chmod(0o755)


def test_moved_data_are_found_with_data_dir(copy, made, tmp_path, capsys):
    moved = shutil.copytree(made[0], tmp_path / "moved photos")
    change(copy / "checkpoint.pt", config_of(data_dir=str(tmp_path / "gone")))
    for words in (["train", "--resume", copy], ["evaluate", "--checkpoint", copy],
                  ["reconstruct", "--checkpoint", copy]):
        line = refused(capsys, *words)
        assert str(tmp_path / "gone") in line and "--data-dir" in line
        assert command(*words, "--data-dir", moved, "--device", "cpu") == 0
    assert same(copy, made[1])


def test_moved_data_may_have_the_name_of_the_default(copy, made, tmp_path, monkeypatch):
    shutil.copytree(made[0], tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    change(copy / "checkpoint.pt", config_of(data_dir=str(tmp_path / "gone")))
    assert command("train", "--resume", copy, "--data-dir", "data", "--device", "cpu") == 0 and same(copy, made[1])


def test_resume_after_the_class_folders_changed_is_refused(copy, made, tmp_path, capsys):
    for i, edit in enumerate((lambda photos: shutil.copytree(photos / "a", photos / "c"),
                              lambda photos: (photos / "a").rename(photos / "z"))):
        photos = shutil.copytree(made[0], tmp_path / f"photos{i}")
        edit(photos)
        change(copy / "checkpoint.pt", config_of(data_dir=str(photos)))
        before = (copy / "checkpoint.pt").read_bytes()
        assert "classes" in refused(capsys, "train", "--resume", copy)
        assert (copy / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("words", [["--resume", ""], ["--data-dir", "", "--dataset", "folder"]])
def test_an_empty_word_is_not_taken_for_a_default(monkeypatch, tmp_path, capsys, words):
    """As from a variable of the shell that is not set."""
    photographs(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sl, "fit_autoencoder", lambda *a: pytest.fail("training began"))
    assert words[0] in refused(capsys, "train", *TINY[:-2], *words) if words[0] != "--resume" else \
        refused(capsys, "train", *words)


def test_a_folder_that_is_a_loop_of_links(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    for flag, also in (("--out", []), ("--data-dir", ["--out", tmp_path / "run"])):
        refused(capsys, "train", *TINY, "--dataset", "folder", flag, tmp_path / "loop", *also)


# ---- checkpoints from strangers

def without(*keys):
    return lambda state: [state.pop(key) for key in keys] and None


def config_of(**changes):
    return lambda state: state["config"].update(changes)


def truncate(share):
    return lambda data: data[:int(len(data) * share)]


DAMAGE = {"empty": lambda data: b"", "text": lambda data: b"step,loss\n1,2\n", "half": truncate(0.5),
          "all but the end": truncate(0.999), "header": lambda data: data[:4], "zeros": lambda data: bytes(len(data)),
          "a picture": lambda data: b"\x89PNG\r\n\x1a\n" + data[:100]}
FOREIGN = {
    "a list": lambda state: [1, 2], "a tensor": lambda state: torch.zeros(3), "no step": without("step"),
    "only weights": lambda state: state["model"], "no config": without("config"),
    "a config of text": lambda state: state.update(config="x"),
    "unknown setting": config_of(colour="red"), "setting out of range": config_of(image_size=-3),
    "setting of another type": config_of(image_size="16"), "size that is no whole number": config_of(image_size=16.0),
    "unknown data set": config_of(dataset="dogs"), "other channels": config_of(latent_channels=4),
    "other size of the denoiser": config_of(model_size="S"), "other image size": config_of(image_size=32),
    "other classes": lambda state: state["classes"].append("c"), "no classes": without("classes"),
    "classes that are a number": lambda state: state.update(classes=3),
    "no average": without("ema"), "weights of text": lambda state: state.update(ema={"head": "heavy"}),
    "another autoencoder": lambda state: state.update(autoencoder=state["model"])}
ONLY_RESUME = {"no optimiser": without("optimiser"), "no log": without("log"), "no model": without("model"),
               "a step of text": lambda state: state.update(step="last")}


@pytest.mark.parametrize("name", [*DAMAGE, *FOREIGN, *ONLY_RESUME])
def test_a_strange_checkpoint_is_one_line_that_names_it(copy, capsys, name):
    path = copy / "checkpoint.pt"
    if name in DAMAGE:
        path.write_bytes(DAMAGE[name](path.read_bytes()))
    else:
        change(path, {**FOREIGN, **ONLY_RESUME}[name])
    before = path.read_bytes()
    assert str(copy) in refused(capsys, "train", "--resume", copy)
    assert path.read_bytes() == before
    if name not in ONLY_RESUME:
        assert str(copy) in refused(capsys, "sample", "--checkpoint", copy, "--count", 1, "--steps", 1)


@pytest.mark.parametrize("name", ["half", "other channels", "no optimiser", "a step of text", "a tensor"])
def test_a_strange_checkpoint_of_the_autoencoder_too(made, tmp_path, monkeypatch, capsys, name):
    with monkeypatch.context() as patch:
        patch.setattr(sl, "fit_denoiser", lambda *a: (_ for _ in ()).throw(sl.UserError("enough")))
        refused(capsys, "train", *made[2], "--out", tmp_path / "run")
    path = tmp_path / "run/autoencoder.pt"
    if name in DAMAGE:
        path.write_bytes(DAMAGE[name](path.read_bytes()))
    else:
        change(path, {**FOREIGN, **ONLY_RESUME}[name])
    assert str(tmp_path / "run") in refused(capsys, "train", "--resume", tmp_path / "run")


def test_weights_that_are_not_numbers_do_not_end_in_a_traceback(copy, capsys):
    def spoil(state):
        for value in state["ema"].values():
            value.fill_(math.nan)
    change(copy / "checkpoint.pt", spoil)
    for words in (["evaluate", "--eval-samples", 8], ["sample", "--count", 1]):
        code = command(*words, "--checkpoint", copy, "--device", "cpu")
        error = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in error and (code == 0 or one_line(error))


# ---- images from the wild

def png(width, height, depth=1, kind=0, palette=b"", clear=b""):
    """A valid PNG of zeros: a few kilobytes, whatever its size."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    line, squeeze = b"\0" * (1 + width * depth // 8), zlib.compressobj(1)
    body = b"".join(squeeze.compress(line * 1000) for _ in range(height // 1000))
    body += squeeze.compress(line * (height % 1000)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"PLTE", palette) if palette else b"")
            + (chunk(b"tRNS", clear) if clear else b"") + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def test_png_of_this_file_is_a_png():
    image = Image.open(io.BytesIO(png(24, 1010, kind=3, palette=bytes(range(6)), clear=b"\0")))
    assert image.size == (24, 1010) and image.convert("RGBA").getpixel((3, 3)) == (0, 1, 2, 0)


def test_a_folder_from_the_wild(tmp_path, capsys):
    """Every file is used or named; there are good ones enough for the bad to be fewer than one in a hundred."""
    root, noise = tmp_path / "wild", np.random.default_rng(0)
    good = root / "many" / "deep" / "deeper"
    good.mkdir(parents=True)
    for i in range(1200):
        (good / f"{i}.png").write_bytes(png(8, 8))
    (root / "empty").mkdir()
    for name in ("with space", "mañana 花", "$x_1$ 100%", "-dash", "new\nline"):
        (root / name).mkdir()
        (root / name / f"{name} it's.png").write_bytes(png(8, 8))
    odd = root / "odd"
    odd.mkdir()
    pixels = noise.integers(0, 255, (300, 200, 4), dtype=np.uint8)
    Image.new("RGB", (1, 1), "red").save(odd / "one pixel.png")
    (odd / "wide.png").write_bytes(png(20_000, 1))
    (odd / "high.png").write_bytes(png(8, 20_000))
    Image.fromarray(pixels, "CMYK").save(odd / "cmyk.jpg")
    frames = [Image.fromarray(noise.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in range(5)]
    frames[0].save(odd / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(odd / "moving.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(pixels, "RGBA").save(odd / "upper.PNG")
    (odd / "16 bits.png").write_bytes(png(30, 30, depth=16))
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(odd / "float.tiff")
    bad = root / "bad"
    bad.mkdir()
    (bad / "nothing.png").touch()
    Image.fromarray(pixels[..., :3]).save(bad / "whole.jpg", quality=95)
    (bad / "truncated.jpg").write_bytes((bad / "whole.jpg").read_bytes()[:9000])
    (bad / "text.jpg").write_text("dear diary")
    (bad / "bomb.png").write_bytes(png(12_000, 12_000))
    (bad / "big bomb.png").write_bytes(png(20_000, 20_000))
    (root / "loop").symlink_to(root)
    (bad / "self.png").symlink_to("self.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        train, test = (sl.load_images(folder_config(root), split) for split in ("train", "test"))
    said, files = capsys.readouterr().err.replace("\r", "\n"), [path for path in root.rglob("*") if path.is_file()]
    named = {path.name for path in files if f"{os.sep}{path.name} (" in said}
    unreadable = {"nothing.png", "truncated.jpg", "text.jpg", "bomb.png", "big bomb.png"}
    assert unreadable <= named <= unreadable | {"16 bits.png", "float.tiff"}
    assert len(train) + len(test) == len(files) - len(named) and "Traceback" not in said
    assert all(said.count(f"{os.sep}{name} (") == 1 for name in named)
    assert {"with space", "mañana 花", "new\nline", "odd", "many", "bad"} <= set(train.classes)
    assert "empty" not in train.classes and "loop" not in train.classes


def test_one_bad_file_of_two_hundred_is_skipped_wherever_it_falls(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.png").write_bytes(png(8, 8))
    bad, fell = tmp_path / "bad.png", set()
    bad.write_text("no picture")
    for i in range(40):
        bad = bad.rename(tmp_path / f"bad{i}.png")
        held_out = len(sl.load_images(folder_config(tmp_path), "test"))
        fell.add(held_out)                                     # 20 of 201, one of which may be the bad one
    assert fell == {19, 20}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """In a new process, as the command line: wide images and bombs; then names of any bytes -> its words, the run."""
    root = tmp_path_factory.mktemp("elsewhere")
    wide, bomb = png(20_000, 2_500, kind=3, palette=bytes(6), clear=b"\0"), png(20_000, 20_000)
    (root / "wide").mkdir()
    for i in range(4):
        (root / f"wide/wide{i}.png").write_bytes(wide)
        (root / f"wide/bomb{i}.png").write_bytes(bomb)
    try:
        photographs(root / "photos", (b"caf\xe9", "花", "naïve class"))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    out = os.path.join(os.fsencode(root), b"r\xfcn")
    code = ("import resource, runpy; script, root, out, name = sys.argv[1:5]; flags = sys.argv[5:]; codes = []\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "sample = ['sample', '--checkpoint', out, '--count', '1', '--steps', '1', '--classes']\n"
            "before = peak()\n"
            "for words in (['train', *flags, '--data-dir', root + '/wide', '--out', root + '/none'],\n"
            "              ['train', *flags, '--data-dir', root + '/photos', '--out', out], [*sample, '0', name],\n"
            "              [*sample, 'weed'], ['reconstruct', '--checkpoint', out]):\n"
            "    sys.argv[1:] = words\n"
            "    [sys.modules.pop(old, 0) for old in ('sphere_latent', 'extras')]\n"
            "    try: runpy.run_path(script, run_name='__main__')\n"
            "    except SystemExit as leave: codes.append(leave.code)\n"
            "    if len(codes) == 1: more = peak() - before\n"
            "print('\\nmore', more // 1024 ** (2 if sys.platform == 'darwin' else 1), 'codes', *codes)")
    process = start(code, ROOT / "sphere_latent.py", root, out, "花", *TINY, "--dataset", "folder", "--train-steps", 1,
                    PYTHONIOENCODING="ascii")
    words, error = (text.decode(errors="replace") for text in process.communicate(timeout=100))
    return words, error, out


def test_wide_images_and_bombs_take_no_gigabytes(elsewhere):
    """The wide ones are below Pillow's limit, transparent, read at once, and cut to 16 pixels."""
    words, error, _ = elsewhere
    assert error.count("wide/bomb") == 4 and "MemoryError" not in error, error
    assert int(words.split("more ")[1].split()[0]) < 1300


def test_names_of_any_bytes_reach_the_pictures(elsewhere):
    """A class folder and a run folder that are no UTF-8, and a terminal that knows only ASCII."""
    words, error, out = elsewhere
    assert "Traceback" not in error and words.endswith("codes 2 0 0 2 0\n"), error[-3000:]
    for name in (b"samples.png", b"sampled.png", b"reconstructions.png"):
        with open(os.path.join(out, name), "rb") as file:
            assert Image.open(file).size[0] > 100


def test_few_images_of_one_class_each_and_fewer_than_a_batch(tmp_path):
    photographs(tmp_path / "photos", ("a", "b", "c", "d", "e"), count=5)
    words = [*TINY, "--dataset", "folder", "--data-dir", tmp_path / "photos", "--batch-size", 64]
    assert command("train", *words, "--out", tmp_path / "run") == 0
    assert all(value.isfinite().all() for value in weights(tmp_path / "run"))
    assert command("evaluate", "--checkpoint", tmp_path / "run", "--eval-samples", 2) == 0


@pytest.mark.parametrize("colour", ["black", "white"])
def test_a_whole_folder_of_one_colour_trains(tmp_path, colour):
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), colour).save(tmp_path / "photos" / f"{i}.png")
    words = [*TINY, "--dataset", "folder", "--data-dir", tmp_path / "photos"]
    assert command("train", *words, "--out", tmp_path / "run") == 0
    assert all(value.isfinite().all() for value in weights(tmp_path / "run"))
    assert np.isfinite(np.genfromtxt(tmp_path / "run/frechet.csv", delimiter=",", skip_header=1)).all()
    images = sl.load_images(sl.load_run(tmp_path / "run")[0], "test")
    assert (sl.load_run(tmp_path / "run")[1].encode(images.pixels / 255)).isfinite().all()


# ---- numbers

def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(made, tmp_path, monkeypatch, capsys):
    """The loss of the last update before a save is finite, its gradient is not."""
    original, calls, out = sl.sphere_losses, [], tmp_path / "run"

    def spoil(*arguments):
        losses = original(*arguments)
        calls.append(1)
        if len(calls) == 2:                                    # zero, with a gradient of infinity times zero
            losses["total"] = losses["total"] + (0 * losses["total"]).sqrt()
        return losses
    monkeypatch.setattr(sl, "sphere_losses", spoil)
    assert "not finite" in refused(capsys, "train", *made[2], "--out", out, "--save-every", 2)
    for path in out.glob("*.pt"):
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["ema"].values()), path.name


def test_overflow_in_bf16_ends_in_one_line_or_in_finite_weights(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sl, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    for i, rate in enumerate(("0.01", "1e4", "1e11")):
        out = tmp_path / f"run{i}"
        code = command("train", *made[2], "--out", out, "--learning-rate", rate, "--train-steps", 12)
        error = capsys.readouterr().err
        assert code == 0 or "not finite" in one_line(error)
        assert code == 0 or rate != "0.01"
        for path in out.glob("*.pt"):
            assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["ema"].values()), rate


@pytest.mark.parametrize("error", [
    "torch.OutOfMemoryError", "torch.empty(2 ** 60, dtype=torch.uint8)", "MemoryError()"])
def test_out_of_memory_is_one_line_that_names_the_batch_size(made, tmp_path, monkeypatch, capsys, error):
    def greedy(*arguments):
        if error.startswith("torch.empty"):
            eval(error)                                        # the allocator's own words
        raise {"torch.OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
               "MemoryError()": MemoryError()}[error]
    monkeypatch.setattr(sl, "sphere_losses", greedy)
    assert "--batch-size" in refused(capsys, "train", *made[2], "--out", tmp_path / "run")


def test_what_only_sounds_like_memory_is_not_taken_for_it(made, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(sl, "sphere_losses", broken)
    with pytest.raises(RuntimeError, match="illegal memory"):
        command("train", *made[2], "--out", tmp_path / "run")


def test_out_of_memory_while_a_checkpoint_is_read_does_not_call_it_damaged(made, tmp_path, monkeypatch, capsys):
    def greedy(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(sl.Denoiser, "load_state_dict", greedy)
    said = refused(capsys, "sample", "--checkpoint", made[1], "--out", tmp_path / "a.png")
    assert "--batch-size" in said and "damaged" not in said


@pytest.mark.parametrize("pace, days", [(30, 0), (60_000, 60_000 / 9 * 80 / 86400)])
def test_a_run_of_days_says_so_after_ten_updates(made, tmp_path, monkeypatch, capsys, pace, days):
    real = sl.tqdm.format_dict.fget
    monkeypatch.setattr(sl.tqdm, "format_dict", property(lambda bar: {**real(bar), "elapsed": pace}))
    assert command("train", *made[2], "--train-steps", 80, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert said.count(f"80 updates, at the pace of the first: about {days:.1f} days") == (days > 0)


@pytest.mark.parametrize("words", [
    "--max-angle 0 --small-ratio 0 --label-dropout 1 --learning-rate 0 --ema-decay 0 --cfg-scale 0 "
    "--tilt 0 --noise-mean -100 --noise-std 0 --reconstruction-weight 0 --consistency-weight 0 --latent-consistency-weight 0",
    "--no-spherify --no-flips --no-fresh-noise --tilt-schedule fixed --save-every 1 --eval-samples 2",
    "--noise-distribution uniform-tangent --max-angle 89 --steps 1 --batch-size 1 --patch-size 1 --latent-channels 3 "
    "--image-size 2 --autoencoder-width 4"])
def test_the_edges_of_the_settings_train(made, tmp_path, monkeypatch, words):
    monkeypatch.setattr(sl, "loss_figure", LOSS_FIGURE)
    assert command("train", *made[2], *words.split(), "--out", tmp_path / "run") == 0
    assert all(value.isfinite().all() for value in weights(tmp_path / "run"))


# ---- every flag

NUMBERS = [field for field in FIELDS.values() if field.type in (int, float)]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_numbers_out_of_range_are_refused_by_name(monkeypatch, capsys, field):
    monkeypatch.setattr(sl, "train", lambda config: pytest.fail(f"training began with {getattr(config, field.name)}"))
    flag, rule = "--" + field.name.replace("_", "-"), field.metadata
    wrong = [str(rule["least"] - 1), str(rule["most"] * 1.5), "-1e11", "nan", "inf", "-inf", "1e13", "9" * 30]
    wrong += ["9" * 6000, "", " ", "ten", "1,5", "0x10", "1_0_", "None", "\n", "٣٫٥"]
    wrong += ["1.5", "1e3", "True"] if field.type is int else []
    for value in wrong + (["1.5"] if field.name in ("label_dropout", "ema_decay") else []):
        assert flag in refused(capsys, "train", f"{flag}={value}")


@pytest.mark.parametrize("flag, value", [
    ("steps", 10 ** 11), ("eval-samples", 10 ** 11), ("autoencoder-depth", 10 ** 11),
    ("autoencoder-width", 64 * 10 ** 9)])
def test_numbers_that_no_machine_can_do_are_refused_before_training(monkeypatch, capsys, flag, value):
    monkeypatch.setattr(sl, "train", lambda config: pytest.fail("training began"))
    assert f"--{flag}" in refused(capsys, "train", f"--{flag}", value)


@pytest.mark.parametrize("words", [
    ["sample", "--count", 10 ** 7], ["sample", "--steps", 10 ** 7], ["evaluate", "--eval-samples", 10 ** 7]])
def test_too_many_images_are_refused_before_the_first(made, monkeypatch, capsys, words):
    monkeypatch.setattr(sl, "seeded_noise", lambda *a: pytest.fail("it began"))
    assert words[1] in refused(capsys, *words, "--checkpoint", made[1])


@pytest.mark.parametrize("words, expected", [
    ("train --image-size 60 --patch-size 16", "--patch-size"), ("train --image-size 16", "--patch-size"),
    ("train --patch-size 4 --latent-channels 49", "--latent-channels"),
    ("train --autoencoder-width 6", "--autoencoder-width"),
    ("train --resume RUN --overwrite", "--resume"),
    ("train --resume RUN --out RUN", "--resume"), ("train --resume RUN --train-steps 9", "--resume"),
    ("train --device meta", "--device meta"), ("train --device hpu", "--device hpu"),
    ("train --device cuda:99", "--device cuda:99"),
    ("train --dataset", "--dataset"), ("train --flips=yes", "--flips"), ("train --no-seed", "no-seed"),
    ("train --dataset folder --data-dir absent", "absent"), ("train --steps 4 5", "5"), ("train drawn", "drawn"),
    ("sample --checkpoint RUN --cfg-scale -1", "--cfg-scale"),
    ("sample --checkpoint RUN --cfg-scale nan", "--cfg-scale"),
    ("sample --checkpoint RUN --tilt -5", "--tilt"), ("sample --checkpoint RUN --tilt inf", "--tilt"),
    ("sample --checkpoint RUN --steps -1", "--steps"), ("sample --checkpoint RUN --count -1", "--count"),
    ("sample --checkpoint RUN --seed -1", "--seed"), ("sample --checkpoint RUN --tilt-schedule up", "--tilt-schedule"),
    ("sample --checkpoint RUN --classes 2", "2"), ("sample --checkpoint RUN --classes -1", "-1"),
    ("sample --checkpoint RUN --classes a 0.5", "0.5"), ("sample --checkpoint RUN --classes", "--classes"),
    ("sample --checkpoint RUN --out RUN", "--out"), ("sample --checkpoint RUN --out x.jpeg", "--out"),
    ("sample --checkpoint RUN --device meta", "--device meta"), ("sample --checkpoint PHOTOS", "PHOTOS"),
    ("sample --checkpoint RUN/config.json", "config.json"), ("sample --checkpoint RUN/samples.png", "samples.png"),
    ("evaluate --checkpoint RUN --eval-samples 1", "--eval-samples"),
    ("evaluate --checkpoint RUN --steps 2", "--steps"),
    ("reconstruct --checkpoint RUN --seed 1", "--seed"), ("reconstruct", "--checkpoint"), ("sample --help=1", "help")])
def test_words_that_contradict_or_make_no_sense(made, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("draw_flowers", "fit_autoencoder", "sample_images"):
        monkeypatch.setattr(sl, name, lambda *a, **k: pytest.fail("it began"))
    photos, run, _ = made
    words = words.replace("PHOTOS", str(photos)).replace("RUN", str(run)).split()
    assert expected.replace("PHOTOS", str(photos)) in refused(capsys, *words)


def test_a_data_dir_alone_means_the_folder(made, monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(sl, "train", lambda config: configs.append(config))
    assert command("train", "--data-dir", made[0]) == 0
    assert configs[0].dataset == "folder" and configs[0].data_dir == str(made[0])


def test_classes_by_name_and_by_number_give_the_same_picture(made, tmp_path):
    for name, words in (("a", ["a", "b"]), ("b", [0, 1]), ("c", ["b", 0])):
        assert command("sample", "--checkpoint", made[1], "--count", 2, "--steps", 1, "--out",
                       tmp_path / f"{name}.png", "--classes", *words) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_a_message_is_one_line_even_if_a_word_has_two(tmp_path, capsys):
    assert "a" in refused(capsys, "train", "--dataset", "a\nb")
    assert "a" in refused(capsys, "sample", "--checkpoint", tmp_path / "a\nb")


# ---- properties

def any_value(field):
    """A strategy for values of a field of Config, inside and outside of its range."""
    choices = field.metadata["choices"]
    if field.type is bool:
        return st.booleans()
    if field.type is str:
        return st.sampled_from(choices + ("", "other")) if choices else st.text(max_size=8)
    least, most = field.metadata["least"], field.metadata["most"]
    edges = [field.default, least, least - 1, int(most), int(most) + 1, 0, 1, 2, 4, 16, 64, 89, 90]
    if field.type is int:
        return st.sampled_from(edges) | st.integers(-5, 200) | st.integers()
    return st.sampled_from(edges).map(float) | st.floats()


some_settings = st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), max_size=6).flatmap(
    lambda chosen: st.fixed_dictionaries({name: any_value(FIELDS[name]) for name in chosen}))


@given(some_settings)
@settings(quietly, max_examples=200)
@example({"image_size": 0, "patch_size": 0})
@example({"patch_size": 10 ** 11, "image_size": 2 * 10 ** 11})
def test_what_a_config_takes_it_keeps_and_the_rest_it_refuses(changes):
    try:
        config = sl.Config(**changes)
    except sl.UserError as error:
        assert "--" in str(error) and changes
        return
    values = dataclasses.asdict(config)
    assert sl.Config(**values) == config and sl.Config(**json.loads(json.dumps(values))) == config
    for name, field in FIELDS.items():
        value, choices = values[name], field.metadata["choices"]
        assert not choices or value in choices
        assert field.type not in (int, float) or math.isfinite(value) and value >= field.metadata["least"]
        assert field.type not in (int, float) or value <= field.metadata["most"]
        assert value == changes.get(name, field.default)
    assert config.image_size % config.patch_size == 0 and config.image_size > config.patch_size


@given(some_settings)
@settings(quietly, max_examples=100)
def test_the_command_line_and_config_agree(changes):
    got, words = [], []
    changes = {name: value for name, value in changes.items() if name not in ("resume", "data_dir", "dataset")}
    for name, value in changes.items():
        flag = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag}={value}")
    try:
        expected = dataclasses.replace(sl.preset("drawn", changes.get("method", "sphere-latent")), **changes)
    except sl.UserError:
        expected = None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()), \
            contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sl, "train", lambda config: got.append(config))
        code = sl.main(["train", *words])
    assert (code, got) == ((2, []) if expected is None else (0, [expected]))


WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=6) | st.sampled_from(
    ["", "-", "--", "-1", "0", "1", "2", "nan", "inf", "1e3", "a", "b", "--help", "train", "\n", "a b", "%s", "{}"])
FLAGS = sorted("--" + name.replace("_", "-") for name in FIELDS) + [
    "--checkpoint", "--classes", "--count", "--no-flips", "--no-spherify", "--nonsense", "-x"]


@st.composite
def command_lines(draw):
    """Words as a cat would type them, most of them near to something that works."""
    words = [draw(st.sampled_from(["train", "train", "sample", "sample", "evaluate", "reconstruct", "paint"]))]
    if words != ["train"] and draw(st.integers(0, 3)):
        checkpoints = ["RUN", "RUN", "RUN", "RUN/config.json", "FILE", "absent", "."]
        words += ["--checkpoint", draw(st.sampled_from(checkpoints))]
    if words[0] == "sample":
        words += ["--count", "1", "--steps", draw(st.sampled_from(["1", "2", "0", "-1", "x"]))]
    if words[0] in ("sample", "evaluate", "reconstruct"):
        words += ["--device", "cpu"]
    if words[0] == "evaluate":
        words += ["--eval-samples", draw(st.sampled_from(["2", "3", "1", "x"]))]
    for _ in range(draw(st.integers(0, 4))):
        flag = draw(st.sampled_from(FLAGS))
        if words[0] != "train" and flag in ("--count", "--steps", "--eval-samples", "--device", "--data-dir", "--out"):
            continue                                          # the cat may not draw a billion images
        field = FIELDS.get(flag[2:].replace("-", "_"))
        words.append(flag)
        words += [str(draw(any_value(field)))] * draw(st.sampled_from([1, 1, 1, 0])) if field and draw(st.booleans()) \
            else draw(st.lists(WORDS, max_size=2))
    return [word.replace("\0", "") for word in words]


@given(command_lines())
@settings(quietly, max_examples=250)
@example(["train", "--resume", ""])
@example([])
def test_no_command_line_ends_in_a_traceback(made, tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "file").write_text("text")
    words = [word.replace("RUN", str(made[1])).replace("FILE", str(folder / "file")) for word in words]
    if words and words[0] in ("sample", "evaluate", "reconstruct"):
        words += ["--out", str(folder / ("out.csv" if words[0] == "evaluate" else "out.png"))]
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        quick(patch)
        patch.setattr(sl, "train", lambda config: folder)
        patch.setattr(sl, "resolve_device", lambda name: torch.device("cpu"))
        patch.chdir(folder)
        code = sl.main(words)
    assert code in (0, 2)
    if code == 2:
        one_line(error.getvalue())
    shutil.rmtree(folder)


def points(seed, batch=3, shape=(16, 8)):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def at_right_angles(v, e):
    """e made orthogonal to v, of the same length."""
    return sl.spherify(e - (e * v).mean((1, 2), keepdim=True) * v)


seeds, angles = st.integers(0, 10 ** 6), st.floats(0, math.pi / 2)


@given(seeds, st.sampled_from([(4, 2), (16, 8), (1, 64), (3, 5, 7), (200,)]), st.floats(-3, 9))
@quietly
def test_spherify_again_changes_nothing_and_scale_does_not_matter(seed, shape, power):
    z = points(seed, 2, shape)
    v = sl.spherify(z)
    size = math.sqrt(math.prod(shape))
    torch.testing.assert_close(v.flatten(1).norm(dim=1), torch.full((2,), size), rtol=1e-3, atol=0)
    torch.testing.assert_close(sl.spherify(v), v, rtol=1e-5, atol=1e-5)
    scaled = sl.spherify(10.0 ** power * z)
    cosine = torch.cosine_similarity(scaled.flatten(1), v.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2), rtol=0, atol=1e-5)           # the direction, always
    if power >= -0.5:                                                              # the length, above the 1e-6
        torch.testing.assert_close(scaled, v, rtol=1e-4, atol=1e-4)
    assert (scaled.flatten(1).norm(dim=1) <= size * (1 + 1e-5)).all()
    torch.testing.assert_close(sl.spherify(-z), -v)


@given(seeds, angles, angles)
@quietly
def test_tilts_by_orthogonal_noise_add_up_like_rotations(seed, first, second):
    v = sl.spherify(points(seed))
    e = at_right_angles(v, points(seed + 1))
    once = sl.tilt(v, e, first)
    length = torch.full((3,), math.sqrt(16 * 8))
    torch.testing.assert_close(once.flatten(1).norm(dim=1), length, rtol=1e-4, atol=0)     # no spherify needed
    torch.testing.assert_close(sl.noisy_spherify(v, e, first), once, rtol=1e-4, atol=1e-4)
    turned = sl.tilt(e, -v, first)                                                                  # e goes along
    torch.testing.assert_close(sl.tilt(once, turned, second), sl.tilt(v, e, first + second), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sl.tilt(once, turned, -first), v, rtol=1e-4, atol=1e-4)             # and back
    torch.testing.assert_close(sl.angle_between(v, once), torch.full((3,), first), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sl.angle_between(once, e), torch.full((3,), math.pi / 2 - first), rtol=1e-3, atol=1e-3)


@given(seeds, st.floats(0.01, 100))
@quietly
def test_noisy_spherify_is_v_at_no_angle_and_the_noise_at_ninety_degrees(seed, scale):
    v, e = sl.spherify(points(seed)), scale * points(seed + 1)
    torch.testing.assert_close(sl.noisy_spherify(v, e, 0.0), v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sl.noisy_spherify(v, e, math.pi / 2), sl.spherify(e), rtol=1e-4, atol=1e-4)
    between = sl.noisy_spherify(v, e, torch.tensor([0.3, 0.8, 1.2]))
    assert (sl.angle_between(v, between) < sl.angle_between(v, e) + 1e-3).all()


@given(seeds, st.lists(st.floats(0, 1), min_size=2, max_size=6))
@quietly
def test_slerp_goes_one_way_along_the_great_circle(seed, shares):
    a, b = sl.spherify(points(seed, 1)), sl.spherify(points(seed + 1, 1))
    whole, last = float(sl.angle_between(a, b)), -1e-3
    for t in sorted(shares):
        p = sl.slerp(a, b, t)
        torch.testing.assert_close(p.norm(), torch.tensor(math.sqrt(16 * 8)), rtol=1e-4, atol=0)
        there, back = float(sl.angle_between(a, p)), float(sl.angle_between(p, b))
        assert there >= last - 1e-3 and abs(there + back - whole) < 2e-3               # on the way, never off it
        torch.testing.assert_close(p, sl.slerp(b, a, 1 - t), rtol=1e-3, atol=1e-3)     # the same way back
        last = there


@given(seeds, st.floats(0, 1), st.floats(0, 1e-4))
@quietly
def test_slerp_between_near_and_opposite_points_is_finite(seed, t, near):
    a = sl.spherify(points(seed))
    close = sl.spherify(a + near * points(seed + 1))
    p = sl.slerp(a, close, t)
    torch.testing.assert_close(p.flatten(1).norm(dim=1), torch.full((3,), math.sqrt(16 * 8)), rtol=1e-3, atol=0)
    assert (sl.angle_between(a, p) <= sl.angle_between(a, close) + 1e-3).all()
    assert sl.slerp(a, -a, t).isfinite().all()                                         # no way is the right one


@given(seeds, st.sampled_from(["logit-normal", "uniform", "uniform-tangent"]), st.floats(0, 89), st.floats(0, 1),
       st.floats(-100, 1e11), st.floats(0, 1e11))
@quietly
def test_angles_stay_in_their_range_for_every_setting(seed, name, largest, ratio, mean, std):
    config = sl.Config(noise_distribution=name, max_angle=largest, small_ratio=ratio, noise_mean=mean, noise_std=std)
    small, large = sl.sample_angles(64, config, torch.Generator().manual_seed(seed))
    assert (0 <= small).all() and (small <= large + 1e-6).all() and (large <= math.radians(largest) + 1e-5).all()


@given(seeds, st.floats(0, math.pi / 2))
@quietly
def test_the_zero_latent_stays_zero_and_its_noise_is_noise(seed, angle):
    e = points(seed)
    zero = torch.zeros_like(e)
    assert torch.equal(sl.spherify(zero), zero) and torch.equal(sl.noisy_spherify(zero, zero, angle), zero)
    noisy = sl.noisy_spherify(zero, e, max(angle, 0.1))
    torch.testing.assert_close(noisy, sl.spherify(e), rtol=1e-3, atol=1e-3)
