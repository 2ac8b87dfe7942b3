"""A ring without data: the executor runs on meta tensors, and its transport counts bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.ring.program import RankProgram
from attnplan.runtime.ring.exchanges import Received, Start, run, size_in, size_of
from attnplan.runtime.ring.executor import Rank
from attnplan.runtime.ring.parts import Flow, Gradients, Part
from attnplan.runtime.views import accumulator
from attnplan.spec import AttentionSpec


class DryTransport:
    """Counts what a rank would send and receive."""

    def __init__(self) -> None:
        self.bytes_sent = self.bytes_received = 0

    def start(self, request: Start) -> Start:
        """Count an exchange."""
        self.bytes_sent += sum(map(size_of, request.sends.values()))
        self.bytes_received += sum(map(size_in, request.receives.values()))
        return request

    def wait(self, handle: Start) -> Received:
        """Return meta tensors of the sizes that are expected."""
        return {
            peer: tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in sizes)
            for peer, sizes in handle.receives.items()
        }


def _nothing(*args: Any) -> Any:
    raise AssertionError("a dry part runs nothing")


@attrs.frozen(eq=False)
class DryPart(Part):
    """A graph whose results have sizes only."""

    program: Any = _nothing

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))

    def backward(
        self, flow: Flow, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], names: Sequence[str] = ()
    ) -> Gradients:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def dry_run(program: RankProgram, spec: AttentionSpec, *, backward: bool = False) -> DryTransport:
    """Run a rank's forward, or its backward, on meta tensors; return the transport, which counted.

    Parameters
    ----------
    program
        What the rank does.
    spec
        What the ranks compute together.
    backward
        Count the backward instead of the forward.

    Examples
    --------
    >>> from attnplan.patterns import window
    >>> from attnplan.ring.build import rank_program
    >>> spec = AttentionSpec(seq_len=4096, heads=2, head_dim=64, pattern=window(256, 0))
    >>> dry_run(rank_program(spec, 16, "contiguous", "halo", rank=3), spec).bytes_received
    131072
    """
    rank = Rank(program, spec, [[None if g is None else DryPart() for g in hop.graphs] for hop in program.hops])
    dtype = getattr(torch, spec.dtype)
    sizes = [
        (spec.heads, rank.queries.length, spec.head_dim),
        (spec.kv_heads, rank.keys.length, spec.head_dim),
        (spec.kv_heads, rank.keys.length, spec.value_dim),
        (spec.heads, rank.queries.length, spec.value_dim),
    ]
    q, k, v, grad = (torch.empty((spec.batch, *size), dtype=dtype, device="meta") for size in sizes)
    forward = DryTransport()
    result = run(rank.forward(q, k, v, {}), forward)
    if not backward:
        return forward
    transport = DryTransport()
    run(rank.backward(grad, None, result, k, v, {}), transport)
    return transport
