"""Measured search: the best few by price are run on the real shapes, and the fastest is kept for the next time.

A choice is remembered in the user's cache with the fingerprint of the machine; on another device, driver or version it
is measured again. Pins stay: only what they allow is measured. Who measures spends seconds already, so candidates that
compile at their first call are among them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.cost import Target, cache
from attnplan.cost.calibration import fingerprint
from attnplan.errors import AttnPlanError, NoBackendError, SpecError
from attnplan.plan import Plan
from attnplan.search import Candidate, Choice, Found, search
from attnplan.spec import AttentionSpec

if TYPE_CHECKING:
    from attnplan.runtime.clock import Times

SCHEMA = 1
"""Version of the files that remember choices."""
MOST = 5
"""Candidates that are measured at most."""
WITHIN = 2.0
"""Candidates that are predicted to take this many times as long as the best are measured; two always are."""


@attrs.frozen
class Trial:
    """One candidate that was measured."""

    name: str
    predicted: float
    """Seconds of a call."""
    seconds: float | None
    """Median of what it took; None if it failed."""
    spread: float = 0.0
    """By which share of the median rounds differ."""
    failed: str = ""


@attrs.frozen
class Tuning:
    """What a measured search found."""

    choice: Choice
    trials: tuple[Trial, ...]
    """The candidates in the order of their prices."""
    remembered: bool = False
    """Whether it comes from the cache."""

    @property
    def chosen(self) -> Trial:
        """The fastest trial."""
        return min((t for t in self.trials if t.seconds is not None), key=lambda t: t.seconds or 0.0)

    @property
    def error(self) -> float:
        """Predicted over measured time of the chosen candidate, minus 1."""
        return self.chosen.predicted / (self.chosen.seconds or 1.0) - 1

    @property
    def gain(self) -> float:
        """By which share of the measured best the model's own choice would have been slower."""
        first = self.trials[0].seconds
        return 0.0 if first is None else first / (self.chosen.seconds or 1.0) - 1

    def facts(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "seconds": self.chosen.seconds,
            "error": self.error,
            "gain": self.gain,
            "remembered": self.remembered,
            "trials": [attrs.asdict(t) for t in self.trials],
        }


def tuned(spec: AttentionSpec, target: Target, pins: Mapping[str, Any], *, deterministic: bool) -> tuple[Found, Tuning]:
    """Return the candidate that is fastest on this machine, and what was measured.

    Parameters
    ----------
    spec
        What to compute; a spec with open lengths is measured at their maximum.
    target
        A device that is here.
    pins
        ``backend``, ``strategy`` and ``max_memory``, as :func:`~attnplan.search.search` takes them.
    deterministic
        As in :func:`attnplan.compile`.

    Raises
    ------
    NoBackendError
        If the device is not here, or every candidate that was tried failed.
    """
    if target.torch_device is None:
        raise NoBackendError(
            f"tune=True measures, and {target.device.title} is not here; leave it out to plan by price"
        )
    found = search(spec, target, **pins, deterministic=deterministic, measured=True)
    few = _few(found)
    name = _file(spec, target, pins, deterministic)
    kept = _remembered(name, target, few) if name else None
    if kept is None:
        kept = _measured(spec, target, pins, few, deterministic)
        if name:
            _remember(name, target, kept)
    return _only(kept.choice, spec, target, pins, found, deterministic), kept


def _choice(candidate: Candidate) -> Choice:
    return candidate.strategy, candidate.backend, candidate.schedule


def _few(found: Found) -> list[Candidate]:
    """Return the candidates that are worth a measurement, the cheapest first."""
    accepted = [c for c in found.candidates if c.prediction is not None and not c.reasons]
    limit = WITHIN * (accepted[0].prediction.seconds if accepted[0].prediction else 0.0)
    near = [c for c in accepted if c.prediction is not None and c.prediction.seconds <= limit]
    return accepted[: max(2, min(MOST, len(near)))]


def _only(
    choice: Choice, spec: AttentionSpec, target: Target, pins: Mapping[str, Any], found: Found, deterministic: bool
) -> Found:
    """Return what a search finds if this choice is the only one, with every candidate in its report."""
    others = {_choice(c): "is slower, as was measured" for c in found.candidates if not c.reasons}
    others.pop(choice)
    alone = search(spec, target, **pins, deterministic=deterministic, failed=others, measured=True)
    candidate = next(c for c in found.candidates if _choice(c) == choice and not c.reasons)
    return attrs.evolve(alone, candidate=candidate, candidates=found.candidates)


