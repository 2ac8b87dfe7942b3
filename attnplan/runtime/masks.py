"""Boolean masks from patterns, evaluated on the device over the rows of an attend."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.errors import SpecError
from attnplan.ir import Attend, RowMap, TensorType
from attnplan.ir.slots import Condition, slot_condition
from attnplan.passes.canonicalize import simplify
from attnplan.patterns import Pattern, Shape, full
from attnplan.patterns.counts import Table

_KEPT_MASKS = 4
_KEPT_CONDITIONS = 4096
ORIGIN = "origin of the piece"
"""Key under which the operands of a piece say (batch element, query head, row) from which its indices count."""


class MaskBuilder(torch.nn.Module):
    """Builds the mask of one attend: booleans that broadcast to ``[B, *axes, R, C]``, True where a pair meets.

    Parameters
    ----------
    where
        The condition, in terms of global heads and positions.
    q, k
        Row maps of the queries and keys. With ``follow=True`` they are whole tensors, and their lengths are those of
        the tensors that each call brings.
    shift
        Position of query row 0, or None if it arrives with the call.
    shape
        Heads of q, the batch size and lengths for which static tables are built.
    partial
        Whether the tensors hold some rows of the sequence only, so that its lengths are those of ``shape``.
    """

    def __init__(
        self,
        where: Pattern,
        q: RowMap,
        k: RowMap,
        shift: int | None,
        shape: Shape,
        *,
        follow: bool = False,
        partial: bool = False,
    ) -> None:
        super().__init__()
        self.where, self.q, self.k, self.shift, self.shape, self.follow = where, q, k, shift, shape, follow
        self.partial = partial
        self._constant = not where.operands and shift is not None
        self._kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._static: OrderedDict[tuple[object, ...], dict[str, Table]] = OrderedDict()

    def forward(self, operands: Mapping[str, Tensor], q: Tensor, k: Tensor) -> Tensor:
        """Return the mask for the call's whole q and k, ``[B, H, S, D]`` and ``[B, H_kv, C, D]``."""
        lengths = (q.shape[2], k.shape[2]) if self.follow else (self.q.length, self.k.length)
        key = (q.device, *lengths)
        kept = self._kept.get(key)  # one look: another thread may drop it
        if kept is not None:
            return kept
        offset = operands.get("q_offset")
        if isinstance(offset, Tensor) and offset.numel() > 1:  # a position of its own for each batch element
            each = [_element(operands, b) for b in range(q.shape[0])]
            return torch.cat([self._build(one, lengths, q[:1], k[:1]) for one in each])
        mask = self._build(operands, lengths, q, k)
        if self._constant:
            self._kept[key] = mask
            if len(self._kept) > _KEPT_MASKS:
                self._kept.popitem(last=False)
        return mask

    def _build(self, operands: Mapping[str, Tensor], lengths: tuple[int, int], q: Tensor, k: Tensor) -> Tensor:
        device = q.device
        heads, query = element_indices(self.q, lengths[0], device, query=True)
        _, key = element_indices(self.k, lengths[1], device, query=False)
        shape = self.shape
        if not self.partial:
            shape = Shape(q.shape[2], k.shape[2], shape.heads, shape.batch)
        shift: Any = shape.shift if self.follow else self.shift
        if self.shift is None:
            offset = operands["q_offset"]
            shift = offset.reshape(()) if isinstance(offset, Tensor) else offset
        tables = {name: Table(t) for name, t in runtime_tables(operands, shape.kv_len).items()}
        tables = self._static_tables(shape, device) | tables
        mask: Tensor = self.where.pairs(tables, heads, query + shift, key)
        while mask.dim() > query.dim():  # a table puts its batch in front of the axes, whose own batch has size 1
            mask = mask.squeeze(1)
        return mask

    def _static_tables(self, shape: Shape, device: torch.device) -> dict[str, Table]:
        """Return what the pattern looks up, made once: a copy from the host fails where a CUDA graph is captured."""
        key = (device, shape)
        kept = self._static.get(key)
        if kept is None:
            made = {name: Table(torch.as_tensor(t, device=device)) for name, t in self.where.tables(shape).items()}
            if self._constant:  # the mask itself is kept
                return made
            kept = self._static[key] = made
            if len(self._static) > _KEPT_MASKS:
                self._static.popitem(last=False)
        return kept


