"""The notebook is whole, runs from top to bottom, and each check tells right answers from wrong."""
import os
import re
import statistics

import pytest
from conftest import ROOT

import sphere_latent as sl

nbformat = pytest.importorskip("nbformat")
PATH = ROOT / "tutorial.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TEXT = [cell for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
WORDS = "\n".join(cell.source for cell in NOTEBOOK.cells)
BLANK = re.compile(r"\.\.\.(?= *(?:#|$))", re.M)
WRONG = [                                # for each exercise, answers that its check must refuse
    ["45", "0"],
    ["v + alpha * e", "math.sin(alpha) * v + math.cos(alpha) * e"],
    ["z_hat_small", "z_hat_large.detach()", "0 * z_hat_small.detach()"],
    ["math.pi / 2", "math.pi / 2 * (1 - (k + 1) / steps)", "90 * (1 - k / steps)"],
    ["z + w * (z - z_null)", "w * z - z_null", "z"],
    ["0", "(a.var(0) - b.var(0)).square().sum()", "(a.std(0) - b.std(0)).sum()"],
    ["grey.mean((1, 2))[:, None].expand(-1, 2)", "grey.mean(1)", "grey.flatten(1)", "grey.std(1)",
     "torch.stack([grey.mean((1, 2)), grey.std((1, 2))], dim=1)", "grey.diff(dim=1).mean((1, 2))"],
    ["1", "2", "50"],
]


def tags(cell):
    return cell.metadata.get("tags", [])


def exercises():
    """[(exercise, solution, check)], which have to stand one after the other."""
    starts = [i for i, cell in enumerate(NOTEBOOK.cells) if "exercise" in tags(cell)]
    return [tuple(NOTEBOOK.cells[i:i + 3]) for i in starts]


def test_shape():
    opened = [cell for cell in CODE if not {"solution", "check"} & set(tags(cell))]
    lengths = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in CODE]
    assert 60 <= len(NOTEBOOK.cells) <= 75
    assert 1 <= len(TEXT) / len(opened) <= 1.9
    assert statistics.median(lengths) <= 12
    assert max(len(line) for cell in CODE for line in cell.source.splitlines()) <= 100


def test_sections_say_which_section_of_the_file_they_open():
    source = (ROOT / "sphere_latent.py").read_text()
    of_file = dict(re.findall(r"^# -{90,}\n# (\d+)\. (.+)\n# -{90,}$", source, re.M))
    sections = re.split(r"^## ", WORDS, flags=re.M)[1:]
    titles = [section.splitlines()[0] for section in sections]
    for title in ("The frozen autoencoder, opened", "A distance that is blind", "Few against many"):
        assert any(title in found for found in titles)
    opened = set()
    for section in sections:
        line = re.search(r"^\*Opens sections? ([\d and]+) of the file, (.+)\.\*$", section, re.M)
        if line is None:                                     # nearest neighbours, limits, teaching
            assert section in sections[-3:], section.splitlines()[0]
            continue
        numbers = line[1].split(" and ")
        assert " and ".join(of_file[number] for number in numbers) == line[2]
        opened |= set(numbers)
    assert opened >= {str(number) for number in range(2, 11)}


def test_exercises():
    assert len(exercises()) == len(WRONG) >= 6
    for exercise, solution, check in exercises():
        assert [tags(cell) for cell in (exercise, solution, check)] == [
            ["exercise"], ["solution"], ["check"]]
        assert len(BLANK.findall(exercise.source)) == 1
        assert solution.source.startswith("# Solution (open me after trying)\nif unfilled(")
        assert solution.metadata["jupyter"]["source_hidden"] and solution.metadata["collapsed"]
        assert "assert not unfilled(" in check.source


def test_outputs_are_stored_and_clean():
    outputs = [output for cell in CODE for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 20
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert PATH.stat().st_size < 3e6


def test_speaks_of_nothing_but_the_project():
    words = WORDS
    for cell in CODE:
        for output in cell.outputs:
            words += "\n" + str(output.get("text", output.get("data", {}).get("text/plain", "")))
    foreign = r"(?<![\w.~])/(root|home|tmp|work|usr|Users|mnt|opt|var)/|[A-Z]:\\"
    assert not re.search(foreign, words)


def test_names_and_flags_exist():
    names = set(re.findall(r"\bsl\.(\w+)", WORDS))
    assert len(names) > 20 and [name for name in names if not hasattr(sl, name)] == []
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", WORDS))
    fields = {"--" + field.name.replace("_", "-") for field in sl.dataclasses.fields(sl.Config)}
    switches = {"--no-flips", "--resume", "--overwrite"}
    assert flags and flags <= fields | switches | {"--checkpoint", "--classes", "--count", "--help"}


def test_commands_are_understood():
    """Every command line of the text: known flags, values that Config takes, none without effect."""
    commands = re.findall(r"python sphere_latent\.py (train[^`\n]*)", WORDS)
    assert len(commands) >= 8
    for command in commands:
        given = vars(sl.build_parser().parse_args(command.split()))
        for name in ("function", "overwrite"):
            given.pop(name, None)
        if "resume" not in given:
            choices = {name: given[name] for name in ("method", "autoencoder") if name in given}
            start = sl.preset(given.get("dataset", "drawn"), **choices)
            sl.refuse_unused_flags(given, sl.dataclasses.replace(start, **given))


def asserts_of(check):
    """A check cell up to its last assertion: without the figures that follow."""
    start = check.source.rindex("assert ")
    return check.source[:start] + check.source[start:].split("\n")[0]


@pytest.mark.slow
def test_runs_from_top_to_bottom_and_no_check_is_vacuous(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    notebook = nbformat.from_dict(NOTEBOOK)
    cells = {cell.id: (i, cell) for i, cell in enumerate(notebook.cells)}
    client = nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3",
                                     resources={"metadata": {"path": str(tmp_path)}})

    def run(cell, source=None):
        place, copy = cells[cell.id]
        copy.source = source or cell.source
        client.execute_cell(copy, place)

    with client.setup_kernel():
        for cell in CODE:
            run(cell)
        for wrong, (exercise, solution, check) in zip(WRONG, exercises()):
            for answer in ["...", *wrong]:
                run(exercise, BLANK.sub(answer, exercise.source))
                with pytest.raises(nbclient.exceptions.CellExecutionError) as failure:
                    run(check, asserts_of(check))
                error = failure.value
                assert error.ename == "AssertionError", f"{answer}: {error.ename} {error.evalue}"
                assert len(error.evalue) > 15, f"{answer}: the message does not help"
            run(exercise)
            run(solution)
            run(check, asserts_of(check))                    # with the solution it passes again
