"""Whole plans as one registered operator: how a plan that nobody traces appears in a traced program.

``attnplan::planned`` finds its plan by a handle that is a *tensor*, or by the plan's own text in an exported program.
Dynamo guards on what a tensor is and not on what it holds, so any number of plans share one graph, and data that comes
with a call never makes another. Emission, block tables and the checks of a call happen inside the operator, when it
runs: nothing there is traced, and no lock is taken in a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attnplan.errors import AttnPlanError, SpecError
from attnplan.runtime.scores import learned
from attnplan.runtime.views import accumulator, empty_like_rows

Pair = tuple[Tensor, Tensor | None]
Gradients = tuple[Tensor, ...]


class Runner(Protocol):
    """What the operator asks of a plan, on tensors ``[B, H, S, D]``."""

    def answer(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool) -> Pair:
        """Check a call and run it."""
        ...

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> Gradients:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``, then those of the named operands."""
        ...


_plans: WeakValueDictionary[int, Runner] = WeakValueDictionary()
_numbers = count(1)
_readers: list[Callable[[str], Runner]] = []


def handle_of(plan: Runner) -> Tensor:
    """Return the int64 tensor ``[]`` by which the operator finds ``plan`` in this process, as long as it lives."""
    number = next(_numbers)
    _plans[number] = plan
    return torch.tensor(number)


def read_with(reader: Callable[[str], Runner]) -> None:
    """Set how the text of a plan in an exported program is read."""
    _readers[:] = [reader]
    _read.cache_clear()


@lru_cache(maxsize=256)
def _read(text: str) -> Runner:
    if not _readers:
        raise AttnPlanError("this exported program holds plans: import attnplan.integrations.dynamo before it runs")
    return _readers[0](text)


def _find(handle: Tensor | None, text: str) -> Runner:
    if handle is None:
        return _read(text)
    found = _plans.get(int(handle))
    if found is None:
        raise AttnPlanError(
            f"plan {int(handle)} of this compiled program is gone: keep the plan as long as the program"
        )
    return found


def planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, Any],
    has_lse: bool,
    handle: Tensor | None,
    text: str = "",
) -> Pair:
    """Return (output, LSE) of a plan as one operator call.

    Parameters
    ----------
    q, k, v
        ``[B, H, S, D]``, ``[B, H_kv, K, D]``, ``[B, H_kv, K, Dv]``.
    operands
        What comes with the call; integers become tensors, so that another one is no other graph.
    has_lse
        Whether the plan has one LSE.
    handle, text
        The plan, by :func:`handle_of` or by the text of its file.

    Raises
    ------
    SpecError
        If an operand is neither a tensor nor an integer.
    """
    values = []
    for name, value in operands.items():
        if isinstance(value, Tensor):
            values.append(value)
        elif isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
            values.append(torch.full((), value, dtype=torch.int64))  # type: ignore[arg-type]  # a SymInt in traces
        else:
            raise SpecError(f"{name} must be a tensor or an int, got {type(value).__name__}")
    out, lse = torch.ops.attnplan.planned(q, k, v, values, ",".join(operands), has_lse, handle, text)
    return out, lse if has_lse else None


def _named(values: Sequence[Tensor], names: str) -> dict[str, Tensor]:
    return dict(zip(names.split(","), values, strict=True)) if names else {}


def _like(q: Tensor, features: int) -> Tensor:
    """Return a tensor like the output for queries ``q``, laid out as the operator promises."""
    return empty_like_rows(q, features, q.dtype)


def _as_promised(x: Tensor, q: Tensor) -> Tensor:
    promised = _like(q, x.shape[-1])
    return x if x.stride() == promised.stride() and x.dtype == q.dtype else promised.copy_(x)


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty((0,), dtype=accumulator(q.dtype))


@torch.library.custom_op("attnplan::planned", mutates_args=())
def _planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    names: str,
    has_lse: bool,
    handle: Tensor | None,
    text: str,
) -> tuple[Tensor, Tensor]:
    out, lse = _find(handle, text).answer(q, k, v, _named(operands, names), has_lse)
    return _as_promised(out, q), _no_lse(q) if lse is None else lse.contiguous()


