"""Neighbourhoods on a line, a grid or a volume whose cells are laid out row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, TypeVar

import attrs

from attnplan.errors import SpecError
from attnplan.patterns.base import Array, Pattern, Shape, require, require_int

if TYPE_CHECKING:
    import numpy as np

DIMENSIONS = 3
_LENGTH = "neighborhood:length"

T = TypeVar("T", int, bool)


def neighbors(x: Array, size: Array, kernel: int, dilation: int, causal: bool) -> tuple[Array, Array]:
    """Return the first and the last neighbour of coordinate ``x`` along one dimension of ``size`` cells.

    The neighbours are the cells from the first to the last in steps of ``dilation``. Written with operators only, so
    that ``x`` and ``size`` may be arrays of any library.

    Examples
    --------
    >>> [neighbors(x, 6, 3, 1, False) for x in range(6)]
    [(0, 2), (0, 2), (1, 3), (2, 4), (3, 5), (3, 5)]
    >>> [neighbors(x, 6, 3, 1, True) for x in range(4)]
    [(0, 0), (0, 1), (0, 2), (1, 3)]
    """
    group = x % dilation  # cells of another residue are never neighbours
    place = x // dilation
    if causal:
        start = place - (kernel - 1)
        return group + start * (start > 0) * dilation, x
    start = place - kernel // 2
    start = start * (start > 0)
    surplus = start - ((size - group + dilation - 1) // dilation - kernel)
    first = group + (start - surplus * (surplus > 0)) * dilation
    return first, first + (kernel - 1) * dilation


@attrs.frozen(cache_hash=True, repr=False)
class Neighborhood(Pattern):
    """Query and key that are neighbours in every dimension."""

    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    shape: tuple[int, ...] | None
    """Cells per dimension, the last one contiguous; None is one dimension, the sequence."""

    def __attrs_post_init__(self) -> None:
        for d in range(len(self.kernel)):
            require_int(self.kernel[d], "neighborhood kernel", 1)
            require_int(self.dilation[d], "neighborhood dilation", 1)
            if not isinstance(self.causal[d], bool):
                raise SpecError(f"neighborhood causal must be True or False per dimension, got {self.causal[d]!r}")
            if self.shape is not None:
                require_int(self.shape[d], "size of a neighborhood's dimension", 1)
                self._check_size(d, self.shape[d])

    def _check_size(self, d: int, size: int) -> None:
        kernel, dilation = self.kernel[d], self.dilation[d]
        require(
            kernel * dilation <= size,
            f"neighborhood kernel {kernel} with dilation {dilation} needs {kernel * dilation} cells, dimension {d} has "
            f"{size}; use a smaller kernel or dilation",
        )

    def sizes(self, kv_len: int) -> tuple[int, ...]:
        """Return the number of cells per dimension of a sequence of ``kv_len`` positions."""
        return (kv_len,) if self.shape is None else self.shape

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        sizes = (tables[_LENGTH][q * 0],) if self.shape is None else self.shape
        result = (q == q) & (k == k)
        for d in reversed(range(len(sizes))):
            x, y = (q, k) if d == 0 else (q % sizes[d], k % sizes[d])
            q, k = (q, k) if d == 0 else (q // sizes[d], k // sizes[d])
            dilation = self.dilation[d]
            first, last = neighbors(x, sizes[d], self.kernel[d], dilation, self.causal[d])
            result = result & (y >= first) & (y <= last)
            if dilation > 1:
                result = result & ((y - x) % dilation == 0)
        return result

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        if self.shape is not None:
            return {}
        import numpy as np

        return {_LENGTH: np.full((1, 1), shape.kv_len, dtype=np.int64)}

    def check(self, shape: Shape) -> None:
        require(
            shape.seq_len <= shape.kv_len,
            f"a neighborhood needs a cell for every query: seq_len={shape.seq_len} exceeds kv_len={shape.kv_len}",
        )
        if self.shape is None:
            self._check_size(0, shape.kv_len)
            return
        require(
            math.prod(self.shape) == shape.kv_len,
            f"neighborhood shape {list(self.shape)} has {math.prod(self.shape)} cells, the spec has "
            f"kv_len={shape.kv_len}; they must be equal",
        )

    @property
    def period(self) -> int:
        return self.dilation[-1]

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        return [edge for run in self.runs(q, kv_len) for edge in run]

    def runs(self, q: np.ndarray, kv_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over the runs of keys ``[start, stop)`` of queries ``q``, each in steps of the last dilation.

        There is one run for each neighbour in all dimensions but the last. A causal dimension has fewer neighbours
        near its border; its last run is repeated there.
        """
        sizes = self.sizes(kv_len)
        spans, rest = [], q
        for d in reversed(range(len(sizes))):
            x, rest = (rest, rest) if d == 0 else (rest % sizes[d], rest // sizes[d])
            spans.append(neighbors(x, sizes[d], self.kernel[d], self.dilation[d], self.causal[d]))
        spans.reverse()
        for steps in product(*(range(n) for n in self.kernel[:-1])):
            base = q * 0
            for d, step in enumerate(steps):
                first, last = spans[d]
                cell = first + step * self.dilation[d]
                base = (base + cell - (cell - last) * (cell > last)) * sizes[d + 1]
            yield base + spans[-1][0], base + spans[-1][1] + 1

    def __repr__(self) -> str:
        def shown(values: tuple[object, ...]) -> str:
            return repr(values[0]) if len(set(values)) == 1 else repr(list(values))

        dilation = "" if set(self.dilation) == {1} else f", dilation={shown(self.dilation)}"
        shape = "" if self.shape is None else f", shape={list(self.shape)}"
        causal = f", causal={shown(self.causal)}" if any(self.causal) else ""
        return f"neighborhood({shown(self.kernel)}{dilation}{shape}{causal})"


def _each(value: T | Sequence[T], dimensions: int, name: str) -> tuple[T, ...]:
    """Return ``value`` once per dimension."""
    if isinstance(value, int):
        return (value,) * dimensions
    if not isinstance(value, list | tuple):
        raise SpecError(f"neighborhood {name} must be one value or one per dimension, got {value!r}")
    require(
        len(value) == dimensions,
        f"neighborhood {name} has {len(value)} values for {dimensions} dimensions; give one, or one per dimension",
    )
    return tuple(value)


def neighborhood(
    kernel: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    shape: Sequence[int] | None = None,
    causal: bool | Sequence[bool] = False,
) -> Pattern:
    """Let a query meet its nearest keys on a line, a grid or a volume.

    Every query has exactly ``kernel`` neighbours along a dimension: near a border the window moves inwards instead of
    losing neighbours. An even kernel has one neighbour more before the query than after it. With dilation d, a
    dimension falls apart into d interleaved groups of cells, each with neighbourhoods of its own. Along a causal
    dimension the window ends at the query and loses what lies beyond the border.

    Parameters
    ----------
    kernel
        Neighbours per dimension, the query's own cell included.
    dilation
        Distance of neighbours per dimension.
    shape
        Cells per dimension, one to three of them; position p of a ``[Y, X]`` grid is the cell ``(p // X, p % X)``.
        Their product is the number of keys. Without it there is one dimension, the sequence itself.
    causal
        Whether a dimension is causal; one value, or one per dimension, as time is and space is not.

    Raises
    ------
    SpecError
        If the values do not fit the dimensions, or ``kernel * dilation`` exceeds a dimension; in a spec, if the cells
        are not as many as the keys, or there are more queries than keys.

    Examples
    --------
    >>> neighborhood(7), neighborhood([3, 5], dilation=[1, 2], shape=[8, 16])
    (neighborhood(7), neighborhood([3, 5], dilation=[1, 2], shape=[8, 16]))
    >>> neighborhood(3, shape=[4, 8, 8], causal=[True, False, False])
    neighborhood(3, shape=[4, 8, 8], causal=[True, False, False])

    References
    ----------
    Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143; Hassani and Shi, Dilated Neighborhood
    Attention Transformer, arXiv 2209.15001; even kernels and causal dimensions as in NATTEN.
    """
    if not isinstance(shape, list | tuple | None):
        raise SpecError(f"neighborhood shape must be a list of one to three sizes, got {shape!r}")
    if shape is None and not isinstance(kernel, int):
        raise SpecError(f"neighborhood with kernel {kernel!r} needs shape=, the number of cells per dimension")
    dimensions = 1 if shape is None else len(shape)
    require(
        1 <= dimensions <= DIMENSIONS,
        f"a neighborhood has one to {DIMENSIONS} dimensions, shape {list(shape or ())} has {dimensions}",
    )
    return Neighborhood(
        _each(kernel, dimensions, "kernel"),
        _each(dilation, dimensions, "dilation"),
        _each(causal, dimensions, "causal"),
        None if shape is None else tuple(shape),
    )
