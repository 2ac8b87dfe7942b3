"""Checks of a call's tensors and operands against the spec of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnplan.cost import Target
from attnplan.errors import NoBackendError, SpecError, did_you_mean
from attnplan.spec import OPERANDS, AttentionSpec, Dim

_DECLARED_BY = {
    "documents": "P.documents()",
    "key_padding": "P.padding()",
    "q_offset": "q_offset=True",
    "dropout_seed": "dropout above 0",
    "bias": "bias=True",
    "alibi_slopes": "alibi_slopes=True",
    "sink_logits": "sink_logits=True",
}


def check_call(
    spec: AttentionSpec, target: Target, q: Any, k: Any, v: Any, return_lse: bool, operands: Mapping[str, Any]
) -> None:
    """Raise where a call does not fit ``spec``.

    Raises
    ------
    NoBackendError
        If the plan is for hardware that is not here.
    SpecError
        If a tensor or operand has the wrong shape, dtype or device, is missing, or is not of this spec.
    """
    require_here(target)
    _check_tensors(spec, target, {"q": q, "k": k, "v": v})
    check_operand_names(operands, spec.operands)
    missing = sorted(spec.operands - set(operands))
    if missing:
        raise SpecError(f"the spec needs {', '.join(missing)} with each call: plan(q, k, v, {missing[0]}=...)")
    if operands:
        from attnplan.runtime.masks import check_operands

        rows = 2 if spec.layout == "bhsd" else 1
        check_operands(operands, (q.shape[0], spec.heads, q.shape[rows], k.shape[rows]), q.device)
    if return_lse and not spec.has_lse:
        raise SpecError(
            f"there is no one LSE under mix={spec.rule!r}: return_lse needs the rule 'lse' or 'lse-detached'"
        )


def require_here(target: Target) -> None:
    """Raise :class:`~attnplan.errors.NoBackendError` for hardware that is not here."""
    if target.torch_device is None:
        raise NoBackendError(
            f"this plan is for {target.device.title}, which is not here: inspect it, or compile with device='auto'"
        )


def check_operand_names(operands: Mapping[str, Any], allowed: frozenset[str]) -> None:
    """Raise :class:`~attnplan.errors.SpecError` for an operand that the spec does not have."""
    for name in operands:
        if name in allowed:
            continue
        if name not in OPERANDS:
            raise SpecError(f"unknown operand {name!r}{did_you_mean(name, OPERANDS)}")
        raise SpecError(f"this plan takes no {name}: its spec would need {_DECLARED_BY[name]}")


def _check_tensors(spec: AttentionSpec, target: Target, tensors: Mapping[str, Any]) -> None:
    import torch

    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise SpecError(f"{name} must be a tensor, got {type(tensor).__name__}")
        _check_shape(spec, name, tuple(tensor.shape))
        if str(tensor.dtype) != f"torch.{spec.dtype}":
            raise SpecError(
                f"{name} has dtype {tensor.dtype}, the spec has {spec.dtype}; convert it, or compile for it"
            )
        if tensor.device.type != str(target.torch_device).partition(":")[0]:
            raise SpecError(f"{name} is on {tensor.device}, the plan is for {target.torch_device}")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if not shapes["q"][0] == shapes["k"][0] == shapes["v"][0]:
        sizes = ", ".join(f"{name} {shape[0]}" for name, shape in shapes.items())
        raise SpecError(f"batch sizes differ: {sizes}")
    rows = 2 if spec.layout == "bhsd" else 1
    if shapes["k"][rows] != shapes["v"][rows]:
        raise SpecError(f"k has {shapes['k'][rows]} rows, v has {shapes['v'][rows]}")
    if not spec.is_static:
        spec.at(shapes["q"][rows], shapes["k"][rows])


def _check_shape(spec: AttentionSpec, name: str, shape: tuple[int, ...]) -> None:
    heads = spec.heads if name == "q" else spec.kv_heads
    length = spec.seq_len if name == "q" else spec.kv_len
    features = spec.value_dim if name == "v" else spec.head_dim
    order: tuple[int | Dim, ...] = (heads, length, features) if spec.layout == "bhsd" else (length, heads, features)
    if len(shape) == 4 and all(isinstance(n, Dim) or n == m for n, m in zip(order, shape[1:], strict=True)):
        return
    needed = ", ".join(["B", *(f"{n.name} <= {n.max}" if isinstance(n, Dim) else str(n) for n in order)])
    hint = ""
    if len(shape) == 4 and sorted(shape[1:3]) == sorted(n for n in order[:2] if not isinstance(n, Dim)):
        other = "bshd" if spec.layout == "bhsd" else "bhsd"
        hint = f"; heads and rows look swapped: transpose(1, 2), or use layout={other!r}"
    raise SpecError(f"{name} has shape {list(shape)}, the spec needs [{needed}] (layout {spec.layout}){hint}")
