"""How strong the coverage proof is: mutate the rewrites one syntax node at a time and see which mutants it refuses.

Every mutant of ``lower.py`` and of the passes compiles a corpus of specs through the real pipelines, with the mutated
module patched in and nothing written to disk. Where the proof passes and the graph differs from the unmutated one, the
float64 interpreter says whether the meaning changed. ``docs/mutants.md`` has the method and the figures.

    python -m bench.mutants --json bench/results/mutants.json --docs docs/mutants.md      # about five minutes
    python -m bench.mutants --sample 40 --seed 1
    python -m bench.mutants --from bench/results/mutants.json --docs docs/mutants.md      # only write the page again
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
import multiprocessing
import platform
import random
import textwrap
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attnplan import patterns as P
from attnplan.errors import PassError, SpecError, VerifyError
from attnplan.ir import Graph, Input
from attnplan.ir.coverage import Coverage, spec_coverage
from attnplan.lower import lower
from attnplan.passes import Canonicalize, FuseMerge, Lattice, Pass, Pipeline, SplitHeads
from attnplan.runtime.interpreter import interpret
from attnplan.spec import AttentionSpec

PIPELINES: Mapping[str, tuple[Pass, ...]] = {
    "usual": (Canonicalize(), SplitHeads(), Lattice(), FuseMerge()),
    "unsplit": (Canonicalize(), FuseMerge()),
    "unfused": (Canonicalize(), SplitHeads(), Lattice()),
    "lattice-alone": (Canonicalize(), Lattice(), FuseMerge()),
    "twice": (SplitHeads(), Lattice(), SplitHeads(), Lattice(), Canonicalize(), FuseMerge(), Canonicalize()),
}
"""The order of a real compilation, and others that exercise what one pass does without the one before it."""
TARGETS = tuple(dict.fromkeys([lower.__module__, *(p.__module__ for run in PIPELINES.values() for p in run)]))
"""The modules that are mutated: lowering, and every pass of a pipeline."""

TIME_LIMIT = 20.0
"""Seconds that one mutant may take."""
REFUSALS = (PassError, VerifyError, SpecError)
TOLERANCE = 1e-9

# ---------------------------------------------------------------------------------------------------- the corpus


def _spec(pattern: P.Pattern | P.Mixture, seq_len: int = 19, heads: int = 4, **options: Any) -> AttentionSpec:
    return AttentionSpec(seq_len=seq_len, heads=heads, head_dim=3, pattern=pattern, dtype="float64", **options)


SMALL: Mapping[str, AttentionSpec] = {
    "longnet-interleave": _spec(P.longnet([4, 8, 16], [1, 2, 4]), causal=True),
    "longnet-block": _spec(P.longnet([6, 12], [2, 3], offset="block"), 25, 6),
    "longnet-block-uneven": _spec(P.longnet([7, 14], [3, 5], offset="block"), 30, 7, causal=True),
    "longnet-short": _spec(P.longnet([8, 16], [2, 4]), 5),
    "longnet-gqa": _spec(P.longnet([4, 12], [1, 3]), 26, 8, kv_heads=2, causal=True),
    "longnet-gqa-block": _spec(P.longnet([8], [4], offset="block"), 20, 8, kv_heads=4),
    "longnet-mqa": _spec(P.longnet([6, 12], [2, 3]), 23, 9, kv_heads=1),
    "longnet-gqa-mean": _spec(P.longnet([6, 9], [2, 3], mix="mean"), 20, 12, kv_heads=2, kv_len=23),
    "longnet-offset-per-head": _spec(P.longnet([8], [8]), 15, 8, kv_heads=4),
    "longnet-unlike-runs": _spec(P.longnet([10], [5]), 24, 12, kv_heads=4),
    "longnet-more-keys": _spec(P.longnet([4, 8], [1, 2]), 7, 3, kv_len=22, causal=True),
    "longnet-more-queries": _spec(P.longnet([4, 8], [1, 2]), 22, 3, kv_len=9),
    "longnet-one-query": _spec(P.longnet([4, 8], [1, 4]), 1, 5, kv_len=23, causal=True),
    "longnet-detached": _spec(P.longnet([4, 8], [1, 2], mix="lse-detached"), causal=True, value_dim=5),
    "longnet-mean": _spec(P.longnet([4, 8], [1, 3], mix="mean"), 18, 3),
    "longnet-sum-documents": _spec(P.longnet([6, 12], [1, 2], mix="sum") & P.documents()),
    "grouped-none": _spec(P.grouped([4, 8, 16], [1, 2, 4]), 21, 7, causal=True),
    "grouped-mean": _spec(P.grouped([4, 8, 12], [1, 2, 3], mix="mean"), 21, 7),
    "grouped-few-heads": _spec(P.grouped([4, 8, 12], [1, 2, 3], mix="mean"), 13, 2),
    "grouped-gqa": _spec(P.grouped([5, 10], [1, 2]), 23, 6, kv_heads=3, causal=True),
    "window-softcap": _spec(P.window(5), heads=4, kv_heads=2, causal=True, softcap=5.0, scale=0.7),
    "window-more-keys": _spec(P.window(4, 2), 9, 2, kv_len=17),
    "window-more-queries": _spec(P.window(4, 2), 17, 2, kv_len=9),
    "window-wide": _spec(P.window(8, 30) & P.band(25, 40), 9, 2, kv_len=33),
    "window-just-all": _spec(P.window(9, 5), 6, 2, kv_len=10),
    "window-not-all": _spec(P.window(8, 4), 6, 2, kv_len=10),
    "window-or-sinks": _spec((P.window(3) | P.sinks(2)) & P.segments(8), 18, 2, causal=True),
    "global-more-keys": _spec(P.window(2) | P.global_tokens([1, 9]), 11, 2, kv_len=15),
    "documents-more-keys": _spec(P.documents([5, 7, 8]), 12, 2, kv_len=20),
    "padding": _spec(P.dilated(8, 2, offset="interleave") & P.padding() & P.full(), 21, 3, batch=2),
    "padding-lengths": _spec(P.segments(6) & P.padding([20, 11]), 20, 2, batch=2, causal=True),
    "heads-union": _spec(P.heads(0, 2) & P.window(3) | P.heads(2, 4), 14),
    "heads-overlap": _spec(P.heads(0, 3) & P.heads(1, 4) & P.window(4, 0), 14),
    "heads-all": _spec(P.heads(0, 4) & P.window(3), 9),
    "heads-not-all": _spec(P.heads(0, 3) & P.window(3), 9),
    "heads-offset-falls": _spec(P.heads(1, 3) & P.dilated(8, 2, offset="interleave"), 17),
    "heads-none": _spec(P.heads(0, 1) & P.heads(2, 4), 6),
    "mix-sum-weights": _spec(P.mix([P.heads(0, 3) & P.segments(4), P.window(2)], "sum", [0.5, 2.0]), 14),
    "mix-detached-heads": _spec(P.mix([P.heads(0, 2) & P.segments(4), P.heads(1, 4)], "lse-detached"), 14),
    "mix-one": _spec(P.mix([P.heads(1, 3) & P.segments(4)]), 14),
    "mix-no-heads": _spec(P.mix([P.heads(0, 1) & P.heads(2, 4), P.heads(0, 2) & P.heads(3, 4)]), 8),
    "mix-twice": _spec(P.mix([P.window(3), P.window(3), P.full()]), 13, 2, causal=True),
    "nested": _spec(P.segments(12) & P.dilated(4, 2, 1) & P.segments(24) & P.segments(40), 33, 2),
    "nested-rates": _spec(P.dilated(12, 2, offset="interleave") & P.segments(4), 33, 3, causal=True),
    "nested-offsets": _spec(P.dilated(12, 3, 1) & P.segments(4), 30, 2),
    "nested-twice": _spec(P.dilated(12, 2, 1) & P.dilated(4, 2, offset="interleave"), 30, 2),
    "unnested": _spec(P.segments(6) & P.dilated(4, 2, 1), 25, 2),
    "unnested-rates": _spec(P.dilated(12, 3, offset="interleave") & P.dilated(4, 2, 1), 30, 3),
    "segment-holds-all": _spec(P.segments(32) & P.dilated(64, 3, offset="interleave"), 17, 5, kv_len=20),
    "segment-holds-all-more-queries": _spec(P.segments(32) & P.dilated(64, 3), 18, 2, kv_len=17),
    "segment-whole": _spec(P.segments(40), 12, 2),
    "segment-exact": _spec(P.segments(20) & P.dilated(20, 2), 17, 2, kv_len=20),
    "q-offset": _spec(P.longnet([4, 8], [1, 2]), 6, 3, kv_len=24, causal=True, q_offset=True),
    "q-offset-few-heads": _spec(P.grouped([4, 8, 12], [1, 2, 3], mix="mean"), 6, 2, kv_len=20, q_offset=True),
}
"""Specs that are proved and interpreted."""

_BIG = 1_000_003
LARGE: Mapping[str, AttentionSpec] = {
    "million-longnet": _spec(
        P.longnet([2048 << i for i in range(5)], [1 << i for i in range(5)]), _BIG, 16, kv_heads=4, causal=True
    ),
    "million-grouped": _spec(P.grouped([1000, 4096, 30_000], [1, 3, 6], mix="mean"), _BIG, 8, kv_len=_BIG + 77),
    "million-window": _spec(P.window(4096) & P.padding(), _BIG, 8, kv_heads=2, dropout=0.1, precision="tf32"),
}
"""Specs that are proved only."""

CORPUS = {**SMALL, **LARGE}


# ---------------------------------------------------------------------------------------------------- the mutants


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
        return ast.unparse(replaced(_tree(self.module), self.target, self.replacement))


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
def _tree(module: str) -> ast.Module:
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


def _changes(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Iterate over (node, kind of mutation, replacement); a replacement reads no name that the function lacks."""
    known = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)} | {a.arg for a in function.args.args}
    for node in _walk(function):
        for kind, mutate in MUTATIONS.items():
            for replacement in mutate(node):
                if not isinstance(replacement, ast.Name) or replacement.id in known:
                    yield node, kind, replacement


