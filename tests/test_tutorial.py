"""The notebook runs from top to bottom, and each check tells right answers from wrong."""
import os
import re

import pytest
from conftest import ROOT

import sphere_latent as sl

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
WORDS = "\n".join(cell.source for cell in NOTEBOOK.cells)
BLANK = re.compile(r"\.\.\.(?= *(?:#|$))", re.M)
WRONG = [                                # for each exercise, answers that its check must refuse
    ["45", "0"],
    ["v + alpha * e", "math.sin(alpha) * v + math.cos(alpha) * e"],
    ["z_hat_small", "z_hat_large.detach()", "0 * z_hat_small.detach()"],
    ["math.pi / 2 * (1 - k / steps)", "math.pi / 2 * (1 - (k + 1) / steps) ** 0.7",
     "90 * (1 - k / steps) ** 0.7"],
    ["z + w * (z - z_null)", "w * z - z_null", "z"],
    ["0", "(a.var(0) - b.var(0)).square().sum()", "(a.std(0) - b.std(0)).sum()"],
    ["grey.mean((1, 2))[:, None].expand(-1, 2)", "grey.mean(1)", "grey.flatten(1)", "grey.std(1)",
     "torch.stack([grey.mean((1, 2)), grey.std((1, 2))], dim=1)", "grey.diff(dim=1).mean((1, 2))"],
    ["1", "4", "8"],
]


EXERCISES = [NOTEBOOK.cells[i:i + 3] for i, cell in enumerate(NOTEBOOK.cells)
             if "exercise" in cell.metadata.get("tags", [])]    # each with its solution and check


def test_every_exercise_has_a_blank_a_hidden_solution_and_a_check():
    assert len(EXERCISES) == len(WRONG)
    for exercise, solution, check in EXERCISES:
        assert solution.metadata.tags == ["solution"] and check.metadata.tags == ["check"]
        assert solution.source.startswith("# Solution (open me after trying)\nif unfilled(")
        assert solution.metadata["jupyter"]["source_hidden"]


def test_outputs_are_stored_and_clean():
    outputs = [output for cell in CODE for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 20
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"
        assert not re.search(r"it/s|/(home|root|tmp|Users)/", output.get("text", ""))


def test_names_exist_and_commands_are_understood(monkeypatch):
    names = set(re.findall(r"\bsl\.(\w+)", WORDS))
    assert len(names) > 20 and [name for name in names if not hasattr(sl, name)] == []
    commands = re.findall(r"python sphere_latent\.py (train[^`\n]*)", WORDS)
    assert len(commands) >= 8
    monkeypatch.setattr(sl, "train", lambda config, **_: ROOT)
    for command in commands:
        sl.build_parser().parse_args(command.split())        # known flags
        if "--resume" not in command:                        # values that Config takes
            assert sl.main(command.split()) == 0, command


def asserts_of(check):
    """A check cell up to its last assertion: without the figures that follow."""
    start = check.source.rindex("assert ")
    return check.source[:start] + check.source[start:].split("\n")[0]


@pytest.mark.slow
def test_runs_from_top_to_bottom_and_no_check_is_vacuous(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    cell = nbformat.v4.new_code_cell()                       # all code runs in this one
    notebook = nbformat.v4.new_notebook(cells=[cell])
    client = nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3",
                                     resources={"metadata": {"path": str(tmp_path)}})

    def run(source):
        cell.source = source
        client.execute_cell(cell, 0)

    with client.setup_kernel():
        for original in CODE:
            run(original.source)
        for wrong, (exercise, solution, check) in zip(WRONG, EXERCISES):
            for answer in ["...", *wrong]:
                run(BLANK.sub(answer, exercise.source))
                with pytest.raises(nbclient.exceptions.CellExecutionError) as failure:
                    run(asserts_of(check))
                error = failure.value
                assert error.ename == "AssertionError", f"{answer}: {error.ename} {error.evalue}"
                assert len(error.evalue) > 15, f"{answer}: the message does not help"
            run(exercise.source)
            run(solution.source)
            run(asserts_of(check))                           # with the solution it passes again
