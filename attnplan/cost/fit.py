"""Fitting the numbers of the cost model to measurements: damped least squares on the logarithms of times.

Every number starts at its published value and is pulled towards it a little, so that what no measurement speaks of
stays what it was. Measurements that are badly off, a disturbed round say, count less (Huber).

References
----------
Marquardt, SIAM J. Appl. Math. 11, 1963; Huber, Ann. Math. Statist. 35, 1964.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import exp, log
from statistics import median

import attrs
import numpy as np

from attnplan.cost.device import Device
from attnplan.cost.model import Load, timed
from attnplan.cost.parameters import CALIBRATED, Parameters
from attnplan.cost.rules import FREE
from attnplan.cost.setting import KernelModel
from attnplan.spec import AttentionSpec

PULLS = {"peak": 1.0, "half": 0.15, "causal": 1.5, "causal_backward": 1.5, "masked": 0.8}
"""Weights of published values beside one measurement, by the part of their path that says what they are."""
PULL = 0.5
"""Weight of the others, which are estimates."""
NOISE = 0.15
"""Relative errors beyond which a measurement counts less."""
COMMON_PULL = 0.2
"""By how much the common factors are pulled towards 1, against what numbers of their own are."""
HOST_WEIGHT = 0.5
BOUND = 0.9
"""Share of a call from which the host's time decides what it takes."""
DOUBT = 1.0
"""Measurements that a run's pace is held against, as if they had been made at the usual one."""
HOST_SEEN = 0.3
"""Share of a call below which the host's time is not fitted: it slept while the device worked, and wakes slowly."""
ROUNDS, STEPS = 5, 4
MOST_STEP = 0.7
"""Largest change of a logarithm in one step."""
LEAST = {"few": 1.0, "lone": 1.0}
"""Smallest values of some numbers, likewise."""
LIMITS = {"exposed": 0.1, "quantum": 1.0, "peak": 1.5, "direct": 1.0, "quick": 1.0} | dict.fromkeys(
    ("memory", "copy", "join", "own_copy", "own_join", "gather"), 1.5
)
"""Largest values of some numbers, by the part of their path that says what they are."""


@attrs.frozen(eq=False)
class Sample:
    """One measurement."""

    loads: tuple[Load, ...]
    spec: AttentionSpec
    kernel: KernelModel
    seconds: float | None
    """Seconds of a call; None if only the device was looked at."""
    alone: float | None = None
    """Seconds of the device alone; None where the host is the device."""
    host: float | None = None
    """Seconds of the host; None where the host is the device."""
    exposed: float = 0.0
    """Share of the shorter of the device's and the host's time that :attr:`seconds` holds beside the longer."""
    run: str = ""
    """What was measured by turns with it, on a host that worked at one pace; nothing if that is not known."""

    @classmethod
    def of(
        cls,
        loads: Sequence[Load],
        spec: AttentionSpec,
        kernel: KernelModel,
        seconds: float | None,
        alone: float | None = None,
        host: float | None = None,
        exposed: float = 0.0,
        run: str = "",
    ) -> Sample:
        """Return a sample of what costs anything."""
        kept = tuple(x for x in loads if x.forward is not FREE or x.backward is not FREE)
        return cls(kept, spec, kernel, seconds, alone, host, exposed, run)

    def predicted(self, device: Device, table: Parameters) -> tuple[float, float, float]:
        """Return the seconds that a table predicts: of what was measured, of the device alone, and of the host."""
        ops, seconds, host = timed(self.loads, self.spec, self.kernel, device, table)
        alone = sum(op.seconds for op in ops)
        return seconds + max(0.0, self.exposed - table.exposed) * min(alone, host), alone, host

    def errors(self, device: Device, table: Parameters) -> Iterator[tuple[float, float]]:
        """Iterate over (logarithm of predicted over measured, weight)."""
        seconds, alone, host = self.predicted(device, table)
        if self.seconds is not None:
            yield log(seconds / self.seconds), 1.0
        if self.alone is not None:
            yield log(max(1e-9, alone) / self.alone), 1.0
        if self.host is not None and self.host > HOST_SEEN * (self.seconds or 0.0):
            yield log(host / self.host), HOST_WEIGHT

    def at_usual_pace(self, pace: float) -> Sample:
        """Return what would have been measured had the host not taken ``pace`` times as long as it usually does."""
        if self.host is None or pace == 1.0:
            return self
        host, seconds = self.host / pace, self.seconds
        if seconds is not None and self.host > BOUND * seconds:
            seconds = max(self.alone or 0.0, seconds - self.host + host)
        return attrs.evolve(self, host=host, seconds=seconds)


HIDDEN = 0.5
"""Share of a call below which the host's time is hidden by the device's."""


def alone(seconds: float, device: Sequence[float], host: float) -> float | None:
    """Return the seconds of the device alone; None where the host may have kept it waiting.

    Parameters
    ----------
    seconds, host
        Of a call, back to back with others.
    device
        Times of the device that hold no time of the host, where they were taken.

    Examples
    --------
    >>> alone(2e-3, [1e-3, 1.1e-3, 1.2e-3], 1.9e-3), alone(9e-3, [], 1e-3), alone(9e-3, [], 8e-3)
    (0.0011, 0.009, None)
    """
    if device:
        return min(median(device), seconds)
    return seconds if host < HIDDEN * seconds else None