def _module_mutants(module: str) -> Iterator[Mutant]:
    tree = _tree(module)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    seen: set[tuple[int, str, str]] = set()
    for node, kind, replacement in (change for function in functions for change in _changes(function)):
        line = getattr(node, "lineno", None) or parents[node].lineno  # type: ignore[attr-defined]
        around = _context(node, parents)
        texts = _headline(around), _headline(replaced(around, node, replacement))
        if texts[0] != texts[1] and (line, *texts) not in seen:
            seen.add((line, *texts))
            yield Mutant(module, line, kind, *texts, node, replacement)


def mutants() -> list[Mutant]:
    """Return every mutant, in the order of the source."""
    return [m for module in TARGETS for m in sorted(_module_mutants(module), key=lambda m: m.line)]


# ---------------------------------------------------------------------------------------------------- one mutant


@attrs.frozen
class Compiler:
    """Lowering and passes, one module of which may be mutated."""

    lower: Callable[[AttentionSpec], Graph]
    pipelines: Mapping[str, Pipeline]

    @classmethod
    def load(cls, name: str | None = None, source: str = "") -> Compiler:
        """Return the compiler with ``source`` in place of the module ``name``, or the unmutated one."""
        module = ModuleType(name or "none")
        exec(compile(source, f"<mutant of {name}>", "exec"), module.__dict__)
        made = vars(module)
        return cls(
            lower=made["lower"] if name == lower.__module__ else lower,
            pipelines={
                label: Pipeline(tuple(_mutated(p, made) if p.__module__ == name else p for p in passes))
                for label, passes in PIPELINES.items()
            },
        )

    def run(self, spec: AttentionSpec, pipeline: str, expected: Coverage) -> Graph:
        """Return the final graph of a spec, proved after lowering and after every pass."""
        return self.pipelines[pipeline].run(self.lower(spec), expected)[0]


