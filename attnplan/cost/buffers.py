"""Sizes of what kernels and masks allocate, for the memory model."""

from __future__ import annotations

import os
from functools import lru_cache
from math import prod

from attnplan.cost.along import mask_axes
from attnplan.ir import Attend, RowMap
from attnplan.ir.launch import fold, strides_in_rows
from attnplan.patterns import Pattern
from attnplan.patterns.blocks import Blocks, RandomBlocks
from attnplan.patterns.custom import Mask
from attnplan.spec import AttentionSpec


@lru_cache(maxsize=256)
def mask_elements(op: Attend, q: RowMap, k: RowMap, batch: int, spec: AttentionSpec) -> int:
    """Return the elements of a mask over some rows: only axes along which the condition changes have more than one."""
    heads, queries, keys = mask_axes(op.where, spec.shape)
    per_row = any(a.row for a in q.batch)
    batch = batch if op.where.operands & {"documents", "key_padding"} or op.shift is None else 1
    repeats = prod(a.size for a in q.batch if (per_row and a.row) or (heads and a.head))
    return batch * repeats * (q.length if queries else 1) * (k.length if keys else 1)


def mask_spread(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> int:
    """Return the elements of a mask that is copied in full, 0 if it is not.

    A kernel has two batch dimensions. Where axes fold into one of which a mask broadcasts along some only, such as the
    batch and the heads of one branch, no strides express it.
    """
    if len(q.batch) == 1:
        return 0
    heads, _, _ = mask_axes(op.where, spec.shape)
    arrives = op.where.operands & {"documents", "key_padding"} or op.shift is None
    sizes = (spec.batch, *(a.size for a in q.batch))
    varies = (bool(arrives), *(bool(a.row or (a.head and heads)) for a in q.batch))
    strides = [
        strides_in_rows(m, RowMap.whole(spec.heads if m is q else spec.kv_heads, n), spec.layout)
        for m, n in ((q, spec.shape.seq_len), (k, spec.shape.kv_len))
    ]
    second = fold(sizes, strides).groups[1]
    rest = tuple(a for a in range(len(sizes)) if a not in second)
    mixed = any(len({varies[a] for a in group if sizes[a] > 1}) > 1 for group in (rest, second))
    return spec.batch * prod(q.sizes) * k.length if mixed else 0


def looked_up(where: Pattern) -> bool:
    """Return whether a condition reads a table of pairs, for which two indices of 8 bytes a pair are made."""
    return any(isinstance(part, Blocks | RandomBlocks | Mask) for part in where.walk())


def flash_cpu(rows: int, keys: int, features: int, item: int, acc: int) -> int:
    """Return the buffers of SDPA's flash operator for CPU: scores of one tile, and of its output, for each thread."""
    tall = min(rows, 256 if rows >= 768 else 64 if rows >= 192 else 32)
    wide = min(keys, 512)
    each = (tall * wide + 2 * tall + tall * features) * acc + (tall * wide * item if item < acc else 0)
    return _threads() * (each + 4096)


@lru_cache(maxsize=1)
def _threads() -> int:
    """Return how many threads a kernel of the CPU may use, each with buffers of its own."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(given), here) if given.isdigit() and int(given) else here


def bias_bytes(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec, *, whole: bool, plain: bool) -> int:
    """Return the bytes of what is added to the scores of an attend; in training, of its gradient too.

    ``whole`` says that the attend runs on all rows that the graph is given, so that a bias is no copy; ``plain``, that
    it is plain torch. The gradient of a whole bias, which others are added to, is :func:`bias_total`.
    """
    if not op.biases:
        return 0
    acc, alone = 8 if spec.dtype == "float64" else 4, op.biases == ("bias",)
    pairs = prod(q.sizes) * -(-k.length // 16) * 16 * spec.batch * acc  # rows of scores are padded
    apart = 0 if alone else prod(a.size for a in q.batch if a.row) * q.length * k.length  # distances, of 8 bytes each
    # Of a bias that broadcasts the gradient is small: that of the scores is then a buffer beside the result.
    made = (1 if alone and whole else 2) + 3 * spec.training
    if not whole:  # rows of a bias, products of slopes and their sum
        made = max(made, 1 + len(op.biases))
    sinks = spec.batch * spec.heads * spec.shape.seq_len * spec.value_dim * acc if spec.sink_logits else 0
    indices = 0
    if op.at is not None and spec.training and not whole and "bias" in op.biases:
        indices = 26 * pairs // acc  # in a piece nothing else hides those of a gradient
    if plain:
        distances = 8 * apart if spec.training else max(0, 24 * apart - 3 * pairs)
        return (0 if alone and whole else pairs) + distances + indices
    small = pairs // 16 + 2**12  # positions
    return max(made * pairs + 6 * apart, 24 * apart) + small + sinks + indices


def bias_total(op: Attend, spec: AttentionSpec, inputs: tuple[int, int], attends: int, *, whole: bool) -> int:
    """Return the bytes of a whole bias's gradient from one attend, to which that of another is added; else 0.

    ``inputs`` are the elements of q (rows of all heads) and the rows of k that the graph is given. The only gradient is
    the result, which counts nowhere.
    """
    if not spec.training or whole or attends == 1 or "bias" not in op.biases:
        return 0
    return prod(inputs) * (8 if spec.dtype == "float64" else 4)
