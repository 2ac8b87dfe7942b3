"""Mutants: a module with one node of its syntax tree changed."""

from __future__ import annotations

import ast
import copy
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import attrs

from bench.mutants.pipelines import TARGETS


@attrs.frozen
class Mutant:
    """One change to one syntax node of one module."""

    module: str
    line: int
    kind: str
    original: str
    """The changed code and what stands around it."""
    mutated: str
    target: ast.AST = attrs.field(repr=False, eq=False)
    replacement: ast.AST = attrs.field(repr=False, eq=False)

    @property
    def file(self) -> str:
        """Path of the module inside the repository."""
        return self.module.replace(".", "/") + ".py"

    def source(self) -> str:
        """Return the text of the mutated module."""
        return ast.unparse(replaced(parsed(self.module), self.target, self.replacement))


class _Replace(ast.NodeTransformer):
    """Puts ``replacement`` where ``target`` stands."""

    def __init__(self, target: ast.AST, replacement: ast.AST) -> None:
        self.target, self.replacement = target, replacement

    def visit(self, node: ast.AST) -> Any:
        return self.replacement if node is self.target else self.generic_visit(node)


def replaced(root: ast.AST, target: ast.AST, replacement: ast.AST) -> ast.AST:
    """Return a copy of ``root`` in which ``replacement`` stands for its descendant ``target``."""
    place = next(i for i, node in enumerate(ast.walk(root)) if node is target)
    clone = copy.deepcopy(root)
    twin = next(islice(ast.walk(clone), place, None))
    result: ast.AST = _Replace(twin, replacement).visit(clone)
    return ast.fix_missing_locations(result)


def _changed(node: ast.AST, **fields: Any) -> ast.AST:
    """Return a copy of ``node`` with other values in some fields."""
    twin = copy.copy(node)
    for name, value in fields.items():
        setattr(twin, name, value)
    return twin


def _without(items: Sequence[Any], index: int) -> list[Any]:
    return [item for i, item in enumerate(items) if i != index]


def _exchanged(items: Sequence[Any], i: int, j: int) -> list[Any]:
    """Return ``items`` with the i-th and j-th in each other's place."""
    result = list(items)
    result[i], result[j] = items[j], items[i]
    return result


def _with_item(items: Sequence[Any], index: int, item: object) -> list[Any]:
    return [item if i == index else old for i, old in enumerate(items)]


COMPARISONS: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
NEGATIONS = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)
ARITHMETIC: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv,
}  # fmt: skip
SIBLINGS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_PAIRS = (
    ("q", "k"), ("seq_len", "kv_len"), ("heads", "kv_heads"), ("head_dim", "value_dim"), ("queries", "keys"),
    ("rows_q", "rows_k"), ("q_rows", "k_rows"), ("q_skip", "k_skip"), ("rq", "rk"), ("q_axes", "k_axes"),
    ("args", "sources"),
    ("start", "stop"), ("first", "last"), ("low", "high"), ("left", "right"), ("whole", "end"), ("head", "row"),
    ("length", "rate"), ("starts", "sizes"), ("offset", "start"), ("start", "kv_head"), ("coarse", "fine"),
)  # fmt: skip
COUNTERPARTS: Mapping[str, str] = {a: b for pair in _PAIRS for a, b in (pair[::-1], pair)}
"""Names that are easily taken for each other."""


def _constants(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)


