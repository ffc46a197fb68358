"""The command line. What a person can put right ends in one line and exit code 2."""
import dataclasses
import fcntl
import io
import pathlib
import runpy
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import sphere_latent as sl
from conftest import ROOT, SMALL

FIELDS = dataclasses.fields(sl.Config)
WITH_RULES = [f for f in FIELDS if f.type in (int, float) or f.metadata["options"]]
FLAGS = {field.name: "--" + field.name.replace("_", "-") for field in FIELDS}


def run(*words):
    return sl.main([str(word) for word in words])


def refused(capsys, *words):
    """The command must end with exit code 2 and one line, but for progress bars -> that line."""
    assert run(*words) == 2
    error = capsys.readouterr().err
    *bars, line = error.strip().replace("\r", "\n").split("\n")
    assert line.startswith("sphere_latent.py: ") and all("it/s" in bar for bar in bars if bar)
    return line


@pytest.fixture
def trained(monkeypatch):
    """The configs with which a training would have begun."""
    configs = []
    monkeypatch.setattr(sl, "train", lambda config, **_: configs.append(config) or pathlib.Path())
    return configs


@pytest.mark.parametrize("field", WITH_RULES, ids=lambda field: field.name)
def test_values_that_no_setting_takes(trained, capsys, field):
    for value in ("nan", "inf", "-inf", "-1e11", "1e13", "9" * 19, "9" * 6000, "ten", "1,5", ""):
        assert FLAGS[field.name] in refused(capsys, "train", f"{FLAGS[field.name]}={value}")
    assert not trained


# Wrong words after `train`, after `sample --checkpoint RUN` and others. The last one is at fault.
WRONG = {
    "train": [
        "now", "--train", "--seed", "--flips=yes", "--train-steps=0", "--resume absent",
        "--image-size=50", "--patch-size=5 --image-size=15", "--patch-size 4 --latent-channels=49",
        "--autoencoder dinov2-b", "--noise-distribution uniform-tangent",
        "--batch-size 9 --accumulate=2", "--dataset drawn --data-dir=X", "--weights-dir=X",
        "--noise-distribution uniform --noise-std=2", "--method sphere-encoder --compile",
        "--method sphere-encoder --autoencoder-steps=5"],
    "train --resume RUN": ["--seed=1", "--overwrite", "--data-dir=X"],
    "evaluate --checkpoint RUN": ["absent", "--eval-samples=1", "--data-dir=X", "--steps=2"],
    "sample --checkpoint RUN": [
        "--classes weed", "--classes 12", "--classes 0.5", "--classes", "--count=0", "--count=-1",
        "--count=84", "--classes poppy --count=600", "--steps=0", "--seed=1111111111111111111",
        "--tilt=inf", "--out=RUN", "--out=x.jpeg", "--out=RUN/checkpoint.pt", "--weights-dir=X",
        "--device potato", "--device meta", "--device cuda:99", "--device hpu"],
    "sample --checkpoint": ["absent", "RUN/log.csv", ""],
    "": ["paint"],
}


@pytest.mark.parametrize("words", [f"{start} {end}" for start in WRONG for end in WRONG[start]])
def test_words_that_make_no_sense(small_run, trained, monkeypatch, capsys, words):
    for name in ("sample_images", "evaluate"):
        monkeypatch.setattr(sl, name, lambda *arguments: pytest.fail("it began"))
    words = words.replace("RUN", str(small_run)).split()
    assert words[-1].split("=")[0] in refused(capsys, *words) and not trained


def test_the_file_runs_where_stdout_is_no_terminal(monkeypatch):
    """As in a notebook by %run. --help names all settings."""
    monkeypatch.setattr(sys, "argv", ["sphere_latent.py", "train", "--help"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "sphere_latent.py"), run_name="__main__")
    assert all(flag in sys.stdout.getvalue() for flag in FLAGS.values())


