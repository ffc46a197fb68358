"""The command line. What a person can put right ends in one line and exit code 2."""
import dataclasses
import pathlib
import shlex
import shutil

import pytest
import torch

import sphere_latent as sl
from conftest import SMALL, fill


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


@pytest.mark.parametrize("value", [
    "nan", "inf", "-inf", "-1e11", "1e13", "9" * 19, "9" * 6000, "ten", "1,5", ""])
def test_values_that_no_setting_takes(trained, capsys, value):
    for field in dataclasses.fields(sl.Config):
        if field.type in (int, float) or field.metadata["options"]:
            flag = "--" + field.name.replace("_", "-")
            assert flag in refused(capsys, "train", f"{flag}={value}")
    assert not trained


# Wrong words after `train`, after `sample --checkpoint RUN` and others. The last one is at fault.
WRONG = {
    "train": [
        "now", "--flips=yes", "--resume absent", "--image-size=50", "--dataset drawn --data-dir=X",
        "--batch-size 9 --accumulate=2", "--method sphere-encoder --autoencoder-steps=5"],
    "train --resume RUN": ["--seed=1", "--overwrite"],
    "evaluate --checkpoint RUN": ["absent", "--eval-samples=1", "--steps=2"],
    "sample --checkpoint RUN": [
        "--classes weed", "--classes 12", "--count=0", "--out=x.jpeg", "--device cuda:99"],
    "sample --checkpoint": ["absent", "RUN/log.csv"],
}


@pytest.mark.parametrize("words", [f"{start} {end}" for start in WRONG for end in WRONG[start]])
def test_words_that_make_no_sense(small_run, trained, monkeypatch, capsys, words):
    for name in ("sample_images", "evaluate"):
        monkeypatch.setattr(sl, name, lambda *arguments: pytest.fail("it began"))
    words = words.replace("RUN", str(small_run)).split()
    assert words[-1].split("=")[0] in refused(capsys, *words) and not trained


def test_only_overwrite_replaces_a_run_and_nothing_else(tmp_path, monkeypatch, capsys):
    def press_ctrl_c(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(sl, "load_images", press_ctrl_c)     # the first thing after that
    for name in ("checkpoint.pt", "notes.txt"):
        (tmp_path / name).write_text("old")
    words = ["train", *SMALL, "--out", tmp_path]
    assert "--overwrite" in refused(capsys, *words)
    assert (tmp_path / "checkpoint.pt").read_text() == "old"
    assert run(*words, "--overwrite") == 130
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt"}


class Attack:
    def __reduce__(self):                                    # what unpickling it would do
        return pytest.fail, ("the file ran code",)


@pytest.mark.parametrize("command", ["sample --checkpoint", "train --resume"])
@pytest.mark.parametrize("damage", ["half", "attack", "no average", "newer program"])
def test_a_strange_checkpoint_is_named(small_run, tmp_path, capsys, command, damage):
    folder = shutil.copytree(small_run, tmp_path / "run")
    path = folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    others = {"attack": {"step": Attack()}, "no average": {**state, "average": {}},
              "newer program": {**state, "config": {**state["config"], "colour": "red"}}}
    torch.save(others.get(damage, state), path)
    if damage == "half":
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    line = refused(capsys, *command.split(), folder)
    assert str(folder) in line and ("settings colour" in line) == (damage == "newer program")


def test_what_is_missing_is_named_with_a_command_that_works(tmp_path, monkeypatch, capsys, request):
    def no_network(*arguments, **options):
        raise OSError("no network")
    for name in ("huggingface_hub.get_hf_file_metadata", "torch.hub.download_url_to_file"):
        monkeypatch.setattr(name, no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "my photos", *[f"{i}.png" for i in range(4)])
    flags = ["--data-dir", "my photos", "--autoencoder", "dinov2-b", "--image-size", 256]
    assert run("train", *flags, "--device", "cpu") == 2
    out, error = capsys.readouterr()
    assert "No GPU found" in out.split("\n")[0] and "Traceback" not in error
    for name in ("model.safetensors", "model.pt", "stat.pt", sl.INCEPTION):
        assert f"{name} " in error
    trained = request.getfixturevalue("trained")             # from here on nothing is trained
    assert run(*shlex.split(error.split("python sphere_latent.py")[-1])) == 0
    assert trained[0].autoencoder == "tiny" and trained[0].data_dir == "my photos"
