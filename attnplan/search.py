"""The search: every strategy x backend x schedule for a spec, priced or refused with reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import attrs

from attnplan.backends import Backend, Schedule, registry
from attnplan.cost import Prediction, Target, price
from attnplan.errors import MemoryBudgetError, NoBackendError, SpecError, did_you_mean
from attnplan.ir import Graph
from attnplan.ir.coverage import spec_coverage
from attnplan.lower import lower
from attnplan.passes import Canonicalize, FuseMerge, Lattice, Pipeline, SplitHeads, Step
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes

STRATEGIES: Mapping[str, Pipeline] = {
    "naive": Pipeline(()),
    "dense": Pipeline((Canonicalize(), SplitHeads(), FuseMerge())),
    "lattice": Pipeline((Canonicalize(), SplitHeads(), Lattice(), FuseMerge())),
}
"""Legal pipelines.

``dense`` attends over whole rows, masked where a kernel does not know the pattern; ``lattice`` takes segments and
dilation apart; ``naive`` is the lowering itself, which only the reference runs.
"""


@attrs.frozen
class Lowered:
    """A spec lowered by one strategy, every step proved."""

    strategy: str
    graph: Graph
    steps: tuple[Step, ...]


@attrs.frozen
class Candidate:
    """One way to run a spec: priced, or refused with every reason."""

    strategy: str
    backend: str
    schedule: str
    prediction: Prediction | None
    reasons: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The candidate as reports write it."""
        return f"{self.strategy} > {self.backend} ({self.schedule})"


@attrs.frozen
class Found:
    """What a search found."""

    lowered: Lowered
    candidate: Candidate
    backend: Backend
    schedule: Schedule
    candidates: tuple[Candidate, ...]
    """Every candidate: the accepted ones by predicted time, then the refused."""


@lru_cache(maxsize=64)
def lowerings(spec: AttentionSpec) -> tuple[Lowered, ...]:
    """Return the spec lowered by each strategy; one that leaves the same graph as an earlier one is left out."""
    expected = spec_coverage(spec)
    naive = lower(spec)
    found: list[Lowered] = []
    for name, pipeline in STRATEGIES.items():
        graph, steps = pipeline.run(naive, expected, known=found[-1].steps if found else ())
        if all(graph != other.graph for other in found if other.strategy != "naive"):
            found.append(Lowered(name, graph, steps))
    return tuple(found)


def search(
    spec: AttentionSpec, target: Target, backend: str = "auto", strategy: str = "auto", max_memory: int | None = None
) -> Found:
    """Price every candidate and return the cheapest.

    Raises
    ------
    SpecError
        If a pinned backend or strategy does not exist.
    NoBackendError
        If every candidate is refused; the message lists all reasons.
    MemoryBudgetError
        If candidates could run, but none within ``max_memory``.
    """
    if strategy != "auto" and strategy not in STRATEGIES:
        raise SpecError(f"unknown strategy {strategy!r}{did_you_mean(strategy, [*STRATEGIES, 'auto'])}")
    if backend != "auto":
        registry().get(backend)
    options = list(_options(spec, target, backend, strategy))
    budget = target.device.memory if max_memory is None else max_memory
    fitting = [o for o in options if o[3].prediction and o[3].prediction.peak_bytes <= budget]
    refused = [_over_budget(o[3], budget, max_memory) for o in options if o not in fitting]
    if not fitting:
        raise _nothing_fits(spec, target, [o[3] for o in options], refused, max_memory)
    fitting.sort(key=lambda o: o[3].prediction.seconds if o[3].prediction else 0.0)
    lowered, chosen_backend, schedule, candidate = fitting[0]
    return Found(lowered, candidate, chosen_backend, schedule, (*(o[3] for o in fitting), *refused))


def candidates(spec: AttentionSpec, target: Target) -> tuple[Candidate, ...]:
    """Return every candidate, the accepted ones by predicted time, whether or not any can run."""
    found = [option[3] for option in _options(spec, target, "auto", "auto")]
    return tuple(sorted(found, key=lambda c: c.prediction.seconds if c.prediction else float("inf")))


Option = tuple[Lowered, Backend, Schedule, Candidate]


def _options(spec: AttentionSpec, target: Target, backend: str, strategy: str) -> Iterator[Option]:
    for lowered in lowerings(spec):
        for name, candidate_backend in registry().backends.items():
            if candidate_backend.naive != (lowered.strategy == "naive"):
                continue
            for schedule in candidate_backend.schedules(target.device):
                reasons = [*candidate_backend.availability(target)]
                reasons += _pinned(lowered.strategy, name, candidate_backend, backend, strategy)
                reasons += candidate_backend.refuse(lowered.graph, spec, schedule, target.device)
                prediction = None if reasons else price(lowered.graph, spec, schedule.kernel, target.device)
                candidate = Candidate(lowered.strategy, name, schedule.name, prediction, tuple(reasons))
                yield lowered, candidate_backend, schedule, candidate


def _pinned(has_strategy: str, name: str, candidate: Backend, backend: str, strategy: str) -> Iterator[str]:
    if strategy not in ("auto", has_strategy):
        yield f"strategy={strategy!r} was asked for"
    if backend not in ("auto", name):
        yield f"backend={backend!r} was asked for"
    if backend == "auto" and not candidate.automatic:
        yield f"runs only when asked for by backend={name!r}"


def _over_budget(candidate: Candidate, budget: int, max_memory: int | None) -> Candidate:
    if candidate.prediction is None:
        return candidate
    need = format_bytes(candidate.prediction.peak_bytes)
    limit = f"max_memory={format_bytes(budget)}" if max_memory else f"the device's {format_bytes(budget)}"
    return attrs.evolve(candidate, reasons=(f"needs {need} beside inputs and output, more than {limit}",))


def _nothing_fits(
    spec: AttentionSpec, target: Target, options: list[Candidate], refused: list[Candidate], max_memory: int | None
) -> Exception:
    priced = [(c.prediction.peak_bytes, c.name) for c in options if c.prediction]
    if priced:
        need, name = min(priced)
        what = f"the smallest plan, {name}, needs {format_bytes(need)} beside its inputs and output"
        smaller = "try a smaller batch" if spec.batch > 1 else "try a shorter sequence"
        if max_memory is None:
            has = format_bytes(target.device.memory)
            return MemoryBudgetError(f"{what}, {target.device.name} has {has}; {smaller}, or a sparser pattern")
        enough = f"{-(-need // 2**10)} KiB"  # rounded up, so that what is proposed works
        return MemoryBudgetError(f"{what}, budget {format_bytes(max_memory)}; {smaller}, or max_memory={enough!r}")
    lines = [f"  {c.name}: {'; '.join(c.reasons)}" for c in refused]
    lines += [f"  {name}: {reason}" for name, reason in registry().broken.items()]
    return NoBackendError(f"no backend can run this on {target.device.name}:\n" + "\n".join(lines))
