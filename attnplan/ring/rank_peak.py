"""The peak of one rank on a device of its own: what it holds at one of its hops, by the order of its executor."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import attrs

from attnplan.ring.handling import AT_ONCE
from attnplan.ring.program import ITEM_BYTES
from attnplan.ring.transports import COLLECTIVES, LocalHop, LocalPlan, Setting


@attrs.frozen
class _Held:
    """Bytes of k and v that one hop brings."""

    store: int = 0
    """What is put together for the hop's graphs; 0 if that is as it came, or the rank's own."""
    received: int = 0
    sent: int = 0
    """Packed for peers, who are taken to ask for as much as they send."""

    @property
    def moved(self) -> int:
        return self.received + self.sent


def rank_peak(setting: Setting, plan: LocalPlan, kind: str, inside: Callable[[LocalHop], int]) -> int:
    """Return the bytes that a rank holds at its worst hop, beside its inputs and output.

    Those are what two hops bring, parts that wait for the merge or sums of gradients, and what the kernels of one hop
    need (``inside``) or, on the CPU, a merge in plain torch.
    """
    spec, item = setting.spec, ITEM_BYTES[setting.spec.dtype]
    wide, rows = max(4, item), spec.batch * sum(m.elements_count for m in plan.ring.query_maps())
    hops = [h for h in plan.hops if h.parts.parts]
    held = [_held(setting, plan, h) for h in plan.hops]
    both = max((a.store + a.moved + b.moved for a, b in pairwise([*held, _Held()])), default=0)
    before = max((h.store for h in held[:-1]), default=0)  # that of a hop is freed once that of the next is there
    parts = sum(plan.every if h.parts.hop else 1 for h in hops)
    waiting = min(parts, AT_ONCE) * rows * (spec.value_dim * item + wide)
    running = rows * (spec.value_dim + 1) * wide if parts > AT_ONCE else 0
    merging = 0
    if kind == "cpu" and parts > 1:  # a sum, a part as wide as that, weights; the output has its room
        cast = wide if wide != item else 0
        merging = rows * (spec.value_dim * (wide + cast - item * (not cast)) + 4 * wide)
    sums = 0
    if spec.training:  # of the gradients of queries and of a store, and what goes home of these
        meanwhile = 1 + (sum(h.received > 0 for h in held) > 1)  # those of the hop before are still on their way
        each = [max(h.store, h.received) + meanwhile * h.received for h in held]
        sums = rows * spec.head_dim * wide + max(each, default=0) * wide // item
    most = max((inside(h) for h in hops), default=0)
    return both + max(most, merging, before) + max(waiting + running, sums) + _spread(setting, plan, rows)


def _held(setting: Setting, plan: LocalPlan, hop: LocalHop) -> _Held:
    if hop.parts.own:
        return _Held()
    spec = setting.spec
    each = spec.batch * (spec.head_dim + spec.value_dim) * ITEM_BYTES[spec.dtype]
    store, peers = sum(m.elements_count for m in hop.parts.store), len(hop.peers())
    own = sum(p.count for p in setting.keys.rows(plan.rank)) * spec.kv_heads
    remote, collective = hop.remote, COLLECTIVES.get(setting.transport, "p2p")
    direct = store == remote and peers == 1 and setting.layout != "zigzag"  # whose two runs may lie otherwise
    kept = 0 if direct else store * each
    if collective == "all-gather":  # one buffer for the shards of all ranks, and the packed one
        return _Held(kept, (remote + own) * each, 2 * own * each)
    if collective == "all-to-all":  # packed for each peer, and all of that in one buffer
        return _Held(kept, remote * each, 2 * remote * each)
    lies = remote == peers * own and (peers == 1 or setting.layout == "contiguous")
    return _Held(kept, remote * each, 0 if lies else remote * each)


def _spread(setting: Setting, plan: LocalPlan, rows: int) -> int:
    """Return the bytes of the queries that were gathered, and of one exchange of queries or outputs."""
    if setting.ulysses == 1:
        return 0
    spec, item = setting.spec, ITEM_BYTES[setting.spec.dtype]
    asked = rows * spec.head_dim * item
    return asked + 3 * rows * max(spec.head_dim * item, spec.value_dim * item + max(4, item))
