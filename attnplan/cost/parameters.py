"""What the cost model knows about kernels and operators: a table of numbers that calibration replaces.

Rates are fractions of a device's data-sheet figures, so that a table serves every device of its kind. The table that
comes with the package, ``kernels.toml``, holds what publications say; a calibration holds what was measured.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import attrs

from attnplan.errors import SpecError

DATA_SHEET, CALIBRATED, SHIPPED = "data sheet", "calibrated", "calibrated elsewhere"
"""Bases of a prediction."""


@attrs.frozen
class Curve:
    """How fast a kernel is, by the features of a head: ``peak`` x keys / (keys + ``half``) of the device's rate."""

    peak: Mapping[int, float] = attrs.field(eq=dict)
    """Fraction of the device's rate on rows with many keys."""
    half: Mapping[int, float] = attrs.field(eq=dict)
    """Keys that a tile of queries costs beside those that it visits: with as many, half the rate is reached."""
    windowed: Mapping[int, float] = attrs.field(factory=dict, eq=dict)
    """Factor on the rate under a window of the kernel's own: some compare the positions of every tile then."""

    def at(self, width: int) -> tuple[float, float]:
        """Return peak and half for heads of ``width`` features: linear between the widths of the table.

        Narrower heads than the narrowest of the table fill less of a matrix unit; wider ones run as the widest.

        Examples
        --------
        >>> curve = Curve({64: 0.4, 128: 0.6}, {64: 100.0, 128: 200.0})
        >>> [round(x, 3) for x in curve.at(96)], curve.at(256), curve.at(32)[0]
        ([0.5, 150.0], (0.6, 200.0), 0.2)
        """
        narrow = min(1.0, width / min(self.peak))
        return _between(self.peak, width) * narrow, _between(self.half, width)

    def in_window(self, width: int) -> float:
        """Return :attr:`windowed` for heads of ``width`` features."""
        return _between(self.windowed, width) if self.windowed else 1.0


def _between(known: Mapping[int, float], width: int) -> float:
    """Return a number that is known for some widths: linear between them, and constant beyond."""
    widths = sorted(known)
    place = bisect_right(widths, width)
    if place in (0, len(widths)):
        return known[widths[max(0, place - 1)]]
    low, high = widths[place - 1], widths[place]
    return known[low] + (width - low) / (high - low) * (known[high] - known[low])


@attrs.frozen
class KernelParameters:
    """Numbers of one attention kernel."""

    forward: Curve
    backward: Curve
    causal: float = 1.0
    """Factor on the rate where rows see different numbers of keys."""
    causal_backward: float = 1.0
    masked: float = 0.8
    """Factor on the rate under a mask in memory, or over tables of tiles."""
    compare: float = 1.0
    """What it costs to find out whether a pair meets, in tiles that are not whole: as much as so many features."""
    host: float = 3e-5
    """Seconds for which one forward call keeps the host busy."""
    backward_host: float = 6e-5
    packed: float = 1e-6
    """Seconds of the host that packed documents add to either, beside plain operators."""
    call: float = 2e-5
    """Seconds of the host for one call of a plan with it, beside its operators."""
    backward_call: float = 1e-4
    """The same for one backward."""
    direct: float = 1.0
    """Share of a backward's host time that is left where a plan is one call, which torch itself differentiates.

    1 stays 1 in a fit: nothing else differentiates such a plan then.
    """
    quick: float = 1.0
    """The same of a forward, which keeps no LSE if nobody differentiates such a plan."""
    tile: int = 128
    """Query rows of one block of threads."""
    splits: bool = False
    """Whether it splits keys where there are few rows."""
    packs: bool = False
    """Whether few rows of all heads that share keys are one tile."""
    few: float = 1.0
    """How many times as long blocks of threads take that have a unit each, as nothing runs while one waits."""
    lone: float = 1.0
    """The same of the longest block, which goes on when the others are done."""


