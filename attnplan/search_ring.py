"""The search for a plan over several ranks: layout, transport and kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs

from attnplan.backends import Backend, Schedule, registry
from attnplan.cost import Device, Target, resolve
from attnplan.errors import MemoryBudgetError, NoBackendError, SpecError, did_you_mean
from attnplan.ir import Graph
from attnplan.ring.build import programs
from attnplan.ring.choose import RingCandidate, choose
from attnplan.ring.layouts import LAYOUTS
from attnplan.ring.price import Kernel
from attnplan.ring.room import Room, room_of
from attnplan.ring.transports import TRANSPORTS
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes


@attrs.frozen
class Runner:
    """A backend's schedule that may run graphs of a ring."""

    backend: Backend
    schedule: Schedule

    @property
    def name(self) -> str:
        """The runner as reports write it."""
        return f"{self.backend.name} ({self.schedule.name})"


@attrs.frozen(eq=False)
class RingPrediction:
    """What a call is expected to take."""

    seconds: float
    """Time of the slowest rank: forward, or forward and backward if the spec says ``training``."""
    rank_peak_bytes: int
    """Memory beside inputs and output of the rank that needs the most, were each rank on a device of its own."""
    compile_seconds: float = 0.0
    """Seconds for which the first call compiles, once; no part of :attr:`seconds`."""
    _whole: Callable[[], int] | None = None
    """Counts what all ranks hold in one process; None where each has its own."""

    @cached_property
    def peak_bytes(self) -> int:
        """Memory that a call takes in this process, beside what it is given and returns.

        On a mesh that is :attr:`rank_peak_bytes`; of a virtual ring, all that its ranks hold at once.
        """
        return self.rank_peak_bytes if self._whole is None else self._whole()


@attrs.frozen
class FoundRing:
    """What planning a ring found."""

    candidates: tuple[RingCandidate, ...]
    runners: tuple[Runner, ...]
    """The first that accepts a graph runs it."""
    refused: tuple[tuple[str, tuple[str, ...]], ...]
    """Backends and schedules that are not here or not asked for, with every reason."""


def search_ring(
    spec: AttentionSpec,
    target: Target,
    ranks: int | tuple[int, int],
    pins: Mapping[str, Any],
    *,
    deterministic: bool = False,
    virtual: bool = False,
) -> FoundRing:
    """Choose layout, transport and kernels for a spec over some ranks; ``pins`` are those of :class:`Plan`.

    With ``virtual`` all ranks are in one process, and a budget is for what they hold together.

    Raises
    ------
    MemoryBudgetError
        If no rank's part fits the budget, or of a virtual ring not all parts together.
    SpecError
        If the backend or the strategy is unknown.
    NoBackendError
        If no backend can run the ranks' graphs.
    RingError
        If no layout and transport can carry the spec, or it has operands that a ring has no gradients for.
    """
    spec = without_sinks(spec)
    layout, transport = split_strategy(pins["strategy"])
    accepted, refused = _runners(target, pins["backend"], deterministic=deterministic)
    if not accepted:
        lines = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in refused)
        raise NoBackendError(f"no backend can run a ring on {target.device.name}:\n{lines}")
    kernels = [_kernel(r, spec, target.device) for r in accepted]

    def whole(one: RingCandidate) -> int:
        return whole_peak(spec, one, _ordered(one, accepted), target.device)

    priced = choose(spec, ranks, target.device, layout, transport, kernels)
    together = virtual and pins["max_memory"] is not None
    found = _within(priced, target, pins["max_memory"], whole if together else None)
    return FoundRing(found, _ordered(found[0], accepted), tuple(refused))


def without_sinks(spec: AttentionSpec) -> AttentionSpec:
    """Return what ranks compute together: each row's sink joins its softmax at the end, where the row is."""
    return attrs.evolve(spec, sink_logits=False) if spec.sink_logits else spec


def split_strategy(strategy: str) -> tuple[str, str]:
    """Return layout and transport of a strategy: ``"auto"``, ``"zigzag"``, ``"rows"`` or ``"contiguous > halo"``.

    Examples
    --------
    >>> split_strategy("zigzag > ring"), split_strategy("rows"), split_strategy("striped > hybrid 4x2")
    (('zigzag', 'ring'), ('auto', 'rows'), ('striped', 'hybrid 4x2'))
    """
    if strategy == "auto":
        return "auto", "auto"
    names = [part.strip() for part in strategy.split(">")]
    known = [*LAYOUTS, *TRANSPORTS, "auto"]
    bare = [re.sub(r"^hybrid +\d+x\d+$", "hybrid", name) for name in names]
    if len(names) == 1:
        if bare[0] in LAYOUTS:
            return names[0], "auto"
        if bare[0] in TRANSPORTS:
            return "auto", names[0]
    elif len(names) == 2 and bare[0] in (*LAYOUTS, "auto") and bare[1] in (*TRANSPORTS, "auto"):
        return names[0], names[1]
    bad = next((n for n in bare if n not in known), strategy)
    raise SpecError(
        f"unknown strategy {strategy!r} for a ring{did_you_mean(bad, known)}; it is a layout, a transport, or both, "
        "such as 'zigzag > ring' or 'contiguous > hybrid 4x2'"
    )