@_planned.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: Any, names: str, has_lse: bool, handle: Any, text: str) -> Any:
    lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype)) if has_lse else _no_lse(q)
    return _like(q, v.shape[-1]), lse


@torch.library.custom_op("attnplan::planned_backward", mutates_args=())
def _planned_backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    names: str,
    learned: str,
    handle: Tensor | None,
    text: str,
) -> list[Tensor]:
    given, wanted = _named(operands, names), learned.split(",") if learned else []
    found = _find(handle, text).gradients((grad, grad_lse), (q, k, v, out, lse), given, wanted)
    rest = [d.contiguous() for d in found[3:]]
    return [*(_as_promised(d, x) for d, x in zip(found[:3], (q, k, v), strict=True)), *rest]


@_planned_backward.register_fake
def _(
    grad: Any, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, operands: Any, names: str,
    learned: str, *rest: Any,
) -> Any:  # fmt: skip
    given, wanted = _named(operands, names), learned.split(",") if learned else []
    own = [torch.empty_like(given[name], memory_format=torch.contiguous_format) for name in wanted]
    return [*(_like(x, x.shape[-1]) for x in (q, k, v)), *own]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, operands, ctx.names, has_lse, handle, ctx.text = inputs
    out, lse = output
    if not has_lse:
        ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.learned = learned(_named(operands, ctx.names))
    ctx.save_for_backward(q, k, v, out, lse, handle, *operands)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, handle, *operands = ctx.saved_tensors
    nothing = (None, None, None, None)
    if grad is None and grad_lse is None:
        return None, None, None, [None] * len(operands), *nothing
    given = (grad, grad_lse, q, k, v, out, lse, operands, ctx.names, ",".join(ctx.learned), handle, ctx.text)
    dq, dk, dv, *rest = torch.ops.attnplan.planned_backward(*given)
    own = dict(zip(ctx.learned, rest, strict=True))
    return dq, dk, dv, [own.get(name) for name in _named(operands, ctx.names)], *nothing


_planned.register_autograd(_differentiate, setup_context=_setup)


def neutral_operands(
    names: Iterable[str], batch: int, heads: int, kv_len: int, device: torch.device
) -> dict[str, Tensor]:
    """Return operands for a call that is run for its side effects: one document, no padding, first position, zeros.

    Examples
    --------
    >>> neutral_operands(["documents"], 1, 2, 8, torch.device("cpu"))
    {'documents': tensor([0, 8], dtype=torch.int32)}
    """
    known = {
        "documents": lambda: torch.tensor([0, kv_len], dtype=torch.int32, device=device),
        "key_padding": lambda: torch.ones(batch, kv_len, dtype=torch.bool, device=device),
        "q_offset": lambda: torch.zeros((), dtype=torch.int64, device=device),
        "dropout_seed": lambda: torch.zeros((), dtype=torch.int64, device=device),
        "bias": lambda: torch.zeros(1, 1, 1, device=device),
        "alibi_slopes": lambda: torch.zeros(heads, device=device),
        "sink_logits": lambda: torch.zeros(heads, device=device),
    }
    return {name: known[name]() for name in names}


def gradients_by_autograd(
    run: Callable[..., Pair], flow: Sequence[Tensor | None], given: Sequence[Tensor], has_lse: bool
) -> Gradients:
    """Return the gradients of a program that autograd differentiates: it runs once more.

    Parameters
    ----------
    run
        ``(q, k, v, *more, return_lse) -> (out, lse)``.
    flow
        Gradients of output and LSE, or None.
    given
        q, k, v, and what else gradients are asked for.
    has_lse
        Whether to ask for the LSE.
    """
    # An operator's own code runs below autograd, which is switched on again here.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in given]
        results = run(*leaves, has_lse and flow[1] is not None)
        pairs = [(x, g) for x, g in zip(results, flow, strict=True) if x is not None and g is not None]
        outs, upstream = [x for x, _ in pairs], [g for _, g in pairs]
        return torch.autograd.grad(outs, leaves, upstream, allow_unused=True, materialize_grads=True)
