# mypy: ignore-errors
"""Mask functions in the language of flash-attn 4's kernels. Imported only where that package is.

One function serves every pattern: what it looks up arrives as tensors, so that one compiled kernel does, too.

References
----------
``call_mask_mod`` in ``flash_attn.cute.mask``, flash-attn-4 4.0.0b36, calls ``mask_mod(batch, head, query, key, lengths,
tensors)``.
"""

from functools import lru_cache

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


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
