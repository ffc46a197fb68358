"""The README promises only what is there: commands, names, pictures."""
import re
import shlex

import pytest
from conftest import ROOT, SMALL, fill

import sphere_latent as sl

README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?m)^(?:pip .* && )?(python sphere_latent\.py \w.*)$", README)))


def test_every_picture_experiment_and_name_exists():
    pictures = re.findall(r"\]\((assets/[^)]+)\)", README)
    experiments = re.findall(r"tests/experiments/\w+\.py", README)
    assert pictures and experiments
    for path in pictures + experiments:
        assert (ROOT / path).stat().st_size > 500, path
    rows = re.findall(r"^\|[^|`]+\|[^|`]*\| (`.*) \|$", README, re.M)        # the map of the file
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) >= 15
    assert [name for name in names if not hasattr(sl, name)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, small_run, tmp_path, monkeypatch, capsys):
    """As printed, but smaller. The paper's data sets are not fetched: its settings are read."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "PHOTOS", *[f"{name}/{i}.png" for name in "abc" for i in range(14)])
    words = [str(small_run) if w.startswith("runs/") else w for w in shlex.split(command)[2:]]
    if {"flowers", "animal-faces", "imagenet"} & set(words) and "tiny" not in words:
        configs = []
        monkeypatch.setattr(sl, "train", lambda config, **_: configs.append(config) or tmp_path)
        assert sl.main(words) == 0
        assert configs[0].autoencoder == "dinov2-b" and configs[0].image_size == 256
        return
    if words[0] == "train" and not {"--resume", "--help"} & set(words):
        words += [*SMALL, "--out", str(tmp_path / "run")]
    assert sl.main(words) == 0, capsys.readouterr().err