def _mutated(original: Pass, made: Mapping[str, Any]) -> Pass:
    """Return the pass of a mutated module that has the options of ``original``."""
    result: Pass = made[type(original).__name__](**attrs.asdict(original, recurse=False))
    return result


Meaning = list[torch.Tensor]
Verdict = dict[str, Any]
Result = tuple[int, Verdict]


def meaning(graph: Graph, spec: AttentionSpec) -> Meaning:
    """Return output, LSE and gradients of a graph on fixed random inputs, in float64.

    Raises
    ------
    SpecError
        If the graph does not take the tensors of the spec.
    """
    random_numbers = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(spec.batch, *sizes, generator=random_numbers, dtype=torch.float64)

    shape = spec.shape
    q = draw(spec.heads, shape.seq_len, spec.head_dim).requires_grad_()
    k = draw(spec.kv_heads, shape.kv_len, spec.head_dim).requires_grad_()
    v = draw(spec.kv_heads, shape.kv_len, spec.value_dim).requires_grad_()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        op = graph.inputs[name].op
        if not isinstance(op, Input) or (op.heads, op.length, op.features) != tensor.shape[1:]:
            raise SpecError(f"the graph takes another {name}: {op}")
    out, lse = interpret(graph, q, k, v, operands(spec), shape)
    upstream, upstream_lse = draw(*out.shape[1:]), draw(*out.shape[1:-1])
    loss = (out * upstream).sum()
    if lse is not None:
        loss = loss + (upstream_lse * lse.masked_fill(lse.isinf(), 0)).sum()
    gradients = torch.autograd.grad(loss, (q, k, v), allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (out, lse, *gradients) if t is not None]


