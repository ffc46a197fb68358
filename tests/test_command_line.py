"""The command line. What a person can put right ends in one line and exit code 2."""
import contextlib
import dataclasses
import io
import json
import pathlib
import runpy
import shlex
import shutil

import huggingface_hub
import pytest
import torch
from conftest import SMALL, fill

import sphere_latent as sl


def run(*words):
    return sl.main([str(word) for word in words])


def refused(capsys, *words):
    """The command must end with exit code 2 and one line, but for progress bars. Returns it."""
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


FLAGS = {"--" + field.name.replace("_", "-"): field for field in dataclasses.fields(sl.Config)}


@pytest.mark.parametrize("value", [
    "nan", "inf", "-inf", "-1e11", "1e13", "9" * 19, "9" * 6000, "ten", "1,5", ""])
def test_values_that_no_setting_takes(trained, capsys, value):
    for flag, field in FLAGS.items():
        if field.type in (int, float) or field.metadata["choices"]:
            assert flag in refused(capsys, "train", f"{flag}={value}")
    assert not trained


# Wrong words after `train`, after `sample --checkpoint RUN` and others. The last one is at fault.
WRONG = {
    "train": [
        "now", "--flips=yes", "--batch=8", "--resume absent", "--image-size=50", "--image-size=0",
        "--patch-size 33 --image-size=66", "--latent-channels=769", "--device=cuda:99",
        "--autoencoder dinov2-b --image-size=64", "--device=meta", "--data-dir absent",
        "--noise-distribution uniform-tangent --max-angle=90",
        "--method sphere-encoder --dataset cifar10 --patch-size 8 --image-size=16",
        "--autoencoder tiny --dataset imagenet"],
    "train --resume RUN": ["--overwrite", "--train-steps=5"],
    "evaluate --checkpoint RUN": ["absent", "--eval-samples=1", "--steps=2"],
    "sample --checkpoint RUN": [
        "--classes weed", "--classes 12", "--classes -1", "--count=0", "--count=x", "--count=42",
        "--classes poppy --count=501", "--out=x.jpeg", "--steps=0", "--device cuda:99"],
    "sample --checkpoint": ["absent", "RUN/log.csv"],
}


@pytest.mark.parametrize("words", [f"{start} {end}" for start in WRONG for end in WRONG[start]])
def test_words_that_make_no_sense(small_run, tmp_path, monkeypatch, capsys, words):
    for name in ("sample_images", "evaluate", "begin_run", "fit"):
        monkeypatch.setattr(sl, name, lambda *arguments: pytest.fail("it began"))
    monkeypatch.chdir(tmp_path)
    words = words.replace("RUN", str(small_run)).split()
    assert words[-1].split("=")[0] in refused(capsys, *words)


def test_flags_with_underscores_and_a_home(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "my_photos", *[f"a_b/{i}.png" for i in range(4)])
    assert run("train", "--data_dir=~/my_photos", "--batch_size", 9, "--no_flips") == 0
    [config] = trained
    assert config.dataset == "folder" and config.data_dir == "~/my_photos"   # the word is kept
    assert config.batch_size == 9 and not config.flips
    assert sl.find_images(config)["train"].classes == ["a_b"]
    folder = sl.prepare_folder(dataclasses.replace(config, out="~/run"), False, False)
    assert folder == tmp_path / "run"
    assert "train | sample | evaluate" in refused(capsys)     # no command at all


CHANGES = {"train_steps": 9, "data_dir": "x", "device": "cpu", "micro_batch": 3,
           "precision": "float32", "compile": True, "save_every": 7}


def test_a_resumed_run_keeps_its_settings_but_for_a_few(small_run, trained, capsys):
    saved = json.loads((small_run / "config.json").read_text())
    for path in (small_run, small_run / "checkpoint.pt"):
        for flag, field in FLAGS.items():
            value = CHANGES.get(field.name, saved[field.name])
            words = [flag] if field.type is bool else [f"{flag}={value}"]
            if field.name in CHANGES:
                assert run("train", "--resume", path, *words) == 0
                assert vars(trained.pop()) == {**saved, field.name: value}
            else:
                assert flag in refused(capsys, "train", "--resume", path, *words)


