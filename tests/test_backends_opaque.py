"""The operators that stand for kernels of other packages: dispatch modes, checkpointing, tracing, opcheck."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attnplan.runtime import opaque
from tests import fake_kernels
from tests.kernel_plans import SPECS, Counting, float32_call, packages, plan_by, plans

__all__ = ["packages"]
pytestmark = pytest.mark.usefixtures("packages")


@pytest.mark.parametrize("schedule", ["fa2", "fa4"])
def test_a_dispatch_mode_sees_the_registered_operator_and_plain_eager_goes_without(schedule):
    call = float32_call(SPECS["window"])
    plan = plan_by(call.spec, schedule)
    want = plan(*call.inputs)
    with Counting() as mode:
        got = plan(*call.inputs)
        plan(*call.inputs, return_lse=True)
    assert mode.seen.count("attnplan.flash_forward.default") == 2
    assert torch.equal(got, want)


def test_the_operators_of_xformers_are_a_family_of_their_own():
    call = float32_call(SPECS["window"])
    with Counting() as mode:
        next(p for p in plans(call.spec) if p.backend == "xformers" and p.schedule == "flash")(*call.inputs)
    assert mode.seen.count("attnplan.xformers_forward.default") == 1


@pytest.mark.parametrize("name", ["window", "longnet", "whole tiles"])
@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing_saves_the_attention(name, policy):
    call = float32_call(SPECS[name])
    plan = plan_by(call.spec, "fa4")
    attends = len([n for n in plan.graph if n.op.name == "attend"])
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    want = torch.autograd.grad(plan(*leaves), leaves, call.grad)

    def decide(ctx, op, *args, **kwargs):
        return policy if "attnplan" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    fake_kernels.calls.clear()
    out = checkpoint(
        plan, *leaves, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(decide)
    )
    got = torch.autograd.grad(out, leaves, call.grad)
    forwards = fake_kernels.calls["fa4 forward"]
    assert forwards == (attends if policy == CheckpointPolicy.MUST_SAVE else 2 * attends)
    assert fake_kernels.calls["fa4 backward"] == attends
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["causal", "window", "grouped queries", "whole tiles"])
def test_plans_trace_without_a_break_and_give_the_same(name):
    call = float32_call(SPECS[name])
    plan = plan_by(call.spec, "fa4")
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    want = plan(*leaves)
    got = torch.compile(lambda q, k, v: plan(q, k, v), backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x, leaves, call.grad) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", ["fa2", "fa4", "xformers-flash"])
@pytest.mark.parametrize("window", [[-1, -1], [3, 0]])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(kernel, window, packed):
    family = opaque.FAMILIES["xformers" if "xformers" in kernel else "flash"]
    q = torch.randn(2, 12, 2, 16, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 2, 12, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    documents = torch.tensor([0, 5, 12]) if packed else None
    sinks = torch.tensor([0.5, -1.0]) if kernel == "fa4" else None
    given = (q, k, v, None, None, documents, sinks, [], kernel, False, [*window, 0, 0], 0.25, 0.0)
    torch.library.opcheck(family, given)