def operands(spec: AttentionSpec) -> dict[str, Any]:
    """Return values for the runtime operands of a spec."""
    keys = spec.shape.kv_len
    values = {
        "documents": torch.tensor([0, 5, 7, keys]),
        "key_padding": torch.arange(keys) >= torch.tensor([[3], [0]]),
        "q_offset": torch.tensor(7),
    }
    return {name: values[name] for name in spec.operands}


def compare(graph: Graph, spec: AttentionSpec, expected: Meaning) -> str:
    """Return whether a graph means what is expected: ``"equal"``, ``"wrong"``, or ``"broken"`` if it cannot be run."""
    try:
        got = meaning(graph, spec)
    except Exception:  # whatever a graph that should not exist does to the interpreter
        return "broken"
    alike = len(got) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        for a, b in zip(got, expected, strict=True)
    )
    return "equal" if alike else "wrong"


@attrs.frozen
class Baseline:
    """What the unmutated compiler makes of the corpus."""

    expected: Mapping[str, Coverage]
    graphs: Mapping[tuple[str, str], Graph]
    meanings: Mapping[str, Meaning]
    known: dict[tuple[str, Graph], str] = attrs.field(factory=dict)
    """Comparisons made before: many mutants make the same graph."""

    @classmethod
    def compute(cls) -> Baseline:
        """Compile and interpret the corpus.

        Raises
        ------
        VerifyError
            If the unmutated pipelines do not agree on a spec.
        """
        compiler = Compiler.load()
        expected = {name: spec_coverage(spec) for name, spec in CORPUS.items()}
        graphs = {
            (name, pipeline): compiler.run(spec, pipeline, expected[name])
            for name, spec in CORPUS.items()
            for pipeline in PIPELINES
        }
        meanings = {name: meaning(compiler.lower(spec), spec) for name, spec in SMALL.items()}
        for (name, pipeline), graph in graphs.items():
            if name in SMALL and compare(graph, SMALL[name], meanings[name]) != "equal":
                raise VerifyError(f"the unmutated pipeline {pipeline!r} changes the meaning of {name!r}")
        return cls(expected, graphs, meanings)

    def outcome(self, compiler: Compiler, name: str, pipeline: str) -> tuple[str, str]:
        """Return what became of a spec: one of :data:`OUTCOMES`, and by what it was refused or crashed."""
        try:
            graph = compiler.run(CORPUS[name], pipeline, self.expected[name])
        except REFUSALS as error:
            return "refused", "coverage" if isinstance(error, VerifyError) else "types"
        except Exception as error:  # whatever a mutant does
            return "crash", type(error).__name__
        if graph == self.graphs[name, pipeline]:
            return "same", ""
        return ("unknown" if name in LARGE else self._compared(name, graph)), ""

    def _compared(self, name: str, graph: Graph) -> str:
        if (name, graph) not in self.known:
            self.known[name, graph] = compare(graph, SMALL[name], self.meanings[name])
        return self.known[name, graph]


