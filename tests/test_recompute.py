"""What is saved for the backward and what is computed again."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.ir import Output, parse_graph, print_graph
from attnplan.lower import lower
from attnplan.memory_budget import variants
from attnplan.passes import Recompute, Step
from attnplan.passes.recompute import saves_more
from attnplan.plan import Plan
from attnplan.search import Candidate, Found, Lowered
from bench.memory import call_of, measured
from tests.running import Call, assert_agree, every_plan, way

MEAN = P.mix([P.window(5), P.segments(16)], rule="mean")
SPEC = AttentionSpec(seq_len=37, heads=4, kv_heads=2, head_dim=8, dtype="float64", pattern=MEAN, causal=True)


def recomputed(plan: Plan) -> Plan:
    graph = Recompute()(plan.graph)
    steps = (*plan.steps, Step(Recompute(), len(plan.graph), len(graph), 0.0, graph))
    candidate = Candidate(plan.strategy, plan.backend, plan.schedule, plan.predicted)
    found = Found(Lowered(plan.strategy, graph, steps), candidate, plan._backend, plan._schedule, (candidate,))
    return Plan(plan.spec, plan.target, found, {}, strict=True)


@pytest.mark.parametrize("rule", ["mean", "lse-detached", "lse"])
def test_gradients_are_the_same(rule):
    spec = attrs.evolve(SPEC, pattern=attrs.evolve(MEAN, rule=rule))
    call = Call.of(spec, batch=2)
    want = call.expected()
    for plan in every_plan(spec):
        if plan.backend == "eager":
            assert_agree(call.got(recomputed(plan)), want, 1e-12, way(plan))


def test_the_option_is_printed_read_and_set_once():
    graph = Recompute()(lower(SPEC))
    assert graph.output.op == Output(recompute=True)
    assert parse_graph(print_graph(graph)) == graph
    assert Recompute()(graph) is graph


def test_only_what_saves_more_than_the_output_is_offered():
    assert saves_more(lower(SPEC), plain=False)
    assert saves_more(lower(AttentionSpec(seq_len=8, heads=1, head_dim=8)), plain=True)
    assert not saves_more(lower(AttentionSpec(seq_len=8, heads=1, head_dim=8)), plain=False)
    titles = [v.title for v in variants(lower(SPEC), attrs.evolve(SPEC, training=True), plain=False)]
    assert titles[0] == "recompute"
    assert "recompute" not in [v.title for v in variants(lower(SPEC), SPEC, plain=False)]


def test_a_budget_between_the_two_recomputes():
    spec = AttentionSpec(
        seq_len=1024, heads=4, head_dim=32, dtype="float32", pattern=P.longnet([64, 256], [1, 4]), softcap=9.0,
        training=True,
    )  # fmt: skip
    free = attnplan.compile(spec, device="cpu")
    tight = attnplan.compile(spec, device="cpu", max_memory=int(free.predicted.peak_bytes * 0.9))
    assert "recompute" in tight.candidates[0].name or "pieces" in tight.candidates[0].name
    assert tight.predicted.peak_bytes <= 0.9 * free.predicted.peak_bytes
    assert tight.predicted.seconds > free.predicted.seconds
    assert measured(call_of(tight, "cpu"), "cpu").allocated <= tight.predicted.peak_bytes


def test_checkpointing_outside_gives_the_same_gradients():
    trained = attrs.evolve(SPEC, training=True)
    whole = attnplan.compile(trained, device="cpu").predicted.peak_bytes
    plan = attnplan.compile(trained, device="cpu", max_memory=int(0.9 * whole))
    free = attnplan.compile(SPEC, device="cpu")
    assert plan.graph.output.op != Output()
    q, k, v = (torch.randn(1, h, 37, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    weight = torch.randn(1, 4, 37, 8, dtype=torch.float64)
    found = [
        torch.autograd.grad((run() * weight).sum(), (q, k, v))
        for run in (lambda: free(q, k, v), lambda: checkpoint(plan, q, k, v, use_reentrant=False))
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
