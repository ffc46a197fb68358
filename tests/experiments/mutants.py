"""How many small faults do the quick tests miss? One random change of sphere_latent.py at a time.

    python tests/experiments/mutants.py --count 100 --seed 0 [--jobs 2]

A change is another operator, comparison, number or flag, two arguments in the other order, one
keyword argument less, a condition negated or a statement left out. Comments, messages, help and the
tables of species and grounds stay. Printed: each change that passes the tests, and their share.
"""
import argparse
import ast
import contextlib
import itertools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
OPERATORS = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult],
    ast.Pow: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.FloorDiv: [ast.Mult],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.And: [ast.Or],
    ast.Or: [ast.And], ast.USub: [ast.UAdd]}
STATEMENTS = (ast.Assign, ast.AugAssign, ast.Expr, ast.Raise, ast.Return, ast.Continue, ast.Break)
MESSAGES = ("say", "print", "progress", "UserError", "ArgumentTypeError", "as_user_error",
            "set_postfix")


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

    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.UnaryOp)):
        for operator in OPERATORS.get(type(node.op), []):
            yield with_other(op=operator())
    elif isinstance(node, ast.Compare):
        for operator in OPERATORS[type(node.ops[0])]:
            yield with_other(ops=[operator(), *node.ops[1:]])
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield node, repr(node.value + 1)
        yield node, repr(node.value * 2 or -1)
    elif isinstance(node, ast.Call):
        for i in range(len(node.args) - 1):
            first, second = node.args[i:i + 2]
            if ast.dump(first) != ast.dump(second):
                yield with_other(args=[*node.args[:i], second, first, *node.args[i + 2:]])
        for keyword in node.keywords:
            yield with_other(keywords=[other for other in node.keywords if other is not keyword])
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, STATEMENTS):
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


def passes(program, limit=1800):
    """Whether the quick tests pass with this program, in a copy of the tree, in `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "tree"
        left_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "data")
        shutil.copytree(ROOT, tree, ignore=left_out)
        (tree / "sphere_latent.py").write_bytes(program)
        process = subprocess.Popen(
            TESTS, cwd=tree, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(limit)
        with contextlib.suppress(ProcessLookupError):        # what the tests started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return code == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    source = (ROOT / "sphere_latent.py").read_bytes()
    began = time.time()
    if not passes(source):
        sys.exit("the tests fail without any change")
    limit = 60 + 4 * given.jobs * (time.time() - began)
    chance = random.Random(given.seed)
    places = chance.sample(find_places(ast.parse(source)), given.count)
    chosen = [chance.choice(place) for place in places]

    def survives(change):
        return passes(changed_program(source, *change), limit)

    survivors = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for (node, text), survived in zip(chosen, pool.map(survives, chosen)):
            before = " ".join(ast.unparse(node).split())
            if survived:
                survivors += 1
                print(f"line {node.lineno}: {before}  ->  {text}", flush=True)
    print(f"{survivors} of {given.count} changes pass the tests")


if __name__ == "__main__":
    main()
