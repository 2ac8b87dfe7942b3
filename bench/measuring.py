"""Measures one spec of a grid: every candidate that accepts it and the calls by hand, checked, then in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import attrs

from attnplan.backends.base import import_failure
from attnplan.cost import Target
from attnplan.cost.setting import ITEM_BYTES
from attnplan.harness.entrants import Asked, contest, contestants
from attnplan.harness.peers import BLOCK_MASK_ELEMENTS, MASK_ELEMENTS, contestants_by_hand
from attnplan.runtime.clock import Plenty
from attnplan.search import lowerings_clear
from bench.cores import on_the_fastest
from bench.grid import Case

FLEX_COST = 25.0
"""Seconds that a FlexAttention plan may take to compile, at worst: none is started with less time left."""
PREPARATION, RACE = "its preparation", "the race"
PHASES = (PREPARATION, RACE)
"""What may hang that is no contestant; the spec is left out then."""
MASK_BYTES = {"sdpa": 8, "flex": 16}
"""Bytes for each pair of a query and a key that a dense mask, or that of which FlexAttention's is made, may need."""
BY_HAND_BYTES = 2 << 30
"""Bytes that a call by hand may need."""
Row = dict[str, Any]


@attrs.frozen
class Rules:
    """What is the same for all specs of a run."""

    target: Target
    gpu: bool
    """Whether it is the grid for a GPU: more candidates, and FlexAttention."""
    backends: frozenset[str] = frozenset()
    peers: frozenset[str] = frozenset()

    @property
    def may_compile(self) -> bool:
        """Whether there may be programs that Inductor compiles."""
        return not self.backends or "compiled" in self.backends or "flex" in self.peers

    @classmethod
    def of(cls, target: Target, backends: str, peers: str, *, gpu: bool) -> Rules:
        """Return the rules for lists separated by commas; a call by hand whose library is missing is none."""
        asked = frozenset(filter(None, peers.split(",")))
        if "fa4" in asked and import_failure("flash_attn.cute.interface") is not None:
            asked -= {"fa4"}
        return cls(target, gpu, frozenset(filter(None, backends.split(","))), asked)


@attrs.frozen
class Job:
    """One spec, and what an earlier run says about it."""

    case: Case
    left: float
    """Seconds until the run has to end."""
    broken: frozenset[str] = frozenset()
    """Contestants that ended an earlier process."""
    known: Mapping[str, str] = attrs.field(factory=dict)
    """Digests of graphs by the names of candidates that were measured earlier."""
    alone: bool = False
    """Whether nothing else runs on the device meanwhile."""


Gate = Callable[[str, int], None]
"""Called with the name of what comes next, and the bytes it may need; returns when it may start."""


def measure(
    job: Job,
    rules: Rules,
    gate: Gate = lambda name, size: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row] | None:
    """Return the rows of a spec; None if everything that would be measured is known already.

    Parameters
    ----------
    job, rules
        What to measure.
    gate
        Called with :data:`PREPARATION` before anything runs on the device, with each contestant's name before its
        first call, and with :data:`RACE` before contestants take turns.
    clock
        By which first calls are timed; it stands still while the gate is closed.

    Raises
    ------
    PoisonedError
        If the process has to start again.
    """
    case = job.case
    facts = {"spec": case.name, "family": case.family, "mode": "training" if case.spec.training else "forward"}
    sizes: dict[str, int] = {}
    cores, host = ExitStack(), Row()

    def watch(name: str) -> None:
        gate(name, sizes.get(name, BY_HAND_BYTES))
        if name == RACE and rules.gpu:  # a race that hangs ends with its process
            host.update(cores.enter_context(on_the_fastest()))

    asked = attrs.evolve(_asked(job, rules), watch=watch, clock=clock)
    start = time.perf_counter()
    entrants, rows = contestants(case.spec, rules.target, asked)
    if job.known and all(job.known.get(e.name) == e.facts["graph"] for e in entrants):
        return None
    refused = sum("refused" in r for r in rows)
    rows.append({"planning": time.perf_counter() - start, "refused_candidates": refused})
    sizes |= {e.name: e.facts["predicted_peak"] for e in entrants}
    sizes[RACE] = max(sizes.values(), default=0)
    gate(PREPARATION, _bytes_of_inputs(job, rules))
    hand, others = contestants_by_hand(case.spec, str(rules.target.torch_device), _hands(job, rules))
    lowerings_clear()
    taking_part = [e for e in (*entrants, *hand) if e.name not in job.broken]
    rows += others
    with cores:
        rows += list(contest(case.spec, rules.target, taking_part, asked, case.operands))
    return [{**facts, **row, **(host if "seconds" in row else {})} for row in rows if "refused" not in row]


def _asked(job: Job, rules: Rules) -> Asked:
    without = {("reference", "float64")}
    if not rules.gpu or not job.case.flex or job.left < FLEX_COST:
        without |= {("compiled", name) for name in ("flex", "inductor", "inductor-kept")}
    on_cpu = Plenty(warm_ups=1, rounds=6, seconds=0.3, slow=0.7)
    plenty = Plenty(rounds=8, seconds=0.05, further=24) if rules.gpu else on_cpu
    return Asked(
        plenty=plenty,
        backends=rules.backends,
        without=frozenset(without),
        memory=int(rules.target.device.memory * 0.4),
        hopeless=12.0 if rules.gpu else 8.0,
        least=4,
        until=time.monotonic() + job.left,
    )


def _hands(job: Job, rules: Rules) -> frozenset[str]:
    """Return the calls by hand; FlexAttention only for marked specs, forward: each costs a compilation."""
    wanted = set(rules.peers)
    if rules.gpu and (not job.case.flex or job.case.spec.training or job.left < FLEX_COST):
        wanted.discard("flex")
    return frozenset(wanted)


def _bytes_of_inputs(job: Job, rules: Rules) -> int:
    """Return the bytes that preparing a spec may need: its inputs, their copies in float64, and a mask by hand."""
    spec = job.case.spec
    rows = spec.heads * spec.shape.seq_len + 2 * spec.kv_heads * spec.shape.kv_len
    inputs = spec.batch * rows * spec.head_dim * (4 * ITEM_BYTES[spec.dtype] + 16 * (1 + spec.training))
    return inputs + _mask_bytes(job, rules)


def _mask_bytes(job: Job, rules: Rules) -> int:
    pairs = job.case.spec.shape.seq_len * job.case.spec.shape.kv_len
    limits = {"sdpa": MASK_ELEMENTS, "flex": BLOCK_MASK_ELEMENTS}
    asked = _hands(job, rules) if job.case.sparse else frozenset[str]()
    needed = [
        pairs * each
        for name, each in MASK_BYTES.items()
        if name in asked and pairs <= limits[name][rules.target.device.kind]
    ]
    return max(needed, default=0)
