"""Attention masks that a graph builds from sizes alone: evaluated, and compared with bands in every element."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from attnplan import patterns as P
from attnplan.patterns import Pattern

_MOST = 1 << 28
"""Elements of the largest mask that is evaluated."""
_BUILDING = frozenset(
    [
        "arange",
        "ones",
        "zeros",
        "full",
        "tril",
        "triu",
        "ones_like",
        "zeros_like",
        "full_like",
        "new_ones",
        "new_zeros",
        "new_full",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_and",
        "logical_or",
        "logical_not",
        "logical_xor",
        "bitwise_and",
        "bitwise_or",
        "bitwise_not",
        "bitwise_xor",
        "and_",
        "or_",
        "xor",
        "invert",
        "add",
        "sub",
        "mul",
        "floordiv",
        "floor_divide",
        "mod",
        "remainder",
        "neg",
        "abs",
        "where",
        "masked_fill",
        "expand",
        "expand_as",
        "broadcast_to",
        "unsqueeze",
        "squeeze",
        "view",
        "reshape",
        "transpose",
        "permute",
        "to",
        "bool",
        "float",
        "int",
        "long",
        "type",
        "contiguous",
        "clone",
        "getitem",
        "tensor",
        "scalar_tensor",
        "__and__",
        "__or__",
        "__invert__",
        "minimum",
        "maximum",
        "clamp",
        "diff",
        "cumsum",
    ]  # a list of 80 lines
)
"""Pure functions of their arguments by name, of which masks are built."""


class Unknown(Exception):  # noqa: N818  # a finding, not a fault
    """A mask, or a call, that cannot be proved to be one of a spec; the message is the reason."""


def known_mask(mask: Any, seq_len: int, kv_len: int) -> Pattern:
    """Return the pattern that equals a mask of a graph.

    Parameters
    ----------
    mask
        Its node.
    seq_len, kv_len
        Lengths of the attention.

    Raises
    ------
    Unknown
        If it depends on an input, is built by unknown operations, or is no band.
    """
    if not isinstance(mask, fx.Node):
        raise Unknown("its mask is a constant of the graph")
    nodes = list(_ancestors(mask))
    _check(mask, nodes)
    value = mask.meta.get("example_value")
    if value is None or value.numel() > _MOST:
        raise Unknown(f"its mask has more than {_MOST} elements")
    found = _evaluate(mask, nodes)
    met = _met(found)
    if tuple(met.shape[-2:]) != (seq_len, kv_len):
        met = met.expand(*met.shape[:-2], seq_len, kv_len)
    return _band(met)


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """Iterate over a node and all that it is computed from, in the order of the graph."""
    found = {node}
    waiting = [node]
    while waiting:
        for other in waiting.pop().all_input_nodes:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return (n for n in node.graph.nodes if n in found)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _check(mask: fx.Node, nodes: list[fx.Node]) -> None:
    for node in nodes:
        if node.op == "placeholder":
            what = "a size" if isinstance(node.meta.get("example_value"), torch.SymInt) else "an input tensor"
            raise Unknown(f"its mask depends on {what}, {node.name}")
        if node.op == "get_attr":
            raise Unknown(f"its mask depends on the model's own tensor {node.target}")
        if _name(node) not in _BUILDING or "out" in node.kwargs:
            raise Unknown(f"its mask is built by {_name(node)}, which is not among the operations that are evaluated")
    used = set(nodes)
    for node in mask.graph.nodes:
        written = _written(node)
        if written is not None and used & set(_ancestors(written)):
            raise Unknown(f"its mask, or what it is built from, is written in place by {node.name}")


def _written(node: fx.Node) -> fx.Node | None:
    """Return what a node writes in place, None if nothing."""
    name = _name(node)
    in_place = node.op.startswith("call") and (
        node.target is operator.setitem
        or (name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_"))
        or (
            getattr(operator, name, None) is node.target
            and name.startswith("i")
            and name not in ("invert", "index", "inv")
        )
    )
    if in_place and node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    out = node.kwargs.get("out")
    return out if isinstance(out, fx.Node) else None


def _evaluate(mask: fx.Node, nodes: list[fx.Node]) -> Tensor:
    values: dict[fx.Node, Any] = {}

    def known(x: Any) -> Any:
        return fx.node.map_arg(x, lambda n: values[n])

    with torch.no_grad():
        for node in nodes:
            args, kwargs = known(node.args), known(node.kwargs)
            if node.op == "call_method":
                values[node] = getattr(args[0], _name(node))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
    found = values[mask]
    assert isinstance(found, Tensor)
    return found


def _met(mask: Tensor) -> Tensor:
    """Return where pairs meet, bool ``[S or 1, K or 1]``; raise if batch elements or heads differ."""
    if mask.dtype != torch.bool:
        met = mask == 0
        if not bool((met | (mask == -torch.inf) | (mask <= torch.finfo(mask.dtype).min)).all()):
            raise Unknown("its mask holds other numbers than 0 and the least, which are a bias")
        mask = met
    flat = mask.reshape(-1, *mask.shape[-2:]) if mask.dim() > 2 else mask.reshape(1, *_two(mask))
    if not bool((flat == flat[:1]).all()):
        raise Unknown("its mask differs between batch elements or heads")
    return flat[0]


def _two(mask: Tensor) -> tuple[int, int]:
    sizes = (1, 1, *mask.shape)[-2:]
    return int(sizes[0]), int(sizes[1])


def _band(met: Tensor) -> Pattern:
    """Return the band that equals ``met`` ``[S, K]``."""
    if bool(met.all()):
        return P.full()
    if not bool(met.any(-1).all()):
        raise Unknown("its mask has rows without a key, which calls and plans may treat differently")
    seq_len, kv_len = met.shape
    ahead = torch.arange(kv_len, device=met.device) - (
        torch.arange(seq_len, device=met.device).unsqueeze(1) + kv_len - seq_len
    )
    left, right = -int(ahead[met].min()), int(ahead[met].max())
    if not bool((met == ((ahead >= -left) & (ahead <= right))).all()):
        raise Unknown("its mask is no band: not causal, no window, not full")
    return P.band(left if left < kv_len - 1 else None, right if right < kv_len - 1 else None)
