"""The explain page: its small mask, its figures' basis, and how soon it is there."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import attrs
import numpy as np
import pytest

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.mask_text import SHADES, TILES, mask_lines
from attnplan.patterns.operands import static_part
from tests.conftest import ROOT

LADDER = [2048 << i for i in range(10)]
RATES = [1 << i for i in range(10)]
MILLION = {"seq_len": 1_000_000, "heads": 12, "head_dim": 64, "causal": True}


def met(spec):
    """Return the share of pairs of each tile that meet in some head and branch, asked one by one."""
    shape = spec.shape
    q, k = np.arange(shape.seq_len)[:, None] + shape.shift, np.arange(shape.kv_len)[None]
    share = np.zeros((TILES, TILES))
    rows, keys = np.arange(shape.seq_len) * TILES // shape.seq_len, np.arange(shape.kv_len) * TILES // shape.kv_len
    for head in range(spec.heads):
        inside = np.zeros((shape.seq_len, shape.kv_len), dtype=bool)
        for branch in spec.branches:
            inside |= np.broadcast_to(static_part(branch).pairs({}, np.array(head), q, k), inside.shape)
        total = np.zeros((TILES, TILES))
        np.add.at(total, (rows[:, None], keys[None]), inside)
        share += total / np.outer(np.bincount(rows), np.bincount(keys)) / spec.heads
    return share


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(seq_len=1000, heads=2, head_dim=8, pattern=P.window(9), causal=True),
        AttentionSpec(seq_len=1024, heads=4, head_dim=8, pattern=P.longnet([64, 1024], [1, 16]), causal=True),
        AttentionSpec(seq_len=999, heads=3, head_dim=8, pattern=P.dilated(999, 12)),
        AttentionSpec(seq_len=512, kv_len=1500, heads=2, head_dim=8, pattern=P.window(3) | P.sinks(2), causal=True),
        AttentionSpec(seq_len=800, heads=1, head_dim=8, pattern=P.full(), causal=True),
        AttentionSpec(seq_len=5, heads=1, head_dim=8, causal=True),
    ],
    ids=lambda spec: f"{spec.pattern} {spec.seq_len}x{spec.kv_len}",
)
def test_a_tile_of_the_small_mask_is_marked_only_if_pairs_meet_in_it(spec):
    rows = [f"{row:<{TILES}}" for row in mask_lines(spec)]
    if spec.shape.seq_len < TILES:
        assert any(row.strip() for row in rows)
        return
    share = met(spec)
    for i, row in enumerate(rows):
        for j, character in enumerate(row):
            if character != " ":
                assert share[i, j] > 0, (i, j, character)
            if share[i, j] > 0.005:
                assert character != " ", (i, j, share[i, j])
            if share[i, j] > 0.45:
                assert SHADES.index(character) >= SHADES.index("▒")


def test_thin_masks_can_be_seen():
    for pattern in (
        P.longnet(LADDER, RATES),
        P.dilated(1_000_000, 96),
        P.dilated(1_000_000, 512, offset=11),
        P.window(300),
    ):
        rows = mask_lines(AttentionSpec(**MILLION, pattern=pattern))
        assert len(rows) == TILES
        for i, row in enumerate(rows):
            assert row[i : i + 1].strip(), f"{pattern}: nothing on the diagonal of {rows}"
            assert not row[i + 1 :].strip(), "nothing above it"
    whole = mask_lines(AttentionSpec(**MILLION, pattern=P.longnet(LADDER, RATES)))
    assert all(" " not in row for row in whole), "the longest segment reaches everything before"


def test_a_window_has_no_dots_away_from_its_band():
    rows = mask_lines(AttentionSpec(seq_len=65_536, heads=2, head_dim=8, pattern=P.window(256), causal=True))
    for i, row in enumerate(rows):
        assert not row[: max(0, i - 1)].strip()


def test_an_empty_mask_says_so():
    spec = AttentionSpec(seq_len=64, heads=2, head_dim=8, pattern=P.window(4) & ~P.full())
    assert mask_lines(spec) == ["(nothing)"]


def test_the_page_says_where_hardware_is_and_what_figures_rest_on():
    page = attnplan.compile(AttentionSpec(seq_len=4096, heads=8, head_dim=64, causal=True), "a100").explain()
    lines = page.splitlines()
    assert lines[2] == "device     NVIDIA A100 SXM4 80 GB (not here: packages assumed present)"
    assert " (data sheet)    peak " in lines[4]
    assert any(line.startswith("           of the peak: ") for line in lines)


def test_the_page_names_the_basis_of_a_shipped_calibration(monkeypatch):
    """Hardware that is elsewhere may be priced by a calibration: the page must not say data sheet then."""
    from attnplan.cost import calibration

    monkeypatch.setattr(calibration, "shipped", lambda name: {"numbers": {}, "about": "measured on its kin"})
    calibration._parameters_for.cache_clear()
    try:
        spec = AttentionSpec(seq_len=4352, heads=8, head_dim=64, causal=True)
        page = attnplan.compile(spec, "h100").explain()
    finally:
        calibration._parameters_for.cache_clear()
        attnplan.cache_clear()
    assert "(calibrated elsewhere)" in page
    assert "measured on its kin" in page
    assert "data sheet" not in page


def test_memory_is_split_into_what_it_is_for():
    spec = AttentionSpec.from_file(ROOT / "examples" / "longnet.toml")
    plan = attnplan.compile(spec, "cpu", strategy="lattice")
    memory = plan.explain("json")["choice"]["memory"]
    assert memory.pop("budget_bytes") is None
    assert min(memory["workspace_bytes"], memory["gathered_bytes"]) > 0
    assert sum(memory.values()) == plan.predicted.peak_bytes
    assert re.search(r"of the peak: [\d.]+ MiB workspace, [\d.]+ MiB copies of rows\n", plan.explain())
    page = attnplan.compile(spec, "cpu", strategy="lattice", max_memory="1 GiB").explain()
    assert "copies of rows    budget 1 GiB" in page
    training = attrs.evolve(spec, pattern=P.longnet([1024, 4096], [1, 4], mix="mean"), training=True)
    trained = attnplan.compile(training, "cpu", strategy="lattice")
    assert trained.explain("json")["choice"]["memory"]["saved_bytes"] > 0
    assert "saved for the backward" in trained.explain()


@pytest.mark.timing
def test_longnet_over_a_million_tokens_is_explained_in_a_second():
    flags = [x for n, v in (("seq-len", "1000000"), ("heads", "12"), ("head-dim", "64")) for x in (f"--{n}", v)]
    pattern = f"longnet({LADDER}, {RATES})"
    command = [
        sys.executable,
        "-m",
        "attnplan",
        "explain",
        *flags,
        "--causal",
        "--device",
        "h100",
        "--pattern",
        pattern,
    ]
    walls = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        walls.append(time.perf_counter() - began)
    assert "S=1000000" in done.stdout
    assert min(walls) < 1, walls
