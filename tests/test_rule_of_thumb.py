"""The published rule of thumb against the planner: never slower, never over budget, and the committed table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

import attnplan
from attnplan.cost import resolve
from attnplan.errors import RingError
from attnplan.search import CALLS, candidates
from attnplan.units import parse_bytes
from bench import rule_of_thumb as bench

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(bench.rows())


def budget(row: dict[str, Any]) -> int:
    text = bench.SETTINGS[row["setting"]].get("max_memory")
    return resolve(bench.DEVICE).device.memory if text is None else parse_bytes(text)


def test_the_rule_is_the_published_one() -> None:
    assert [bench.rule(n) for n in (1, 8191, 8192, 65_536, 65_537)] == [
        "improved", "improved", "ring", "ring", "block_sparse_ring"
    ]  # fmt: skip
    assert [(n, bench.rule(n)) for n in bench.LENGTHS] == [
        (4096, "improved"), (32_768, "ring"), (131_072, "block_sparse_ring")
    ]  # fmt: skip


def test_every_cell_is_priced_or_refused(rows: list[dict[str, Any]]) -> None:
    assert [(r["seq_len"], r["setting"]) for r in rows] == [(n, s) for n in bench.LENGTHS for s in bench.SETTINGS]
    for row in rows:
        for cell in (row["rule"], row["auto"]):
            priced = [cell["plan"], cell["seconds"], cell["peak_bytes"]]
            assert all(priced) is (cell["refused"] is None)
            assert any(priced) is (cell["refused"] is None)
        assert row["setting"] == "ring of 8" or row["auto"]["refused"] is None


def test_nothing_is_over_budget(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for cell in (row["rule"], row["auto"]):
            assert cell["peak_bytes"] is None or cell["peak_bytes"] <= budget(row), row


def test_a_budget_that_nothing_fits_is_refused_in_the_words_of_the_refusal() -> None:
    cell = bench.cell("auto", 4096, max_memory="64 KiB")
    assert cell.refused is not None
    assert "budget 64 KiB" in cell.refused
    assert cell.seconds is None


def never_slower(auto: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether ``auto`` is at least as fast as another kind, unless that computes fewer pairs.

    What a first call compiles is spread over as many calls as a search spreads it over.
    """
    if other["seconds"] is None:
        return True
    mine, theirs = (x["seconds"] and x["seconds"] + x.get("compile_seconds", 0.0) / CALLS for x in (auto, other))
    return mine is not None and (mine <= theirs or other["pairs"] < auto["pairs"])


def test_auto_is_never_slower_than_the_rule(rows: list[dict[str, Any]]) -> None:
    assert all(never_slower(row["auto"], row["rule"]) for row in rows)
    compared = [row for row in rows if row["rule"]["seconds"] is not None]
    assert compared
    for row in compared:
        if row["rule"]["kind"] == "improved":  # the same attention: the same plan
            assert {**row["rule"], "kind": "auto"} == row["auto"]


@pytest.mark.parametrize("kind", ["standard", "improved", "ring", "block_sparse_ring"])
def test_auto_is_never_slower_than_any_kind_where_all_fit(kind: str) -> None:
    """At a length at which the device decides: on short ones the host does, and others have fewer launches."""
    auto, other = (attrs.asdict(bench.cell(k, 32_768)) for k in ("auto", kind))
    assert other["seconds"] is not None
    assert never_slower(auto, other)


def test_auto_is_the_fastest_way_that_fits(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["setting"] == "ring of 8":
            continue
        priced = [c.prediction for c in candidates(bench.spec("auto", row["seq_len"]), resolve(bench.DEVICE))]
        fitting = [p.seconds for p in priced if p is not None and p.peak_bytes <= budget(row)]
        assert len(fitting) > 1 or row["seq_len"] > 4096
        assert row["auto"]["seconds"] == min(fitting)


def test_the_pairs_of_the_ring_class_are_counted_right() -> None:
    heads, length = 4, 32_768
    want = sum(
        heads * (length // w) * sum(w - k for k in range(i % r, w, r))  # key k of a segment is seen from k on
        for i, (w, r) in enumerate(((2048, 1), (4096, 2), (8192, 4)))
    )
    assert bench.pairs("ring", length) == want


def test_a_ring_is_refused_in_the_words_of_the_refusal_and_fills_in_once_it_compiles(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        attnplan.compile(bench.spec("auto", 4096, ring_size=8), device=bench.DEVICE)
        words = None
    except RingError as error:
        words = str(error)
    refused = {cell["refused"] for r in rows if r["setting"] == "ring of 8" for cell in (r["rule"], r["auto"])}
    assert words in refused
    real = attnplan.compile
    monkeypatch.setattr(attnplan, "compile", lambda spec, **o: real(attrs.evolve(spec, ring_size=1), **o))
    alone = bench.cell("auto", 4096)
    assert bench.cell("auto", 4096, ring_size=8) == alone
    assert alone.seconds is not None


def test_the_committed_table_is_that_of_the_committed_run() -> None:
    data = json.loads((ROOT / "bench/results/rule-of-thumb.json").read_text())
    page = (ROOT / "docs/migration.md").read_text()
    assert bench.placed(page, data) == page
    assert [(r["seq_len"], r["setting"]) for r in data["rows"]] == [
        (n, s) for n in bench.LENGTHS for s in bench.SETTINGS
    ]
    assert all(never_slower(row["auto"], row["rule"]) for row in data["rows"])


def test_the_command_writes_and_prints(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    page, file = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"before\n{bench.START}\nold\n{bench.END}\nafter\n")
    options = ["--json", str(file), "--docs", str(page)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(bench.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(file.read_text())["rows"] == rows
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
