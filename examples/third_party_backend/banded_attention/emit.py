"""Emission: makes of a graph a callable with a source that people can read. Imported on the first call of a plan."""

import attrs
import torch

from attnplan.ir import Attend
from attnplan.ir.slots import slot_band


def in_band(i, j, low, high):
    """Which of rows i and keys j meet: ``low <= i - j <= high``, None being no limit."""
    seen = (i == i) & (j == j) if low is None else i - j >= low
    return seen if high is None else seen & (i - j <= high)


@attrs.frozen
class Program:
    low: int | None
    high: int | None
    scale: float
    source: str
    differentiable_lse: bool = True
    follows_lengths: bool = False

    def __call__(self, q, k, v, operands, return_lse):
        group, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        scores = self.scale * q.to(wide).unflatten(1, (-1, group)) @ k.to(wide).unsqueeze(2).mT
        i, j = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        seen = in_band(i[:, None], j, self.low, self.high)
        empty = ~seen.any(-1)  # rows without a key: output 0, LSE -inf, no gradient, never NaN
        scores = scores.masked_fill(~seen & ~empty[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp() @ v.to(wide).unsqueeze(2)
        out = out.masked_fill(empty[:, None], 0).flatten(1, 2).to(q.dtype)
        return out, lse.masked_fill(empty, -torch.inf).flatten(1, 2) if return_lse else None


def emit(graph, spec, schedule, device):
    ((node, op),) = graph.of(Attend)
    low, high = slot_band(op, *(n.type.rows for n in graph.args(node)[:2]))
    return Program(low, high, op.scale, f"# {low} <= row - key <= {high}, in plain torch, for\n{graph}")
