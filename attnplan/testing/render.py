"""Matrices and reports as text: tables of what ran, then every refusal in full."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnplan.testing.matrix import FAILED, Matrix, Report, Result, said
from attnplan.units import format_seconds

_WIDTH = 180
_STYLE = {"agrees": "green", "differs": "bold red", "failed": "bold red", "refused": "dim"}
CHECKS = ("output", "lse", "grad q", "grad k", "grad v", "empty rows")


def matrix_text(matrix: Matrix, color: bool = False) -> str:
    """Return the matrix of one spec: error <= tolerance for each way and check, time, and every refusal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = [n for n in CHECKS if any(c.name == n for r in matrix.ran for c in r.checks)]
    for title in ("way", "verdict", *names):
        table.add_column(title, no_wrap=True)
    table.add_column("time", no_wrap=True, justify="right")
    for r in matrix.ran:
        cells = {c.name: f"{c.error:.1e} {'<=' if c.passed else '> '} {c.tolerance:.1e}" for c in r.checks}
        seconds = "" if r.seconds is None else format_seconds(r.seconds)
        table.add_row(r.way, Text(r.status, _STYLE[r.status]), *(cells.get(n, "-") for n in names), seconds)
    head = [f"{matrix.name}: {matrix.spec}"] if matrix.name not in matrix.spec else [matrix.spec]
    head += [f"fault     {matrix.fault} ({matrix.source})"] if matrix.fault else []
    head += [f"rows      {matrix.rows}, against float64"]
    head += [f"anchor    {matrix.anchor}"] if matrix.anchor else []
    notes = [f"{r.status:<9} {r.way}: {why}" for r in matrix.ran for why in r.reasons]
    return "\n".join([*head, _printed(table, color), *notes, *_refusals(matrix.refused), _sum((matrix,))]) + "\n"


def _refusals(refused: Sequence[Result]) -> Iterator[str]:
    for r in refused:
        for n, why in enumerate(r.reasons):
            yield f"{'refused' if n == 0 else '':<9} {r.way if n == 0 else ' ' * len(r.way)}  {why}"


def report_text(report: Report, color: bool = False) -> str:
    """Return the table of a catalogue: for each case and schedule the worst error over its tolerance, and refusals."""
    columns = list(dict.fromkeys(r.column for m in report.matrices for r in m.results))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for m in report.matrices:
        table.add_row(m.name, *(_cell([r for r in m.results if r.column == c]) for c in columns))
    head = [
        f"{report.device}, {report.dtype}, {report.size} sizes; the largest error over tolerance of all strategies",
        *("versions  " + ", ".join(f"{n} {v}" for n, v in run.items()) for run in report.versions),
        *(f"anchor    {name}: {count} cases" for name, count in _anchors(report).items()),
    ]
    wrong = [f"WRONG     {m.name}: {line}" for m in report.wrong for r in m.wrong for line in said(r)]
    return "\n".join([*head, _printed(table, color), *wrong, *_all_refusals(report), _sum(report.matrices)]) + "\n"


def _anchors(report: Report) -> Mapping[str, int]:
    names = [m.anchor for m in report.matrices if m.anchor]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _cell(results: Sequence[Result]) -> Text:
    ran = [r for r in results if r.status != "refused"]
    if not ran:
        return Text("refused" if results else "-", "dim")
    worst = max(ran, key=lambda r: (r.status == FAILED, r.wrong, r.worst))
    ratio = "failed" if worst.status == FAILED else "inf" if math.isinf(worst.worst) else f"{worst.worst:.2g}"
    return Text(f"WRONG {ratio}" if worst.wrong else ratio, _STYLE[worst.status])


def _all_refusals(report: Report) -> Iterator[str]:
    """Iterate over every reason, with the cases and strategies to which it was given."""
    given: dict[tuple[str, str], dict[str, list[str]]] = {}
    for m in report.matrices:
        for r in m.refused:
            for why in r.reasons:
                given.setdefault((r.column, why), {}).setdefault(m.name, []).append(r.strategy)
    for (column, why), cases in sorted(given.items()):
        if len(cases) == len(report.matrices) > 1:
            yield f"refused   {column}: {why} (every case)"
            continue
        yield f"refused   {column}: {why}"
        for name, strategies in cases.items():
            yield f"              {name}" + (f" ({', '.join(strategies)})" if any(strategies) else "")


def _sum(matrices: Sequence[Matrix]) -> str:
    ran, wrong = (sum(len(getattr(m, what)) for m in matrices) for what in ("ran", "wrong"))
    refused = sum(len(m.refused) for m in matrices)
    cases = f"{len(matrices)} cases, " if len(matrices) != 1 else ""
    return f"{'WRONG' if wrong else 'ok':<9} {cases}{ran} ran, {wrong} wrong, {refused} refused"


def _printed(table: Table, color: bool) -> str:
    console = Console(file=StringIO(), width=_WIDTH, force_terminal=color, no_color=not color, highlight=False)
    console.print(table)
    text = console.file
    assert isinstance(text, StringIO)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())