class FollowingCondition(torch.nn.Module):
    """Decides at each call, from the lengths it brings, what the condition of an attend over whole rows means."""

    def __init__(self, op: Attend, q: RowMap, k: RowMap, shape: Shape) -> None:
        super().__init__()
        self.op, self.shape = op, shape
        self.masks = MaskBuilder(op.where, q, k, op.shift, shape, follow=True)
        self._known: OrderedDict[tuple[int, int], Condition] = OrderedDict()

    def forward(self, operands: Mapping[str, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor | None, bool]:
        """Return (mask or None, whether row i sees key j only for j <= i)."""
        lengths = (q.shape[2], k.shape[2])
        condition = self._known.get(lengths)
        if condition is None:
            condition = self._known[lengths] = self._decide(*lengths)
            if len(self._known) > _KEPT_CONDITIONS:
                self._known.popitem(last=False)
        if condition == "mask":
            return self.masks(operands, q, k), False
        return None, condition == "causal"

    def _decide(self, seq_len: int, kv_len: int) -> Condition:
        if self.op.shift is None:
            return "mask" if self.op.where != full() else "full"
        q, k = (
            TensorType(name, RowMap.whole(self.shape.heads, n), 1, "float32")
            for name, n in (("q", seq_len), ("k", kv_len))
        )
        here = attrs.evolve(self.op, shift=kv_len - seq_len)
        return slot_condition(attrs.evolve(here, where=simplify(here, q, k)), q.rows, k.rows)


def _element(operands: Mapping[str, Tensor], b: int) -> dict[str, Tensor]:
    """Return the operands of one batch element."""
    batched = {"q_offset": 1, "key_padding": 2, "documents": 2}
    return {
        name: value[b : b + 1] if name in batched and value.dim() == batched[name] and value.shape[0] > 1 else value
        for name, value in operands.items()
    }


def element_indices(rows: RowMap, length: int, device: torch.device, *, query: bool) -> tuple[Tensor, Tensor]:
    """Return head and row of each element, shaped to broadcast as ``[1, *axes, R, C]`` with the other side."""
    rank = len(rows.axes) + 2
    head = torch.full((1,) * rank, rows.head, device=device)
    row = torch.full((1,) * rank, rows.row, device=device)
    for place, axis in enumerate(rows.batch, start=1):
        steps = torch.arange(axis.size, device=device).reshape([-1 if i == place else 1 for i in range(rank)])
        head = head + steps * axis.head if axis.head else head
        row = row + steps * axis.row if axis.row else row
    steps = torch.arange(length, device=device) * rows.axes[-1].row
    return head, row + steps.reshape([-1 if i == rank - (2 if query else 1) else 1 for i in range(rank)])


def runtime_tables(operands: Mapping[str, Tensor], kv_len: int) -> dict[str, Tensor]:
    """Return the tables ``[B or 1, kv_len]`` that runtime operands stand for."""
    tables = {}
    if "documents" in operands:
        tables["documents"] = document_ids(operands["documents"], kv_len)
    if "key_padding" in operands:
        tables["key_padding"] = operands["key_padding"].to(torch.int32)
    return tables


def document_ids(boundaries: Tensor, length: int) -> Tensor:
    """Return the document of each position ``[B or 1, length]`` from cumulative lengths ``[n + 1]`` or ``[B, n + 1]``.

    Examples
    --------
    >>> document_ids(torch.tensor([0, 2, 5]), 5)
    tensor([[0, 0, 1, 1, 1]], dtype=torch.int32)
    """
    ends = boundaries.reshape(-1, boundaries.shape[-1])[:, 1:].contiguous()
    positions = torch.arange(length, device=boundaries.device, dtype=ends.dtype).expand(ends.shape[0], -1)
    return torch.searchsorted(ends, positions.contiguous(), right=True, out_int32=True)


def check_operands(operands: Mapping[str, Any], sizes: tuple[int, int, int, int], device: torch.device) -> None:
    """Raise :class:`~attnplan.errors.SpecError` where a runtime operand does not fit a call of (B, H, S, K).

    What can be checked from shapes is always checked; values are read only on the CPU, where reading them does not
    make the device wait.
    """
    batch, heads, seq_len, kv_len = sizes
    for name, value in operands.items():
        if isinstance(value, Tensor) and value.device != device and value.dim() > 0:
            raise SpecError(f"{name} is on {value.device}, q is on {device}; move it there once, outside the loop")
    if "key_padding" in operands:
        _check_padding(operands["key_padding"], batch, kv_len)
    if "documents" in operands:
        _check_documents(operands["documents"], batch, kv_len)
    if "q_offset" in operands:
        _check_offset(operands["q_offset"], batch, kv_len - seq_len)
    if "dropout_seed" in operands:
        _check_seed(operands["dropout_seed"])
    for name, shapes in {
        "bias": ((heads, seq_len, kv_len), (batch, heads, seq_len, kv_len)),
        "alibi_slopes": ((heads,), (batch, heads)),
        "sink_logits": ((heads,),),
    }.items():
        if name in operands:
            _check_learned(name, operands[name], shapes)


def _check_learned(name: str, value: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Check a tensor that has gradients; a bias may have sizes of 1."""
    if isinstance(value, Tensor) and value.is_floating_point():
        for shape in shapes:
            once = 1 if name == "bias" else None
            if len(shape) == value.dim() and all(n in (m, once) for n, m in zip(value.shape, shape, strict=True)):
                return
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    broadcast = ", with sizes of 1 where it broadcasts" if name == "bias" else ""
    raise SpecError(f"{name} must be a floating-point tensor {wanted}{broadcast}; got {got}")


def _check_padding(mask: Any, batch: int, kv_len: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape not in ((batch, kv_len), (1, kv_len)):
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise SpecError(
            f"key_padding must be a bool tensor [B, kv_len] = [{batch}, {kv_len}], True for real keys; got {got}"
        )


def _check_documents(boundaries: Any, batch: int, kv_len: int) -> None:
    integer = isinstance(boundaries, Tensor) and boundaries.dtype in (torch.int32, torch.int64)
    if not integer or boundaries.dim() not in (1, 2) or boundaries.shape[-1] < 2:
        got = f"{boundaries.dtype} {list(boundaries.shape)}" if isinstance(boundaries, Tensor) else repr(boundaries)
        raise SpecError(f"documents must be an int tensor of cumulative lengths [n + 1] or [B, n + 1]; got {got}")
    if boundaries.dim() == 2 and boundaries.shape[0] not in (1, batch):
        raise SpecError(f"documents has {boundaries.shape[0]} rows for a batch of {batch}")
    if boundaries.device.type == "cpu" and not (
        bool((boundaries[..., 0] == 0).all())
        and bool((boundaries[..., -1] == kv_len).all())
        and bool((boundaries.diff(dim=-1) >= 0).all())
    ):
        raise SpecError(
            f"documents must rise from 0 to the {kv_len} keys without overlap; got {boundaries.tolist()}; add padding "
            "as a document of its own"
        )


def _check_offset(offset: Any, batch: int, last: int) -> None:
    if isinstance(offset, bool) or not isinstance(offset, int | Tensor):
        raise SpecError(f"q_offset must be an int or an int tensor [] or [B], got {offset!r}")
    if isinstance(offset, Tensor):
        if offset.dtype not in (torch.int32, torch.int64) or offset.shape not in ((), (1,), (batch,)):
            raise SpecError(f"q_offset must be an int tensor [] or [B]; got {offset.dtype} {list(offset.shape)}")
        if offset.device.type != "cpu" or not offset.numel():
            return
        low, high = int(offset.min()), int(offset.max())
    else:
        low = high = offset
    if low < 0 or high > max(last, 0):
        raise SpecError(
            f"q_offset must be from 0 to {max(last, 0)}, so that every query is beside a key; got {low}..{high}"
        )


def _check_seed(seed: Any) -> None:
    integer = isinstance(seed, int) and not isinstance(seed, bool)
    if not integer and not (isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.dim() == 0):
        got = f"{seed.dtype} {list(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise SpecError(f"dropout_seed must be an int or an int64 tensor []; got {got}")
