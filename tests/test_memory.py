"""Predicted peaks against what the allocator counts: never below, and at most 1.3 times or 16 MiB above."""

from __future__ import annotations

from typing import Any
from unittest import mock

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import batches, memory, resolve
from attnplan.cost.allocated import Memory
from attnplan.cost.buffers import mask_elements
from attnplan.cost.live import Live
from attnplan.cost.setting import Setting
from attnplan.ir import Attend, RowMap
from attnplan.lower import lower
from attnplan.plan import Plan
from attnplan.search import Found, _options
from bench import budget_curve, train_step
from bench.memory import MIB, SHARES, call_of, measured, row, smallest, specs, summary

SHAPE: dict[str, Any] = {"heads": 4, "head_dim": 32}
GRID: dict[str, dict[str, Any]] = {
    "full": {"pattern": P.full()},
    "causal, grouped heads": {"causal": True, "kv_heads": 2},
    "window": {"pattern": P.window(64), "causal": True},
    "longnet": {"pattern": P.longnet([128, 512], [1, 4])},
    "ragged longnet": {"pattern": P.longnet([100, 256, 1000], [1, 2, 5]), "causal": True},
    "grouped": {"pattern": P.grouped([128, 512], [1, 2])},
    "mean": {"pattern": P.mix([P.window(30), P.segments(128)], rule="mean")},
    "union": {"pattern": P.window(64) | P.global_tokens(16)},
    "random blocks": {"pattern": P.random_blocks(0.1, 64, 0)},
    "documents": {"pattern": P.documents([200, 312, 512])},
    "batch": {"pattern": P.longnet([128, 512], [1, 4]), "batch": 3, "layout": "bshd"},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Kernels of the CPU have buffers for each thread: the tests run on one, and the model is told so."""
    monkeypatch.setattr("attnplan.cost.buffers._threads", lambda: 1)


def every_plan(spec: AttentionSpec):
    target = resolve("cpu")
    for lowered, backend, schedule, candidate in _options(spec, target, "auto", "auto"):
        if not candidate.reasons:
            yield Plan(spec, target, Found(lowered, candidate, backend, schedule, (candidate,)), {}, strict=True)


def assert_predicted(plan: Plan) -> None:
    predicted = plan.predicted.peak_bytes
    peak = measured(call_of_layout(plan), "cpu").allocated
    what = f"{plan}: predicted {predicted / MIB:.2f} MiB, measured {peak / MIB:.2f} MiB"
    assert peak <= predicted, what
    assert predicted <= max(1.3 * peak, peak + 16 * MIB), what


def call_of_layout(plan: Plan):
    if plan.spec.layout == "bhsd":
        return call_of(plan, "cpu")
    spec = plan.spec
    q, k, v = (torch.randn(spec.batch, spec.seq_len, h, spec.head_dim) for h in (spec.heads, *2 * (spec.kv_heads,)))
    return lambda: (plan(q, k, v),)


QUICK = ("causal, grouped heads", "longnet", "union")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in GRID])
def test_the_peak_is_predicted(name):
    spec = AttentionSpec(seq_len=1024, dtype="float32", **SHAPE, **GRID[name])
    for plan in every_plan(spec):
        assert_predicted(plan)


@pytest.mark.parametrize("name", ["longnet", "grouped", pytest.param("mean", marks=pytest.mark.slow)])
def test_the_peak_of_a_training_step_is_predicted(name):
    spec = AttentionSpec(seq_len=1024, dtype="bfloat16", training=True, **SHAPE, **GRID[name])
    for plan in every_plan(spec):
        assert_predicted(plan)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [2048, 4000])
@pytest.mark.parametrize("name", [n for n in GRID if n != "batch"])
def test_the_peak_is_predicted_at_size(name, length, dtype, training):
    if "documents" in name:
        pytest.skip("its lengths are those of 1,024 tokens")
    spec = AttentionSpec(seq_len=length, dtype=dtype, training=training, heads=4, head_dim=64, **GRID[name])
    for plan in every_plan(spec):
        if not (training and any(op.tile for _, op in plan.graph.of(Attend))):
            assert_predicted(plan)


@pytest.mark.slow
def test_budgets_are_kept():
    found = [row(name, spec, share, "cpu", 1) for name, spec in specs(gpu=False) for share in SHARES]
    counts = summary(found)
    assert counts["rows"] >= 80
    assert counts["failed"] == counts["over_budget"] == counts["predicted_below"] == counts["predicted_far"] == 0


def test_a_budget_that_just_fits_is_kept():
    spec = AttentionSpec(seq_len=1024, dtype="float32", pattern=P.longnet([128, 512], [1, 4]), **SHAPE)
    plan = attnplan.compile(spec, device="cpu", max_memory=smallest(spec, "cpu"))
    assert measured(call_of(plan, "cpu"), "cpu").allocated <= plan.predicted.peak_bytes <= smallest(spec, "cpu")


@pytest.mark.parametrize(
    "count", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow), 16]
)
def test_scores_shrink_with_the_number_of_key_blocks(count):
    """The seed's table: a kernel that materialises scores needs 50, 75, 87.5 and 93.8 % less."""
    length = 1536
    spec = AttentionSpec(seq_len=length, heads=1, head_dim=16, dtype="float32", softcap=1e6)
    whole = next(p for p in every_plan(spec) if p.schedule == "math")
    assert whole.predicted.memory.workspace > 3 * length**2 * 4
    from tests.test_chunk import looped

    blocks = looped(whole, None, (length, length // count))
    peaks = [measured(call_of(p, "cpu"), "cpu").allocated for p in (whole, blocks)]
    assert peaks[1] <= (1 / count + 0.05) * peaks[0]


SCORES: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.1, "causal": True},
    "slopes": {"alibi_slopes": True, "causal": True},
    "sinks": {"sink_logits": True, "causal": True},
    "bias": {"bias": True, "pattern": P.longnet([128, 512], [1, 4])},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [n if n == "bias" else pytest.param(n, marks=pytest.mark.slow) for n in SCORES])
def test_the_peak_of_pieces_with_score_operands_covers_what_is_allocated(name, training):
    from tests.test_chunk import looped

    spec = AttentionSpec(seq_len=1024, heads=4, head_dim=64, dtype="float32", training=training, **SCORES[name])
    given = {"sink_logits": torch.randn(4), "alibi_slopes": torch.rand(4), "bias": torch.randn(4, 1024, 1024)}
    own = {n: x for n, x in given.items() if getattr(spec, n)}
    seed = {"dropout_seed": 1} if spec.dropout else {}
    q, k, v, grad = (torch.randn(1, 4, 1024, 64) for _ in range(4))
    for plan in every_plan(spec):
        for one in (plan, looped(plan, (1, 1, 256), None)):

            def run(one=one):
                if not training:
                    return (one(q, k, v, **own, **seed),)
                leaves = [x.detach().requires_grad_() for x in (q, k, v, *own.values())]
                out = one(*leaves[:3], **dict(zip(own, leaves[3:], strict=True)), **seed)
                return (out.detach(), *torch.autograd.grad(out, leaves, grad))

            setting = Setting.of(one.graph, spec, plan._schedule.priced)
            predicted, peak = memory.peak_bytes(one.graph, setting), measured(run, "cpu").allocated
            assert peak <= predicted <= max(1.3 * peak, peak + 16 * MIB), f"{one}: {predicted / MIB}, {peak / MIB} MiB"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("other", [{}, pytest.param({"alibi_slopes": True}, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["full", "longnet", pytest.param("union", marks=pytest.mark.slow)])
def test_a_bias_that_broadcasts_needs_no_more_than_is_predicted(name, other, training):
    """The gradient of one is small, so that no buffer of all pairs is the result, as that of a whole bias is."""
    spec = AttentionSpec(seq_len=512, dtype="float32", training=training, bias=True, **SHAPE, **GRID[name], **other)
    for shape in ((4, 512, 512), (4, 1, 512)):
        leaves = [torch.randn(1, 4, 512, 32, requires_grad=training) for _ in "qkv"]
        given = {"bias": torch.randn(shape, requires_grad=training)}
        given |= {n: torch.rand(4, requires_grad=training) for n in other}
        grad = torch.randn(1, 4, 512, 32)
        for plan in every_plan(spec):

            def run(plan=plan, leaves=leaves, given=given, grad=grad):
                out = plan(*leaves, **given)
                own = (*leaves, *given.values())
                return (out.detach(), *torch.autograd.grad(out, own, grad)) if training else (out,)

            peak = measured(run, "cpu").allocated
            assert peak <= plan.predicted.peak_bytes, f"{plan}: {plan.predicted.peak_bytes / MIB}, {peak / MIB} MiB"


@pytest.mark.parametrize("budget", ["1 MiB", pytest.param("3 MiB", marks=pytest.mark.slow)])
def test_a_training_step_under_a_budget_has_the_same_loss(budget):
    """The example LongNet at the longest length whose attention fits, against the same step without a budget."""
    found = train_step.row(budget, 1024 if budget == "1 MiB" else 4096, "cpu")
    assert found["fits"], found
    assert not found["below"], found
    assert found["close"], found
    assert "pieces of" in found["choice"]
    assert found["predicted_without"] > found["max_memory"]
    assert found["loss_apart"] <= 1e-6
    assert found["gradients_apart"] <= 1e-4
    assert found["step"] <= found["step_without"]


def test_the_longest_length_that_fits_is_the_longest():
    length = train_step.longest("600 KiB", 2**14, "cpu")
    attnplan.compile(train_step.spec_of(length), device="cpu", max_memory="600 KiB")
    with pytest.raises(attnplan.errors.MemoryBudgetError):
        attnplan.compile(train_step.spec_of(2 * length), device="cpu", max_memory="600 KiB")


def test_halved_budgets_are_measured_and_drawn(tmp_path):
    spec = attrs.evolve(budget_curve.specs(gpu=False, tiny=True)["LongNet, 1024 tokens"], heads=2, kv_heads=2)
    found = budget_curve.curve("LongNet", spec, "cpu", 1, 512)
    assert [r["budget"] for r in found[1:]] == [found[0]["budget"] // 2**i for i in range(1, len(found))]
    assert all(r["fits"] for r in found)
    assert found[-1]["rows_of_piece"] < 512 <= found[-2]["rows_of_piece"]
    assert budget_curve.summary(found, 512)["worst_halving"] == max(r["over_twice_the_budget"] for r in found[:-1])
    budget_curve.draw(found, tmp_path / "curve.svg")
    assert "empty circles" in (tmp_path / "curve.svg").read_text() or (tmp_path / "curve.svg").stat().st_size > 10_000


def test_batches_of_tiles_are_those_that_run():
    """The shapes of the runtime's own batches, where the table keeps the tiles that are expected."""
    from attnplan.runtime import tiles

    assert (batches.ELEMENTS, batches.SHARE) == (tiles._ELEMENTS, tiles._SHARE)
    tried = 0
    for pattern in (
        P.window(64) | P.global_tokens(16),
        P.random_blocks(0.1, 64, 0),
        P.window(300) | P.global_tokens(4),
    ):
        spec = AttentionSpec(seq_len=4000, dtype="float32", pattern=pattern, **SHAPE)
        for plan in every_plan(spec):
            for node, op in plan.graph.of(Attend):
                if op.tile is None:
                    continue
                q, k = (n.type.rows for n in plan.graph.args(node)[:2])
                builder = tiles.TileBuilder(op, q, k, spec.shape, 1)
                made = builder({}, *(torch.empty(1, 4, 4000, 32) for _ in "qk"))
                ran = {(len(b.rows), b.columns.shape[1]) for heads in made.heads for b in heads.batches}
                model = {(b.rows, b.width) for b in batches.batches(op, q, k, spec)}
                assert max(r * w for r, w in model) == max(r * w for r, w in ran)
                assert max(r for r, _ in model) >= max(r for r, _ in ran)
                tried += 1
    assert tried >= 2


def test_the_peak_says_what_it_consists_of():
    spec = AttentionSpec(seq_len=1024, dtype="bfloat16", training=True, pattern=GRID["mean"]["pattern"], **SHAPE)
    plan = attnplan.compile(spec, device="cpu")
    found = plan.predicted.memory
    assert isinstance(found, Memory)
    assert found.total == plan.predicted.peak_bytes
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        found.saved = 1
    plain = next(p for p in every_plan(attrs.evolve(spec, dtype="float32", training=False)) if p.schedule == "math")
    assert plain.predicted.memory.saved == 0


def test_masks_are_counted_by_the_axes_that_they_have():
    spec = AttentionSpec(seq_len=8, heads=4, head_dim=8)
    rows = RowMap.whole(4, 8)
    for pattern, elements in ((P.window(2), 64), (P.dilated(8, 2, "interleave"), 4 * 64)):
        op = lower(attrs.evolve(spec, pattern=pattern)).of(Attend)[0][1]
        assert mask_elements(op, rows, rows, 1, attrs.evolve(spec, pattern=pattern)) == elements


@pytest.mark.parametrize("what", ["_join", "_workspace", "_condition"])
def test_a_model_that_forgets_a_buffer_is_caught(what):
    empty = {"_join": (0, 0), "_workspace": 0, "_condition": (0, 0)}[what]
    dtype = "bfloat16" if what == "_join" else "float32"
    spec = AttentionSpec(seq_len=512, dtype=dtype, pattern=P.longnet([128, 512], [1, 4]), **SHAPE)
    with mock.patch.object(Live, what, return_value=empty):
        plans = list(every_plan(spec))
    assert any(p.predicted.peak_bytes < measured(call_of(p, "cpu"), "cpu").allocated for p in plans)
