"""``plan.verify()``: passes on every plan that is right, and notices each of many ways to be wrong."""

from __future__ import annotations

import attrs
import pytest
import torch

from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from attnplan.backends.eager import emit, places
from attnplan.errors import NoBackendError, SpecError, VerifyError
from attnplan.ir import Attend
from attnplan.runtime import attend, kernels, masks, merge, views
from attnplan.verify import Check, Report, _lse_error, relative_error
from tests.cases import CASES
from tests.running import every_plan, plan_for, way
from tests.test_mutations import change_attends, join_operands

LONGNET = AttentionSpec(
    seq_len=40, heads=4, kv_heads=2, head_dim=8, dtype="float32", pattern=P.longnet([8, 16], [1, 2]), causal=True
)
MEAN = attrs.evolve(LONGNET, pattern=P.longnet([8, 16], [1, 2], mix="mean"))
DETACHED = attrs.evolve(LONGNET, pattern=P.longnet([8, 16], [1, 2], mix="lse-detached"))
WINDOW = attrs.evolve(LONGNET, pattern=P.window(5))
CAUSAL = attrs.evolve(LONGNET, pattern=P.full())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_plans_that_are_right_pass(name, dtype):
    spec = attrs.evolve(CASES[name].spec, dtype=dtype)
    for plan in every_plan(spec):
        report = plan.verify(rows=16)
        names = ["output", *(["lse"] if spec.has_lse else []), "grad q", "grad k", "grad v"]
        assert [c.name for c in report.checks] == names, way(plan)
        assert all(c.passed for c in report.checks)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_layouts_batches_and_open_lengths_pass(layout):
    for options in (
        {"batch": 3},
        {"seq_len": Dim("s", max=40), "kv_len": Dim("s", max=40)},
        {"seq_len": Dim("s", max=9), "kv_len": Dim("k", max=40), "pattern": P.padding() & P.documents()},
        {"kv_len": 64, "q_offset": True},
    ):
        for plan in every_plan(attrs.evolve(LONGNET, layout=layout, **options)):
            plan.verify(rows=16)


def test_the_report_says_what_was_compared():
    report = plan_for(LONGNET, "flash").verify(rows=5, seed=3)
    assert isinstance(report, Report)
    text = str(report)
    assert text.startswith("coverage   proved: every pair of the spec exactly once (")
    assert "grad k     ok      relative L2 " in text
    assert "numbers    5 sampled rows against float64 (" in text


def test_the_seed_decides_what_is_compared():
    plan = plan_for(LONGNET, "flash")
    first, again, other = (plan.verify(rows=5, seed=seed).checks for seed in (0, 0, 1))
    assert first == again != other


def test_more_rows_than_there_are_is_no_error():
    plan_for(LONGNET, "flash").verify(rows=10_000)


@pytest.mark.parametrize("rows", [0, -3])
def test_at_least_one_row_is_compared(rows):
    with pytest.raises(SpecError, match=f"verify needs at least one row, got {rows}"):
        plan_for(LONGNET, "flash").verify(rows=rows)


def test_nan_is_never_within_a_tolerance():
    assert not Check("output", relative_error(torch.tensor([torch.nan]), torch.ones(1)), 1.0).passed


@pytest.mark.parametrize("lse", [[0.5, 1.0], [-torch.inf, -torch.inf], [torch.nan, 1.0]], ids=str)
def test_an_lse_is_minus_infinity_exactly_where_no_key_is_seen(lse):
    want = torch.tensor([-torch.inf, 1.0])
    assert _lse_error(want, want) == 0
    assert _lse_error(torch.tensor(lse), want) == float("inf")


# ----------------------------------------------------------------------------------------------------- corruptions


def wrapped(monkeypatch, owner, name, change):
    """Replace a function by ``change(original)``, in all plans emitted from now on."""
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))


def assert_caught(spec, what, schedule="flash", strategy=None):
    plan = plan_for(spec, schedule, strategy)
    with pytest.raises(VerifyError, match=what):
        plan.verify()


def test_a_merge_without_weights_is_caught(monkeypatch):
    def even(original):
        return lambda q, outs, lses, places: (
            merge.weighted_sum(q, outs, [1 / len(outs)] * len(outs), places), merge.merged_lse(q, lses, places)
        )  # fmt: skip

    wrapped(monkeypatch, merge, "merge", even)
    assert_caught(LONGNET, "output .*grad q .*grad k", strategy="lattice")


def test_a_plain_merge_that_detaches_its_weights_is_caught_by_gradients_alone(monkeypatch):
    def detaching(original):
        return lambda *args, detach=False: original(*args, detach=True)

    wrapped(monkeypatch, merge, "merge_plain", detaching)
    assert_caught(LONGNET, "sampled rows: grad q", schedule="math")


@pytest.mark.parametrize(
    ("method", "what"), [("forward", "sampled rows: output .*lse"), ("backward", "sampled rows: grad q")]
)
def test_a_wrong_scale_is_caught(monkeypatch, method, what):
    def louder(original):
        return lambda self, *args: original(self, *args[:-1], args[-1]._replace(scale=1.01 * args[-1].scale))

    wrapped(monkeypatch, kernels.FlashCPU, method, louder)
    assert_caught(LONGNET, what)
    assert_caught(WINDOW, what)


