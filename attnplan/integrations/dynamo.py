"""``torch.compile(model, backend="attnplan")``: a model's own attention calls become plans where the mask is known.

Importing this module also lets exported programs that hold plans run.

Examples
--------
>>> import torch, attnplan.integrations.dynamo as dynamo
>>> isinstance(dynamo.report(), dynamo.Report)
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.backends.registry import list_backends, register_backend

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.api import compile as plan_of
from attnplan.api import fingerprint
from attnplan.errors import AttnPlanError
from attnplan.integrations.dynamo_masks import Unknown, known_mask
from attnplan.patterns import Pattern
from attnplan.plan import Plan
from attnplan.runtime.planned import planned, read_with
from attnplan.store import parse

_KEPT = 4096
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@attrs.frozen
class Call:
    """One ``scaled_dot_product_attention`` call of a graph."""

    name: str
    """Its node."""
    shape: str
    """Shapes of q and k."""
    plan: str = ""
    """What runs instead; empty if it was left alone."""
    reason: str = ""
    """Why it was left alone."""


@attrs.frozen
class Report:
    """Every attention call that this backend has seen, in order."""

    calls: tuple[Call, ...] = ()

    @property
    def replaced(self) -> tuple[Call, ...]:
        """The calls that became plans."""
        return tuple(c for c in self.calls if c.plan)

    @property
    def left(self) -> tuple[Call, ...]:
        """The calls that were left alone, each with its reason."""
        return tuple(c for c in self.calls if not c.plan)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} of {len(self.calls)} attention calls run as plans"]
        lines += [f"  {c.name} {c.shape}: {c.plan or 'left alone: ' + c.reason}" for c in self.calls]
        return "\n".join(lines)


_calls: list[Call] = []


def report() -> Report:
    """Return which calls were replaced since the process began or :func:`clear` was called."""
    return Report(tuple(_calls))


def clear() -> None:
    """Forget the calls seen so far."""
    _calls.clear()


def backend(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """Compile a graph of Dynamo: replace its attention calls where the mask is known, hand the rest to Inductor.

    A mask is known if it is absent, ``is_causal``, or built in the graph from sizes alone, by ``arange``, ``tril``,
    comparisons and logic, and equals a band in every element. What an input tensor holds is never known.

    Parameters
    ----------
    module
        The graph.
    inputs
        Its example inputs.
    **options
        Passed on to Inductor; ``inner`` replaces Inductor by another function of (module, inputs).

    Returns
    -------
    callable
        The compiled graph.
    """
    inner = options.pop("inner", None)
    for node in list(module.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)):
        _calls.append(_replaced(module, node))
    del _calls[:-_KEPT]
    module.recompile()
    if inner is None:
        from torch._inductor.compile_fx import compile_fx

        inner = compile_fx
    compiled: Callable[..., Any] = inner(module, inputs, **options)
    return compiled


def _replaced(module: fx.GraphModule, node: fx.Node) -> Call:
    """Replace one call if its mask is known, and return what was done."""
    given: dict[str, Any] = {**_DEFAULTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    shapes = [_sizes(given[name]) for name in _ARGUMENTS[:3]]
    text = " x ".join(str(s) for s in shapes[:2])
    try:
        plan = plan_of(_spec(given, shapes), given["query"].meta["example_value"].device)
    except (Unknown, AttnPlanError) as error:
        return Call(node.name, text, reason=str(error))
    if (plan.strategy, plan.backend) == ("dense", "eager") and plan._inlined is not None:
        return Call(node.name, text, plan=f"{plan!r}, which is this call")
    with module.graph.inserting_before(node):
        args = (given["query"], given["key"], given["value"], plan._text())
        made = module.graph.call_function(_run, args)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    return Call(node.name, text, plan=repr(plan))


def _run(q: Tensor, k: Tensor, v: Tensor, text: str) -> Tensor:
    """Run the plan of a text on tensors ``[B, H, S, D]``."""
    return planned(q, k, v, {}, True, None, text)[0]


def _sizes(node: Any) -> list[Any]:
    return list(node.meta["example_value"].shape)


def _spec(given: dict[str, Any], shapes: list[list[Any]]) -> AttentionSpec:
    """Return the spec of a call; raise :class:`Unknown` if it has none."""
    q, k, v = shapes
    if not len(q) == len(k) == len(v) == 4:
        raise Unknown(f"q has {len(q)} dimensions, plans take 4")
    if any(not isinstance(n, int) for sizes in shapes for n in sizes[1:]):
        raise Unknown("its lengths are symbolic; compile with dynamic=False, or put a plan with Dim into the model")
    if not q[0] == k[0] == v[0] or k[1:3] != v[1:3] or q[3] != k[3]:
        raise Unknown("its shapes broadcast")
    if q[1] != k[1] and not given["enable_gqa"]:
        raise Unknown("its heads broadcast")
    if given["dropout_p"]:
        raise Unknown(f"it has dropout_p={given['dropout_p']}, whose random mask no plan repeats")
    if not isinstance(given["scale"], float | int | None):
        raise Unknown("its scale is computed in the graph")
    return AttentionSpec(
        seq_len=q[2],
        kv_len=k[2],
        heads=q[1],
        kv_heads=k[1],
        head_dim=q[3],
        value_dim=v[3],
        batch=q[0] if isinstance(q[0], int) else 1,
        dtype=str(given["query"].meta["example_value"].dtype).removeprefix("torch."),
        scale=None if given["scale"] is None else float(given["scale"]),
        pattern=_pattern(given, q[2], k[2]),
    )


def _pattern(given: dict[str, Any], seq_len: int, kv_len: int) -> Pattern:
    mask = given["attn_mask"]
    if mask is not None and given["is_causal"]:
        raise Unknown("it has both a mask and is_causal")
    if given["is_causal"] not in (True, False):
        raise Unknown("whether it is causal is computed in the graph")
    if mask is not None:
        return known_mask(mask, seq_len, kv_len)
    if not given["is_causal"]:
        return P.full()
    # SDPA aligns is_causal to the first key, patterns to the last
    return P.causal() if seq_len == kv_len else P.band(None, seq_len - kv_len)


def _read_plan(text: str) -> Plan:
    found = parse(text, "the plan of an exported program", fingerprint())
    return Plan(found.spec, found.target, found.found, found.pins)


read_with(_read_plan)
if "attnplan" not in list_backends(None):  # as an entry point it is known, and registered when it is first used
    register_backend(backend, "attnplan")
