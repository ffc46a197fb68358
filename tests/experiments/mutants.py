"""Which small faults do the quick tests miss? One random change of sphere_latent.py at a time.

    pip install pytest-cov
    python tests/experiments/mutants.py --count 100 --seed 0 [--jobs 2]

A change is another operator, comparison, number or flag, arguments in another order, one keyword
argument less, a condition negated or a statement left out. Messages and tables of colours stay.
Each change first meets the tests that run its line, those of the fewest lines before the others,
then all quick tests. Printed: each change that passes them, and their share.
"""
import argparse
import ast
import collections
import itertools
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 900                  # seconds for the quick tests; a change that makes them hang is found
QUICK = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
PROCESSES = multiprocessing.get_context("forkserver")        # each begins with these imported:
PROCESSES.set_forkserver_preload(["torch", "torchvision", "timm", "scipy.linalg", "hypothesis"])
OPERATORS = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult],
    ast.Pow: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.FloorDiv: [ast.Mult], ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.And: [ast.Or]}
MESSAGES = ("say", "print", "progress", "UserError", "as_user_error", "set_postfix")


def is_left_alone(node):
    """A text for the user, or a table of colours: neither it nor its parts are changed."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", getattr(node.func, "attr", "")) in MESSAGES
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or is_left_alone(node.value)
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", "") in ("SPECIES", "GROUNDS")
    return isinstance(node, ast.JoinedStr) or getattr(node, "arg", "") in ("help", "description")


def changes(node):
    """Yield what else could be written for a node of the syntax tree: (node or its part, text)."""
    def with_other(**fields):
        return node, f"({ast.unparse(type(node)(**{**vars(node), **fields}))})"

    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        for operator in OPERATORS.get(type(node.op), []):
            yield with_other(op=operator())
    elif isinstance(node, ast.Compare):
        for operator in OPERATORS[type(node.ops[0])]:
            yield with_other(ops=[operator(), *node.ops[1:]])
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield from [(node, repr(node.value + 1)), (node, repr(2 * node.value or -1))]
    elif isinstance(node, ast.Call):
        for i, (first, second) in enumerate(zip(node.args, node.args[1:])):
            if ast.dump(first) != ast.dump(second):
                yield with_other(args=[*node.args[:i], second, first, *node.args[i + 2:]])
        for keyword in node.keywords:
            yield with_other(keywords=[other for other in node.keywords if other is not keyword])
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return                                               # without it Python stops: no such name
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr, ast.Raise, ast.Return)):
        yield node, "pass"


def find_places(node):
    """All places of a program that can be changed, each a list of changes."""
    if is_left_alone(node):
        return []
    here = list(changes(node))
    below = [place for child in ast.iter_child_nodes(node) for place in find_places(child)]
    return [here, *below] if here else below


def changed_program(source, node, text):
    """The program, bytes, with a text in the place of a node."""
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    return source[:begin] + text.encode() + source[end:]


def run_tests(tree, options):
    """What a process does: run the quick tests of a tree, print nothing, exit with their code."""
    os.setsid()                                              # a group, with what the tests start
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.chdir(tree)
    sys.exit(pytest.main([*QUICK, *options]))


def passes(tree, options):
    process = PROCESSES.Process(target=run_tests, args=(tree, options))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode == 0


def copy_tree(folder, program):
    """A copy of the repository with another sphere_latent.py, bytes."""
    tree = pathlib.Path(folder) / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__*", "runs", "data"))
    (tree / "sphere_latent.py").write_bytes(program)
    return tree


def tests_by_line(program):
    """Run all quick tests. Returns {line: tests that run it, those of the fewest lines first}."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(folder, program)
        assert passes(tree, ["--cov=sphere_latent", "--cov-context=test", "--cov-report="]), (
            "the tests fail without any change")
        import coverage
        data = coverage.CoverageData(tree / ".coverage")
        data.read()
        lines = data.contexts_by_lineno(str(tree / "sphere_latent.py"))
    found = {line: {test.split("|")[0] for test in tests if test} for line, tests in lines.items()}
    lengths = collections.Counter(itertools.chain(*found.values()))
    return {line: sorted(found[line], key=lambda test: (lengths[test], test)) for line in found}


def survives(program, first_tests):
    """Whether the quick tests pass with this program."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(folder, program)
        if first_tests and not passes(tree, first_tests[:8]):
            return False
        return passes(tree, [])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag, default in (("--count", 100), ("--seed", 0), ("--jobs", 2)):
        parser.add_argument(flag, type=int, default=default)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    source = (ROOT / "sphere_latent.py").read_bytes()
    tests = tests_by_line(source)
    chance = random.Random(given.seed)
    places = chance.sample(find_places(ast.parse(source)), given.count)
    chosen = [chance.choice(place) for place in places]
    programs = [changed_program(source, node, text) for node, text in chosen]
    first_tests = [tests.get(node.lineno, []) for node, _ in chosen]
    survivors = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for (node, text), survived in zip(chosen, pool.map(survives, programs, first_tests)):
            survivors += survived
            if survived:
                at = f"line {node.lineno}, column {node.col_offset}"
                print(f"{at}: {ast.unparse(node)}  ->  {text}", flush=True)
    print(f"{survivors} of {given.count} changes pass the tests")


if __name__ == "__main__":
    main()
