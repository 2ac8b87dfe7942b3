"""Sink logits, biases and ALiBi slopes: what a call brings for the scores, under every plan, with its gradients."""

from __future__ import annotations

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from attnplan.errors import VerifyError
from attnplan.ir import Attend, Output
from attnplan.ir.coverage import check_coverage, coverage, spec_coverage
from attnplan.lower import lower
from tests import oracle
from tests.running import every_plan, way
from tests.score_calls import CASES, assert_same, by_plan, drawn, expected, numbers, spec_of


@pytest.mark.parametrize("name", CASES)
def test_every_plan_agrees_with_the_pairs_written_out(name):
    spec, operands = CASES[name]
    given = {**drawn(spec), **operands}
    want = numbers(lambda q, k, v, own: expected(spec, q, k, v, own), spec, given)
    plans = list(every_plan(spec))
    assert {"reference", "eager"} <= {p.backend for p in plans}
    assert spec.softcap is not None or {"flash", "math"} <= {p.schedule for p in plans}
    for plan in plans:
        assert_same(numbers(by_plan(plan), spec, given), want, way(plan))


@pytest.mark.parametrize("shape", [(1, 37, 37), (4, 1, 37), (4, 37, 1), (2, 1, 1, 37), (2, 4, 37, 37), (1, 1, 37, 1)])
@pytest.mark.parametrize("pattern", [P.window(9), P.longnet([8, 16], [1, 2])], ids=repr)
def test_a_bias_broadcasts_and_its_gradient_has_its_shape(shape, pattern):
    spec = spec_of(pattern, causal=True, kv_heads=2, bias=True)
    given = drawn(spec, shape)
    want = numbers(lambda q, k, v, own: expected(spec, q, k, v, own), spec, given)
    for plan in every_plan(spec):
        assert_same(numbers(by_plan(plan), spec, given), want, way(plan))


def test_open_lengths_take_what_the_call_brings():
    spec = spec_of(P.window(6), seq_len=Dim("s", max=40), kv_len=Dim("k", max=48), causal=True, bias=True,
                   alibi_slopes=True, sink_logits=True)  # fmt: skip
    for lengths in ((17, 17), (9, 33), (1, 20)):
        here = spec.at(*lengths)
        given = drawn(here)
        want = numbers(lambda q, k, v, own, here=here: expected(here, q, k, v, own), here, given)
        for plan in every_plan(spec):
            assert_same(numbers(by_plan(plan), here, given), want, f"{way(plan)} at {lengths}")


def test_only_what_requires_gradients_gets_them():
    spec = attrs.evolve(spec_of(causal=True, bias=True, sink_logits=True), dtype="float32")
    plan = attnplan.compile(spec, device="cpu")
    q, k, v = (torch.randn(1, 4, 37, 8) for _ in range(3))
    bias, sinks = torch.randn(4, 37, 37), torch.randn(4, requires_grad=True)
    plan(q, k, v, bias=bias, sink_logits=sinks).sum().backward()
    assert sinks.grad is not None
    assert bias.grad is None
    assert not plan(q, k, v, bias=bias, sink_logits=sinks.detach()).requires_grad
    q.requires_grad_()
    plan(q, k, v, bias=bias, sink_logits=sinks.detach()).sum().backward()
    assert q.grad is not None


