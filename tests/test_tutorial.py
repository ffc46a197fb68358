"""The notebook is whole, runs from top to bottom, and every check of an exercise tells right from wrong."""
import os
import re
import statistics

import pytest
from conftest import ROOT

import sphere_latent as sl

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TEXT = [cell for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
BLANK = re.compile(r"\.\.\.(?= *(?:#|$))", re.M)
WRONG = [["45"],                                             # for each exercise, what the check must refuse
         ["v + alpha * e", "math.sin(alpha) * v + math.cos(alpha) * e"],
         ["z_hat_small", "z_hat_large.detach()", "0 * z_hat_small.detach()"],
         ["math.pi / 2", "math.pi / 2 * (1 - (k + 1) / steps)", "90 * (1 - k / steps)"],
         ["z + w * (z - z_null)", "w * z - z_null", "z"],
         ["0", "(a.var(0) - b.var(0)).square().sum()", "(a.std(0) - b.std(0)).sum()"]]


def tags(cell):
    return cell.metadata.get("tags", [])


def exercises():
    """[(exercise, solution, check)], which have to stand one after the other."""
    starts = [i for i, cell in enumerate(NOTEBOOK.cells) if "exercise" in tags(cell)]
    return [tuple(NOTEBOOK.cells[i:i + 3]) for i in starts]


def test_shape():
    shown = [cell for cell in CODE if "solution" not in tags(cell)]
    lengths = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in CODE]
    assert 40 <= len(NOTEBOOK.cells) <= 60
    assert 1.2 <= len(TEXT) / len(CODE) and len(TEXT) / len(shown) <= 1.9
    assert statistics.median(lengths) <= 8


def test_exercises():
    assert len(exercises()) == len(WRONG) >= 6
    for exercise, solution, check in exercises():
        assert [tags(cell) for cell in (exercise, solution, check)] == [["exercise"], ["solution"], ["check"]]
        assert len(BLANK.findall(exercise.source)) == 1
        assert solution.source.startswith("# Solution (open me after trying)\nif unfilled(")
        assert solution.metadata["jupyter"]["source_hidden"] and solution.metadata["collapsed"]
        assert "assert not unfilled(" in check.source


def test_outputs_are_stored_and_clean():
    outputs = [output for cell in CODE for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 15
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert (ROOT / "tutorial.ipynb").stat().st_size < 3e6


def test_speaks_of_nothing_but_the_project():
    words = "\n".join(cell.source for cell in NOTEBOOK.cells)
    words += "\n".join(str(output.get("text", output.get("data", {}).get("text/plain", "")))
                       for cell in CODE for output in cell.outputs)
    assert not re.search(r"(?<![\w.~])/(root|home|tmp|work|usr|Users|mnt|opt|var)/|[A-Z]:\\", words)


def test_names_and_flags_exist():
    words = "\n".join(cell.source for cell in NOTEBOOK.cells)
    names = set(re.findall(r"\bsl\.(\w+)", words))
    assert len(names) > 15 and [name for name in names if not hasattr(sl, name)] == []
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", words))
    fields = {"--" + field.name.replace("_", "-") for field in sl.dataclasses.fields(sl.Config)}
    assert flags and flags <= fields | {"--checkpoint", "--classes", "--count", "--help"}


@pytest.mark.slow
def test_runs_from_top_to_bottom_and_no_check_is_vacuous(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
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
            asserts = check.source[:check.source.rindex("assert ")] + check.source[check.source.rindex("assert "):].split("\n")[0]
            for answer in ["...", *wrong]:
                run(exercise, BLANK.sub(answer, exercise.source))
                with pytest.raises(nbclient.exceptions.CellExecutionError) as failure:
                    run(check, asserts)
                assert failure.value.ename == "AssertionError", f"{answer}: {failure.value.ename} {failure.value.evalue}"
                assert len(failure.value.evalue) > 15, f"{answer}: the message does not help"
            run(exercise)
            run(solution)
            run(check, asserts)                              # with the solution it passes again
