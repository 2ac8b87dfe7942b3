"""Partial tiles by flash-attn 4's mask functions: lookups forward, and no mask function backward."""

from __future__ import annotations

import attrs
import pytest
import torch

import attnplan
from attnplan import patterns as P
from attnplan.backends import flash, limits
from attnplan.errors import KernelError
from attnplan.ir import Attend
from attnplan.patterns import Shape
from attnplan.patterns.tiles import block_table
from attnplan.runtime.kernels import Request
from attnplan.runtime.kernels_all import KERNELS
from attnplan.runtime.tables import block_lists
from attnplan.runtime.tile_masks import lookup_tables
from attnplan.search import candidates
from tests import fake_kernels
from tests.kernel_plans import H100, SPECS, Counting, float32_call, packages, plan_by, plans, spec_of
from tests.running import Call, assert_agree

__all__ = ["packages"]
pytestmark = [
    pytest.mark.usefixtures("packages"),
    pytest.mark.filterwarnings("error:.*this plan now runs.*:RuntimeWarning"),
]

PARTIAL = ("longformer", "streaming", "any mask")
MORE = {
    "ragged": spec_of(P.window(3) | P.global_tokens(2), seq_len=45, kv_heads=2),
    "more keys": spec_of(P.window(6, 2) | P.sinks(1), seq_len=23, kv_len=41),
    "rows without a key": spec_of(P.band(20, -4)),
    "no whole tile": spec_of(P.strided(3)),
    "bshd": spec_of(P.window(5) | P.global_tokens(3), layout="bshd"),
    "heads differ": spec_of((P.heads(0, 2) & P.window(5)) | (P.heads(2, 4) & P.full())),
}


@pytest.mark.parametrize("name", [*PARTIAL, *MORE])
def test_one_call_forward_and_whole_tiles_apart_backward(name):
    spec = {**SPECS, **MORE}[name]
    call = Call.of(spec, batch=2)
    plan = plan_by(spec, "fa4-masks", "blocks")
    fake_kernels.calls.clear()
    assert_agree(call.got(plan), call.expected(), 1e-11, name)
    assert fake_kernels.calls["fa4 forward"] == 1
    assert fake_kernels.calls["fa4 backward"] >= 1


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("tokens", [P.global_tokens(2), P.global_tokens([5, 6, 30])])
def test_rows_that_see_every_key_are_calls_of_their_own(layout, tokens):
    spec = spec_of(P.window(3) | tokens, seq_len=45, layout=layout)
    call = Call.of(spec, batch=2)
    plan = plan_by(spec, "fa4-masks", "blocks-rows")
    fake_kernels.calls.clear()
    assert_agree(call.got(plan), call.expected(), 1e-11, layout)
    rows = [graph_rows(plan, node) for node, op in plan.graph.of(Attend) if op.tile is None]
    assert rows == ([(0, 2)] if tokens == P.global_tokens(2) else [(5, 7), (30, 31)])
    assert fake_kernels.calls["fa4 forward"] == len(plan.graph.of(Attend))
    assert fake_kernels.calls["fa4 told where to write"] > 0, "nothing is copied to its place"


def graph_rows(plan, node):
    rows = plan.graph.args(node)[0].type.rows
    return rows.row, rows.last_row + 1


def test_where_no_row_sees_every_key_none_is_cut_off():
    assert not [p for p in plans(MORE["more keys"]) if p.strategy == "blocks-rows"]  # sinks are keys alone
    assert any(p.strategy == "blocks" for p in plans(MORE["more keys"]))


def test_a_dispatch_mode_sees_the_same():
    call = float32_call(SPECS["longformer"])
    plan = plan_by(call.spec, "fa4-masks", "blocks")
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    want = plan(*leaves)
    with Counting() as mode:
        got = plan(*leaves)
    assert mode.seen.count("attnplan.flash_forward.default") == 1
    assert torch.equal(got, want)
    traced = torch.compile(lambda q, k, v: plan(q, k, v), backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(traced, want)
    each = [torch.autograd.grad(x, leaves, call.grad) for x in (want, got, traced)]
    for a, b, c in zip(*each, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a, rtol=2e-2, atol=2e-2)


def test_its_backward_with_a_mask_function_is_refused_by_name():
    table = block_table(P.causal(), Shape(16, 16, 2, 1), (8, 4), masks=True)
    lists = attrs.evolve(block_lists(table), masks=lookup_tables(table))
    q = torch.randn(1, 2, 16, 16)
    asked = Request(0.25, blocks=lists)
    out, lse = KERNELS["fa4"].forward(q, q, q, asked)
    with pytest.raises(KernelError, match=r"wrong gradients with mask functions .*2101"):
        KERNELS["fa4"].backward(out, q, q, q, out, lse, asked)


def test_what_it_is_not_for_is_refused(monkeypatch):
    def reasons(spec):
        found = [c for c in candidates(spec, H100) if (c.schedule, c.strategy) == ("fa4-masks", "blocks")]
        return "; ".join(found[0].reasons)

    assert "is for partial tiles, and all are whole" in reasons(SPECS["whole tiles"])
    assert "no backward of a softcap" in reasons(attrs.evolve(SPECS["longformer"], softcap=2.0))
    assert "one mask function for the whole batch, padding([20, 9])" in reasons(spec_of(P.padding([20, 9]), seq_len=20))
    monkeypatch.setattr(limits, "MOST_LOOKED_UP", 64)
    assert "looks masks up in at most 64 B, this needs 288 B or more" in reasons(SPECS["longformer"])
    monkeypatch.setattr(limits, "MOST_LOOKED_UP", 300)
    assert "in at most 300 B, this needs" in reasons(SPECS["longformer"]), "the masks count, too"
    assert all(p.strategy != "dense" for p in plans(SPECS["causal"]) if p.schedule == "fa4-masks")


def test_what_has_not_been_run_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(flash, "FA4_MASKS", attrs.evolve(flash.FA4_MASKS, automatic=False))
    spec = attrs.evolve(SPECS["longformer"], dtype="bfloat16", head_dim=64, value_dim=64)

    def schedules(**options):
        found = attnplan.compile(spec, device="h100", **options).candidates
        return {c.schedule: c.reasons for c in found if c.strategy == "blocks"}

    assert schedules()["fa4-masks"] == ("runs only when asked for by backend='flash'",)
    assert schedules(backend="flash")["fa4-masks"] == ()
