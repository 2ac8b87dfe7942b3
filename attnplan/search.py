"""The search: every strategy x backend x schedule for a spec, priced or refused with reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import attrs

from attnplan.backends import Backend, Schedule, registry
from attnplan.backends.base import import_failure
from attnplan.cost import Device, Prediction, Target, parameters_for, price
from attnplan.cost.workspaces import like
from attnplan.errors import MemoryBudgetError, NoBackendError, SpecError, did_you_mean
from attnplan.ir import Attend, Graph, Merge, Mix, Node
from attnplan.ir.coverage import Coverage, spec_coverage
from attnplan.ir.slots import slot_condition
from attnplan.lower import lower
from attnplan.memory_budget import Way, fit, least
from attnplan.passes import Decompose, Step
from attnplan.passes.decompose import is_union
from attnplan.passes.pipeline import Memo
from attnplan.spec import AttentionSpec
from attnplan.strategies import STRATEGIES, Tiling, pipelines
from attnplan.units import format_bytes

_NONE: Mapping[tuple[str, str, str], str] = {}
CALLS = 100_000
"""Calls over which a choice spreads the seconds for which a first call compiles: a short training of one layer.

The 6 to 10 seconds of FlexAttention are then 60 to 100 us a call.
"""
UNTRIED = 1.05
"""By how much longer the prediction of a schedule that was never run on hardware counts: near ties go to tried ones.

No measurement stands behind its price, and none behind its numbers.
"""


@attrs.frozen
class Lowered:
    """A spec lowered by one strategy, every step proved."""

    strategy: str
    graph: Graph
    steps: tuple[Step, ...]
    also: tuple[str, ...] = ()
    """Other strategies that leave the same graph."""


@attrs.frozen
class Candidate:
    """One way to run a spec: priced, or refused with every reason."""

    strategy: str
    backend: str
    schedule: str
    prediction: Prediction | None
    reasons: tuple[str, ...] = ()
    loop: str = ""
    """What it is looped over to fit a budget, in words."""

    @property
    def name(self) -> str:
        """The candidate as reports write it."""
        return f"{self.strategy} > {self.backend} ({self.schedule}){', ' if self.loop else ''}{self.loop}"


@attrs.frozen
class Found:
    """What a search found."""

    lowered: Lowered
    candidate: Candidate
    backend: Backend
    schedule: Schedule
    candidates: tuple[Candidate, ...]
    """Every candidate: the accepted ones by predicted time, their share of compiling included, then the refused.

    One that was never run on hardware stands where a prediction longer by :data:`UNTRIED` would.
    """
    calls: int = CALLS
    """Calls over which compiling was spread."""


@lru_cache(maxsize=128)
def lowerings(spec: AttentionSpec, tiling: Tiling | None = None, *, fused: bool = False) -> tuple[Lowered, ...]:
    """Return the spec lowered by each strategy; one that leaves the same graph as an earlier one is named there.

    ``tiling`` is that of the schedule, None if it has no tiles; ``fused`` says whether our own kernels may stand around
    its kernel.
    """
    found: list[Lowered] = []
    unions = any(is_union(branch) for branch in spec.branches)
    for name, pipeline in pipelines(tiling, (spec.layout, spec.batch) if fused else None).items():
        blocks = [i for i, other in enumerate(found) if "blocks" in (other.strategy, *other.also)]
        if name == "blocks-rows" and not unions:  # nothing that the pass would cut: not even proved again
            same = blocks
        else:
            graph, steps = pipeline.run(*_start(spec), _memo(spec))
            same = [i for i, other in enumerate(found) if graph == other.graph and other.strategy != "naive"]
            same = blocks if not same and _cuts_no_rows(steps) else same
        if same:
            found[same[0]] = attrs.evolve(found[same[0]], also=(*found[same[0]].also, name))
        else:
            found.append(Lowered(name, graph, steps))
    return tuple(found)


def _cuts_no_rows(steps: Sequence[Step]) -> bool:
    """Return whether a pipeline was to cut rows that see every key off, and found none."""
    return any(
        isinstance(step.rewrite, Decompose) and step.rewrite.full_rows and step.graph == before.graph
        for before, step in pairwise(steps)
    )


def lowerings_clear() -> None:
    """Forget every lowered spec."""
    lowerings.cache_clear()
    _start.cache_clear()
    _memo.cache_clear()


@lru_cache(maxsize=64)
def _start(spec: AttentionSpec) -> tuple[Graph, Coverage]:
    """Return the naive graph of a spec, and what every graph for it has to cover."""
    return lower(spec), spec_coverage(spec)


@lru_cache(maxsize=64)
def _memo(spec: AttentionSpec) -> Memo:
    """Return the passes that have run for a spec, shared by its pipelines at every size of tiles."""
    return Memo()


def search(
    spec: AttentionSpec,
    target: Target,
    backend: str = "auto",
    strategy: str = "auto",
    max_memory: int | None = None,
    *,
    deterministic: bool = False,
    failed: Mapping[tuple[str, str, str], str] = _NONE,
    loops: bool = True,
    measured: bool = False,
    calls: int = CALLS,
) -> Found:
    """Price every candidate and return the cheapest over some calls, the first of which may compile.

    With ``deterministic`` only schedules that repeat bit for bit are candidates; what ``failed`` in a call is none,
    for the reason given there. Without ``loops`` nothing is cut into pieces to meet the budget, which takes seconds to
    find out where nothing meets it. Where candidates will be
    ``measured``, the tested schedules of backends that compile are among them.

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
    options = list(
        _options(spec, target, backend, strategy, deterministic=deterministic, failed=failed, measured=measured)
    )
    budget = target.device.memory if max_memory is None else max_memory
    fitting = [o for o in options if o[3].prediction and o[3].prediction.peak_bytes <= budget]
    if loops and (max_memory is not None or not fitting):
        fitting += _fitted(spec, target, options, budget, calls)
    kept = {id(o) for o in fitting}
    refused = [_over_budget(o[3], budget, max_memory) for o in options if id(o) not in kept]
    if not fitting:
        raise _nothing_fits(spec, target, options, refused, max_memory, loops=loops)
    fitting.sort(key=lambda o: _rank(o, calls))
    lowered, chosen_backend, schedule, candidate = fitting[0]
    return Found(lowered, candidate, chosen_backend, schedule, (*(o[3] for o in fitting), *refused), calls)


