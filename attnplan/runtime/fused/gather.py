"""Rows of all parts of a launch, taken into one buffer for each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnplan.runtime.fused.launching import Launcher
from attnplan.runtime.fused.maps import Packing
from attnplan.runtime.fused.switch import features_of_block, runs_triton
from attnplan.runtime.views import rows

_ELEMENTS = 8192
"""Elements that one program copies."""


class Gather(nn.Module):
    """Copies the rows of several parts out of whole tensors.

    Parameters
    ----------
    packings
        For each tensor of a call, where its rows lie: q's packing, or that of k and v.
    """

    def __init__(self, packings: Sequence[Packing]) -> None:
        super().__init__()
        self.packings = tuple(packings)
        self._cells = [p.table() for p in self.packings]
        self._tables: dict[torch.device, list[Tensor]] = {}
        self._start = Launcher(_kernel)

    def forward(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the rows ``[N, M, R, D]`` of each ``[B, H, S, D]``, ``[N, M, R]`` of ``[B, H, S]``, None of None."""
        made = [None if x is None else self._empty(i, x) for i, x in enumerate(tensors)]
        given = [
            (i, x, y) for i, (x, y) in enumerate(zip(tensors, made, strict=True)) if x is not None and y is not None
        ]
        wide = [(i, x, y) for i, x, y in given if x.dim() == 4]
        if runs_triton(*(x for _, x, _ in wide)):
            self._launch(wide)
        else:
            for i, x, y in wide:
                gather_rows(x, y, self.packings[i])
        for i, x, y in given:
            if x.dim() == 3:
                gather_rows(x.unsqueeze(-1), y.unsqueeze(-1), self.packings[i])
        return tuple(made)

    def _empty(self, i: int, x: Tensor) -> Tensor:
        packing = self.packings[i]
        cells, count = packing.starts()[-1], packing.places[0][2][-1][0]
        return x.new_empty((x.shape[0] * cells, packing.group, count, *x.shape[3:]))

    def _launch(self, wide: Sequence[tuple[int, Tensor, Tensor]]) -> None:
        tensors, made = [x for _, x, _ in wide], [y for _, _, y in wide]
        device = tensors[0].device
        if device not in self._tables:
            self._tables[device] = [torch.tensor(c, device=device) for c in self._cells]
        cells = tuple([len(self._cells[i]) for i, _, _ in wide])
        counts = tuple([y.shape[2] for y in made])
        features = tuple([x.shape[3] for x in tensors])
        strides = tuple([x.stride()[:3] for x in tensors])
        block = max(1, _ELEMENTS // features_of_block(max(features)))
        pointers = 0
        for x in (*tensors, *made):
            pointers |= x.data_ptr()
        self._start(
            (max(cells) * -(-max(counts) // block), tensors[0].shape[0], len(tensors)),
            (device, tensors[0].dtype, tuple([i for i, _, _ in wide]), strides, features),
            device,
            pointers,
            tuple(tensors),
            tuple(made),
            tuple([self._tables[device][i] for i, _, _ in wide]),
            strides,
            cells,
            counts,
            max(cells),
            features,
            tuple(map(features_of_block, features)),
            block,
            len(tensors),
        )


def _kernel() -> Any:
    from attnplan.runtime.fused.triton_kernels import gather_kernel

    return gather_kernel


def gather_rows(x: Tensor, made: Tensor, packing: Packing) -> None:
    """Write the rows of all parts of ``x`` ``[B, H, S, D]`` into a buffer ``[N, M, R, D]``, by strided copies."""
    starts = packing.starts()
    cells = made.reshape(x.shape[0], starts[-1], *made.shape[1:])
    for part, place in enumerate(packing.places):
        order, last = packing.order(part), len(place[2])
        ordered = rows(x, *place).permute(0, *(a + 1 for a in order), last, last + 1)
        cells[:, starts[part] : starts[part + 1]].view(ordered.shape).copy_(ordered)
