"""Sink logits in flash-attn 4's own argument, where one call is the whole plan; a merge everywhere else."""

from __future__ import annotations

import attrs
import pytest
import torch

from attnplan import patterns as P
from tests import fake_kernels
from tests.kernel_plans import Counting, packages, plan_by, plans
from tests.score_calls import assert_same, by_plan, drawn, expected, numbers, spec_of

__all__ = ["packages"]
pytestmark = pytest.mark.usefixtures("packages")

ONE_CALL = {
    "full": spec_of(sink_logits=True),
    "causal, grouped": spec_of(causal=True, kv_heads=2, sink_logits=True),
    "window": spec_of(P.window(5), causal=True, sink_logits=True),
    "rows without a key": spec_of(causal=True, seq_len=37, kv_len=19, sink_logits=True),
    "softcap": spec_of(causal=True, softcap=2.0, sink_logits=True),
    "more keys": spec_of(P.window(3), seq_len=19, kv_len=37, sink_logits=True),
}
SEVERAL = {
    "longformer": spec_of(P.window(3) | P.global_tokens(2), sink_logits=True),
    "mixture": spec_of(P.mix([P.window(5), P.full()]), sink_logits=True),
    "longnet": spec_of(P.longnet([8, 16, 64], [1, 2, 4]), causal=True, kv_heads=2, sink_logits=True),
}


def given_of(spec):
    """Return logits that float32 holds exactly: the kernel takes no wider ones. One head has none."""
    logits = drawn(spec)["sink_logits"].detach().float().double()
    logits[1] = -torch.inf
    return {"sink_logits": logits}


@pytest.mark.parametrize("name", [*ONE_CALL, *SEVERAL])
def test_numbers(name):
    spec = {**ONE_CALL, **SEVERAL}[name]
    given = given_of(spec)
    want = numbers(lambda q, k, v, own: expected(spec, q, k, v, own), spec, given)
    fake_kernels.calls.clear()
    found = [p for p in plans(spec) if p.schedule == "fa4"]
    assert found
    for plan in found:
        assert_same(numbers(by_plan(plan), spec, given), want, f"{name} by {plan.strategy}")
    native = fake_kernels.calls["fa4 forward with sinks"]
    assert native == (len([p for p in found if len(p.graph) == 5]) if name in ONE_CALL else 0)


def test_other_kernels_merge_and_say_nothing_of_sinks():
    spec = ONE_CALL["causal, grouped"]
    for schedule in ("fa2", "fa3"):
        assert "sunk" in plan_by(spec, schedule).source
    assert "sunk" not in plan_by(spec, "fa4").source


def test_the_registered_operator_carries_them():
    spec = attrs.evolve(ONE_CALL["window"], dtype="bfloat16")
    plan = plan_by(spec, "fa4")
    q, k, v = (torch.randn(2, 4, 37, 8, dtype=torch.bfloat16) for _ in range(3))
    logits = torch.linspace(-1, 1, 4, requires_grad=True)
    want = plan(q, k, v, sink_logits=logits)
    with Counting() as mode:
        got = plan(q, k, v, sink_logits=logits)
    assert mode.seen.count("attnplan.flash_forward.default") == 1
    assert torch.equal(got, want)
    traced = torch.compile(lambda *x: plan(*x[:3], sink_logits=x[3]), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(q, k, v, logits), want)
