"""Compares the published rule of thumb with the planner, for the factory's default attention on one H100.

    python -m bench.rule_of_thumb --json bench/results/rule-of-thumb.json --docs docs/migration.md

The rule of the published fork takes the improved class below 8,192 tokens, the ring class up to 65,536, and the
block-sparse ring class above. Each cell compiles the pattern of the class and reports what the planner predicts, or the
words of its refusal. The classes of the rule compute other pairs than each other; the table counts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import click
from rich.console import Console
from rich.table import Table

import attnplan
from attnplan import AttentionSpec
from attnplan.errors import MemoryBudgetError, NoBackendError, RingError
from attnplan.explain_tables import compiles
from attnplan.nn import create_dilated_attention
from attnplan.nn.factory import SEGMENT_LENGTHS
from attnplan.packages import installed
from attnplan.units import format_bytes, format_count, format_seconds

DEVICE = "h100"
HEADS, HEAD_DIM = 12, 64
LENGTHS = (4096, 32_768, 131_072)
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "one GPU": {},
    "ring of 8": {"ring_size": 8},
    "2 GiB budget": {"max_memory": "2 GiB"},
}
START, END = "<!-- rule of thumb: written by `python -m bench.rule_of_thumb`, do not edit -->", "<!-- end -->"


@attrs.frozen
class Cell:
    """What one kind of attention is predicted to cost, or why it cannot run."""

    kind: str
    pairs: int
    plan: str | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    refused: str | None = None
    compile_seconds: float = 0.0
    """For how long its first call compiles."""


def rule(length: int) -> str:
    """Return the kind that the published rule of thumb takes."""
    if length < 8192:
        return "improved"
    return "ring" if length <= 65_536 else "block_sparse_ring"


def spec(kind: str, length: int, heads: int = HEADS, **fields: Any) -> AttentionSpec:
    """Return what the factory's module of a kind computes, causal, in bfloat16."""
    pattern = create_dilated_attention(kind).pattern(length, heads)
    return AttentionSpec(
        seq_len=length, heads=heads, head_dim=HEAD_DIM, pattern=pattern, causal=True, dtype="bfloat16", layout="bshd",
        **fields,
    )  # fmt: skip


def pairs(kind: str, length: int) -> int:
    """Count the (head, query, key) pairs.

    The ring class describes its keys by a function, which is evaluated pair by pair. Its heads are alike within a
    group, and its segments repeat, so one head of each group and the longest segment are enough.
    """
    period, groups = max(SEGMENT_LENGTHS), len(SEGMENT_LENGTHS)
    if kind == "ring" and length % period == 0 and HEADS % groups == 0:
        return spec(kind, period, groups).count_pairs() * (length // period) * (HEADS // groups)
    return spec(kind, length).count_pairs()


def cell(kind: str, length: int, max_memory: str | None = None, ring_size: int = 1) -> Cell:
    """Compile one kind in one setting."""
    count = pairs(kind, length)
    try:
        plan = attnplan.compile(spec(kind, length, ring_size=ring_size), device=DEVICE, max_memory=max_memory)
    except (MemoryBudgetError, NoBackendError, RingError) as error:
        return Cell(kind, count, refused=str(error))
    name = f"{plan.strategy} > {plan.backend} ({plan.schedule})"
    found = plan.predicted
    return Cell(kind, count, name, found.seconds, found.peak_bytes, compile_seconds=found.compile_seconds)


def rows() -> Iterator[dict[str, Any]]:
    """Iterate over the comparisons."""
    for length in LENGTHS:
        for setting, options in SETTINGS.items():
            ours, theirs = (attrs.asdict(cell(kind, length, **options)) for kind in ("auto", rule(length)))
            yield {"seq_len": length, "setting": setting, "rule": theirs, "auto": ours}


def run() -> dict[str, Any]:
    """Return all comparisons and what they hold for."""
    example = attnplan.compile(spec("auto", LENGTHS[0]), device=DEVICE).explain("json")
    here = {"device": example["device"]["title"], "versions": installed(), "basis": example["choice"]["basis"]}
    return {"environment": here, "spec": spec("auto", LENGTHS[0]).to_dict(), "rows": list(rows())}


HEADER = ("tokens", "setting", "rule of thumb", "pairs", "time", "peak", "planner", "pairs", "time", "peak")


def lines(data: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Return the table's rows as text, and the refusals to which its cells refer by number."""
    notes: list[str] = []

    def shown(one: Mapping[str, Any]) -> list[str]:
        count = format_count(one["pairs"])
        if one["refused"] is None:
            plan = f"{one['kind']}: {one['plan']}"
            time = format_seconds(one["seconds"]) + compiles(one.get("compile_seconds", 0.0))
            return [plan, count, time, format_bytes(one["peak_bytes"])]
        if one["refused"] not in notes:
            notes.append(one["refused"])
        return [one["kind"], count, f"refused ({notes.index(one['refused']) + 1})", ""]

    table = [[f"{r['seq_len']:,}", r["setting"], *shown(r["rule"]), *shown(r["auto"])] for r in data["rows"]]
    return table, notes


def markdown(data: Mapping[str, Any]) -> str:
    """Return the table as the section of ``docs/migration.md`` has it."""
    table, notes = lines(data)
    head = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    refusals = [f"{i}. {' '.join(note.split())}" for i, note in enumerate(notes, 1)]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in table), "", "Refused:", "", *refusals])


def placed(page: str, data: Mapping[str, Any]) -> str:
    """Return a page with the table between its two markers."""
    before, rest = page.split(START)
    return f"{before}{START}\n{markdown(data)}\n{END}{rest.split(END, 1)[1]}"


def show(data: Mapping[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{data['environment']['device']}, {HEADS} heads, bfloat16, causal, forward; predicted")
    for name in HEADER:
        table.add_column(name, justify="right" if name in ("tokens", "pairs", "time", "peak") else "left")
    body, notes = lines(data)
    for row in body:
        table.add_row(*row)
    console.print(table)
    for i, note in enumerate(notes, 1):
        console.print(f"({i}) {note}", highlight=False, markup=False)


@click.command(help=__doc__)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows.")
@click.option("--docs", "docs_file", type=click.Path(path_type=Path), help="Write the table between the markers.")
def main(json_file: Path | None, docs_file: Path | None) -> None:
    data = run()
    if json_file:
        json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if docs_file:
        docs_file.write_text(placed(docs_file.read_text(encoding="utf-8"), data), encoding="utf-8")
    show(data, Console())


if __name__ == "__main__":
    main()
