from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "attnplan"
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))

# Lowest first; the parts of one row may import one another.
LAYERS = (
    ("errors", "units", "packages"),
    ("patterns",),
    ("spec",),
    ("ir",),
    ("lower",),
    ("passes",),
    ("cost",),
    ("ring",),
    ("runtime",),
    ("backends",),
    (
        "plan",
        "plan_ring",
        "sharding",
        "tracing",
        "explain",
        "explain_mesh",
        "explain_ring",
        "explain_tables",
        "measure",
        "tune",
        "search",
        "search_ring",
        "strategies",
        "memory_budget",
        "streams",
        "calls",
        "deferred",
        "verify",
        "verify_ring",
        "mask_text",
        "api",
        "store",
        "compare",
        "what_if",
        "suggest",
        "pictures",
        "report",
    ),
    ("nn", "integrations", "calibrate", "testing", "harness"),
    ("cli_common",),
    ("cli", "cli_verify", "cli_compare", "cli_measure", "cli_pictures"),
)
ABOVE_ALL = ("__init__.py", "__main__.py")
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
FACADE = RANK["plan"] + 0.5  # `import attnplan`, the public names: for the rows above the plan only

# Planning needs no torch: only what runs a plan may import it, or import attnplan.runtime, which does.
WITH_TORCH = ("runtime", "nn", "integrations", "calibrate", "testing", "harness")
# Parts of an emitter in files of their own: nothing but emit.py may import them.
PARTS_OF_EMITTERS = tuple(f"backends/eager/{name}.py" for name in ("programs", "learned", "launches", "written"))
# Files that may import torch inside a function, each with its reason.
TORCH_INSIDE_FUNCTIONS = {
    "__init__.py": "attention() infers a spec from tensors",
    "plan.py": "the first call emits; a file of a plan is for a torch device",
    "tracing.py": "warms up, and traces what torch traces",
    "calls.py": "checks the tensors of a call",
    "api.py": "asks whether a call is traced",
    "deferred.py": "runs in traced programs",
    "verify.py": "runs the plan beside the reference",
    "verify_ring.py": "runs the ring beside the reference",
    "search_ring.py": "a mesh is made of processes",
    "plan_ring.py": "a mesh is made of processes; the first call emits",
    "sharding.py": "cuts and joins tensors",
    "measure.py": "runs the plan and times it",
    "tune.py": "runs candidates beside one another",
    "streams.py": "a stream is run, and its tensors are checked, where torch is",
    "cost/device.py": "asks torch for the properties of a CUDA device that is here",
}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60  # without the docstring


def syntax(path: str) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"), path)


def part_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def module_of(path: str) -> str:
    return ".".join(["attnplan", *path.removesuffix(".py").removesuffix("__init__").rstrip("/").split("/")]).rstrip(".")


MODULES = {module_of(path) for path in FILES}


def imports(tree: ast.Module, *, top_only: bool = False) -> Iterator[tuple[int, str, bool]]:
    """Iterate over (line, module, whether at import time) of every import that is not for type checkers only."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[int, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"line {child.lineno}: a relative import"
                for alias in child.names:
                    name = f"{child.module}.{alias.name}"
                    yield child.lineno, name if name in MODULES else str(child.module), at_import
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_import and not inside)

    return (found for found in walk(tree, True) if found[2] or not top_only)


def own_imports(path: str, *, top_only: bool = False) -> Iterator[tuple[int, str]]:
    for line, name, _ in imports(syntax(path), top_only=top_only):
        if name == "attnplan" or name.startswith("attnplan."):
            yield line, name


@pytest.mark.parametrize("path", FILES)
def test_every_part_of_the_package_has_a_layer(path):
    assert path in ABOVE_ALL or part_of(path) in RANK, f"{path}: give {part_of(path)} a layer in test_layering.py"


@pytest.mark.parametrize("path", [f for f in FILES if f not in ABOVE_ALL])
def test_imports_go_down(path):
    own = RANK.get(part_of(path), -1)
    upward = [f"attnplan/{path}:{line} imports {name}" for line, name in own_imports(path) if rank_of(name) > own]
    assert upward == []


def rank_of(name: str) -> float:
    return FACADE if name == "attnplan" else RANK.get(name.split(".")[1], len(LAYERS))


def test_modules_do_not_import_one_another_in_circles():
    graph = nx.DiGraph()
    for path in FILES:
        graph.add_edges_from((module_of(path), name) for _, name in own_imports(path, top_only=True))
    graph.remove_edges_from(nx.selfloop_edges(graph))
    assert list(nx.simple_cycles(graph)) == []


def may_import_torch(path: str) -> bool:
    emits = path.startswith("backends/") and path.endswith("/emit.py")
    return emits or part_of(path) in WITH_TORCH or path in PARTS_OF_EMITTERS


def needs_torch(name: str) -> bool:
    parts = (module_of(path) for path in PARTS_OF_EMITTERS)
    return (
        name.split(".")[0] == "torch" or name.startswith("attnplan.runtime") or name.endswith(".emit") or name in parts
    )


@pytest.mark.parametrize("path", [f for f in FILES if not may_import_torch(f)])
def test_planning_imports_no_torch(path):
    found = [
        f"attnplan/{path}:{line} imports {name}"
        for line, name, at_import in imports(syntax(path))
        if needs_torch(name) and (at_import or path not in TORCH_INSIDE_FUNCTIONS)
    ]
    # A backend's declaration imports its own emit.py inside a function, when a plan is first run.
    own_emit = f"attnplan.{path.rsplit('/', 1)[0].replace('/', '.')}.emit"
    assert [line for line in found if not (path.startswith("backends/") and line.endswith(own_emit))] == []


def exists(part: str) -> bool:
    return (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()


@pytest.mark.parametrize("module", [m for m in sorted(RANK) if m not in (*WITH_TORCH, "cli") and exists(m)])
def test_importing_the_compiler_loads_no_torch(module):
    code = f"import sys, attnplan.{module}; sys.exit(('torch' in sys.modules) * 7)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


@pytest.mark.parametrize("path", FILES)
def test_files_are_short(path):
    lines = (PACKAGE / path).read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES)
def test_functions_fit_on_a_screen(path):
    functions = [n for n in ast.walk(syntax(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f"{f.name} has {length(f)} lines" for f in functions if length(f) > MAX_FUNCTION_LINES] == []