def _measured(
    spec: AttentionSpec, target: Target, pins: Mapping[str, Any], few: list[Candidate], deterministic: bool
) -> Tuning:
    import torch

    from attnplan.runtime.clock import Call, Plenty, race
    from attnplan.verify import random_inputs, random_operands

    generator = torch.Generator().manual_seed(0)
    device = target.torch_device
    inputs = [x.to(device).requires_grad_(spec.training) for x in random_inputs(spec, generator)]
    operands = {name: x.to(device) for name, x in random_operands(spec, generator).items()}
    whole = search(spec, target, **pins, deterministic=deterministic, measured=True)
    on_gpu = target.device.kind == "cuda"
    times: dict[str, Times] = {}
    failures: dict[str, str] = {}
    calls: dict[str, Call] = {}
    for candidate in few:
        way = _only(_choice(candidate), spec, target, pins, whole, deterministic)
        plan = Plan(spec, target, way, {"backend": candidate.backend}, strict=True)
        calls[candidate.name] = _call(plan, inputs, operands, training=spec.training)
        try:
            calls[candidate.name]()
        except (RuntimeError, AttnPlanError) as error:
            failures[candidate.name] = " ".join(str(error).split())[:200]
            del calls[candidate.name]
    if calls:
        times = race(calls, on_gpu, Plenty(seconds=0.3, slow=1.0))
    trials = tuple(_trial(c, times.get(c.name), failures.get(c.name, "")) for c in few)
    if not times:
        raise NoBackendError("; ".join(f"{name} failed: {why}" for name, why in failures.items()))
    best = min(times, key=lambda name: times[name].median)
    return Tuning(next(_choice(c) for c in few if c.name == best), trials)


def _trial(candidate: Candidate, times: Times | None, failed: str) -> Trial:
    predicted = candidate.prediction.seconds if candidate.prediction else 0.0
    if times is None:
        return Trial(candidate.name, predicted, None, failed=failed)
    return Trial(candidate.name, predicted, times.median, times.spread)


def _call(plan: Plan, inputs: list[Any], operands: Mapping[str, Any], *, training: bool) -> Any:
    import torch

    q, k, v = inputs

    def forward() -> None:
        with torch.no_grad():
            plan(q, k, v, **operands)

    def both() -> None:
        out = plan(q, k, v, **operands)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return both if training else forward


def _file(spec: AttentionSpec, target: Target, pins: Mapping[str, Any], deterministic: bool) -> str:
    """Return the name under which a choice is remembered; empty if the spec has no text form."""
    try:
        described = spec.to_dict()
    except SpecError:  # a mask function
        return ""
    key = [described, target.device.name, dict(pins), deterministic]
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return f"tuned-{digest}.json"


def _remembered(name: str, target: Target, few: list[Candidate]) -> Tuning | None:
    """Return what was found earlier on this machine; None if nothing was, or it does not fit any more."""
    kept = cache.read(name, SCHEMA)
    if kept.note:
        warnings.warn(f"{kept.note}; measuring again", RuntimeWarning, stacklevel=5)
    if kept.data is None or kept.data.get("fingerprint") != json.loads(json.dumps(fingerprint(target.device))):
        return None
    try:
        trials = tuple(Trial(**t) for t in kept.data["trials"])
        strategy, backend, schedule = kept.data["choice"]
        found = Tuning((strategy, backend, schedule), trials, remembered=True)
        known = {c.name: _choice(c) for c in few}
        fits = known.get(found.chosen.name) == found.choice
    except (KeyError, TypeError, ValueError):
        return None
    return found if fits else None


def _remember(name: str, target: Target, found: Tuning) -> None:
    data = {
        "fingerprint": fingerprint(target.device),
        "choice": list(found.choice),
        "trials": [attrs.asdict(t) for t in found.trials],
    }
    try:
        cache.write(name, SCHEMA, data)
    except SpecError as error:
        warnings.warn(f"{error}; the tuned choice is not remembered", RuntimeWarning, stacklevel=5)
