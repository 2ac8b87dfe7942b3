"""Fitting the numbers of the cost model to measurements: damped least squares on the logarithms of times.

Every number starts at its published value and is pulled towards it a little, so that what no measurement speaks of
stays what it was. Measurements that are badly off, a disturbed round say, count less (Huber).

References
----------
Marquardt, SIAM J. Appl. Math. 11, 1963; Huber, Ann. Math. Statist. 35, 1964.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import exp, log

import attrs
import numpy as np

from attnplan.cost.device import Device
from attnplan.cost.model import Load, timed
from attnplan.cost.parameters import CALIBRATED, Parameters
from attnplan.cost.rules import FREE, KernelModel
from attnplan.spec import AttentionSpec

PULL = 0.12
"""Weight of a published value beside one measurement."""
NOISE = 0.15
"""Relative errors beyond which a measurement counts less."""
HOST_WEIGHT = 0.5
HOST_SEEN = 0.3
"""Share of a call below which the host's time is not fitted: it slept while the device worked, and wakes slowly."""
ROUNDS, STEPS = 5, 4
MOST_STEP = 0.7
"""Largest change of a logarithm in one step."""
LIMITS = {"quantum": 1.0, "peak": 1.5, "memory": 1.5, "copy": 1.5, "join": 1.5, "gather": 1.5}
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

    @classmethod
    def of(
        cls,
        loads: Sequence[Load],
        spec: AttentionSpec,
        kernel: KernelModel,
        seconds: float | None,
        alone: float | None = None,
        host: float | None = None,
    ) -> Sample:
        """Return a sample of what costs anything."""
        kept = tuple(x for x in loads if x.forward is not FREE or x.backward is not FREE)
        return cls(kept, spec, kernel, seconds, alone, host)

    def errors(self, device: Device, table: Parameters) -> Iterator[tuple[float, float]]:
        """Iterate over (logarithm of predicted over measured, weight)."""
        ops, seconds, host = timed(self.loads, self.spec, self.kernel, device, table)
        if self.seconds is not None:
            yield log(seconds / self.seconds), 1.0
        if self.alone is not None:
            yield log(max(1e-9, sum(op.seconds for op in ops)) / self.alone), 1.0
        if self.host is not None and self.host > HOST_SEEN * (self.seconds or 0.0):
            yield log(host / self.host), HOST_WEIGHT


def fitted(samples: Sequence[Sample], device: Device, start: Parameters) -> tuple[Parameters, dict[str, float]]:
    """Return a table fitted to samples, and the numbers that changed.

    Numbers of one kernel are fitted to its own samples, those that all share to all, by turns.

    Parameters
    ----------
    samples
        Measurements of one device.
    device
        The device; numbers are shares of its data-sheet figures.
    start
        The published numbers, towards which the fit is pulled.
    """
    origin = start.numbers()
    table = start
    by_kernel: dict[str, list[Sample]] = {}
    for sample in samples:
        by_kernel.setdefault(sample.kernel.key, []).append(sample)
    for _ in range(ROUNDS):
        for key, own in by_kernel.items():
            names = [n for n in origin if n.startswith(f"kernels/{key}/")]
            table = _stepped(names, own, device, table, origin)
        shared = [n for n in origin if not n.startswith("kernels/")]
        table = _stepped(shared, samples, device, table, origin)
    numbers = {n: float(f"{x:.5g}") for n, x in table.numbers().items() if abs(log(x / origin[n])) > 1e-4}
    return start.replaced(numbers, CALIBRATED), numbers


def _stepped(
    names: Sequence[str], samples: Sequence[Sample], device: Device, table: Parameters, origin: Mapping[str, float]
) -> Parameters:
    if not names or not samples:
        return table
    damping = 1e-3
    errors, loss = _loss(names, samples, device, table, origin)
    for _ in range(STEPS):
        slope = _jacobian(names, samples, device, table, origin, errors)
        normal, gradient = slope.T @ slope, slope.T @ errors
        step = -np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), gradient)
        tried = _moved(table, names, np.clip(step, -MOST_STEP, MOST_STEP))
        new_errors, new_loss = _loss(names, samples, device, tried, origin)
        if new_loss < loss:
            table, errors, loss, damping = tried, new_errors, new_loss, damping / 4
        else:
            damping *= 20
    return table


def _loss(
    names: Sequence[str], samples: Sequence[Sample], device: Device, table: Parameters, origin: Mapping[str, float]
) -> tuple[np.ndarray, float]:
    found = [(e, w) for sample in samples for e, w in sample.errors(device, table)]
    raw = np.array([e for e, _ in found])
    weights = np.array([w for _, w in found]) * np.sqrt(NOISE / np.maximum(np.abs(raw), NOISE))
    numbers = table.numbers()
    pull = np.array([PULL * log(numbers[n] / origin[n]) for n in names])
    errors = np.concatenate([raw * weights, pull])
    return errors, float(errors @ errors)


def _jacobian(
    names: Sequence[str],
    samples: Sequence[Sample],
    device: Device,
    table: Parameters,
    origin: Mapping[str, float],
    errors: np.ndarray,
) -> np.ndarray:
    small = 0.02
    columns = [
        (_loss(names, samples, device, _moved(table, [name], np.array([small])), origin)[0] - errors) / small
        for name in names
    ]
    if any(len(c) != len(errors) for c in columns):  # a pull has one entry for each name, moved or not
        raise AssertionError("as many errors for every number")
    return np.stack(columns, axis=1)


def _moved(table: Parameters, names: Sequence[str], step: np.ndarray) -> Parameters:
    numbers = table.numbers()
    changed = {}
    for name, by in zip(names, step, strict=True):
        limit = min((most for part, most in LIMITS.items() if part in name.split("/")), default=float("inf"))
        changed[name] = min(limit, numbers[name] * exp(float(by)))
    return table.replaced(changed, table.basis, table.note)