@attrs.frozen
class Parameters:
    """Numbers of a kind of device, and where they come from."""

    kernels: Mapping[str, KernelParameters] = attrs.field(eq=dict, repr=False)
    start: float
    """Seconds between one kernel and the next, on the device."""
    operator: float
    """Seconds for which one plain operator keeps the host busy."""
    fused: float
    """Seconds for which one of our own kernels keeps the host busy: a gather or a join that pulls."""
    memory: float
    """Fraction of the bandwidth that attention kernels reach."""
    copy: float
    """... that strided copies reach."""
    join: float
    """... that merges of parts reach."""
    own_copy: float
    """... that kernels of our own which gather rows reach."""
    own_join: float
    """... that kernels of our own which join parts reach."""
    gather: float
    """... that gathers of tiles reach."""
    quantum: float
    """How much of an incomplete last wave of blocks is waited for, from 0 to 1."""
    exposed: float
    """Share of the shorter of the device's and the host's time that the longer does not hide."""
    basis: str = DATA_SHEET
    note: str = ""
    """What a reader has to know about where they come from."""

    def kernel(self, key: str, efficiency: float) -> KernelParameters:
        """Return the numbers of a kernel; one that the table does not know runs at a constant fraction."""
        found = self.kernels.get(key)
        if found is None:
            flat = Curve({64: efficiency}, {64: 256.0})
            return KernelParameters(flat, attrs.evolve(flat, peak={64: 0.8 * efficiency}))
        return found

    def indirect(self, key: str) -> Parameters:
        """Return a table for parts of a plan, which keep their LSE and are never differentiated by torch itself."""
        found = self.kernels.get(key)
        if found is None or found.direct == found.quick == 1.0:
            return self
        return attrs.evolve(self, kernels={**self.kernels, key: attrs.evolve(found, direct=1.0, quick=1.0)})

    def numbers(self) -> dict[str, float]:
        """Return every number that a calibration may set, by its path.

        Examples
        --------
        >>> defaults("cuda").numbers()["kernels/cudnn/forward/peak/128"]
        0.62
        """
        return dict(_flat("", attrs.asdict(self)))

    def replaced(self, numbers: Mapping[str, float], basis: str, note: str = "") -> Parameters:
        """Return a table with some numbers replaced.

        Raises
        ------
        SpecError
            If a path is unknown, or a number is not positive and finite.
        """
        mine = attrs.asdict(self)
        known = self.numbers()
        for path, value in numbers.items():
            if path not in known:
                raise SpecError(f"unknown number {path!r} in a calibration")
            _check(path, value)
            *way, last = path.split("/")
            place: Any = mine
            for step in way:
                place = place[_key(place, step)]
            place[_key(place, last)] = float(value)
        return _parameters({**mine, "basis": basis, "note": note})


def _key(place: Mapping[Any, Any], step: str) -> Any:
    return step if step in place else int(step)


def _flat(path: str, found: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        here = f"{path}/{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from _flat(here, value)
        elif isinstance(value, float):
            yield here, value


def _check(path: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise SpecError(f"{path} must be a positive number, got {value!r}")


def _parameters(table: Mapping[str, Any]) -> Parameters:
    kernels = {name: _kernel(name, found) for name, found in table["kernels"].items()}
    rest = {name: value for name, value in table.items() if name != "kernels"}
    return Parameters(kernels=kernels, **rest)


def _kernel(name: str, table: Mapping[str, Any]) -> KernelParameters:
    curves = {}
    for way in ("forward", "backward"):
        curve = {what: {int(w): float(x) for w, x in by_width.items()} for what, by_width in table[way].items()}
        if not curve.get("peak") or curve["peak"].keys() != curve.get("half", {}).keys():
            raise SpecError(f"kernels/{name}/{way}: peak and half need the same widths, and at least one")
        curves[way] = Curve(**curve)
    return KernelParameters(**{**table, **curves})


@lru_cache(maxsize=4)
def defaults(kind: str) -> Parameters:
    """Return the table that comes with the package, for ``"cpu"`` or ``"cuda"``."""
    text = resources.files("attnplan.cost").joinpath("kernels.toml").read_text(encoding="utf-8")
    return _parameters(tomllib.loads(text)[kind])