def test_only_overwrite_replaces_a_run_and_nothing_else(tmp_path, monkeypatch, capsys):
    def press_ctrl_c(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(sl, "new_models", press_ctrl_c)      # the first thing after the images
    out, photos = tmp_path / "run", tmp_path / "photos"
    words = ["train", *SMALL, "--out", out, "--data-dir", photos]
    for names in (["config.json", "notes.txt"],              # another program's, and a run
                  ["checkpoint.pt", "log.csv", "loss.png", "samples.png", "reconstructions.png",
                   "evaluation.csv"]):
        before = [(fill(out, name) / name).absolute() for name in names]
        for path in before:
            path.write_text("old")
        assert "--overwrite" in refused(capsys, *words)
        assert "photos" in refused(capsys, *words, "--overwrite")            # no images are there
        assert [path.read_text() for path in before] == ["old"] * len(names)
    fill(photos, *[f"{name}/{i}.png" for name in "ab" for i in range(3)])
    assert run(*words, "--overwrite") == 130
    assert {path.name for path in out.iterdir()} == {"config.json", "notes.txt"}
    assert json.loads((out / "config.json").read_text())["out"] == str(out)
    output, error = capsys.readouterr()
    assert "a 3, b 3" in output and f"train --resume {out}" in error         # what was found


class Attack:
    def __reduce__(self):                                    # what unpickling it would do
        return pytest.fail, ("the file ran code",)


DAMAGE = {"half": "cannot be read", "attack": "cannot be read", "newer": "settings colour",
          "no average": "does not fit", "nan": "not finite", "missing": "train --resume RUN"}


@pytest.mark.parametrize("command, damage", [
    *[("sample --checkpoint", damage) for damage in DAMAGE],
    *[("train --resume", damage) for damage in ("half", "attack", "newer")]])
def test_a_strange_checkpoint_is_named(small_run, tmp_path, monkeypatch, capsys, command, damage):
    monkeypatch.setattr(sl, "load_both_splits", lambda config: pytest.fail("images were read"))
    folder = shutil.copytree(small_run, tmp_path / "run")
    path = folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    average = {name: torch.nan * weight for name, weight in state["average"].items()}
    others = {"attack": {"step": Attack()}, "no average": {**state, "average": {}},
              "nan": {**state, "average": average},
              "newer": {**state, "config": {**state["config"], "colour": "red"}}}
    torch.save(others.get(damage, state), path)
    if damage == "half":
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    if damage == "missing":
        path.unlink()
    line = refused(capsys, *command.split(), folder)
    assert DAMAGE[damage] in line and (str(folder) in line or damage == "nan")


def test_a_sheet_has_a_row_for_each_class(small_run, tmp_path, monkeypatch):
    sheets = []

    def images(run, labels, steps):
        sheets.append([[run[0].seed, run[0].cfg_scale, run[0].tilt, steps]])
        return labels.view(-1, 1, 1, 1)
    monkeypatch.setattr(sl, "sample_images", images)
    monkeypatch.setattr(sl, "picture", lambda path, rows, names: sheets[-1].extend(
        [[row.flatten().tolist() for row in rows], names, path]))
    command = ["sample", "--checkpoint", small_run / "checkpoint.pt"]
    assert run(*command) == 0
    assert run(*command, "--classes", "poppy", 3, "--count", 2, "--seed", 5, "--cfg-scale", 2,
               "--tilt", 45, "--steps", 6, "--out", tmp_path / "new/x.PNG") == 0
    assert run(*command, "--classes", "daisy", "--count", 1) == 0
    kinds = [[label] * 8 for label in range(12)]
    names = [species[0] for species in reversed(sl.SPECIES)]
    assert sheets == [
        [[0, 1.5, 90, 4], kinds, names, small_run / "sampled.png"],
        [[5, 2, 45, 6], [[2, 2], [3, 3]], ["poppy", "lily"], tmp_path / "new/x.PNG"],
        [[0, 1.5, 90, 4], [[6]], ["daisy"], small_run / "sampled.png"]]
    assert (tmp_path / "new").is_dir()


def test_names_of_classes_come_before_numbers():
    assert [sl.class_number(word, ["rose", "lily"]) for word in ("lily", "0", "1")] == [1, 0, 1]
    assert [sl.class_number(word, ["1", "10", "2"]) for word in ("1", "10", "2")] == [0, 1, 2]
    with pytest.raises(sl.UserError, match="choose from 1, 10, 2"):
        sl.class_number("0", ["1", "10", "2"])


def no_network(*arguments, **options):
    raise OSError("no network")


@pytest.mark.parametrize("missing", [
    "model.safetensors", "model.pt", "stat.pt", "pt_inception", "vgg16-397923af.pth"])
def test_missing_weights_are_named_with_a_command_that_works(tmp_path, monkeypatch, capsys,
                                                             request, missing):
    advised = [str(tmp_path / "hub/checkpoints")]            # how to get them

    def hf_hub_download(repository, file):
        if file.endswith(missing):
            advised[0] = f"hf download {repository} {file},"
            no_network()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sl, "load_both_splits", lambda config: pytest.fail("images were read"))
    is_vgg = missing.startswith("vgg")
    kind = ["--method", "sphere-encoder"] if is_vgg else ["--autoencoder", "dinov2-b"]
    words = ["train", "--data-dir", "my photos", "--device", "cpu", *kind]
    assert run(*words) == 2
    out, error = capsys.readouterr()
    line, advice = error.strip().split("\n")[-1].split("To train without: ")
    assert missing in line and "no network" in line and advised[0] in line
    assert is_vgg or out.startswith("On a CPU this takes weeks") and advice in out
    words = [*words, *advice.split()[1:]] if is_vgg else shlex.split(advice)[2:]
    trained = request.getfixturevalue("trained")             # from here on nothing is trained
    assert run(*words) == 0
    sl.fetch_weights(trained[0])                             # it needs none
    assert not sl.uses_rae(trained[0]) and trained[0].data_dir == "my photos"


def test_a_run_does_not_go_on_with_other_classes(small_run, monkeypatch, capsys):
    others = sl.Images([0, 1], ["cat", "dog"], pixels=torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    monkeypatch.setattr(sl, "load_both_splits", lambda config: (others, others))
    assert "other classes" in refused(capsys, "train", "--resume", small_run)


@pytest.mark.parametrize("stream, word", [
    (io.StringIO(), "é"), (io.TextIOWrapper(io.BytesIO(), encoding="ascii"), r"\xe9")])
def test_it_runs_in_notebooks_and_in_terminals_without_all_letters(tmp_path, monkeypatch, stream,
                                                                   word):
    fill(tmp_path, "a/1.png", "a/2.png", "é/3.txt")
    monkeypatch.setattr("sys.argv", ["", "train", "--data-dir", str(tmp_path), "--device", "cpu"])
    with contextlib.redirect_stdout(stream), pytest.raises(SystemExit) as leaving:
        runpy.run_path(sl.__file__, run_name="__main__")     # as `%run` does
    stream.seek(0)
    assert leaving.value.code == 2 and f"folder {word} holds no image" in stream.read()
