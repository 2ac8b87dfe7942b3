"""Predicted peaks against every row that was measured on an H100, and the rules of kernels that split keys."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from attnplan.cost import Target, catalogue, workspaces
from attnplan.cost.allocated import Memory, rounded
from attnplan.cost.buffers import mask_spread
from attnplan.cost.gradients import Program
from attnplan.cost.joins import destinations, placed, written
from attnplan.cost.setting import KernelModel, Setting, copied_takes
from attnplan.cost.workspaces import NEEDS, backward_workspace, flash_splits, split_keys
from attnplan.ir import Attend, Graph, RowMap
from attnplan.ir.rows import Axis
from attnplan.lower import lower
from attnplan.patterns import dilated, documents, longnet, window
from attnplan.search import every_way, lowerings
from attnplan.spec import AttentionSpec
from bench.judged import read
from bench.peaks import is_known, measured, peaks_of, report, results_of, table

RESULTS = Path(__file__).parent.parent / "bench" / "results"
MIB = 2**20
BELOW = {("eager (cudnn)", "dense"), ("xformers (split-k)", "dense")}
"""Ways of which one row is predicted too low: one by 16 MiB, as gradients of an earlier call were still held, and one
by 0.3 MiB."""


@pytest.fixture(scope="module")
def judged():
    return read(sorted(RESULTS.glob("regret-h100-*.json")))[1]


def test_no_peak_of_the_grid_is_predicted_too_low_and_few_too_high(judged):
    found = list(peaks_of(judged))
    assert len(found) > 1400
    below = [x for x in found if x.verdict == "below"]
    ways = {(x.way.name.partition(" > ")[2], x.way.name.partition(" > ")[0]) for x in below}
    assert ways <= BELOW, table(judged)
    assert len(below) <= 2, table(judged)
    assert sum(x.verdict == "above" for x in found) <= 10, table(judged)
    assert report(judged).startswith(f"peaks: {len(found)} measured, {len(below)} predicted below")


LESS = [
    ("flash-cuda", {"in_order": False}),
    ("cudnn", {"sums": False}),
    ("flash-cuda", {"splits": ""}),
    ("efficient", {"wide": False}),
    ("efficient", {"blanks": False}),
    ("efficient", {"shows_keys": False}),
    ("efficient", {"in_order": False}),
    ("xformers-split-k", {"splits": ""}),
]


@pytest.mark.parametrize(("key", "change"), [LESS[0], *(pytest.param(*x, marks=pytest.mark.slow) for x in LESS[1:])])
def test_a_kernel_that_is_said_to_need_less_is_caught(key, change, monkeypatch, judged):
    """Without any one buffer of a kernel some row is predicted too low: the model hides none behind another."""
    from attnplan.cost import model

    known = sum(x.verdict == "below" for x in peaks_of(judged) if x.way.sample.kernel.key == key)
    assert known <= (key == "xformers-split-k")
    monkeypatch.setattr(workspaces, "NEEDS", NEEDS | {key: attrs.evolve(NEEDS[key], **change)})
    caches = (model.room, workspaces.like)
    try:
        for cache in caches:
            cache.cache_clear()
        again = read([RESULTS / "regret-h100-xformers.json"])[1]
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()
    assert sum(x.verdict == "below" for x in peaks_of(again) if x.way.sample.kernel.key == key) > known


@pytest.mark.parametrize(
    ("blocks", "rows", "keys", "pieces"),
    [(16, 16_384, 16_384, 64), (8, 1024, 1024, 8), (64, 512, 512, 8), (65, 512, 512, 1), (4, 2048, 2048, 16)],
)
def test_split_k_cuts_keys_as_its_rule_says(blocks, rows, keys, pieces):
    """As measured: each piece of (blocks x rows) has an output in float32."""
    assert split_keys(blocks, rows, keys) == pieces


def test_flash_attention_splits_only_where_few_blocks_run():
    assert flash_splits(12, 1024, 1024, 64) == 4
    assert flash_splits(14, 1024, 1024, 64) == 1
    assert flash_splits(1, 64, 64, 64) == 1


def test_results_made_later_leave_their_room():
    found = Memory(workspace=10, gathered=5, saved=3)
    assert found.beside(12) == Memory(gathered=3, saved=3)
    assert found.beside(0) == found
    assert found.beside(100) == Memory()


def test_a_block_keeps_what_is_left_of_its_segment():
    assert [rounded(size * MIB, "cuda") // MIB for size in (3, 15, 16, 17)] == [3, 16, 16, 18]
    assert rounded(15 * MIB - 512, "cuda") == 15 * MIB - 512, "more than 1 MiB is cut off"


def test_a_mask_is_copied_where_batch_and_heads_fold_into_one():
    pattern = dilated(64, 2, offset="interleave")
    spec = AttentionSpec(seq_len=64, heads=8, head_dim=16, batch=2, pattern=pattern)
    op = lower(spec).of(Attend)[0][1]
    rows = RowMap(0, 0, (Axis(4, head=2), Axis(2, head=1), Axis(64, row=1)))
    assert mask_spread(op, rows, rows, spec) == 2 * 8 * 64 * 64
    assert mask_spread(op, RowMap.whole(8, 64), RowMap.whole(8, 64), spec) == 0
    alone = attrs.evolve(spec, batch=1)
    assert mask_spread(op, rows, rows, alone) == 0, "heads alone fold without a copy"


def test_a_row_says_nothing_if_others_left_something_before_it():
    spec = AttentionSpec(seq_len=64, heads=2, head_dim=16, dtype="bfloat16", training=True)
    results = results_of(spec)
    assert results == 4 * 2 * 64 * 16 * 2
    row = {"peak": {"allocated": results + 5, "kept": 3}}
    assert measured(row, spec) == 5
    assert is_known(row)
    assert not is_known({"peak": {**row["peak"], "kept": -7}}), "three may have stayed of its own, or more"
    assert not is_known({})


def lowered(spec: AttentionSpec, strategy: str) -> Graph:
    return next(x.graph for x in lowerings(spec) if x.strategy == strategy)


def test_documents_pad_the_sums_of_dq():
    kernel = KernelModel(0.5, native=frozenset({"window", "documents"}), key="flash-cuda")
    specs = [
        AttentionSpec(seq_len=4096, heads=8, head_dim=64, dtype="bfloat16", pattern=pattern, training=True)
        for pattern in (documents(), window(100))
    ]
    sizes = []
    for spec in specs:
        graph = lower(spec)
        sizes.append(backward_workspace(graph.of(Attend)[0][0], Setting.of(graph, spec, kernel), "cuda"))
    assert sizes[0] - sizes[1] == 8 * 8 * 128 * (64 * 4 + 8) + 8 * 8 * 128 * 5


def test_rows_that_are_copies_are_not_written_into_a_whole():
    pattern = longnet([1024, 4096], [1, 4])
    spec = AttentionSpec(seq_len=8192, heads=8, kv_heads=2, head_dim=64, dtype="bfloat16", pattern=pattern)
    ways = every_way(spec, Target(catalogue()["h100"], None))
    graph = next(way.lowered.graph for c, way in ways if way is not None and c.name == "decompose-pull > flash (fa4)")
    join, copied = graph[graph.output.args[0]], copied_takes(graph, spec)
    first = destinations(graph, join, 0)
    assert first
    assert all(graph[i].args[0] in copied for i in first)
    assert written(graph, join, 0, copied) == frozenset()
    assert written(graph, join, 0, frozenset()) == frozenset(first)


def test_an_output_with_gaps_is_not_written_by_its_parts():
    spec = AttentionSpec(seq_len=64, heads=4, head_dim=16, pattern=documents([16, 48]))
    graph = lowered(spec, "decompose")
    join = graph[graph.output.args[0]]
    assert placed(graph, join) == frozenset(join.args)
    assert placed(graph, attrs.evolve(join, args=join.args[:1])) == frozenset()


def test_masks_of_a_call_do_not_stay_for_its_backward():
    for pattern, times in ((documents(), 1), (window(8), 2)):
        spec = AttentionSpec(seq_len=256, heads=2, head_dim=16, dtype="bfloat16", pattern=pattern, training=True)
        graph = lower(spec)
        kernel = KernelModel(0.5, native=frozenset({"mask"}), key="efficient")
        program = Program(graph, Setting.of(graph, spec, kernel), "cuda")
        assert program.all_masks == times * program.masks > 0