VERDICTS = ("caught", "survivor", "crash", "timeout", "same meaning", "identical")
"""The first that applies is a mutant's verdict."""
OUTCOMES: Mapping[str, str] = {
    "refused": "caught",
    "wrong": "survivor",
    "broken": "survivor",
    "crash": "crash",
    "equal": "same meaning",
    "unknown": "same meaning",
    "same": "identical",
}
"""What may become of one spec, and the verdict that it points to. ``unknown`` is another graph of a large spec."""


def judge(outcomes: Iterable[tuple[str, str, str, str]]) -> Verdict:
    """Return the verdict over (spec, pipeline, outcome, details) of a whole corpus, with the evidence."""
    found: dict[str, list[str]] = {}
    details: Counter[str] = Counter()
    for name, pipeline, outcome, detail in outcomes:
        found.setdefault(outcome, []).append(f"{name}/{pipeline}")
        if detail:
            details[detail] += 1
    verdict = min((OUTCOMES[o] for o in found), key=VERDICTS.index)
    evidence = {o: found[o] for o in ("wrong", "broken") if o in found}
    counts = {outcome: len(specs) for outcome, specs in found.items()}
    return {"verdict": verdict, "by": dict(details), "counts": counts} | evidence


def examine(name: str, source: str, baseline: Baseline) -> Verdict:
    """Return the verdict on one mutated module."""
    try:
        compiler = Compiler.load(name, source)
    except Exception as error:
        return {"verdict": "crash", "by": {type(error).__name__: 1}, "counts": {}}
    return judge((n, p, *baseline.outcome(compiler, n, p)) for n in CORPUS for p in _pipelines(name))


def _pipelines(module: str) -> list[str]:
    """Return the pipelines that a module takes part in."""
    return [n for n, passes in PIPELINES.items() if module in (lower.__module__, *(p.__module__ for p in passes))]


# ---------------------------------------------------------------------------------------------------- all mutants


def _serve(pipe: Connection) -> None:
    """Judge mutants until killed; runs in a process of its own."""
    torch.set_num_threads(1)
    baseline = Baseline.compute()
    pipe.send("ready")
    while True:
        module, source = pipe.recv()
        pipe.send(examine(module, source, baseline))