def test_a_wrong_lse_alone_is_caught(monkeypatch):
    """Base two instead of e, in a plan whose output does not need the LSE."""

    def base_two(original):
        def forward(*args, **options):
            out, lse = original(*args, **options)
            return out, lse * 1.442695

        return forward

    wrapped(monkeypatch, attend, "softmax_attention", base_two)
    assert_caught(WINDOW, r"sampled rows: lse [^,]*$", schedule="math")


def test_a_dropped_mask_is_caught(monkeypatch):
    wrapped(monkeypatch, masks.MaskBuilder, "forward", lambda original: lambda *args: original(*args) | True)
    assert_caught(WINDOW, "output", strategy="dense")


def test_a_kernel_that_forgets_causality_is_caught(monkeypatch):
    def bold(original):
        return lambda self, *args: original(self, *args[:-1], args[-1]._replace(causal=False))

    wrapped(monkeypatch, kernels.FlashCPU, "forward", bold)
    assert_caught(LONGNET, "output", strategy="lattice")


def test_rows_from_the_wrong_place_are_caught(monkeypatch):
    def shifted(original):
        return lambda x, head, row, axes: original(x, head, max(row - 1, 0), axes)

    wrapped(monkeypatch, views, "rows", shifted)
    assert_caught(attrs.evolve(LONGNET, pattern=P.dilated(8, 2, offset=1)), "lse inf .*grad v", strategy="lattice")


def test_a_backward_from_unmerged_outputs_is_caught(monkeypatch):
    """Each branch by its own output and LSE: the classic mistake, which leaves the forward pass right."""

    def alone(original):
        return lambda graph: {node: places.Owner(node, node) for node in original(graph)}

    wrapped(monkeypatch, emit, "owners", alone)
    assert_caught(LONGNET, "sampled rows: grad q", strategy="lattice")


def test_a_backward_that_differentiates_detached_weights_is_caught(monkeypatch):
    def merged(original):
        return lambda graph: {n: attrs.evolve(o, out=o.lse) for n, o in original(graph).items()}

    wrapped(monkeypatch, emit, "owners", merged)
    assert_caught(DETACHED, "sampled rows: grad q", strategy="lattice")


def test_a_backward_without_the_weight_of_a_branch_is_caught(monkeypatch):
    def unweighted(original):
        return lambda graph: {n: attrs.evolve(o, weight=1.0) for n, o in original(graph).items()}

    wrapped(monkeypatch, emit, "owners", unweighted)
    assert_caught(MEAN, "sampled rows: grad q")


def test_gradients_that_are_not_summed_over_a_group_are_caught(monkeypatch):
    def first_only(original):
        return lambda grad, x: grad[tuple(slice(n) for n in x.shape)]

    wrapped(monkeypatch, attend, "_reduce_to", first_only)
    assert_caught(LONGNET, "sampled rows: grad k .*grad v", strategy="lattice")


def test_gradients_of_a_part_that_overwrite_others_are_caught(monkeypatch):
    def overwriting(original):
        return lambda total, part, *where: total.zero_() if not where else views.rows(total, *where).copy_(part)

    spec = attrs.evolve(LONGNET, kv_heads=4)
    wrapped(monkeypatch, views, "add_rows", overwriting)
    assert_caught(spec, "sampled rows: grad q", strategy="lattice")


def test_keys_and_values_exchanged_in_the_backward_are_caught(monkeypatch):
    def exchanged(original):
        def backward(*args):
            dq, dk, dv = original(*args)
            return dq, dv, dk

        return backward

    wrapped(monkeypatch, attend, "attend_backward", exchanged)
    assert_caught(attrs.evolve(CAUSAL, pattern=P.window(5)), "sampled rows: grad k .*grad v")


def test_a_graph_that_lost_a_part_is_caught_by_the_proof():
    plan = plan_for(LONGNET, "flash", "lattice")
    plan.graph = join_operands(plan.graph, lambda places: places[:-1])
    with pytest.raises(VerifyError, match="the plan"):
        plan.verify()


@pytest.mark.parametrize("changes", [{"scale": 0.5}, {"where": P.full()}, {"softcap": 3.0}], ids=str)
def test_a_graph_with_another_attend_is_caught_by_the_proof(changes):
    plan = plan_for(LONGNET, "flash", "lattice")
    plan.graph = change_attends(plan.graph, lambda op: op.branch == 1, **changes)
    assert plan.graph.of(Attend)
    with pytest.raises(VerifyError, match="the plan"):
        plan.verify()


def test_a_wrong_graph_is_refuted_even_for_hardware_elsewhere():
    spec = attrs.evolve(LONGNET, dtype="bfloat16")
    plan = next(p for p in every_plan(spec, "h100") if p.strategy == "lattice")
    with pytest.raises(NoBackendError, match="the coverage is proved, but NVIDIA H100"):
        plan.verify()
    plan.graph = join_operands(plan.graph, lambda places: places[:-1])
    with pytest.raises(VerifyError, match="the plan"):
        plan.verify()