def test_importing_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    runpy.run_path(str(ROOT / "sphere_latent.py"), run_name="imported")
    assert torch.equal(state, torch.random.get_rng_state())
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_it_trains_in_a_thread_without_locks_and_in_the_home_folder(tmp_path, monkeypatch):
    """Signal handlers belong to the main thread; a network disk may not lock files."""
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, lambda *arguments: 1 / 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    with ThreadPoolExecutor() as pool:
        assert pool.submit(run, "train", *SMALL, "--out=~/runs/a").result() == 0
    assert (tmp_path / "runs/a/samples.png").exists()


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt"])
def test_nothing_is_overwritten_unasked(tmp_path, capsys, name):
    (tmp_path / name).write_text("of another program")
    assert "--overwrite" in refused(capsys, "train", *SMALL, "--out", tmp_path)
    assert (tmp_path / name).read_text() == "of another program"


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, monkeypatch):
    def press_ctrl_c(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(sl, "load_images", press_ctrl_c)     # the first thing after that
    for name in ("checkpoint.pt", "notes.txt"):
        (tmp_path / name).write_text("old")
    assert run("train", *SMALL, "--overwrite", "--out", tmp_path) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt"}


def test_a_run_goes_on_by_the_name_of_its_checkpoint(small_run, trained):
    assert run("train", "--resume", small_run / "checkpoint.pt", "--train-steps", 9) == 0
    assert (trained[0].out, trained[0].train_steps) == (str(small_run), 9)


def test_half_a_run_is_not_called_damaged(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert "train --resume" in refused(capsys, "sample", "--checkpoint", tmp_path)


class Attack:
    def __reduce__(self):                                    # what unpickling it would do
        return pytest.fail, ("the file ran code",)


def changed(change):
    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    return damage


DAMAGE = {
    "half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "list": lambda path: torch.save([1, 2], path),
    "attack": lambda path: torch.save({"step": Attack()}, path),
    "no average": changed(lambda state: state.pop("average")),
    "other classes": changed(lambda state: state.update(classes=["a"])),
    "newer program": changed(lambda state: state["config"].update(colour="red")),
    "word": changed(lambda state: state["config"].update(image_size="16")),
    "weights": changed(lambda state: state["average"].update(more=torch.zeros(1))),
}


@pytest.mark.parametrize("command", ["sample --checkpoint", "train --resume"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_strange_checkpoint_is_named(small_run, tmp_path, capsys, command, name):
    folder = shutil.copytree(small_run, tmp_path / "run")
    DAMAGE[name](folder / "checkpoint.pt")
    line = refused(capsys, *command.split(), folder)
    assert str(folder) in line and ("settings colour" in line) == (name == "newer program")


def test_weights_that_are_not_numbers_give_no_picture(small_run, tmp_path, capsys):
    folder = shutil.copytree(small_run, tmp_path / "run")
    changed(lambda state: state["average"]["head.bias"].fill_(torch.nan))(folder / "checkpoint.pt")
    assert "not finite" in refused(capsys, "sample", "--checkpoint", folder)
    assert not (folder / "sampled.png").exists()


def test_classes_by_name_and_by_number(small_run, tmp_path):
    pictures = []
    for classes in (["wild rose", "poppy", 3], [11, 9, "clematis"]):
        words = ["--classes", *classes, "--count", 2, "--out", tmp_path / "grid.PNG"]
        assert run("sample", "--checkpoint", small_run, *words) == 0
        pictures.append((tmp_path / "grid.PNG").read_bytes())
    assert pictures[0] == pictures[1]


def test_where_classes_are_called_by_numbers_a_number_is_a_name():
    assert sl.class_number("2", ["1", "10", "2"]) == 2
    with pytest.raises(sl.UserError, match="choose from 1, 10, 2"):
        sl.class_number("0", ["1", "10", "2"])


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_drawn_without_a_warning(tmp_path):
    sl.picture(tmp_path / "a.png", [torch.zeros(1, 3, 8, 8)], ["罂粟 $x^"], ["мак"])


def test_one_table_for_several_runs(small_run, tmp_path, capsys):
    other = shutil.copytree(small_run, tmp_path / "other")
    assert run("evaluate", "--checkpoint", small_run, other) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line[:2] for line in lines if line[0] in (str(small_run), str(other))]
    assert rows == [[str(path), kind] for path in (small_run, other)
                    for kind in ("rebuilt", "1", "2", "4", "6")]


PUBLISHED = ["model.safetensors", "model.pt", "stat.pt", sl.INCEPTION]


@pytest.mark.parametrize("flags, missing, data_dir", [
    ("--dataset flowers --device cpu", ["flowers-102", *PUBLISHED], ""),
    ("--dataset cifar10", ["cifar-10-python.tar.gz"], ""),
    ("--data-dir 'my photos' --autoencoder dinov2-b --image-size 256 --device cpu", PUBLISHED,
     "my photos"),
])
def test_all_that_is_missing_is_named_at_once_with_a_command_that_works(
        tmp_path, monkeypatch, capsys, request, flags, missing, data_dir):
    def no_network(*arguments, **options):
        raise OSError("no network")
    for name in ("urllib.request.urlopen", "huggingface_hub.hf_hub_download",
                 "torch.hub.download_url_to_file"):
        monkeypatch.setattr(name, no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"my photos/{i}.png")
    assert run("train", *shlex.split(flags)) == 2
    out, error = capsys.readouterr()
    assert all(f"{name} " in error for name in missing) and "Traceback" not in error
    assert ("No GPU found" in out.split("\n")[0]) == ("model.pt" in missing)
    trained = request.getfixturevalue("trained")             # from here on nothing is trained
    assert run(*shlex.split(error.split("python sphere_latent.py")[-1])) == 0
    assert trained[0].autoencoder == "tiny" and trained[0].data_dir == data_dir
