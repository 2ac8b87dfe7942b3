# mypy: ignore-errors
"""Mask functions in the language of flash-attn 4's kernels. Imported only where that package is.

Few functions serve every pattern: what they look up arrives as tensors, so that few compiled kernels do, too. The
kernel goes through the keys of one row after the other, so what a function reads for a row is read once.

References
----------
``call_mask_mod`` in ``flash_attn.cute.mask``, flash-attn-4 4.0.0b36, calls ``mask_mod(batch, head, query, key, lengths,
tensors)``.
"""

from functools import lru_cache

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@lru_cache(maxsize=1)
def between():
    """Return the mask function of rows that see two ranges of keys at most, for heads that share their tiles.

    It compares with bounds ``[rows, 4]``: where a range begins, and what lies behind it, twice.
    """

    @cute.jit
    def meets(batch, head, query, key, lengths, tensors):
        bounds, row = tensors[0], query[0]
        column = utils.scalar_to_ssa(key[0], cutlass.Int32)
        first = utils.scalar_to_ssa(bounds[row, 0], cutlass.Int32)
        behind = utils.scalar_to_ssa(bounds[row, 1], cutlass.Int32)
        second = utils.scalar_to_ssa(bounds[row, 2], cutlass.Int32)
        end = utils.scalar_to_ssa(bounds[row, 3], cutlass.Int32)
        return ((column >= first) & (column < behind)) | ((column >= second) & (column < end))

    return meets


@lru_cache(maxsize=8)
def in_tile(tall, wide):
    """Return the mask function of tiles of ``tall`` queries x ``wide`` keys, for heads that share their tiles.

    It looks up places of masks ``[rows, columns]``, and masks ``[n, tall, wide]``.
    """

    @cute.jit
    def meets(batch, head, query, key, lengths, tensors):
        row, column = query[0], key[0]
        place = tensors[0][row // tall, column // wide]
        found = utils.scalar_to_ssa(tensors[1][place, row % tall, column % wide], cutlass.Int32)
        return found == utils.scalar_to_ssa(1, cutlass.Int32)

    return meets


@lru_cache(maxsize=8)
def in_tile_of_head(tall, wide):
    """Return the same for heads that have tiles of their own: places are ``[H, rows, columns]``."""

    @cute.jit
    def meets(batch, head, query, key, lengths, tensors):
        row, column = query[0], key[0]
        place = tensors[0][head[0], row // tall, column // wide]
        found = utils.scalar_to_ssa(tensors[1][place, row % tall, column % wide], cutlass.Int32)
        return found == utils.scalar_to_ssa(1, cutlass.Int32)

    return meets