def test_a_sink_of_minus_infinity_is_none():
    spec = spec_of(P.dilated(12, 3), sink_logits=True)
    call = oracle.sample_inputs(spec, 1)
    sinks = torch.full((4,), -torch.inf, dtype=torch.float64, requires_grad=True)
    want, want_lse = oracle.dense(spec, *call)
    for plan in every_plan(spec):
        out, lse = plan(*call, return_lse=True, sink_logits=sinks)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)
        grads = torch.autograd.grad(out.sum(), (*call, sinks))
        assert all(x.isfinite().all() for x in grads)
        assert not grads[3].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_stays_near_float64(dtype):
    for name, limit in (("all three", {"float32": 2e-6, "bfloat16": 1e-2}), ("sinks, longnet", None)):
        spec, _ = CASES[name]
        spec = attrs.evolve(spec, dtype=dtype)
        limits = limit or {"float32": 2e-6, "bfloat16": 1e-2}
        given = {n: x.detach().to(getattr(torch, dtype)) for n, x in drawn(spec).items()}
        tensors = [x.detach() for x in oracle.sample_inputs(spec, 1, 0, getattr(torch, dtype))]
        want, _ = expected(spec, *(x.double() for x in tensors), {n: x.double() for n, x in given.items()})
        for plan in every_plan(spec):
            got = plan(*tensors, **given)
            assert got.dtype == tensors[0].dtype
            assert (got.double() - want).norm() / want.norm() < limits[dtype], way(plan)


def test_alibi_in_half_precision_keeps_its_distances_on_the_cpu():
    spec = AttentionSpec(seq_len=1500, heads=2, head_dim=16, causal=True, dtype="bfloat16", alibi_slopes=True)
    tensors = [torch.randn(1, 2, 1500, 16).bfloat16() for _ in range(3)]
    slopes = torch.tensor([2**-8, 0.01])
    want, _ = expected(spec, *(x.double() for x in tensors), {"alibi_slopes": slopes.double()})
    got = attnplan.compile(spec, device="cpu")(*tensors, alibi_slopes=slopes)
    assert (got.double() - want).norm() / want.norm() < 4e-3


def test_a_plan_verifies_itself_with_them():
    spec = AttentionSpec(seq_len=64, heads=4, head_dim=16, causal=True, dtype="float32", bias=True,
                         alibi_slopes=True, sink_logits=True, pattern=P.window(16))  # fmt: skip
    names = {c.name for c in attnplan.compile(spec, device="cpu").verify(rows=20).checks}
    assert {"grad bias", "grad alibi_slopes", "grad sink_logits"} <= names


def test_one_call_and_traces_give_the_same():
    q, k, v = (torch.randn(1, 4, 37, 8, requires_grad=True) for _ in range(3))
    given = {n: x.detach().float().requires_grad_() for n, x in drawn(CASES["all three"][0]).items()}
    spec = attrs.evolve(CASES["all three"][0], kv_heads=4, batch=1, dtype="float32")
    plan = attnplan.compile(spec, device="cpu")
    want = plan(q, k, v, **given)
    torch.testing.assert_close(attnplan.attention(q, k, v, pattern=spec.pattern, causal=True, **given), want)
    leaves = (q, k, v, *given.values())
    upstream = torch.randn_like(want)
    grads = torch.autograd.grad(want, leaves, upstream)
    traced = torch.compile(lambda *x, **own: plan(*x, **own), backend="aot_eager", fullgraph=True)
    got = traced(q, k, v, **given)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), grads, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------- proof and refusals


def test_the_proof_sees_a_lost_bias_and_a_lost_sink():
    spec = spec_of(P.window(5), causal=True, bias=True, sink_logits=True)
    graph = lower(spec)
    expectation = spec_coverage(spec)
    check_coverage(expectation, coverage(graph), "it")

    def without(kind, **changes):
        nodes = [attrs.evolve(n, op=attrs.evolve(n.op, **changes)) if isinstance(n.op, kind) else n for n in graph]
        return attrs.evolve(graph, nodes=tuple(nodes))

    with pytest.raises(VerifyError, match=r"lost .* with bias"):
        check_coverage(expectation, coverage(without(Attend, biases=())), "it")
    with pytest.raises(VerifyError, match="it lost the sink logits"):
        check_coverage(expectation, coverage(without(Output, sinks=False)), "it")
    with pytest.raises(VerifyError, match="it gained the sink logits"):
        check_coverage(spec_coverage(attrs.evolve(spec, sink_logits=False)), coverage(graph), "it")