class Worker:
    """A process that judges one mutant at a time and is replaced when one takes too long."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.task: int | None = None
        self.deadline = float("inf")

    def submit(self, number: int, mutant: Mutant, limit: float) -> None:
        """Start on a mutant."""
        self.ready, self.task, self.deadline = False, number, time.monotonic() + limit
        self.pipe.send((mutant.module, mutant.source()))

    def collect(self) -> Result | None:
        """Return what the process has to say, once its pipe is readable; None if only that it is ready.

        Raises
        ------
        VerifyError
            If the process ended before it was ready: the unmutated code fails.
        """
        try:
            answer = self.pipe.recv()
        except EOFError:
            if self.task is None:
                raise VerifyError("the unmutated code does not pass; see the traceback above") from None
            return self.replace("crash")
        result = None if self.task is None else (self.task, answer)
        self.ready, self.task, self.deadline = True, None, float("inf")
        return result

    def replace(self, verdict: str) -> Result:
        """Give up on the mutant at hand with a verdict, and start a fresh process."""
        assert self.task is not None
        result = self.task, {"verdict": verdict, "by": {}, "counts": {}}
        self.stop()
        self._start()
        return result

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _results(chosen: Sequence[Mutant], workers: Sequence[Worker], limit: float) -> Iterator[Result]:
    """Iterate over (number, verdict) of the mutants as they are done."""
    waiting = deque(enumerate(chosen))
    missing = len(chosen)
    while missing:
        soonest = min(w.deadline for w in workers)
        readable = wait([w.pipe for w in workers], None if soonest == float("inf") else soonest - time.monotonic())
        for worker in workers:
            result = None
            if worker.pipe in readable:
                result = worker.collect()
            elif time.monotonic() > worker.deadline:
                result = worker.replace("timeout")
            if result is not None:
                missing -= 1
                yield result
            if worker.ready and waiting:
                worker.submit(*waiting.popleft(), limit)


def run(chosen: Sequence[Mutant], jobs: int = 2, limit: float = TIME_LIMIT) -> list[dict[str, Any]]:
    """Judge mutants in worker processes and return one row for each.

    Raises
    ------
    VerifyError
        If the unmutated code does not pass its own proof.
    """
    rows: list[dict[str, Any]] = [{} for _ in chosen]
    workers = [Worker() for _ in range(min(jobs, len(chosen)))]
    console = Console(stderr=True)
    columns = (TextColumn("mutants"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("mutants", total=len(chosen))
            for number, answer in _results(chosen, workers, limit):
                mutant = chosen[number]
                place = {"file": mutant.file, "line": mutant.line, "kind": mutant.kind}
                rows[number] = {**place, "original": mutant.original, "mutated": mutant.mutated, **answer}
                progress.advance(bar)
    finally:
        for worker in workers:
            worker.stop()
    return rows


# ---------------------------------------------------------------------------------------------------- the report


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures: mutants by verdict, the rates, and how many wrong graphs were proved."""
    rows = list(rows)
    verdicts = Counter(row["verdict"] for row in rows)
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row["counts"])
    caught, survivors, broken = verdicts["caught"], verdicts["survivor"], verdicts["crash"] + verdicts["timeout"]
    return {
        "mutants": len(rows),
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        "rate": _rate(caught, survivors),
        "rate_with_crashes": _rate(caught + broken, survivors),
        "rate_crashes_missed": _rate(caught, survivors + broken),
        "graphs_refused": counts["refused"],
        "graphs_wrong_but_proved": counts["wrong"],
        "graphs_broken_but_proved": counts["broken"],
    }


def _rate(found: int, missed: int) -> float:
    return round(found / (found + missed), 4) if found + missed else 1.0


