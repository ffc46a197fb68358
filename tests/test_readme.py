"""The README promises only what is there: commands, flags, names, pictures."""
import csv
import math
import re
import shlex

import pytest
import timm
import torch
from conftest import ROOT, SMALL, fill
from test_evaluation import FewFeatures
from test_images import make_flowers

import sphere_latent as sl

README = (ROOT / "README.md").read_text()
BLOCKS = [block.partition("\n") for block in re.split(r"(?m)^```", README)[1::2]]
LINES = [line for language, _, text in BLOCKS if language in ("", "bash")
         for line in text.split("\n")]
COMMAND = re.compile(r"(?:pip .* && )?(?:python|torchrun .*) sphere_latent\.py (\w.*)")
COMMANDS = dict.fromkeys(match[1] for match in map(COMMAND.match, LINES) if match)
SLOW = re.compile("animal-faces|imagenet|dinov2-b")          # as flowers, which is always tried
BIG = ["--train-steps", "1", "--batch-size", "2", "--eval-samples", "4", "--device", "cpu"]


def test_every_picture_experiment_flag_and_name_exists(capsys):
    pictures = re.findall(r"\]\((assets/[^)]+)\)", README)
    experiments = re.findall(r"tests/experiments/[\w.]+", README)
    assert pictures
    for path in pictures + experiments:
        assert (ROOT / path).stat().st_size > 500, path
    for command in ("train", "sample", "evaluate"):
        assert sl.main([command, "--help"]) == 0
    flags, out = set(re.findall(r"(?<=`)--[a-z][a-z-]+", README)), capsys.readouterr().out
    assert flags and flags <= set(re.findall(r"--[a-z][a-z-]+", out))
    assert "updates of the denoiser (default: 1000)" in " ".join(out.split())
    rows = re.findall(r"^\|[^|`]+\| (`.*) \|$", README, re.M)                # the map of the file
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) >= 10
    assert [name for name in names if not hasattr(sl, name)] == []


class SmallRAE(sl.RAE):
    """RAE with latents of its size, but random weights and one small block in each half."""

    def __init__(self, pretrained=True):
        torch.manual_seed(0)
        create, decoder = timm.create_model, sl.RAEDecoder(width=64, depth=1, heads=2, mlp_width=64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sl, "RAEDecoder", lambda: decoder)
            patch.setattr(timm, "create_model", lambda name, **options: create(
                name, depth=1, mlp_ratio=0.1, **options))
            super().__init__(pretrained=False)


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory):
    """Where all commands run in turn, with small networks in place of the published ones."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_flowers(folder / "data", patch, 16)
        for name, value in {"RAE": SmallRAE, "InceptionFID": FewFeatures,
                            "fetch_weights": lambda config: None}.items():
            patch.setattr(sl, name, value)
        for size in ("B", "XL"):
            patch.setitem(sl.MODEL_SIZES, size, (64, 1, 2))
        yield folder


@pytest.mark.parametrize("command", [
    pytest.param(command, marks=[pytest.mark.slow] if SLOW.search(command) else [])
    for command in COMMANDS])
def test_every_command_runs(command, folder, small_run, capsys):
    """As printed, in their order, but smaller; on runs that earlier commands have made."""
    words = shlex.split(command)
    for flag, path in zip(words, words[1:]):
        if flag == "--data-dir":
            fill(folder / path, *[f"{split}/{name}/{i}.png" for name in "ab"
                                  for split in ("train", "val") for i in range(3)])
        if flag in ("--checkpoint", "--resume") and not (folder / path).exists():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).symlink_to(small_run)
    trains = words[0] == "train" and not {"--help", "--resume"} & set(words)
    if trains:
        config = sl.preset(*[words[words.index(flag) + 1] if flag in words else default for
                             flag, default in (("--dataset", "drawn"), ("--autoencoder", ""))])
        words += [*(BIG if sl.uses_rae(config) else SMALL), "--overwrite"]
    if "--resume" in words:
        words += ["--train-steps", "8", "--device", "cpu"]
    assert sl.main(words) == 0, capsys.readouterr().err
    if trains:
        run = folder / capsys.readouterr().out.split("look at ")[1].split("samples.png")[0]
        saved = sl.read_checkpoint(run)
        rows = list(csv.DictReader((run / "evaluation.csv").open()))
        assert saved["step"] == saved["config"].train_steps and len(rows) == 5
        assert all(math.isfinite(float(row["frechet_distance"])) for row in rows)
        assert saved["optimizer"]["state"]                   # it has made an update
        assert all((run / name).stat().st_size > 0 for name in sl.RUN_FILES)
