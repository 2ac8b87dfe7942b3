"""A call of a ring's plan: checks, DTensors, layouts, and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from attnplan.cost import Target
from attnplan.errors import SpecError
from attnplan.runtime.masks import check_operands
from attnplan.runtime.ring.engines import Engine, RealEngine, call
from attnplan.runtime.ring.parts import Gradients
from attnplan.runtime.scores import sunk
from attnplan.spec import AttentionSpec

Result = tuple[Tensor, Tensor | None]
SINKS = "sink_logits"
UNTRACED = {
    "heads": "it spreads heads over ranks, and its backward needs the queries that its forward gathered",
    "mix": "its branches are mixed by another rule than 'lse', and its backward needs the output of each",
    "ragged": "its ranks hold unlike numbers of rows, so that their compiled graphs might order two calls unlike",
    "tensors": "it was called with DTensors",
}
"""Why a call of a ring is no part of a compiled graph."""


class RingCall(Protocol):
    """What a call needs of a plan."""

    spec: AttentionSpec
    target: Target
    mesh: Any

    @property
    def engine(self) -> Engine:
        """Who runs it."""
        ...

    @property
    def lengths(self) -> tuple[int, int]:
        """Rows of q and of k that a call brings: those of this rank's shard, or all."""
        ...


def with_sinks(out: Tensor, lse: Tensor | None, operands: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return output and LSE of rows whose softmax has one more key, which needs no other rank."""
    assert lse is not None
    made, total = sunk(out, lse, operands[SINKS])
    return made.to(out.dtype), total


def run_call(
    plan: RingCall, q: Any, k: Any, v: Any, return_lse: bool, operands: Mapping[str, Any]
) -> Tensor | tuple[Tensor, Tensor]:
    """Run one call of a ring's plan, on shards or DTensors, or on whole tensors for a virtual ring.

    Raises
    ------
    SpecError
        If a tensor or operand does not fit.
    RingError
        If another rank does something else, or does not answer.
    """
    spec = plan.spec
    locals_, placements = _checked(plan, (q, k, v), return_lse, operands)
    swapped = spec.layout == "bshd"
    if swapped:
        locals_ = [x.transpose(1, 2) for x in locals_]
    inner = {name: x for name, x in operands.items() if name != SINKS}
    out, lse = call(plan.engine, locals_[0], locals_[1], locals_[2], inner)
    if SINKS in operands:
        out, lse = with_sinks(out, lse, operands)
    out = out.transpose(1, 2) if swapped else out
    if placements is not None:
        out = _as_dtensor(plan, out, 1 if swapped else 2)
        lse = lse if lse is None else _as_dtensor(plan, lse, 2)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _checked(
    plan: RingCall, tensors: Sequence[Any], return_lse: bool, operands: Mapping[str, Any]
) -> tuple[list[Tensor], Any]:
    """Return this rank's shards and their placements; what does not fit is told to the other ranks, then raised."""
    try:
        locals_, placements = _locals(plan, tensors)
        _check(plan, locals_, return_lse, operands)
    except SpecError as error:
        if isinstance(plan.engine, RealEngine) and isinstance(tensors[0], Tensor):
            plan.engine.refuse(tensors[0], operands, error)  # so that the others need not wait
        raise
    return locals_, placements


def _apart(why: str) -> Any:
    return torch.compiler.disable(  # type: ignore[no-untyped-call]
        run_call,
        reason=f"this ring runs outside of compiled graphs: {why}; compile the blocks around it, without "
        "fullgraph=True, or choose another strategy=",
    )


broken_out = {name: _apart(why) for name, why in UNTRACED.items()}
"""What calls a ring outside of a graph, for each reason."""


def untraced(rule: str, transport: str, sizes: Sequence[int]) -> str:
    """Return the key in :data:`UNTRACED` of why calls of a ring are no part of a compiled graph, empty if they are.

    ``sizes`` are the rows of each process; a virtual ring has none.
    """
    if rule != "lse":
        return "mix"
    if sizes and transport in ("ulysses", "hybrid"):
        return "heads"
    return "ragged" if len(set(sizes)) > 1 else ""


def is_dtensor(x: Any) -> bool:
    """Return whether a tensor is spread over a mesh."""
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def answer(plan: RingCall, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> Result:
    """Run one call in a compiled program, forward only, on ``[B, H, S, D]`` whatever the layout."""
    swapped = plan.spec.layout == "bshd"
    tensors = [x.transpose(1, 2) if swapped else x for x in (q, k, v)]
    _checked(plan, tensors, False, operands)
    out, lse, _ = plan.engine.forward(q, k, v, operands, False)
    return out, lse


def gradients(
    plan: RingCall,
    flow: Sequence[Tensor | None],
    given: Sequence[Tensor],
    operands: Mapping[str, Any],
    names: Sequence[str],
) -> Gradients:
    """Return dq, dk, dv, and those of the named operands, from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``."""
    q, k, v, out, lse = given
    grad = torch.zeros_like(out) if flow[0] is None else flow[0]
    return plan.engine.backward((grad, flow[1]), plan.engine.kept(q, out, lse), k, v, operands, names)


def _locals(plan: RingCall, tensors: Sequence[Any]) -> tuple[list[Tensor], Any]:
    """Return this rank's shards, and the placements of DTensors; None for plain tensors."""
    for name, x in zip("qkv", tensors, strict=True):
        if not isinstance(x, Tensor):
            raise SpecError(f"{name} must be a tensor, got {type(x).__name__}")
    if plan.mesh is None:
        return list(tensors), None
    from torch.distributed.tensor import DTensor, Shard

    if not any(isinstance(x, DTensor) for x in tensors):
        return list(tensors), None
    rows = 2 if plan.spec.layout == "bhsd" else 1
    wanted = (Shard(rows),) * plan.mesh.ndim
    for name, x in zip("qkv", tensors, strict=True):
        if not isinstance(x, DTensor):
            raise SpecError(f"{name} is a plain tensor beside DTensors; make all three DTensors, or none")
        if x.device_mesh != plan.mesh:
            raise SpecError(f"{name} is on {x.device_mesh}, the plan is on {plan.mesh}")
        if tuple(x.placements) != wanted:
            raise SpecError(
                f"{name} is placed {x.placements}, the plan needs {wanted}: the sequence sharded, all else whole"
            )
    return [x.to_local() for x in tensors], wanted


def _as_dtensor(plan: RingCall, x: Tensor, rows: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    shape = list(x.shape)
    shape[rows] = plan.spec.shape.seq_len
    stride = torch.empty(shape, device="meta").stride()
    made: Tensor = DTensor.from_local(
        x, plan.mesh, (Shard(rows),) * plan.mesh.ndim, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made


def _check(plan: RingCall, tensors: Sequence[Tensor], return_lse: bool, operands: Mapping[str, Any]) -> None:
    spec, (queries, keys) = plan.spec, plan.lengths
    sizes = {
        "q": (spec.heads, queries, spec.head_dim),
        "k": (spec.kv_heads, keys, spec.head_dim),
        "v": (spec.kv_heads, keys, spec.value_dim),
    }
    order = (0, 1, 2) if spec.layout == "bhsd" else (1, 0, 2)
    for (name, size), x in zip(sizes.items(), tensors, strict=True):
        needed = [size[i] for i in order]
        if x.dim() != 4 or list(x.shape[1:]) != needed:
            what = "this rank's shard needs" if plan.mesh is not None else "the spec needs"
            shown = ", ".join(map(str, ["B", *needed]))
            raise SpecError(f"{name} has shape {list(x.shape)}, {what} [{shown}] (layout {spec.layout})")
        if str(x.dtype) != f"torch.{spec.dtype}":
            raise SpecError(f"{name} has dtype {x.dtype}, the spec has {spec.dtype}; convert it, or compile for it")
        if x.device.type != str(plan.target.torch_device).partition(":")[0]:
            raise SpecError(f"{name} is on {x.device}, the plan is for {plan.target.torch_device}")
        if x.device != tensors[0].device or x.shape[0] != tensors[0].shape[0]:
            raise SpecError(f"{name} is {list(x.shape)} on {x.device}, q is {list(tensors[0].shape)} on "
                            f"{tensors[0].device}")  # fmt: skip
    if operands:
        whole = (tensors[0].shape[0], spec.heads, spec.shape.seq_len, spec.shape.kv_len)
        check_operands(operands, whole, tensors[0].device)
    if return_lse and not spec.has_lse:
        raise SpecError(
            f"there is no one LSE under mix={spec.rule!r}: return_lse needs the rule 'lse' or 'lse-detached'"
        )