def fitted(samples: Sequence[Sample], device: Device, start: Parameters) -> tuple[Parameters, dict[str, float]]:
    """Return a table fitted to samples, and the numbers that changed.

    First what all kernels have in common is found: by which factors rates, the host's times and the shares of the
    bandwidth differ from the published ones. Then numbers of one kernel are fitted to its own samples, those that all
    share to all, by turns, pulled towards the published ones times these factors.

    Parameters
    ----------
    samples
        Measurements of one device.
    device
        The device; numbers are shares of its data-sheet figures.
    start
        The published numbers, towards which the fit is pulled.
    """
    published = start.numbers()
    table = _together(samples, device, start)
    origin = table.numbers()
    for _ in range(ROUNDS):
        paced = _at_usual_pace(samples, device, table)
        for key in dict.fromkeys(s.kernel.key for s in paced):
            names = [(n,) for n in origin if n.startswith(f"kernels/{key}/")]
            table = _stepped(names, [s for s in paced if s.kernel.key == key], device, table, origin)
        shared = [(n,) for n in origin if not n.startswith("kernels/")]
        table = _stepped(shared, paced, device, table, origin)
    numbers = {n: float(f"{x:.5g}") for n, x in table.numbers().items() if abs(log(x / published[n])) > 1e-4}
    return start.replaced(numbers, CALIBRATED), numbers


def _at_usual_pace(samples: Sequence[Sample], device: Device, table: Parameters) -> list[Sample]:
    """Return samples without what their runs have in common: a host is up to twice as slow in some as in others."""
    errors: dict[str, list[float]] = {}
    for sample in samples:
        if sample.run and sample.host is not None and sample.host > HOST_SEEN * (sample.seconds or 0.0):
            errors.setdefault(sample.run, []).append(log(sample.host / sample.predicted(device, table)[2]))
    paces = {run: exp(sum(found) / (len(found) + DOUBT)) for run, found in errors.items()}
    return [s.at_usual_pace(paces.get(s.run, 1.0)) for s in samples]


COMMON = (
    frozenset({"peak"}),
    frozenset({"host", "backward_host", "packed", "call", "backward_call", "operator", "fused"}),
    frozenset({"memory", "copy", "join", "own_copy", "own_join", "gather"}),
)
"""Numbers that a machine may have by one factor larger or smaller than published: rates, the host, the memory."""


def _together(samples: Sequence[Sample], device: Device, table: Parameters) -> Parameters:
    """Return a table whose numbers are moved by what all samples have in common: little is known of each kernel."""
    origin = table.numbers()
    groups = [tuple(n for n in origin if parts & set(n.split("/"))) for parts in COMMON]
    return _stepped(groups, samples, device, table, origin, COMMON_PULL)


def _pull(name: str) -> float:
    return next((PULLS[part] for part in name.split("/") if part in PULLS), PULL)


Groups = Sequence[tuple[str, ...]]
"""Names of the numbers that one step moves by one factor."""


def _stepped(
    groups: Groups,
    samples: Sequence[Sample],
    device: Device,
    table: Parameters,
    origin: Mapping[str, float],
    pull: float = 1.0,
) -> Parameters:
    """Return a table after some steps of Gauss and Newton, damped as Levenberg and Marquardt do."""
    if not groups or not samples:
        return table
    damping = 1e-3

    def loss_of(tried: Parameters) -> tuple[np.ndarray, float]:
        return _loss(groups, samples, device, tried, origin, pull)

    errors, loss = loss_of(table)
    for _ in range(STEPS):
        slope = _jacobian(groups, table, errors, loss_of)
        normal, gradient = slope.T @ slope, slope.T @ errors
        step = -np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), gradient)
        tried = _moved(table, groups, np.clip(step, -MOST_STEP, MOST_STEP))
        new_errors, new_loss = loss_of(tried)
        if new_loss < loss:
            table, errors, loss, damping = tried, new_errors, new_loss, damping / 4
        else:
            damping *= 20
    return table


def _loss(
    groups: Groups,
    samples: Sequence[Sample],
    device: Device,
    table: Parameters,
    origin: Mapping[str, float],
    pull: float,
) -> tuple[np.ndarray, float]:
    found = [(e, w) for sample in samples for e, w in sample.errors(device, table)]
    raw = np.array([e for e, _ in found])
    weights = np.array([w for _, w in found]) * np.sqrt(NOISE / np.maximum(np.abs(raw), NOISE))
    numbers = table.numbers()
    pulled = np.array([pull * _pull(g[0]) * log(numbers[g[0]] / origin[g[0]]) for g in groups])
    errors = np.concatenate([raw * weights, pulled])
    return errors, float(errors @ errors)


def _jacobian(
    groups: Groups,
    table: Parameters,
    errors: np.ndarray,
    loss_of: Callable[[Parameters], tuple[np.ndarray, float]],
) -> np.ndarray:
    small = 0.02
    columns = [(loss_of(_moved(table, [group], np.array([small])))[0] - errors) / small for group in groups]
    if any(len(c) != len(errors) for c in columns):  # a pull has one entry for each group, moved or not
        raise AssertionError("as many errors for every number")
    return np.stack(columns, axis=1)


def _moved(table: Parameters, groups: Groups, step: np.ndarray) -> Parameters:
    numbers = table.numbers()
    changed = {}
    for group, by in zip(groups, step, strict=True):
        for name in group:
            limit = min((most for part, most in LIMITS.items() if part in name.split("/")), default=float("inf"))
            least = max((x for part, x in LEAST.items() if part in name.split("/")), default=0.0)
            changed[name] = max(least, min(limit, numbers[name] * exp(float(by))))
    return table.replaced(changed, table.basis, table.note)