def _spread(prediction: Prediction | None, calls: int) -> float:
    """Return the seconds of a call with its share of the first one's compiling; infinite for what is refused."""
    return float("inf") if prediction is None else prediction.seconds + prediction.compile_seconds / calls


def _rank(option: Option, calls: int) -> float:
    """Return the seconds by which options are compared: a kernel that nobody has run has to be clearly faster."""
    _, _, schedule, candidate = option
    return _spread(candidate.prediction, calls) * (1.0 if schedule.tested else UNTRIED)


def candidates(spec: AttentionSpec, target: Target) -> tuple[Candidate, ...]:
    """Return every candidate, the accepted ones by predicted time, whether or not any can run."""
    found = sorted(_options(spec, target, "auto", "auto"), key=lambda o: _rank(o, CALLS))
    return tuple(option[3] for option in found)


def every_way(spec: AttentionSpec, target: Target) -> Iterator[tuple[Candidate, Found | None]]:
    """Iterate over every candidate, and what :class:`~attnplan.plan.Plan` needs to run it; None if it is refused.

    Unlike in a search, a backend that runs only when it is asked for by name is asked.
    """
    for name in registry().backends:
        for lowered, backend, schedule, option in _options(spec, target, name, "auto"):
            if backend.name == name:
                candidate = option
                if option.prediction and option.prediction.peak_bytes > target.device.memory:
                    candidate = _over_budget(option, target.device.memory, None)
                found = None if candidate.reasons else Found(lowered, option, backend, schedule, (option,))
                yield candidate, found


Choice = tuple[str, str, str]
"""(strategy, backend, schedule)."""
Option = tuple[Lowered, Backend, Schedule, Candidate]