def _within(
    candidates: tuple[RingCandidate, ...],
    target: Target,
    max_memory: int | None,
    whole: Callable[[RingCandidate], int] | None,
) -> tuple[RingCandidate, ...]:
    """Return the candidates with those refused that need more than there is, up to the first that fits.

    ``whole`` counts what all ranks of a virtual ring hold at once. That takes a while, and is asked for a budget of the
    caller's only: a plan for a device may be looked at for what a mesh of such devices would do.
    """
    budget = target.device.memory if max_memory is None else max_memory
    limit = f"the device's {format_bytes(budget)}" if max_memory is None else f"max_memory={format_bytes(budget)}"

    def judged(one: RingCandidate, need: int, who: str) -> RingCandidate:
        if one.refused or need <= budget:
            return one
        return attrs.evolve(one, refused=f"{who} {format_bytes(need)} beside inputs and output, more than {limit}")

    found = [judged(one, one.peak_bytes, "a rank needs") for one in candidates]
    for i, one in enumerate(found):
        if whole is not None and not one.refused:
            found[i] = judged(one, whole(one), "all ranks here need")
        if not found[i].refused:
            return tuple(sorted(found, key=lambda c: bool(c.refused)))
    least = min((c for c in candidates if not c.refused), key=lambda c: c.peak_bytes)
    need, held = (least.peak_bytes, "on a rank") if whole is None else (whole(least), "for all ranks")
    raise MemoryBudgetError(
        f"the smallest ring, {least.name}, needs {format_bytes(need)} {held} beside inputs and output, more than "
        f"{limit}; try more ranks, or max_memory='{-(-need // 2**10)} KiB'"
    )


def whole_peak(spec: AttentionSpec, one: RingCandidate, runners: Sequence[Runner], device: Device) -> int:
    """Return the bytes that all ranks of a virtual ring hold at once, beside inputs and output of a call."""
    from attnplan.runtime.ring.peak import virtual_peak

    def room(graph: Graph) -> Room:
        return room_of(graph, spec, runner_of(graph, spec, runners, device).schedule.priced, device.kind)

    return virtual_peak(programs(spec, one.shape, one.layout, one.transport), spec, room, device.kind)


def runner_of(graph: Graph, spec: AttentionSpec, runners: Sequence[Runner], device: Device) -> Runner:
    """Return the first runner that takes a graph.

    Raises
    ------
    NoBackendError
        If none does.
    """
    reasons = []
    for runner in runners:
        why = runner.backend.refuse(graph, spec, runner.schedule, device)
        if not why:
            return runner
        reasons.append(f"  {runner.name}: {'; '.join(why)}")
    raise NoBackendError("no backend runs this graph of a ring:\n" + "\n".join(reasons) + f"\n{graph}")


def _ordered(candidate: RingCandidate, accepted: Sequence[Runner]) -> tuple[Runner, ...]:
    """Return the runners, the one first that runs most of a candidate."""
    most = _most_used(candidate)
    return tuple(sorted(accepted, key=lambda r: r.name != most))


def _runners(
    target: Target, backend: str, *, deterministic: bool
) -> tuple[list[Runner], list[tuple[str, tuple[str, ...]]]]:
    if backend != "auto":
        registry().get(backend)
    accepted, refused = [], []
    for one in registry().backends.values():
        for schedule in one.schedules(target.device):
            runner = Runner(one, schedule)
            reasons = list(one.missing(schedule, target))
            if backend not in ("auto", one.name):
                reasons.append(f"backend={backend!r} was asked for")
            elif backend == "auto" and not one.automatic:
                reasons.append(f"runs only when asked for by backend={one.name!r}")
            if deterministic and not schedule.deterministic:
                reasons.append("deterministic=True was asked for, and it is not known to repeat bit for bit")
            if reasons:
                refused.append((runner.name, tuple(reasons)))
            else:
                accepted.append(runner)
    return accepted, refused


def _kernel(runner: Runner, spec: AttentionSpec, device: Device) -> Kernel:
    def refuses(graph: Graph) -> tuple[str, ...]:
        return runner.backend.refuse(graph, spec, runner.schedule, device)

    return Kernel(runner.name, runner.schedule.priced, refuses)


def _most_used(candidate: RingCandidate) -> str:
    """Return the kernel that runs most of the slowest rank's time."""
    each: dict[str, float] = {}
    for hop in candidate.slowest.hops:
        each[hop.kernel] = each.get(hop.kernel, 0.0) + hop.compute
    return max(each, key=lambda name: each[name]) if each else ""


def sizes_of(mesh: Any, ring_size: int) -> Sequence[int]:
    """Return the sizes of a mesh's dimensions.

    Raises
    ------
    SpecError
        If it is no mesh, has more than two dimensions, or has another number of ranks than the spec.
    """
    shape = getattr(mesh, "shape", None)
    if shape is None or not hasattr(mesh, "get_group"):
        raise SpecError(
            f"mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}; "
            'make one by init_device_mesh("cuda", (ranks,))'
        )
    sizes = tuple(int(n) for n in shape)
    if len(sizes) not in (1, 2):
        raise SpecError(f"mesh has {len(sizes)} dimensions; use one, or two for a ring of groups that spread heads")
    total = sizes[0] * (sizes[1] if len(sizes) == 2 else 1)
    if ring_size not in (1, total):
        raise SpecError(f"ring_size={ring_size}, the mesh has {total} ranks; leave ring_size out")
    return sizes


def place_of(mesh: Any, device: object) -> tuple[Target, Any]:
    """Return the device of a ring, and what of its mesh two compilations must share to be the same.

    Raises
    ------
    SpecError
        If the device is another than that of the mesh.
    """
    if mesh is None:
        return resolve(device), None
    from attnplan.runtime.ring.groups import group_of

    kind = mesh.device_type
    target = resolve(kind if device == "auto" else device)
    if str(target.torch_device).partition(":")[0] != kind:
        raise SpecError(f"device={device!r} is not a device of the mesh, which is on {kind}; leave device= out")
    return target, (mesh, id(group_of(mesh)))
