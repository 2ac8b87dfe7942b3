"""The text form of graphs: one line per node, read back to an equal graph without executing anything."""

from __future__ import annotations

import ast
import re
from typing import Any

import attrs

from attnplan.errors import PassError, SpecError, did_you_mean
from attnplan.ir.graph import Builder, Graph, Node
from attnplan.ir.ops import OPS, Op
from attnplan.ir.rows import Axis, RowMap
from attnplan.patterns import Mixture, Pattern
from attnplan.patterns.parse import from_syntax

_UNREADABLE = (
    SyntaxError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, SpecError, PassError,
)  # fmt: skip
_LINE = re.compile(r"(%\d+) = (.*?) : (.*)")


def print_graph(graph: Graph) -> str:
    """Write a graph, one node per line, fields at their default left out."""
    lines = [f"%{n.id} = {_call(n)}" for n in graph.nodes]
    width = min(max(map(len, lines), default=0), 100)
    return "".join(f"{line:<{width}} : {n.type}\n" for line, n in zip(lines, graph.nodes, strict=True))


def _call(node: Node) -> str:
    parts = [f"%{a}" for a in node.args]
    for field in attrs.fields(type(node.op)):
        value = getattr(node.op, field.name)
        default = field.default.factory() if isinstance(field.default, attrs.Factory) else field.default  # type: ignore[arg-type]
        if value != default:
            parts.append(f"{field.name}={_print_value(value)}")
    return f"{node.op.name}({', '.join(parts)})"


def _print_value(value: Any) -> str:
    if isinstance(value, RowMap):
        axes = ", ".join(f"({a.size}, {a.head}, {a.row})" for a in value.axes)
        return f"rows({value.head}, {value.row}, [{axes}])"
    if isinstance(value, tuple) and any(isinstance(item, RowMap | tuple) for item in value):
        return f"({', '.join(map(_print_value, value))}{',' * (len(value) == 1)})"
    return repr(value)


def parse_graph(text: str) -> Graph:
    """Read a graph from its text form.

    Raises
    ------
    PassError
        If a line cannot be read, names an unknown op or option, or states a type that its operands do not make.
    """
    builder = Builder()
    ids: dict[str, int] = {}
    last = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise PassError(f"line {number}: expected '%id = op(...) : type', got {line.strip()!r}")
        name, call, stated = match[1], match[2].strip(), match[3].strip()
        try:
            op, args = _parse_call(call, ids)
            last = ids[name] = builder.add(op, *args)
            inferred = str(builder.type(last))
        except _UNREADABLE as error:
            raise PassError(f"line {number}: {error}") from None
        if inferred != stated:
            raise PassError(f"line {number}: {name} is stated as {stated}, its operands make it {inferred}")
    if not ids:
        raise PassError("the text holds no node")
    graph = builder.build(last)
    graph.verify()
    return graph


def _parse_call(text: str, ids: dict[str, int]) -> tuple[Op, tuple[int, ...]]:
    call = ast.parse(re.sub(r"%(\d+)", r"_\1", text), mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise PassError(f"expected op(...), got {text!r}")
    kind = OPS.get(call.func.id)
    if kind is None:
        raise PassError(f"unknown op {call.func.id!r}{did_you_mean(call.func.id, OPS)}")
    args = []
    for arg in call.args:
        name = "%" + arg.id[1:] if isinstance(arg, ast.Name) else ast.unparse(arg)
        if name not in ids:
            raise PassError(f"{name} is not defined above")
        args.append(ids[name])
    return kind(**{str(k.arg): _parse_value(k.value) for k in call.keywords}), tuple(args)


def _parse_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "rows":
        head, row, axes = (ast.literal_eval(a) for a in node.args)
        return RowMap(head, row, tuple(Axis(*a) for a in axes))
    if isinstance(node, ast.Tuple):
        return tuple(_parse_value(item) for item in node.elts)
    if isinstance(node, ast.Call | ast.BinOp) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert)):
        pattern = from_syntax(node)
        if isinstance(pattern, Mixture) or not isinstance(pattern, Pattern):
            raise PassError(f"{ast.unparse(node)!r} is no pattern")
        return pattern
    return ast.literal_eval(node)