def _options(
    spec: AttentionSpec,
    target: Target,
    backend: str,
    strategy: str,
    *,
    deterministic: bool = False,
    failed: Mapping[Choice, str] = _NONE,
    measured: bool = False,
) -> Iterator[Option]:
    found: dict[tuple[Tiling | None, bool], dict[str, Lowered]] = {}
    for name in STRATEGIES:
        for candidate_backend in registry().backends.values():
            if candidate_backend.naive == (name == "naive"):
                for schedule in candidate_backend.schedules(target.device):
                    tiling = schedule.tiling(spec.training)
                    by_name = found.setdefault((tiling, schedule.fused), {})
                    if not by_name:
                        by_name.update((x.strategy, x) for x in lowerings(spec, tiling, fused=schedule.fused))
                    lowered = by_name.get(name)
                    if lowered is not None:
                        if strategy in lowered.also:
                            lowered = attrs.evolve(lowered, strategy=strategy)
                        more = [*_more(lowered.strategy, candidate_backend, schedule, deterministic, failed)]
                        pins = (backend, strategy)
                        yield _option(spec, target, lowered, candidate_backend, schedule, pins, more, measured=measured)


def failing(candidates: Sequence[Candidate], choice: Choice, schedule: Schedule, why: str) -> dict[Choice, str]:
    """Return what is not tried after a choice failed: it, and what a kernel that skips tiles by itself runs as well."""
    strategy, backend, name = choice
    same = [c.strategy for c in candidates if schedule.kernel.skips and (c.backend, c.schedule) == (backend, name)]
    return {(one, backend, name): why for one in (strategy, *same)}


def _more(
    strategy: str, backend: Backend, schedule: Schedule, deterministic: bool, failed: Mapping[Choice, str]
) -> Iterator[str]:
    if deterministic and not schedule.deterministic:
        yield "deterministic=True was asked for, and it is not known to repeat bit for bit"
    if (strategy, backend.name, schedule.name) in failed:
        yield failed[strategy, backend.name, schedule.name]


def _option(
    spec: AttentionSpec,
    target: Target,
    lowered: Lowered,
    backend: Backend,
    schedule: Schedule,
    pins: tuple[str, str],
    more: Sequence[str] = (),
    *,
    measured: bool = False,
) -> Option:
    reasons = [*backend.missing(schedule, target), *fusion_missing(lowered.graph, target), *more]
    reasons += _pinned(lowered.strategy, backend.name, *pins)
    by_name = backend.by_name_only(spec, schedule, measured=measured) if pins[0] == "auto" else ""
    reasons += [by_name] if by_name else []
    reasons += backend.refuse(lowered.graph, spec, schedule, target.device)
    prediction = None if reasons else priced(lowered.graph, spec, schedule, target)
    candidate = Candidate(lowered.strategy, backend.name, schedule.name, prediction, tuple(reasons))
    return lowered, backend, schedule, candidate


def priced(graph: Graph, spec: AttentionSpec, schedule: Schedule, target: Target) -> Prediction:
    """Return what a graph takes under one schedule of a backend, with the seconds for which its first call compiles."""
    found = price(graph, spec, schedule.priced, target.device, parameters_for(target))
    once = schedule.compiles_for(spec.training)
    return attrs.evolve(found, compile_seconds=once) if once else found


def _way(spec: AttentionSpec, target: Target, backend: Backend, schedule: Schedule) -> Way:
    def price_it(graph: Graph) -> Prediction:
        return priced(graph, spec, schedule, target)

    def accepts(graph: Graph) -> bool:
        return not backend.refuse(graph, spec, schedule, target.device)

    return Way(spec, schedule.priced, target.device.kind, price_it, accepts)


def _fitted(spec: AttentionSpec, target: Target, options: Sequence[Option], budget: int, calls: int) -> list[Option]:
    """Return a loop that fits for each option that does not fit and is faster than all that do."""
    fits = [o for o in options if o[3].prediction and o[3].prediction.peak_bytes <= budget]
    best = min((_rank(o, calls) for o in fits), default=float("inf"))
    found: list[Option] = []
    over = [o for o in options if o[3].prediction and o[3].prediction.peak_bytes > budget]
    hopeless: set[_Kind] = set()
    for option in sorted(over, key=lambda o: _rank(o, calls)):
        if _rank(option, calls) >= best:  # a loop makes nothing faster
            break
        lowered, backend, schedule, candidate = option
        if _memory_kind(lowered, schedule) in hopeless:
            continue
        fitted = fit(lowered.graph, _way(spec, target, backend, schedule), budget, spec_coverage(spec))
        if fitted is None:
            hopeless.add(_memory_kind(lowered, schedule))
        else:
            looped = attrs.evolve(lowered, graph=fitted.graph, steps=(*lowered.steps, *fitted.steps))
            chosen = attrs.evolve(candidate, prediction=fitted.prediction, loop=fitted.title)
            found.append((looped, backend, schedule, chosen))
            best = min(best, _rank(found[-1], calls))
    return found


