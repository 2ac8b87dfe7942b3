"""Measured times beside the predicted ones: of whole calls, and of every op of the emitted program."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.errors import NoBackendError
from attnplan.ir import Attend, Input, Node, Output, Take

if TYPE_CHECKING:
    from attnplan.plan import Plan

FEWEST, MOST, SECONDS = 3, 25, 1.0
"""Rounds: as many as fit in about this many seconds, within these bounds."""
_QUEUED = 100_000_000
"""Clock cycles for which a GPU is kept busy while the host enqueues a watched call, about 50 ms."""


@attrs.frozen
class Measured:
    """What calls of a plan took on this machine, on random inputs."""

    times: tuple[float, ...] = attrs.field(validator=attrs.validators.min_len(1))
    """Seconds of each whole call, forward and backward if the spec says ``training``."""
    timer: str
    """``"CUDA events"`` or ``"clock"``."""
    ops: Mapping[int, float] | None = None
    """Median seconds of each op by node, or None where ops cannot be told apart."""
    other: float | None = None
    """Median seconds of what belongs to no op: conversions, sums of gradients."""
    note: str = ""
    """Why there are no ops, or what stands in for them."""

    @property
    def seconds(self) -> float:
        """Median seconds of a whole call."""
        return median(self.times)

    @property
    def ops_seconds(self) -> float | None:
        """What the ops take together, each in the median."""
        return None if self.ops is None else sum(self.ops.values()) + (self.other or 0.0)

    def facts(self) -> dict[str, Any]:
        """Return the figures of the whole call as plain data."""
        return {
            "seconds": self.seconds,
            "fastest_seconds": min(self.times),
            "slowest_seconds": max(self.times),
            "rounds": len(self.times),
            "timer": self.timer,
            "ops_seconds": self.ops_seconds,
            "other_seconds": self.other,
            "note": self.note,
        }


def measure(plan: Plan, seed: int = 0) -> Measured:
    """Time calls of a plan, and in as many further calls each of its ops.

    Parameters
    ----------
    plan
        A plan for a device that is here. A spec with open lengths is measured at their maximum.
    seed
        Seed of the random inputs.

    Returns
    -------
    Measured
        Medians. Watched calls run node by node, so that the time of an op is that of its own code: on CUDA between
        two events on a stream that is never idle, on the CPU by the clock. What the host does between ops is in the
        whole call only.

    Raises
    ------
    NoBackendError
        If the plan is for hardware that is not here.

    Notes
    -----
    Other threads must not call plans meanwhile: what they run would be counted.

    Examples
    --------
    >>> import attnplan
    >>> spec = attnplan.AttentionSpec(seq_len=64, heads=2, head_dim=8, causal=True, dtype="float32")
    >>> found = measure(attnplan.compile(spec))
    >>> len(found.times) >= 3, list(found.ops)
    (True, [3])
    """
    if plan.target.torch_device is None:
        raise NoBackendError(
            f"nothing can be measured: {plan.device.title} is not here; leave measuring out, or plan for device='auto'"
        )
    import torch

    from attnplan.runtime.ranges import Watch

    call = Call.of(plan, seed, backward=plan.spec.training)
    device = torch.device(str(plan.target.torch_device))
    call()  # emits, builds tables
    warm = Watch(device)
    with warm.call():  # the first run node by node is not counted
        call()
    watch, times = Watch(device), [call.timed()]
    while len(times) < max(FEWEST, min(MOST, int(SECONDS / times[0]))):
        times.append(call.timed())
        if warm.modules:
            with watch.call():
                if device.type == "cuda":
                    torch.cuda._sleep(_QUEUED)  # type: ignore[no-untyped-call]
                call()
    timer = "CUDA events" if device.type == "cuda" else "clock"
    return Measured(tuple(times), timer, *_ops(plan, watch.seconds(), warm.modules, median(times)))


Spans = Sequence[Mapping[tuple[int | None, str], float]]


def _ops(plan: Plan, calls: Spans, modules: int, whole: float) -> tuple[dict[int, float] | None, float | None, str]:
    """Return (seconds by op, seconds of the rest, remark) from watched calls in which ``modules`` modules ran."""
    if plan._next is not None:
        return None, None, f"the chosen kernel failed, and calls now run by {plan._next!r}"
    work = [n for n in plan.graph if not isinstance(n.op, Input | Output)]
    seen = modules >= (2 if plan.spec.training else 1)
    if len(work) == 1:
        every = [sum(call.values()) for call in calls]
        return {work[0].id: median(every) if seen else whole}, 0.0, "" if seen else "one op, which is the whole call"
    if not modules:
        return None, None, f"{plan.backend} emits no program whose ops can be told apart"
    if plan.program.follows_lengths:
        return None, None, "the program reads its lengths off its tensors, and its ops are not those of the plan"
    if not seen:
        return None, None, "torch differentiates this program itself, so that its backward has no ops of the plan"
    booked: list[dict[int | None, float]] = [{} for _ in calls]
    for call, into in zip(calls, booked, strict=True):
        for (op, tensor), seconds in call.items():
            owner = op if op is None else _owner(plan.graph[op], tensor, plan)
            into[owner] = into.get(owner, 0.0) + seconds
    found = {n.id: median([into.get(n.id, 0.0) for into in booked]) for n in work}
    launches = [n.op.launch for n in work if isinstance(n.op, Attend) and n.op.launch is not None]
    shared = "attends of one launch are one kernel call: its time stands with one of them"
    note = shared if len(set(launches)) < len(launches) else ""
    return found, median([into.get(None, 0.0) for into in booked]), note


def _owner(node: Node, tensor: str, plan: Plan) -> int:
    """Return the op that time is booked under: fetching the rows of an operand is its take, where it has one."""
    if not tensor:
        return node.id
    arg = plan.graph.args(node)["qkv".index(tensor)]
    return arg.id if isinstance(arg.op, Take) else node.id


@attrs.frozen(eq=False)
class Call:
    """A call of a plan on random inputs that can be repeated."""

    plan: Plan
    inputs: tuple[Any, ...]
    operands: Mapping[str, Any]
    grad: Any
    """Upstream gradient, or None for a forward alone."""

    @classmethod
    def of(cls, plan: Plan, seed: int, *, backward: bool) -> Call:
        """Return a call with random inputs, operands and upstream gradient, on the plan's device."""
        import torch

        from attnplan.verify import random_inputs, random_operands

        spec, device = plan.spec, plan.target.torch_device
        source = torch.Generator().manual_seed(seed)
        q, k, v = (x.to(device).requires_grad_(backward) for x in random_inputs(spec, source))
        operands = {name: x.to(device) for name, x in random_operands(spec, source).items()}
        grad = torch.randn(*q.shape[:-1], spec.value_dim, generator=source).to(q) if backward else None
        return cls(plan, (q, k, v), operands, grad)

    def __call__(self) -> None:
        """Run it once."""
        import torch

        out = self.plan(*self.inputs, **self.operands)
        if self.grad is not None:
            torch.autograd.grad(out, self.inputs, self.grad)

    def timed(self) -> float:
        """Run it once and return the seconds that it took."""
        import torch

        if not self.inputs[0].is_cuda:
            began = time.perf_counter()
            self()
            return time.perf_counter() - began
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
