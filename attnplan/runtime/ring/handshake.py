"""The handshake before the first byte: every rank must be about to do its part of the same call.

gloo accepts a message that is too short, or of another dtype, and leaves garbage; one that is too long aborts the
process. So what every rank is about to do is compared first, as a few integers.

Under ``first`` a rank shakes hands only when its own call changes, so it may come alone, while the others exchange
keys. It must then not enter a collective of their group: gloo takes it for a part of theirs, and aborts the process. So
ranks meet in the store instead, where those that did not come look, once they have waited in vain.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnplan.errors import RingError
from attnplan.runtime.ring.faults import ANSWER, LostError, bounded, within

VALIDATE = ("always", "first", "off")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FIELDS = ("state", "plan", "call", "batch", "dtype", "device", "gradients", "operands")
"""What is compared, each an int64. ``state`` is 0, or 1 on a rank whose own call is wrong; ``call`` counts calls."""
CALL = FIELDS.index("call")


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


class Cards:
    """Where ranks meet whose call changed: keys in the store of the process group, of one ring and one call."""

    def __init__(self, store: Any, rank: int, ranks: int, name: str) -> None:
        self._store, self.rank, self.ranks, self._name = store, rank, ranks, name
        self._old: list[tuple[int, str]] = []

    def leave(self, own: Sequence[int]) -> str:
        """Leave this rank's card, and return the key that counts those who left the same."""
        step, text = own[CALL], json.dumps(own)
        self._store.set(self._key(step, self.rank), text)
        alike = self._key(step, f"{digest(text):016x}")
        self._store.add(alike, 1)
        if self._store.add(self._key(step, "here"), 1) == self.ranks:
            self._store.set(self._key(step, "all"), "")
        return alike

    def meet(self, own: Sequence[int], timeout: float) -> dict[int, list[int]]:
        """Leave this rank's card, wait for the others, and return the cards of those that came in time.

        However many ranks there are, this asks the store for a few keys only, unless cards differ.

        Raises
        ------
        LostError
            If the store does not answer.
        """
        end, pause, step = time.monotonic() + timeout, 0.0005, own[CALL]
        try:
            alike = self.leave(own)
            while not self._store.check([self._key(step, "all")]):
                if time.monotonic() > end:
                    return self.at(step)
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
            if self._store.add(alike, 0) < self.ranks:
                return self.at(step)
        except RuntimeError as error:
            raise LostError(-1, -1, "handshake", error) from error
        self._forget(step, alike)
        return {rank: list(own) for rank in range(self.ranks)}

    def at(self, step: int) -> dict[int, list[int]]:
        """Return the cards that were left for a call by now."""
        found: dict[int, list[int]] = {}

        def look() -> None:
            for rank in range(self.ranks):
                if self._store.check([self._key(step, rank)]):
                    found[rank] = json.loads(self._store.get(self._key(step, rank)))

        within(ANSWER, look)
        return dict(found)

    def _forget(self, step: int, alike: str) -> None:
        """Delete what was left for the handshake before the last one: all who are here have read it."""
        self._old.append((step, alike))
        if len(self._old) > 2:
            before, shared = self._old.pop(0)
            self._store.delete_key(self._key(before, self.rank))
            if self.rank == 0:
                for key in (shared, self._key(before, "here"), self._key(before, "all")):
                    self._store.delete_key(key)

    def _key(self, step: int, what: object) -> str:
        return f"attnplan/ring/{self._name}/call/{step}/{what}"


def compare(rank: int, cards: Sequence[Sequence[int]], step: int, end: str = "nothing was sent") -> None:
    """Raise where another rank is about to do something else; ``end`` is how the message ends.

    Raises
    ------
    RingError
        With the ranks that differ from most, and in what.
    """
    wrong = [r for r, one in enumerate(cards) if one[0]]
    if wrong:
        raise _error(rank, wrong, step, f"rank {_and(wrong)} was called with tensors that do not fit the plan; {end}")
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
            f"rank {_and(odd)} differs in {_WORDS[name]} from rank {rest} ({_shown(name, usual)}): {each}; {end}",
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
    error = RingError(f"rank {rank}, step {step}, handshake: {why}")
    error.rank, error.peer, error.hop, error.step = rank, odd[0], None, step
    return error
