"""What cross-validation found: a matrix of ways and checks for a spec, and a report of many."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from attnplan.errors import NoBackendError, SpecError, VerifyError
from attnplan.verify import Check

AGREES, DIFFERS, FAILED, REFUSED = "agrees", "differs", "failed", "refused"
STATUSES = (DIFFERS, FAILED, AGREES, REFUSED)
"""Worst first: what stands when two runs of one way differ."""


@attrs.frozen
class Result:
    """One way to run a spec, and how it did."""

    strategy: str
    backend: str
    schedule: str
    status: str
    """``agrees``, ``differs`` from the reference, ``failed`` with an exception, or ``refused`` with reasons."""
    checks: tuple[Check, ...] = ()
    """Errors and tolerances of output, LSE, gradients, and rows without a key."""
    seconds: float | None = None
    """Time of one forward and backward pass, the median of those after the first; None if it did not run."""
    reasons: tuple[str, ...] = ()
    """Every reason of a refusal; the exception of a failure; what was left out of a comparison."""

    @property
    def column(self) -> str:
        """Backend and schedule."""
        return f"{self.backend} ({self.schedule})" if self.schedule else self.backend

    @property
    def way(self) -> str:
        """Strategy, backend and schedule."""
        return f"{self.strategy} > {self.column}" if self.strategy else self.column

    @property
    def wrong(self) -> bool:
        """Whether it accepted the spec and did not compute it."""
        return self.status in (DIFFERS, FAILED)

    @property
    def worst(self) -> float:
        """The largest error over its tolerance; infinite for NaN."""
        ratios = [c.error / c.tolerance if c.tolerance else math.inf * c.error if c.error else 0.0 for c in self.checks]
        return max((math.inf if math.isnan(r) else r for r in ratios), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data; what is not finite is text."""
        checks = [{"name": c.name, "error": _number(c.error), "tolerance": c.tolerance} for c in self.checks]
        return {**attrs.asdict(self, filter=lambda a, _: a.name != "checks"), "checks": checks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Read what :meth:`to_dict` wrote."""
        checks = tuple(Check(c["name"], float(c["error"]), c["tolerance"]) for c in data["checks"])
        return cls(**{**data, "checks": checks, "reasons": tuple(data["reasons"])})


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@attrs.frozen
class Matrix:
    """Every way to run one spec.

    Examples
    --------
    >>> from attnplan import AttentionSpec
    >>> from attnplan.testing import cross_validate
    >>> spec = AttentionSpec(seq_len=33, heads=2, head_dim=8, causal=True, dtype="float64")
    >>> matrix = cross_validate(spec, device="cpu")
    >>> matrix.agrees, "dense > eager (flash)" in [r.way for r in matrix.ran]
    (True, True)
    """

    name: str
    spec: str
    """The spec in words."""
    results: tuple[Result, ...]
    anchor: str = ""
    """What stood for the dtype's own errors, where tolerances depend on it."""
    rows: str = ""
    """How many query rows were compared."""
    fault: str = ""
    source: str = ""

    @property
    def ran(self) -> tuple[Result, ...]:
        """The ways that accepted the spec."""
        return tuple(r for r in self.results if r.status != REFUSED)

    @property
    def wrong(self) -> tuple[Result, ...]:
        """The ways that accepted the spec and did not compute it."""
        return tuple(r for r in self.results if r.wrong)

    @property
    def refused(self) -> tuple[Result, ...]:
        """The ways that did not accept the spec, each with every reason."""
        return tuple(r for r in self.results if r.status == REFUSED)

    @property
    def agrees(self) -> bool:
        """Whether something ran, and all that ran computed the spec."""
        return bool(self.ran) and not self.wrong

    def check(self) -> Matrix:
        """Return this matrix if it agrees.

        Raises
        ------
        VerifyError
            If a way differs from the reference or failed; the message names each with its errors.
        NoBackendError
            If every way refused; the message names each with its reasons.
        """
        if self.wrong:
            raise VerifyError("\n".join([f"{self.name}: {len(self.wrong)} of {len(self.ran)} ways are wrong"]
                                        + [f"  {line}" for r in self.wrong for line in said(r)]))  # fmt: skip
        if not self.ran:
            raise NoBackendError("\n".join([f"{self.name}: nothing ran"]
                                           + [f"  {r.way}: {'; '.join(r.reasons)}" for r in self.refused]))  # fmt: skip
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the matrix as plain data."""
        plain = {name: getattr(self, name) for name in attrs.fields_dict(Matrix) if name != "results"}
        return {**plain, "results": [r.to_dict() for r in self.results]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Matrix:
        """Read what :meth:`to_dict` wrote."""
        return cls(**{**data, "results": tuple(Result.from_dict(r) for r in data["results"])})

    def text(self, color: bool = False) -> str:
        """Return errors, tolerances, times, and every refusal, as text for people."""
        from attnplan.testing.render import matrix_text

        return matrix_text(self, color)

    def __str__(self) -> str:
        return self.text()


def said(result: Result) -> Iterator[str]:
    """Iterate over what is wrong with a result, a line each."""
    for c in result.checks:
        if not c.passed:
            yield f"{result.way}: {c.name} {c.error:.2e} > {c.tolerance:.1e}"
    if result.status == FAILED:
        yield f"{result.way}: {'; '.join(result.reasons)}"


@attrs.frozen
class Report:
    """The matrices of many cases on one device, from one run or from several merged."""

    device: str
    size: str
    dtype: str
    versions: tuple[Mapping[str, str], ...]
    """Versions of packages, for each run."""
    matrices: tuple[Matrix, ...]

    @property
    def wrong(self) -> tuple[Matrix, ...]:
        """The cases that some way did not compute."""
        return tuple(m for m in self.matrices if m.wrong)

    @property
    def ran(self) -> int:
        """How many ways ran, over all cases."""
        return sum(len(m.ran) for m in self.matrices)

    def check(self) -> Report:
        """Return this report if nothing is wrong in it.

        Raises
        ------
        VerifyError
            If a way differs from the reference or failed.
        NoBackendError
            If nothing ran at all.
        """
        if self.wrong:
            lines = [f"  {m.name}: {line}" for m in self.wrong for r in m.wrong for line in said(r)]
            raise VerifyError("\n".join([f"{len(self.wrong)} of {len(self.matrices)} cases are wrong", *lines]))
        if not self.ran:
            reasons = sorted({why for m in self.matrices for r in m.refused for why in (*r.reasons, r.backend)})
            raise NoBackendError(f"no case ran on {self.device}: {'; '.join(reasons)}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "device": self.device,
            "size": self.size,
            "dtype": self.dtype,
            "versions": [dict(v) for v in self.versions],
            "matrices": [m.to_dict() for m in self.matrices],
        }

    @classmethod
    def from_dict(cls, data: object, name: str = "the report") -> Report:
        """Read what :meth:`to_dict` wrote.

        Raises
        ------
        SpecError
            If it is something else.
        """
        if not isinstance(data, dict):
            raise SpecError(f"{name} is no report of `attnplan verify --catalogue`: a {type(data).__name__}")
        try:
            matrices = tuple(Matrix.from_dict(m) for m in data["matrices"])
            return cls(data["device"], data["size"], data["dtype"], tuple(data["versions"]), matrices)
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"{name} is no report of `attnplan verify --catalogue`: {error!r}") from None

    def write(self, path: str) -> None:
        """Write the report as a JSON file that :meth:`read` reads.

        Raises
        ------
        SpecError
            If the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise SpecError(f"cannot write the report {path!r}: {error.strerror}") from None

    @classmethod
    def read(cls, path: str) -> Report:
        """Read what :meth:`write` wrote.

        Raises
        ------
        SpecError
            If the file cannot be read, or holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
            raise SpecError(f"cannot read the report {path!r}: {reason}") from None
        return cls.from_dict(data, repr(path))

    def text(self, color: bool = False) -> str:
        """Return a table of cases and schedules, what is wrong, and every refusal, as text for people."""
        from attnplan.testing.render import report_text

        return report_text(self, color)

    def __str__(self) -> str:
        return self.text()


def merge(reports: Sequence[Report]) -> Report:
    """Return one report of several runs of one catalogue on one kind of device.

    Packages that exclude one another need a run each. What ran in one run and was refused in another counts as run;
    of a way that ran in several, the worst result stands.

    Raises
    ------
    SpecError
        If the runs are of different devices, sizes, dtypes or cases, or there is none.

    Examples
    --------
    >>> one = Matrix("causal", "", (Result("dense", "a", "x", "agrees"), Result("dense", "b", "", "refused")))
    >>> two = Matrix("causal", "", (Result("dense", "a", "x", "differs"), Result("dense", "b", "", "agrees")))
    >>> both = merge([Report("cpu", "small", "float32", ({},), (m,)) for m in (one, two)])
    >>> [(r.way, r.status) for r in both.matrices[0].results]
    [('dense > a (x)', 'differs'), ('dense > b', 'agrees')]
    """
    if not reports:
        raise SpecError("merging needs at least one report")
    first = reports[0]
    for other in reports[1:]:
        for what in ("device", "size", "dtype"):
            a, b = getattr(first, what), getattr(other, what)
            if a != b:
                raise SpecError(f"the runs differ in {what}: {a} and {b}; merge runs of one catalogue on one device")
        a, b = ({(m.name, m.spec) for m in r.matrices} for r in (first, other))
        if a != b:
            raise SpecError(f"the runs differ in their cases: {', '.join(sorted({name for name, _ in a ^ b}))}")
    others = [{m.name: m for m in r.matrices} for r in reports]
    matrices = tuple(_merged([run[m.name] for run in others]) for m in first.matrices)
    return attrs.evolve(first, versions=tuple(v for r in reports for v in r.versions), matrices=matrices)


def _merged(matrices: Sequence[Matrix]) -> Matrix:
    by_way: dict[str, list[Result]] = {}
    for matrix in matrices:
        for result in matrix.results:
            by_way.setdefault(result.way, []).append(result)
    found = {r.backend for results in by_way.values() for r in results if r.strategy}
    for name in [way for way, results in by_way.items() if not results[0].strategy and way in found]:
        del by_way[name]  # absent in one run, there in another
    anchors = "; ".join(dict.fromkeys(m.anchor for m in matrices if m.anchor))
    return attrs.evolve(matrices[0], results=tuple(_worst(results) for results in by_way.values()), anchor=anchors)


def _worst(results: Sequence[Result]) -> Result:
    worst = min(results, key=lambda r: (STATUSES.index(r.status), -r.worst))
    if worst.status != REFUSED:
        return worst
    return attrs.evolve(worst, reasons=tuple(dict.fromkeys(why for r in results for why in r.reasons)))