def fusion_missing(graph: Graph, target: Target) -> Iterator[str]:
    """Yield why this machine cannot run the kernels of our own that a graph asks for."""
    if target.torch_device is None or target.device.kind != "cuda":
        return
    if not any(n.op.pull for n in graph if isinstance(n.op, Merge | Mix)):
        return
    failure = import_failure("triton")
    if failure is not None:
        yield f"its joins are Triton kernels, and import of triton failed: {failure}"


def _pinned(has_strategy: str, name: str, backend: str, strategy: str) -> Iterator[str]:
    if strategy not in ("auto", has_strategy):
        yield f"strategy={strategy!r} was asked for"
    if backend not in ("auto", name):
        yield f"backend={backend!r} was asked for"


def without_schedules(device: Device) -> dict[str, str]:
    """Return the backends that have nothing for a device, each with that as its reason."""
    none = [b.name for b in registry().backends.values() if not b.schedules(device)]
    return dict.fromkeys(none, f"has no schedule for {device.name}, a {device.kind} device")


def _over_budget(candidate: Candidate, budget: int, max_memory: int | None) -> Candidate:
    if candidate.prediction is None:
        return candidate
    need = format_bytes(candidate.prediction.peak_bytes)
    limit = f"max_memory={format_bytes(budget)}" if max_memory else f"the device's {format_bytes(budget)}"
    return attrs.evolve(candidate, reasons=(f"needs {need} beside inputs and output, more than {limit}",))


def _masked(graph: Graph) -> bool:
    """Return whether kernels that know other conditions need other memory for a graph."""

    def needs_mask(node: Node, op: Attend) -> bool:
        q, k = (n.type.rows for n in graph.args(node)[:2])
        return op.tile is not None or slot_condition(op, q, k) == "mask"

    return any(needs_mask(node, op) for node, op in graph.of(Attend))


_Kind = tuple[Graph, bool, bool, str, bool, frozenset[str]]
"""What the memory of a candidate depends on."""


def _memory_kind(lowered: Lowered, schedule: Schedule) -> _Kind:
    kernel = schedule.kernel
    known = kernel.native if _masked(lowered.graph) else frozenset[str]()
    alike = like(schedule.priced.key)
    return lowered.graph, kernel.materialises, kernel.writes_into, alike, kernel.fuses, known


def _nothing_fits(
    spec: AttentionSpec,
    target: Target,
    options: Sequence[Option],
    refused: list[Candidate],
    max_memory: int | None,
    *,
    loops: bool,
) -> Exception:
    priced = [(c.prediction.peak_bytes, c.name) for _, _, _, c in options if c.prediction]
    if priced:
        need, name = min(priced)
        kinds: dict[_Kind, tuple[Option, Way]] = {}
        for option in options if loops else ():
            of, backend, schedule, candidate = option
            if candidate.prediction is not None:
                way = _way(spec, target, backend, schedule)
                kinds.setdefault(_memory_kind(of, schedule), (option, way))
        ways = list(kinds.values())
        found = least([(option[0].graph, way) for option, way in ways], need)
        if found:
            need, name = found.need, attrs.evolve(ways[found.index][0][3], loop=found.title).name
        whole = "" if loops else " in one piece"
        what = f"the smallest plan{whole}, {name}, needs {format_bytes(need)} beside its inputs and output"
        smaller = "try a smaller batch" if spec.batch > 1 else "try a shorter sequence"
        if max_memory is None:
            has = format_bytes(target.device.memory)
            return MemoryBudgetError(f"{what}, {target.device.name} has {has}; {smaller}, or a sparser pattern")
        enough = f"{-(-need // 2**10)} KiB"  # rounded up, so that what is proposed works
        return MemoryBudgetError(f"{what}, budget {format_bytes(max_memory)}; {smaller}, or max_memory={enough!r}")
    lines = [f"  {c.name}: {'; '.join(c.reasons)}" for c in refused]
    lines += [f"  {name}: {reason}" for name, reason in without_schedules(target.device).items()]
    lines += [f"  {name}: {reason}" for name, reason in registry().broken.items()]
    return NoBackendError(f"no backend can run this on {target.device.name}:\n" + "\n".join(lines))
