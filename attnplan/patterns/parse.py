"""The text form of patterns: the same expression that builds one in Python, read without executing anything."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from attnplan.errors import SpecError, did_you_mean
from attnplan.patterns.bands import band, causal, full, window
from attnplan.patterns.base import Pattern
from attnplan.patterns.blocks import block_window, blocks, random_blocks
from attnplan.patterns.grids import neighborhood
from attnplan.patterns.keys import global_tokens, sinks
from attnplan.patterns.mixtures import Mixture, grouped, longnet, mix
from attnplan.patterns.operands import documents, padding
from attnplan.patterns.presets import (
    a_shape,
    bigbird,
    chunked,
    longformer,
    longlora,
    prefix_lm,
    sparse_transformer,
    streaming,
    vertical_slash,
)
from attnplan.patterns.segments import dilated, heads, segments
from attnplan.patterns.strides import columns, strided

CONSTRUCTORS: Mapping[str, Callable[..., Pattern | Mixture]] = {
    f.__name__: f
    for f in (
        full, causal, window, band, segments, dilated, heads, sinks, global_tokens, documents, padding,
        strided, columns, blocks, block_window, random_blocks, neighborhood,
        longformer, bigbird, streaming, a_shape, vertical_slash, sparse_transformer, chunked, prefix_lm, longlora,
        longnet, grouped, mix,
    )
}  # fmt: skip


def parse(text: str) -> Pattern | Mixture:
    """Read a pattern or mixture from its text form.

    Raises
    ------
    SpecError
        If the text is no expression of the algebra, with a suggestion for a misspelt name.

    Examples
    --------
    >>> parse("window(4096, 0) | sinks(4)")
    window(4096, 0) | sinks(4)
    >>> parse("longnet([8, 16], [1, 2]) & documents()")
    longnet(segment_lengths=[8, 16], dilation_rates=[1, 2]) & documents()
    """
    try:
        return from_syntax(ast.parse(text.strip(), mode="eval").body)
    except SpecError:
        raise
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        raise SpecError(f"cannot read the pattern {shown!r}: {getattr(error, 'msg', error)}") from None


def from_syntax(node: ast.expr) -> Pattern | Mixture:
    """Build the pattern that a parsed expression denotes."""
    value = _value(node)
    if not isinstance(value, Pattern | Mixture):
        raise SpecError(f"{ast.unparse(node)!r} is not a pattern; write one such as window(512) | sinks(4)")
    return value


def _value(node: ast.expr) -> Any:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _combine(node, lambda: _value(left) & _value(right))
        case ast.BinOp(left, ast.BitOr(), right):
            return _combine(node, lambda: _value(left) | _value(right))
        case ast.UnaryOp(ast.Invert(), operand):
            return ~from_syntax(operand)
        case ast.Call(ast.Name(name), args, keywords):
            return _call(node, name, [_value(a) for a in args], {str(k.arg): _value(k.value) for k in keywords})
        case ast.List(items) | ast.Tuple(items):
            return [_value(item) for item in items]
        case ast.Name(name) if name in CONSTRUCTORS:
            raise SpecError(f"{name!r} is a function: write {name}(...)")
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise SpecError(f"{ast.unparse(node)!r} is not part of the pattern algebra") from None


def _combine(node: ast.expr, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except TypeError:
        raise SpecError(f"{ast.unparse(node)!r} joins something that is not a pattern") from None


def _call(node: ast.expr, name: str, args: list[Any], keywords: dict[str, Any]) -> Pattern | Mixture:
    if name == "mask":
        raise SpecError("mask(fn) holds a Python function and has no text form: build the spec in Python")
    if name not in CONSTRUCTORS:
        raise SpecError(f"unknown pattern {name!r}{did_you_mean(name, CONSTRUCTORS)}")
    try:
        return CONSTRUCTORS[name](*args, **keywords)
    except TypeError as error:
        raise SpecError(f"{ast.unparse(node)!r}: {error}") from None
