"""What a LongNet user would write, and the rows of it in float64: the peers and the oracle of ``bench.longnet``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.runtime.attend import attend, attend_backward

Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@attrs.frozen
class Case:
    """A dilated attention: every head in every branch (``longnet``), or each group of heads in one (``grouped``)."""

    name: str
    kind: str
    tokens: int
    heads: int
    head_dim: int
    segments: tuple[int, ...]
    rates: tuple[int, ...]
    causal: bool = False

    @property
    def branches(self) -> list[tuple[int, int, list[int], list[int]]]:
        """Return (segment length, rate, heads, offset of each head) of each branch."""
        found = []
        first = 0
        for i, (length, rate) in enumerate(zip(self.segments, self.rates, strict=True)):
            if self.kind == "longnet":
                heads = list(range(self.heads))
                offsets = [h % rate for h in heads]
            else:
                count = self.heads // len(self.rates) + (i < self.heads % len(self.rates))
                heads = list(range(first, first + count))
                offsets = [i % rate] * count
                first += count
            found.append((length, rate, heads, offsets))
        return found


def eager_longnet(case: Case, device: torch.device) -> Callable[..., Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return a maker of the natural code: gather by index, attention per branch, scatter into zeros, merge by LSE.

    The indices are made once. Tensors are ``[B, S, H, D]``.
    """
    plans = []
    for length, rate, heads, offsets in case.branches:
        rows = torch.arange(0, case.tokens, rate, device=device).reshape(-1, length // rate)
        index = rows.unsqueeze(0) + torch.tensor(offsets, device=device).reshape(-1, 1, 1)
        plans.append((index, torch.tensor(heads, device=device).reshape(-1, 1, 1)))

    def with_kernel(kernel: Kernel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            batch, tokens, heads, features = q.shape
            outs, lses = [], []
            for index, head in plans:
                taken = [x[:, index, head].flatten(0, 1) for x in (q, k, v)]  # [B * heads, segments, rows, D]
                out, lse = kernel(*taken)
                out = out.unflatten(0, (batch, -1))
                lse = lse.unflatten(0, (batch, -1))
                full = out.new_zeros(batch, tokens, heads, features)
                full[:, index, head] = out
                full_lse = torch.full((batch, tokens, heads), -torch.inf, dtype=lse.dtype, device=lse.device)
                full_lse[:, index, head] = lse
                outs.append(full)
                lses.append(full_lse)
            weights = torch.softmax(torch.stack(lses), 0).nan_to_num(0)  # rows that no branch holds
            mixed = sum(w.unsqueeze(-1) * o for w, o in zip(weights, outs, strict=True))
            assert isinstance(mixed, Tensor)
            return mixed.to(q.dtype)

        return run

    return with_kernel


def rows_in_float64(case: Case, q: Tensor, k: Tensor, v: Tensor, sample: Sequence[tuple[int, int]]) -> Tensor:
    """Return the output rows ``[len(sample), D]`` of (head, row) pairs, one softmax over all keys."""
    found = []
    for head, row in sample:
        keys = []
        for length, rate, heads, offsets in case.branches:
            if head not in heads:
                continue
            offset = offsets[heads.index(head)]
            start = row // length * length
            if (row - start) % rate == offset % rate:
                stop = row + 1 if case.causal else min(start + length, case.tokens)
                keys.append(torch.arange(start + offset % rate, stop, rate, device=q.device))
        if not keys:
            found.append(torch.zeros(v.shape[-1], dtype=torch.float64, device=q.device))
            continue
        index = torch.cat(keys)
        scores = k[0, index, head].double() @ q[0, row, head].double() * q.shape[-1] ** -0.5
        found.append(torch.softmax(scores, 0) @ v[0, index, head].double())
    return torch.stack(found)


def published(case: Case) -> Any:
    """Return the published class on xformers for grouped heads; raise ImportError where it is not importable."""
    with _hidden("flash_attn"):  # flash-attn 4 alone looks like version 2 to xformers, which then fails to load
        import xformers.ops  # noqa: F401
    from dilated_attention_pytorch.dilated_attention import DilatedAttention

    made = DilatedAttention(list(case.segments), list(case.rates))
    return lambda q, k, v: made(q, k, v, is_causal=case.causal)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Make importing a package fail, and bring it back as it was."""
    kept = {name: m for name, m in sys.modules.items() if name == package or name.startswith(f"{package}.")}
    for name in kept:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]  # what Python takes for a module that there is not
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(kept)


def flex_longnet(case: Case, rows: Sequence[Tensor], *, compiled: bool, block: int = 128) -> Callable[[], Any]:
    """Return FlexAttention over ``[B, H, S, D]`` with a mask of the pairs of all branches: one softmax, each key once.

    Its block tables are written down instead of searched for: every block in a segment of the longest branch holds a
    pair of it, and those in a segment of a first branch of rate 1 are full. They are as ``create_block_mask`` makes
    them: int32, contiguous, and as wide as there are blocks. Lengths and rates are powers of two, so that the mask
    needs no division, which FlexAttention would do for each pair of a block.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if any(n & (n - 1) for n in (*case.segments, *case.rates)):
        raise ValueError(f"lengths and rates must be powers of two; got {case.segments} and {case.rates}")
    first, longest = case.segments[0], max(case.segments)
    blocks, device = case.tokens // block, rows[0].device
    at = torch.arange(blocks, dtype=torch.int32, device=device)

    def tables(length: int, without: int) -> tuple[Tensor, Tensor]:
        """Return the blocks in the same segment of a length, without those of the same segment of a shorter one."""
        near = at[None] * block // length == at[:, None] * block // length
        if without:
            near &= at[None] * block // without != at[:, None] * block // without
        index = near.int().argsort(dim=1, descending=True, stable=True).int()
        return near.sum(1, dtype=torch.int32)[None, None].contiguous(), index[None, None].contiguous()

    whole = first if case.rates[0] == 1 and first % block == 0 else 0
    full = tables(first, 0) if whole else (None, None)

    def meets(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = q < 0
        for length, rate in zip(case.segments, case.rates, strict=True):
            taken = (((q - head) | (k - head)) & (rate - 1)) == 0
            found = found | (((q ^ k) < length) & taken)
        return found

    mask = BlockMask.from_kv_blocks(
        *tables(longest, whole), *full, BLOCK_SIZE=block, mask_mod=meets, seq_lengths=(case.tokens, case.tokens),
        compute_q_blocks=False,
    )  # fmt: skip
    function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda: function(*rows, block_mask=mask)


def gathered(case: Case, device: torch.device, dtype: str, *, batched: bool) -> list[list[Tensor]]:
    """Return (q, k, v, grad) ``[cells, 1, R, D]`` of each kernel call."""
    sizes: dict[int, int] = {}
    calls = []
    for length, rate, heads, _ in case.branches:
        cells, rows = case.tokens // length * len(heads), length // rate
        calls.append((rows, cells))
        sizes[rows] = sizes.get(rows, 0) + cells
    shapes = list(sizes.items()) if batched else calls
    return [
        [torch.randn(cells, 1, rows, case.head_dim, device=device, dtype=getattr(torch, dtype)) for _ in range(4)]
        for rows, cells in shapes
    ]


def kernels_alone(
    case: Case, runs: str, device: torch.device, dtype: str, *, batched: bool, backward: bool
) -> Callable[[], Any]:
    """Return attention alone, on rows that lie gathered."""
    calls, scale = gathered(case, device, dtype, batched=batched), case.head_dim**-0.5

    def forward() -> Any:
        return [attend(q, k, v, None, runs, case.causal, scale) for q, k, v, _ in calls]

    def both() -> Any:
        made = []
        for q, k, v, grad in calls:
            out, lse = attend(q, k, v, None, runs, case.causal, scale)
            made.append(attend_backward(grad, None, q, k, v, out, lse, None, runs, case.causal, scale))
        return made

    return both if backward else forward