def _comparisons(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield _changed(node, ops=_with_item(node.ops, i, COMPARISONS[type(op)]()))


def _arithmetic(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield _changed(node, op=ARITHMETIC[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand


def _logic(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BoolOp):
        yield _changed(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand


def _drops(node: ast.AST) -> Iterator[ast.AST]:
    """Drop one element of a tuple, list, call, comprehension or chain of conditions."""
    if isinstance(node, ast.Tuple | ast.List) and isinstance(node.ctx, ast.Load):
        yield from (_changed(node, elts=_without(node.elts, i)) for i in range(len(node.elts)))
    elif isinstance(node, ast.Call):
        yield from (_changed(node, args=_without(node.args, i)) for i in range(len(node.args)))
        yield from (_changed(node, keywords=_without(node.keywords, i)) for i in range(len(node.keywords)))
    elif isinstance(node, ast.comprehension):
        yield from (_changed(node, ifs=_without(node.ifs, i)) for i in range(len(node.ifs)))
    elif isinstance(node, ast.BoolOp):
        for i in range(len(node.values)):
            rest = _without(node.values, i)
            yield rest[0] if len(rest) == 1 else _changed(node, values=rest)


def _swaps(node: ast.AST) -> Iterator[ast.AST]:
    """Take another index, the other of min and max, or two elements or arguments in the other order."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in (0, 1):
        yield _changed(node, slice=ast.Constant(1 - node.slice.value))
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in SIBLINGS:
            yield _changed(node, func=ast.Name(SIBLINGS[node.func.id], ast.Load()))
        if len(node.args) > 1:
            yield _changed(node, args=_exchanged(node.args, 0, -1))
    elif isinstance(node, ast.Tuple):
        for i in range(len(node.elts) - 1):
            yield _changed(node, elts=_exchanged(node.elts, i, i + 1))


def _mixups(node: ast.AST) -> Iterator[ast.AST]:
    """Read a name, attribute or keyword's namesake: the queries' where the keys' is meant, the first for the last."""
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        field = "id" if isinstance(node, ast.Name) else "attr"
        if getattr(node, field) in COUNTERPARTS:
            yield _changed(node, **{field: COUNTERPARTS[getattr(node, field)]})
    if isinstance(node, ast.Call):
        names = [k.arg or "**" for k in node.keywords]
        for i, name in enumerate(names):
            if name in COUNTERPARTS and COUNTERPARTS[name] not in names:
                keyword = _changed(node.keywords[i], arg=COUNTERPARTS[name])
                yield _changed(node, keywords=_with_item(node.keywords, i, keyword))


def _negations(node: ast.AST) -> Iterator[ast.AST]:
    """Negate a condition, unless another mutation does that already."""
    if isinstance(node, ast.If | ast.IfExp):
        test = node.test
        removed = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        swapped = isinstance(test, ast.Compare) and isinstance(test.ops[0], NEGATIONS)
        if not (removed or swapped):
            yield _changed(node, test=ast.UnaryOp(ast.Not(), test))


def _omissions(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Pass):
        yield ast.Pass()


# Swapped indices come before constants: x[0] to x[1] is both, and is counted once.
MUTATIONS: Mapping[str, Callable[[ast.AST], Iterator[ast.AST]]] = {
    "swap": _swaps, "mix-up": _mixups, "constant": _constants, "comparison": _comparisons,
    "arithmetic": _arithmetic, "logic": _logic, "negated condition": _negations, "dropped element": _drops,
    "dropped statement": _omissions,
}  # fmt: skip

_SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "bases", "keywords")
_SKIPPED_NODES = (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr)


@cache
def parsed(module: str) -> ast.Module:
    path = importlib.import_module(module).__file__
    assert path is not None
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Iterate over the children that may be mutated: no docstrings, annotations, imports or error messages."""
    for name, value in ast.iter_fields(node):
        if name in _SKIPPED_FIELDS and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not isinstance(child, _SKIPPED_NODES) and not docstring:
                yield child


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in _children(node):
        yield from _walk(child)


def _headline(node: ast.AST) -> str:
    """Return a node as one line: of a compound statement, its head."""
    return ast.unparse(node).strip().split("\n", 1)[0]


def _context(node: ast.AST, parents: Mapping[ast.AST, ast.AST], width: int = 90) -> ast.AST:
    """Return the largest syntax around ``node``, up to its statement, that fits on a line."""
    while not isinstance(node, ast.stmt) and len(_headline(parents[node])) <= width:
        node = parents[node]
    return node


def changes(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Iterate over (node, kind of mutation, replacement); a replacement reads no name that the function lacks."""
    known = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)} | {a.arg for a in function.args.args}
    for node in _walk(function):
        for kind, mutate in MUTATIONS.items():
            for replacement in mutate(node):
                if not isinstance(replacement, ast.Name) or replacement.id in known:
                    yield node, kind, replacement


def _module_mutants(module: str) -> Iterator[Mutant]:
    tree = parsed(module)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    seen: set[tuple[int, str, str]] = set()
    for node, kind, replacement in (change for function in functions for change in changes(function)):
        line = getattr(node, "lineno", None) or parents[node].lineno  # type: ignore[attr-defined]
        around = _context(node, parents)
        texts = _headline(around), _headline(replaced(around, node, replacement))
        if texts[0] != texts[1] and (line, *texts) not in seen:
            seen.add((line, *texts))
            yield Mutant(module, line, kind, *texts, node, replacement)


def mutants() -> list[Mutant]:
    """Return every mutant, in the order of the source."""
    return [m for module in TARGETS for m in sorted(_module_mutants(module), key=lambda m: m.line)]
