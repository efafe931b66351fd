"""Imports go one way: a module knows its own floor and those below, and no two know each other."""

import ast
import graphlib
import re
from pathlib import Path

import pdtrim

FLOORS = (
    ("errors", "progress", "records", "versions", "words"),
    ("clock", "devices", "finite", "reading"),
    ("keep",),
    ("cost",),
    ("kv.groups", "kv.view", "kv.bias", "kv.selectors", "kv.codecs", "kv.kernels", "kv.bearable"),
    ("plan",),
    ("card",),
    ("kv", "models"),
    ("stage",),
    ("exported", "bundle"),
    ("calibration",),
    ("search", "kvfit", "repair", "distill"),
    ("methods", "runtime", "engines"),
    ("bench", "evaluate"),
    ("report",),
    ("verbs",),
    ("configs", "demo", "lm_eval", "cli", "__main__", ""),
)
"""From the ground up; a part of a package may stand lower than the rest of it."""
UPWARD = {("models.loading", "stage.guard")}
"""Said where it is done: what was loaded is held against the simulator before anyone has it."""
ROOT = Path(pdtrim.__file__).parent


def modules():
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree, nodes):
    """Names below ``pdtrim`` that these statements import."""
    for node in nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pdtrim":
            base = node.module.removeprefix("pdtrim").lstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                yield whole if is_module(whole) else base


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def floor_of(name):
    fits = [
        (len(part), floor)
        for floor, parts in enumerate(FLOORS)
        for part in parts
        if name == part or name.startswith(f"{part}.") or part == ""
    ]
    return max(fits)[1]


def test_imports_go_down_wherever_they_stand():
    up = {
        (name, other)
        for name, tree in modules()
        for other in imported(tree, ast.walk)
        if floor_of(other) > floor_of(name)
        and name  # the package's own names are for type checkers
    }
    assert up == UPWARD


def test_no_two_modules_need_each_other():
    graph = {name: set(imported(tree, ast.iter_child_nodes)) - {name} for name, tree in modules()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_projections_are_named_by_families_and_vllm_alone():
    name = re.compile(r"\b\w*(q|k|v|o|gate|up|down)_proj\b|\bself_attn\b|\.mlp\.|[\"']mlp\.")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ROOT.rglob("*.py")
        if not path.relative_to(ROOT).as_posix().startswith(("models/", "engines/vllm/"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if name.search(line)
    ]
    assert not found


TESTS = Path(__file__).parent
LINES, SCREEN = 400, 60


def test_files_and_functions_fit():
    """Functions from ``def`` to their ends, docstrings included."""
    long = [
        str(path)
        for folder in (ROOT, TESTS)
        for path in folder.rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > LINES
    ]
    assert not long
    tall = [
        f"{name}.{node.name}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= SCREEN
    ]
    assert not tall
