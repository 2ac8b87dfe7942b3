"""Calls outside attnplan: what a user would write by hand with one kernel, to stand beside the plans.

``sdpa`` is torch's function with its own choice of kernel and, where no flag says the pattern, a dense mask; ``cudnn``
pins that kernel; ``flex`` is FlexAttention over a block mask of its own making; ``fa4`` is flash-attn 4 over what its
arguments can say. A pattern that a kernel cannot take has no such call: nothing is emulated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnplan.harness.entrants import Contestant
from attnplan.patterns.bands import Band, Full
from attnplan.patterns.base import conjuncts
from attnplan.patterns.counts import Table
from attnplan.runtime.compiling import PerShape
from attnplan.runtime.conditions import condition
from attnplan.runtime.masks import runtime_tables
from attnplan.spec import AttentionSpec

MASK_ELEMENTS = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Largest dense mask that ``sdpa`` gets."""
BLOCK_MASK_ELEMENTS = {"cuda": 1 << 29, "cpu": 1 << 26}
"""Largest dense mask from which ``flex`` makes its block mask."""
Run = Callable[..., Tensor]


def peers(spec: AttentionSpec, device: str, names: frozenset[str]) -> Iterator[tuple[str, Callable[[], Run | None]]]:
    """Iterate over (name, function that makes the call, None where the kernel cannot say the pattern)."""
    made: Mapping[str, Callable[[AttentionSpec, str], Run | None]] = {
        "sdpa": _sdpa,
        "cudnn": _cudnn,
        "flex": _flex,
        "fa4": _fa4,
    }
    for name, make in made.items():
        if name in names:
            yield name, lambda make=make: make(spec, device)  # type: ignore[misc]


def contestants_by_hand(
    spec: AttentionSpec, device: str, names: frozenset[str]
) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """Return a contestant for each call that can be made, and rows for those that failed to be."""
    found, rows = [], []
    for name, make in peers(spec, device, names):
        facts = {"kind": "peer", "candidate": f"by hand: {name}", "backend": name}
        try:
            run = make()
        except Exception as error:  # a peer that is missing or out of memory must not cost the others
            rows.append({**facts, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
            continue
        if run is not None:
            found.append(Contestant(f"by hand: {name}", run, facts))
    return found, rows


def band(spec: AttentionSpec) -> tuple[int | None, int | None] | None:
    """Return the window (keys before, keys after) of a spec that is one band, None if it is not."""
    if len(spec.branches) != 1 or spec.q_offset or spec.softcap is not None or spec.dropout:
        return None
    terms = [t for t in conjuncts(spec.branches[0]) if not isinstance(t, Full)]
    left: int | None = None
    right: int | None = None
    for term in terms:
        if not isinstance(term, Band):
            return None
        left = term.left if left is None or (term.left is not None and term.left < left) else left
        right = term.right if right is None or (term.right is not None and term.right < right) else right
    return left, right


def _swapped(spec: AttentionSpec, run: Run) -> Run:
    """Return a call that takes and returns the spec's layout, for a function of ``[B, H, S, D]``."""
    if spec.layout == "bhsd":
        return run

    def swapped(q: Tensor, k: Tensor, v: Tensor, **operands: Tensor) -> Tensor:
        return run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **operands).transpose(1, 2)

    return swapped


def _sdpa(spec: AttentionSpec, device: str) -> Run | None:
    if spec.softcap is not None or spec.dropout or spec.q_offset:
        return None
    window = band(spec)
    square = spec.shape.seq_len == spec.shape.kv_len
    rest: dict[str, Any] = {"scale": spec.softmax_scale, "enable_gqa": spec.heads != spec.kv_heads}
    if window == (None, None) or (window == (None, 0) and square):
        causal = window == (None, 0)
        return _swapped(spec, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, **rest))
    if window == (None, 0) and spec.shape.seq_len == 1:
        return _swapped(spec, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **rest))
    if spec.operands:
        return _swapped(spec, _sdpa_over_operands(spec, device, rest))
    mask = dense_mask(spec, device)
    if mask is None:
        return None
    return _swapped(spec, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **rest))


def _sdpa_over_operands(spec: AttentionSpec, device: str, rest: dict[str, Any]) -> Run:
    """Return a call whose mask is made in each call, as its boundaries arrive with it; kept for the same boundaries."""
    kept: dict[int, Tensor] = {}

    def run(q: Tensor, k: Tensor, v: Tensor, **operands: Tensor) -> Tensor:
        key = id(next(iter(operands.values())))
        if key not in kept:
            found = dense_mask(spec, device, operands)
            assert found is not None, "the mask is larger than a peer may make"
            kept[key] = found
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept[key], **rest)

    return run


