"""Bytes by what they are for, and as a device's allocator counts them."""

from __future__ import annotations

import attrs

BLOCK = {"cpu": 64, "cuda": 512}
"""Bytes to whose multiples an allocator rounds a buffer.

On CUDA the blocks are cut from segments of 2 MiB, or of 20 MiB for buffers above 1 MiB. *Allocated* memory counts the
blocks, and is what a peak means here; *reserved* memory counts the segments.
"""
_MIB = 2**20
_OWN_SEGMENT = 10 * _MIB
"""A buffer of so many bytes has a segment of its own, of a multiple of 2 MiB."""
SMALL = 16 * 2**10
"""Bytes of indices, counts and other small buffers; with 1/64 of the workspace for what each op keeps beside it."""


@attrs.frozen
class Memory:
    """Peak memory beside inputs and output, in bytes, by what it is for.

    Examples
    --------
    >>> Memory(workspace=100, gathered=20, saved=3).total
    123
    """

    workspace: int = 0
    """Partial outputs, accumulators, masks, scores and what kernels allocate."""
    gathered: int = 0
    """Copies of rows of q, k and v."""
    saved: int = 0
    """What the backward is given beside q, k, v and the output: the LSE, outputs of branches, scores of plain torch."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.workspace + self.gathered + self.saved

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.workspace + other.workspace, self.gathered + other.gathered, self.saved + other.saved)

    def beside(self, later: int) -> Memory:
        """Return the memory beside the bytes of results, made or not yet made at this moment.

        Examples
        --------
        The output and the gradients count nowhere: what is live before they are made has their room.

        >>> Memory(workspace=100, gathered=20).beside(110)
        Memory(workspace=0, gathered=10, saved=0)
        """
        parts = []
        for size in (self.workspace, self.gathered, self.saved):
            parts.append(max(0, size - later))
            later = max(0, later - size)
        return Memory(*parts)


def larger(*found: Memory) -> Memory:
    """Return the largest of some peaks."""
    return max(found, key=lambda m: m.total)


def rounded(size: int, kind: str) -> int:
    """Return the bytes that an allocator counts for a buffer.

    On CUDA a block keeps up to 1 MiB that is left of its segment.

    Examples
    --------
    >>> rounded(1, "cpu"), rounded(1, "cuda"), rounded(15 * 2**20, "cuda") // 2**20
    (64, 512, 16)
    """
    found = -(-size // BLOCK[kind]) * BLOCK[kind]
    if kind == "cuda" and size > _OWN_SEGMENT:
        left = -size % (2 * _MIB)
        found = size + left if left <= _MIB else found
    return found


def with_small(found: Memory, kind: str) -> Memory:
    """Return a peak with small buffers, and on CUDA with the rest of segments that buffers of several MiB are cut from.

    The block of such a buffer is the smallest free one that holds it; up to 1 MiB that is left over belongs to it. Four
    of a plan's buffers are taken to have so much.
    """
    over = min(4 * _MIB, max(0, found.total - _MIB) // 6) if kind == "cuda" else 0
    return found + Memory(workspace=SMALL + found.workspace // 64 + over)
