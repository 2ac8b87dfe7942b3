"""Predicted peaks beside those that were measured, of every row of a grid.

    python -m bench.peaks bench/results/regret-h100-*.json

prints the rows that are predicted too low, or more than max(1.3 times, + 16 MiB) too high, by schedule and strategy.

A row's ``peak`` is that of a *later* call of a contestant: what was allocated at its worst moment, less what was
allocated before its first call. So it holds the output, in training the gradients, and whatever stays after the first
call: tables and masks of the plan, workspaces that a library keeps. What float64 needs to judge the call is computed
before; so cuBLAS has its workspace by then, which is in no row. What compiling or choosing a kernel allocates in the
first call is in no row either, unless it stays.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from attnplan.cost.setting import ITEM_BYTES
from attnplan.spec import AttentionSpec
from bench.judged import Judged, Row, Timed, read

MIB = 2**20


@attrs.frozen(eq=False)
class Peak:
    """One row."""

    way: Timed
    spec: str
    training: bool
    predicted: int
    measured: int
    """Bytes beside inputs, output and gradients."""

    @property
    def verdict(self) -> str:
        """``"below"``, ``"above"`` or, if the prediction is good, nothing."""
        if self.predicted < self.measured:
            return "below"
        return "above" if self.predicted > max(1.3 * self.measured, self.measured + 16 * MIB) else ""


def results_of(spec: AttentionSpec) -> int:
    """Return the bytes of the output and, in training, of the gradients of q, k and v."""
    size, shape = ITEM_BYTES[spec.dtype] * spec.batch, spec.shape
    found = size * spec.heads * shape.seq_len * spec.value_dim
    if spec.training:
        widths = spec.head_dim + spec.value_dim
        found += size * (spec.heads * shape.seq_len * spec.head_dim + spec.kv_heads * shape.kv_len * widths)
    return found


def measured(row: Row, spec: AttentionSpec) -> int:
    """Return the measured bytes beside inputs, output and gradients."""
    return max(0, int(row["peak"]["allocated"]) - results_of(spec))


def is_known(row: Row) -> bool:
    """Return whether a row says what a call needs.

    It does not where less stayed after the first call than was there before it: an earlier contestant had left
    something, and the collector took it meanwhile. How much is not known, as tables of the plan may have stayed.
    """
    return "peak" in row and row["peak"]["kept"] >= 0


def peaks_of(judged: Sequence[Judged]) -> Iterator[Peak]:
    """Iterate over the ways whose peak was measured and can be predicted.

    One that was measured in several environments allocates the same in all: what one of them has more is what a cycle
    of an earlier call still held there.
    """
    found: dict[tuple[str, str], Peak] = {}
    for one in judged:
        spec = one.case.spec
        for way in one.own:
            if way.peak is not None and is_known(way.row):
                peak = Peak(way, one.case.name, spec.training, way.peak, measured(way.row, spec))
                least = found.setdefault((one.case.name, way.name), peak)
                if peak.measured < least.measured:
                    found[one.case.name, way.name] = peak
    yield from found.values()


def report(judged: Sequence[Judged]) -> str:
    """Say how predicted peaks compare with measured ones."""
    found = list(peaks_of(judged))
    by = {what: [x for x in found if x.verdict == what] for what in ("below", "above")}
    lines = [
        f"peaks: {len(found)} measured, {len(by['below'])} predicted below, "
        f"{len(by['above'])} above max(1.3 x, + 16 MiB)"
    ]
    for what, rows in by.items():
        for x in sorted(rows, key=lambda x: -abs(x.predicted - x.measured))[:5]:
            size = abs(x.predicted - x.measured) / MIB
            lines.append(f"  {what} by {size:,.1f} MiB: {x.way.name} of {x.spec}")
    return "\n".join(lines)


def table(judged: Sequence[Judged]) -> str:
    """Return the rows that are off, by schedule, strategy and mode."""
    groups: dict[tuple[str, ...], list[Peak]] = defaultdict(list)
    for x in peaks_of(judged):
        row = x.way.row
        mode = "training" if x.training else "forward"
        groups[row["backend"], row["schedule"], row["strategy"], mode].append(x)
    lines = []
    for key, rows in sorted(groups.items()):
        off = [x for x in rows if x.verdict]
        if off:
            counts = ", ".join(f"{sum(x.verdict == what for x in rows)} {what}" for what in ("below", "above"))
            lines.append(f"{' '.join(key)}: {counts} of {len(rows)}")
        for x in off:
            sizes = f"predicted {x.predicted / MIB:9.2f} MiB, measured {x.measured / MIB:9.2f}"
            lines.append(f"  {x.verdict}  {sizes}  {x.spec}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="rows of bench.regret")
    _, judged, _ = read(parser.parse_args().paths)
    print(table(judged))
    print(report(judged))


if __name__ == "__main__":
    main()
