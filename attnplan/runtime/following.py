"""Windows of plans that follow lengths: decided at each call, from the lengths it brings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import attrs
from torch import Tensor, nn

from attnplan.errors import SpecError
from attnplan.ir import Attend, RowMap
from attnplan.ir.native import EVERYTHING, Window, knows, native_window, split_documents
from attnplan.patterns import Shape

_KEPT_WINDOWS = 4096


class FollowingWindow(nn.Module):
    """Decides what the condition of an attend over whole rows is to a kernel that knows windows."""

    def __init__(self, op: Attend, shape: Shape, native: frozenset[str]) -> None:
        super().__init__()
        where, self.documents = split_documents(op.where)
        self.op, self.shape, self.native = attrs.evolve(op, where=where), shape, native
        self._known: OrderedDict[tuple[int, int], tuple[Window, bool]] = OrderedDict()

    def forward(self, operands: Mapping[str, Tensor], q: Tensor, k: Tensor) -> tuple[Window, bool]:
        """Return (window, whether row i sees key j only for j <= i)."""
        lengths = (q.shape[2], k.shape[2])
        known = self._known.get(lengths)  # one look: another thread may drop it
        if known is None:
            known = self._known[lengths] = self._decide(*lengths)
            if len(self._known) > _KEPT_WINDOWS:
                self._known.popitem(last=False)
        return known

    def _decide(self, seq_len: int, kv_len: int) -> tuple[Window, bool]:
        q, k = (RowMap.whole(self.shape.heads, n) for n in (seq_len, kv_len))
        window = native_window(attrs.evolve(self.op, shift=kv_len - seq_len), q, k)
        square = seq_len == kv_len
        if window is None or not knows(self.native, window, square=square) or (self.documents and not square):
            raise SpecError(
                f"{self.op.where!r} over {seq_len} queries and {kv_len} keys is no window of this kernel; compile for "
                "these lengths, or with backend='eager'"
            )
        if square and window == (None, 0) and not self.documents:
            return EVERYTHING, True
        return window, False