def document(rows: Sequence[Mapping[str, Any]], seconds: float, jobs: int) -> dict[str, Any]:
    """Return everything that a run found, as plain data."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jobs": jobs,
        "seconds": round(seconds),
        "sources": {m: sha256(ast.unparse(_tree(m)).encode()).hexdigest()[:16] for m in TARGETS},
        "pipelines": {label: [p.name for p in passes] for label, passes in PIPELINES.items()},
        "corpus": {name: spec.to_dict() for name, spec in CORPUS.items()},
        "summary": summary(rows),
        "mutants": list(rows),
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a run with one line per spec and per mutant, so that two runs can be compared."""
    lines = [
        f'"{key}": {_lines(value) if key in ("corpus", "mutants") else json.dumps(value)}'
        for key, value in data.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _lines(value: Any) -> str:
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"
    return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"


EXPLANATIONS: Mapping[tuple[str, str], str] = {}
"""Why the proof passes wrong or broken graphs of a mutant, by its original and mutated code."""

METHOD = """\
# How strong the proof is

Every pass is proved: after lowering and after each rewrite the types are inferred again, and the coverage of the graph
is compared with that of the spec (`attnplan/ir/coverage.py`). This page measures how much such a proof finds, by
breaking the rewrites on purpose.

<!-- Written by `python -m bench.mutants --from bench/results/mutants.json --docs docs/mutants.md`; do not edit. -->

## Method

`bench/mutants.py` changes one node of the syntax tree of one module at a time. The modules are lowering and the passes;
`passes/pipeline.py` is left out, for it is the prover and no rewrite:

{targets}

The kinds of mutation:

| kind | |
|---|---|
| constant | an int one higher or one lower |
| comparison | `<` and `<=`, `>` and `>=`; the opposites of `==`, `in` and `is` |
| arithmetic | `+` and `-`, `//` and `%`, `*` to `+`, a minus sign removed |
| logic | `and` for `or`, `not` removed |
| negated condition | of an `if` |
| dropped element | of a tuple, list, call, comprehension or chain of conditions |
| dropped statement | a `pass` in its place |
| swap | index 0 for 1, `min` for `max`, `any` for `all`; neighbouring elements, or the first and the last argument |
| mix-up | a name or attribute for its counterpart: `q` for `k`, `seq_len` for `kv_len`, `first` for `last`, ... |

Docstrings, annotations, imports, declarations and error messages stay as they are.

Each mutant compiles {small} small specs and {large} of about a million positions through each of these pipelines that
its module takes part in:

{pipelines}

Nothing is written to disk: the mutated module takes the place of the original inside a worker process, which is killed
after {limit:.0f} s. Where the proof passes and the final graph of a small spec is another than the unmutated one, its
inputs are compared with the tensors of the spec, the float64 interpreter runs it, and output, LSE and gradients are
compared with those of the graph that the unmutated `lower` makes. A graph that takes other tensors, or that the
interpreter cannot run, is broken; one with other numbers is wrong.

| verdict | |
|---|---|
| caught | for some spec, lowering, a pass or the proof after it raised an error of attnplan's own |
| survivor | all proofs passed, and for some spec the graph is wrong or broken |
| crash, timeout | Python raised an error of its own, or did not end: found, but not by the proof |
| same meaning | other graphs, which mean the same |
| identical | the same graphs for the whole corpus |

The rate is caught / (caught + survivors). A verdict is about the whole corpus; the stricter question is whether the
proof ever let a wrong or broken graph pass, even one of a mutant that it caught with another spec. Both are answered
below.
"""


def render(data: Mapping[str, Any]) -> str:
    """Return ``docs/mutants.md`` for a run."""
    small = sum(spec["seq_len"] < 1000 for spec in data["corpus"].values())
    method = METHOD.format(
        targets="\n".join(f"- `{module.replace('.', '/')}.py`" for module in data["sources"]),
        small=small,
        large=len(data["corpus"]) - small,
        pipelines="\n".join(f"- {label}: `{', '.join(names)}`" for label, names in data["pipelines"].items()),
        limit=TIME_LIMIT,
    )
    rows = data["mutants"]
    return "\n".join([method, *_figures(data), *_survivors(rows), *_escapes(rows)]).rstrip() + "\n"


def _figures(data: Mapping[str, Any]) -> list[str]:
    rows, figures = data["mutants"], data["summary"]
    by = Counter(part for row in rows if row["verdict"] == "caught" for part in row["by"])
    errors = Counter(name for row in rows if row["verdict"] == "crash" for name in row["by"])
    return [
        "## Figures",
        "",
        _paragraph(
            f"The proof caught **{figures['caught']} of {figures['caught'] + figures['survivor']}** mutants that "
            f"change behaviour without a crash: **{figures['rate']:.1%}**. With crashes and timeouts counted as found "
            f"it is {figures['rate_with_crashes']:.1%}, with them counted as missed "
            f"{figures['rate_crashes_missed']:.1%}. Crashes are calls with a missing argument, unknown attributes and "
            f"the like ({_most_common(errors)}); where Python raises there is no graph to be proved."
        ),
        "",
        _paragraph(
            f"The types refused graphs of {by['types']} mutants, the coverage graphs of {by['coverage']}. In all, "
            f"{figures['graphs_refused']} compilations were refused, and {figures['graphs_wrong_but_proved']} wrong "
            f"and {figures['graphs_broken_but_proved']} broken graphs were let pass."
        ),
        "",
        _paragraph(
            f"One run of {figures['mutants']} mutants: Python {data['python']}, torch {data['torch']}, {data['jobs']} "
            f"processes on a shared machine, {data['seconds']} s."
        ),
        "",
        *_table(rows, "file"),
        *_table(rows, "kind"),
    ]


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _most_common(errors: Counter[str], count: int = 3) -> str:
    return ", ".join(f"{n} {name}" for name, n in errors.most_common(count))


def _table(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    head = [f"| {key} | mutants | {' | '.join(VERDICTS)} | rate |", "|---" + "|--:" * (len(VERDICTS) + 2) + "|"]
    return [*head, *(_line([r for r in rows if r[key] == name], name) for name in sorted({r[key] for r in rows})), ""]


def _line(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    figures = summary(rows)
    cells = [len(rows), *(figures[verdict] or "" for verdict in VERDICTS), f"{figures['rate']:.1%}"]
    return f"| {name} | {' | '.join(map(str, cells))} |"


def _survivors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    survivors = [row for row in rows if row["verdict"] == "survivor"]
    return ["## Survivors", "", *([_explained(row) for row in survivors] or ["None.\n"])]


def _escapes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    escapes = [row for row in rows if row["verdict"] == "caught" and ("wrong" in row or "broken" in row)]
    title = ["## Wrong graphs of caught mutants", ""]
    if not escapes:
        return [*title, "None.\n"]
    text = "These mutants were caught, but by other specs than some whose meaning they changed."
    return [*title, text, "", *(_explained(row) for row in escapes)]


def _explained(row: Mapping[str, Any]) -> str:
    """Return the list item of a mutant, with the specs that it got past the proof and the reason."""
    where = {o: sorted({spec.split("/")[0] for spec in row[o]}) for o in ("wrong", "broken") if o in row}
    specs = "; ".join(f"{outcome}: {_some(names)}" for outcome, names in where.items())
    reason = EXPLANATIONS.get((row["original"], row["mutated"]), "not yet explained")
    return f"{_change(row)}\n\n" + textwrap.indent(_paragraph(f"({specs}.) {reason}"), "  ") + "\n"


def _some(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _change(row: Mapping[str, Any]) -> str:
    return f"- `{row['file']}`, line {row['line']}: `{row['original']}` to `{row['mutated']}`"


# ---------------------------------------------------------------------------------------------------- command line


def measure(sample: int | None = None, seed: int = 0, jobs: int = 2) -> dict[str, Any]:
    """Judge every mutant, or a random sample of them."""
    chosen = mutants()
    if sample is not None and sample < len(chosen):
        chosen = random.Random(seed).sample(chosen, sample)
    start = time.monotonic()
    rows = run(chosen, jobs)
    return document(rows, time.monotonic() - start, jobs)


@click.command(help=__doc__.split("\n\n    ", 1)[0] if __doc__ else None)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what was found.")
@click.option("--docs", "docs_file", type=click.Path(path_type=Path), help="Write the page that explains it.")
@click.option("--from", "from_file", type=click.Path(path_type=Path, exists=True), help="Read a run, do not run.")
@click.option("--sample", type=click.IntRange(min=1), help="Judge that many mutants, drawn at random.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sample.")
@click.option("--jobs", default=2, show_default=True, help="Number of processes.")
def main(
    json_file: Path | None, docs_file: Path | None, from_file: Path | None, sample: int | None, seed: int, jobs: int
) -> None:
    """Run from the command line."""
    data = json.loads(from_file.read_text(encoding="utf-8")) if from_file else measure(sample, seed, jobs)
    if json_file:
        write_json(json_file, data)
    if docs_file:
        docs_file.write_text(render(data), encoding="utf-8")
    for name, value in data["summary"].items():
        click.echo(f"{name.replace('_', ' '):<26}{value}")
    for row in data["mutants"]:
        if row["verdict"] == "survivor":
            click.echo(_explained(row))


if __name__ == "__main__":
    main()
