"""The README promises only what is there: commands, flags, names, pictures; and the file keeps its size."""
import ast
import io
import re
import shlex
import tokenize

import pytest
from conftest import ROOT, SMALL
from PIL import Image

import sphere_latent as sl

README, SOURCE = (ROOT / "README.md").read_text(), (ROOT / "sphere_latent.py").read_text()
COMMANDS = sorted(set(re.findall(r"^\s*(python sphere_latent\.py \w.*?)\s*(?:#.*)?$", README, re.M)))


def test_picture_and_commands_come_first():
    lines = README.splitlines()
    assert any("](assets/" in line for line in lines[:5])
    assert "python sphere_latent.py train" in "\n".join(lines[:25]) and "python -m pytest" in "\n".join(lines[:25])


def test_every_picture_exists():
    pictures = re.findall(r"\]\((assets/[^)]+)\)", README)
    assert pictures and all((ROOT / picture).stat().st_size > 1000 for picture in pictures)


def test_every_flag_exists():
    flags = {"--" + field.name.replace("_", "-") for field in sl.dataclasses.fields(sl.Config)}
    flags |= {"--checkpoint", "--classes", "--count", "--help", "--between", "--image", "--crossover", "--to"}
    flags |= {"--nproc-per-node", "--shutdown-timeout", "--paper", "--peak"}     # of torchrun and tests/speed.py
    for field in sl.dataclasses.fields(sl.Config):
        if field.type is bool:
            flags.add("--no-" + field.name.replace("_", "-"))
    text = README.split("<!-- other programs -->")[0]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text + (sl.__doc__ or ""))) <= flags


def test_every_name_of_the_map_exists():
    rows = re.findall(r"^\|[^|`]+\|[^|`]*\| (`.*) \|$", README, re.M)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) >= 15 and all(hasattr(sl, name) for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, run, tmp_path, monkeypatch, capsys):
    """As printed, but smaller: short flags for `train`, a small run in the place of the real ones.

    The paper's data sets are not fetched: what `train` would be given is looked at.
    """
    monkeypatch.chdir(tmp_path)
    for i in range(40):
        (tmp_path / "photos" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i, 0, 90)).save(tmp_path / "photos" / "abc"[i % 3] / f"{i}.png")
    words = [str(run) if word.startswith("runs/") else "photos" if "PHOTOS" in word or "flower-photos" in word
             else word for word in shlex.split(command)[2:]]
    if set(words) & {"flowers", "animal-faces", "imagenet"}:
        monkeypatch.setattr(sl, "train", lambda config: vars(config))
        assert sl.main(words) == 0 and "'dinov2-b'" in capsys.readouterr().out
        return
    if words[0] == "train" and "--resume" not in words:
        words += SMALL + ["--out", str(tmp_path / "run")]
    elif words[0] == "evaluate":
        words += ["--eval-samples", "24"]
    assert sl.main(words) == 0


def test_the_file_keeps_its_size():
    """At most 1,200 lines, 750 of code; no function over 60 lines; no line over 100 columns."""
    tree, lines = ast.parse(SOURCE), SOURCE.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 60
    assert max(map(len, lines)) <= 100
    documented = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                  and ast.get_docstring(node)]
    prose = {n for node in documented for n in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = {n for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline) if token.type not in skip
            for n in range(token.start[0], token.end[0] + 1)} - prose
    assert len(lines) <= 1200 and len(code) <= 750