def dense_mask(spec: AttentionSpec, device: str, operands: Mapping[str, Tensor] | None = None) -> Tensor | None:
    """Return what makes SDPA compute a spec: booleans, or for mixtures the log of how many branches see a pair.

    None if it would be too large, or if no mask can say it.
    """
    shape = spec.shape
    per_head = any(where.head_key(h) != where.head_key(0) for where in spec.branches for h in range(spec.heads))
    heads = spec.heads if per_head else 1
    if heads * shape.seq_len * shape.kv_len > MASK_ELEMENTS[torch.device(device).type] or (
        len(spec.branches) > 1 and spec.rule != "lse"
    ):
        return None
    runtime = {n: Table(x) for n, x in runtime_tables(operands, shape.kv_len).items()} if operands else {}
    rows = torch.arange(shape.seq_len, device=device)[:, None] + shape.shift
    keys = torch.arange(shape.kv_len, device=device)[None]
    mixed = len(spec.branches) > 1
    made = []
    for head in range(heads):
        count = torch.zeros(shape.seq_len, shape.kv_len, dtype=torch.int8 if mixed else torch.bool, device=device)
        for where in spec.branches:
            static = where.tables(shape).items()
            tables = {n: Table(torch.as_tensor(t, device=device)) for n, t in static} | runtime
            seen = where.pairs(tables, torch.full((1, 1), head, device=device), rows, keys)
            seen = seen.reshape(seen.shape[-2:])  # boundaries have a batch dimension, of size 1 here
            count = count + seen if mixed else count | seen
        made.append(count.to(getattr(torch, spec.dtype)).log_() if mixed else count)
    return torch.stack(made).unsqueeze(0)


def _cudnn(spec: AttentionSpec, device: str) -> Run | None:
    window = band(spec)
    square = spec.shape.seq_len == spec.shape.kv_len
    if not device.startswith("cuda") or spec.heads != spec.kv_heads or spec.dtype not in ("bfloat16", "float16"):
        return None
    if window is None or window not in ((None, None), (None, 0)) or not (square or window == (None, None)):
        return None
    causal, training, scale = window == (None, 0), spec.training, spec.softmax_scale
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return _swapped(spec, lambda q, k, v: operator(q, k, v, None, training, 0.0, causal, False, scale=scale)[0])


def _flex(spec: AttentionSpec, device: str) -> Run | None:
    mixed = len(spec.branches) > 1
    if spec.softcap is not None or spec.dropout or spec.q_offset or (mixed and spec.rule != "lse"):
        return None
    shape = spec.shape
    per_head = any(where.head_key(h) != where.head_key(0) for where in spec.branches for h in range(spec.heads))
    heads = spec.heads if per_head else None
    if (heads or 1) * shape.seq_len * shape.kv_len > BLOCK_MASK_ELEMENTS[torch.device(device).type]:
        return None
    return _swapped(spec, _FlexByHand(spec, heads, device))


class _FlexByHand:
    """FlexAttention with a block mask that torch makes, kept for the same boundaries where these arrive with a call."""

    def __init__(self, spec: AttentionSpec, heads: int | None, device: str) -> None:
        self.spec, self.heads, self.device = spec, heads, device
        self.batch = spec.batch if spec.operands else None
        self.compiled = PerShape(_flex_call, "flex by hand")
        self.kept: dict[tuple[int, ...], tuple[Any, Any]] = {}
        if not spec.operands:
            self.kept[()] = self._blocks({})

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **operands: Tensor) -> Tensor:
        key = tuple(map(id, operands.values()))
        if key not in self.kept:
            self.kept[key] = self._blocks(operands)
        grouped = self.spec.heads != self.spec.kv_heads
        found: Tensor = self.compiled((), q, k, v, *self.kept[key], self.spec.softmax_scale, grouped)
        return found

    def _blocks(self, operands: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """Return the block mask, and for mixtures the function that weighs a pair by the branches that see it."""
        from torch.nn.attention.flex_attention import create_block_mask

        shape, branches = self.spec.shape, self.spec.branches
        if len(branches) == 1 and isinstance(branches[0], Full):
            return None, None
        made = [condition(where, shape, shape.shift) for where in branches]
        given = [x.captures(operands, self.spec.batch, shape.kv_len, torch.device(self.device)) for x in made]

        def seen(b: Tensor, h: Tensor, q_row: Tensor, k_row: Tensor) -> list[Tensor]:
            return [x.module.forward(b, h, q_row, k_row, *rest) for x, rest in zip(made, given, strict=True)]

        def mask(b: Tensor, h: Tensor, q_row: Tensor, k_row: Tensor) -> Tensor:
            first, *others = seen(b, h, q_row, k_row)
            for other in others:
                first = first | other
            return first

        def weighed(score: Tensor, b: Tensor, h: Tensor, q_row: Tensor, k_row: Tensor) -> Tensor:
            first, *others = (x.float() for x in seen(b, h, q_row, k_row))
            return score + torch.log(sum(others, first))

        blocks = create_block_mask(mask, self.batch, self.heads, shape.seq_len, shape.kv_len, device=self.device)
        return blocks, weighed if len(branches) > 1 else None


def _flex_call(q: Tensor, k: Tensor, v: Tensor, blocks: Any, weighed: Any, scale: float, grouped: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, score_mod=weighed, block_mask=blocks, scale=scale, enable_gqa=grouped)


def _fa4(spec: AttentionSpec, device: str) -> Run | None:
    window = band(spec)
    if not device.startswith("cuda") or spec.dtype not in ("bfloat16", "float16") or spec.operands:
        return None
    if window is None or spec.head_dim not in (64, 128):
        return None
    function = import_module("flash_attn.cute.interface").flash_attn_func
    options: dict[str, Any] = {"softmax_scale": spec.softmax_scale, "causal": window == (None, 0)}
    if window not in ((None, None), (None, 0)):
        options["window_size"] = window
    swap = spec.layout == "bhsd"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.transpose(1, 2) for x in (q, k, v)] if swap else [q, k, v]
        found = function(*rows, **options)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2) if swap else out

    return run
