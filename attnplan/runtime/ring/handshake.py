"""The handshake before the first byte: every rank must be about to do its part of the same call.

gloo accepts a message that is too short, or of another dtype, and leaves garbage; one that is too long aborts the
process. So what every rank is about to do is compared first, as a few integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnplan.errors import RingError
from attnplan.runtime.ring.faults import LostError, bounded

VALIDATE = ("always", "first", "off")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FIELDS = ("state", "plan", "call", "batch", "dtype", "device", "gradients", "operands")
"""What is compared, each an int64. ``state`` is 0, or 1 on a rank whose own call is wrong; ``call`` counts calls."""


def digest(text: str) -> int:
    """Return 63 bits of a hash of some text.

    Examples
    --------
    >>> 0 <= digest("a") < 2**63 and digest("a") != digest("b")
    True
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def card(plan: int, call: int, q: Tensor, operands: Mapping[str, Any], *, gradients: bool, wrong: bool) -> list[int]:
    """Return what a rank says about its call, in the order of :data:`FIELDS`."""
    dtype = _DTYPES.index(q.dtype) if q.dtype in _DTYPES else -1
    device = 0 if q.device.type == "cpu" else 1
    shapes = [(n, tuple(x.shape) if isinstance(x, Tensor) else ()) for n, x in sorted(operands.items())]
    return [int(wrong), plan, call, q.shape[0], dtype, device, int(gradients), digest(repr(shapes))]


def shake_hands(own: Sequence[int], group: Any, device: torch.device, timeout: float) -> list[list[int]]:
    """Return what every rank says, in the order of ranks.

    Raises
    ------
    LostError
        If a rank does not take part in time.
    """
    ranks = dist.get_world_size(group)
    mine = torch.tensor(own, dtype=torch.int64, device=device)
    everyone = torch.empty(ranks * len(own), dtype=torch.int64, device=device)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    try:
        work = gather(everyone, mine, group=group, async_op=True)
        if device.type == "cuda":
            work.wait()
            bounded(torch.cuda.current_stream(device).synchronize, timeout)  # the stream of this thread
        else:
            work.wait(timedelta(seconds=timeout))
    except (RuntimeError, TimeoutError) as error:
        raise LostError(-1, -1, "handshake", error) from error
    found: list[list[int]] = everyone.view(ranks, len(own)).tolist()
    return found


def compare(rank: int, cards: Sequence[Sequence[int]], step: int) -> None:
    """Raise where another rank is about to do something else.

    Raises
    ------
    RingError
        With the ranks that differ from most, and in what.
    """
    wrong = [r for r, one in enumerate(cards) if one[0]]
    if wrong:
        raise _error(rank, wrong, step, f"rank {_and(wrong)} was called with tensors that do not fit the plan")
    for i, name in enumerate(FIELDS):
        values = [one[i] for one in cards]
        if len(set(values)) == 1:
            continue
        usual = max(sorted(set(values), key=values.index), key=values.count)
        odd = [r for r, value in enumerate(values) if value != usual]
        each = "; ".join(f"rank {r}: {_shown(name, v)}" for r, v in enumerate(values) if r in odd or r == rank)
        rest = next(r for r in range(len(cards)) if r not in odd)
        raise _error(
            rank,
            odd,
            step,
            f"rank {_and(odd)} differs in {_WORDS[name]} from rank {rest} ({_shown(name, usual)}): {each}",
        )


_WORDS = {
    "plan": "the plan (spec, layout, transport, versions or mesh)",
    "call": "the number of calls of this plan so far",
    "batch": "the batch size",
    "dtype": "the dtype",
    "device": "the kind of device",
    "gradients": "whether gradients are asked for",
    "operands": "the names or shapes of the operands",
}


def _shown(name: str, value: int) -> str:
    if name == "dtype":
        return str(_DTYPES[value]) if value >= 0 else "no known dtype"
    if name == "device":
        return ("cpu", "cuda")[value]
    if name == "gradients":
        return "yes" if value else "no"
    return f"{value:016x}" if name in ("plan", "operands") else str(value)


def _and(ranks: Sequence[int]) -> str:
    return " and ".join(map(str, ranks))


def _error(rank: int, odd: Sequence[int], step: int, why: str) -> RingError:
    error = RingError(f"rank {rank}, step {step}, handshake: {why}; nothing was sent")
    error.rank, error.peer, error.hop, error.step = rank, odd[0], None, step
    return error
