"""The numbers do not depend on how a call brings its tensors: layout, strides, batch size, open lengths, operands."""

from __future__ import annotations

import attrs
import pytest
import torch

from attnplan import patterns as P
from attnplan.spec import AttentionSpec, Dim
from tests.cases import CASES
from tests.running import Call, assert_agree, every_plan, plan_for, way

VARIED = ("causal", "causal window", "causal longnet", "unlike offsets in a group", "longnet mean", "more queries")


def on_a_canvas(x):
    """Return ``x`` inside a larger tensor: a storage offset, and steps that are none of a contiguous tensor."""
    canvas = x.new_zeros(x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 3, x.shape[3] + 4)
    view = canvas[1:, 1:-1, 2:-1, 3:-1]
    view.copy_(x)
    return view


STRIDES = {
    "contiguous": lambda x: x.contiguous(),
    "rows first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "heads after rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "features not last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other feature": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "every other row": lambda x: torch.stack([x, x], dim=3).flatten(2, 3)[:, :, ::2],
    "part of a larger tensor": on_a_canvas,
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", VARIED)
def test_layout_and_strides_change_nothing(name, layout, strides):
    call = Call.of(CASES[name].spec, batch=3)
    want = call.expected()
    for plan in every_plan(attrs.evolve(call.spec, layout=layout)):
        leaves = [x.clone().requires_grad_() for x in call.inputs]
        given = [x.transpose(1, 2) if layout == "bshd" else x for x in map(STRIDES[strides], leaves)]
        assert_agree(call.results(plan, leaves, given), want, 1e-12, way(plan))


@pytest.mark.parametrize("name", VARIED)
def test_upstream_gradients_of_any_strides(name):
    call = Call.of(CASES[name].spec, batch=2, through_lse=False)
    want = call.expected()
    expanded = attrs.evolve(call, grad=call.grad[:1, :1, :1].expand_as(call.grad))
    want_expanded = expanded.expected()
    transposed = attrs.evolve(call, grad=call.grad.transpose(1, 3).contiguous().transpose(1, 3))
    for plan in every_plan(call.spec):
        assert_agree(transposed.got(plan), want, 1e-12, way(plan))
        leaves = [x.clone().requires_grad_() for x in call.inputs]
        out = plan(*leaves)
        grads = torch.autograd.grad(out, leaves, expanded.grad)
        for got, exact in zip(grads, (want_expanded.dq, want_expanded.dk, want_expanded.dv), strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", VARIED)
def test_keys_that_the_batch_shares(name):
    """k and v may be one tensor expanded over the batch, with a step of 0."""
    call = Call.of(CASES[name].spec, batch=3)
    q, k, v = call.inputs
    want = attrs.evolve(call, inputs=(q, k[:1].expand_as(k).clone(), v[:1].expand_as(v).clone())).expected()
    for plan in every_plan(call.spec):
        leaves = [q.clone().requires_grad_(), *(x[:1].clone().requires_grad_() for x in (k, v))]
        got = call.results(plan, leaves, [leaves[0], *(x.expand(3, -1, -1, -1) for x in leaves[1:])])
        summed = attrs.evolve(want, dk=want.dk.sum(0, keepdim=True), dv=want.dv.sum(0, keepdim=True))
        assert_agree(got, summed, 1e-12, way(plan))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["full", "causal longnet", "unlike offsets in a group", "mask of heads", "softcap"])
def test_any_batch_size_runs(name, batch):
    call = Call.of(CASES[name].spec, batch=batch)
    want = call.expected()
    for plan in every_plan(call.spec):
        assert_agree(call.got(plan), want, 1e-12, way(plan))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.operands and n != "padding"])
def test_an_empty_batch_gives_empty_tensors(name, layout):
    spec = attrs.evolve(CASES[name].spec, layout=layout)
    shapes = [(0, spec.heads, spec.seq_len), (0, spec.kv_heads, spec.kv_len)]
    order = (lambda x: x.transpose(1, 2)) if layout == "bshd" else (lambda x: x)
    for plan in every_plan(spec):
        q, k, v = (
            order(torch.empty(*shape, n, dtype=torch.float64)).requires_grad_()
            for shape, n in ((shapes[0], spec.head_dim), (shapes[1], spec.head_dim), (shapes[1], spec.value_dim))
        )
        out, lse = plan(q, k, v, return_lse=True) if spec.has_lse else (plan(q, k, v), None)
        assert out.shape == order(torch.empty(*shapes[0], spec.value_dim)).shape, way(plan)
        assert lse is None or lse.shape == shapes[0], way(plan)
        grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out), allow_unused=True, materialize_grads=True)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape], way(plan)


def test_the_output_lies_in_memory_as_the_queries_do():
    spec = attrs.evolve(CASES["causal longnet"].spec, layout="bshd")
    q = torch.randn(2, 37, 4, 8, dtype=torch.float64)
    for plan in every_plan(spec):
        if plan.schedule == "flash":
            assert plan(q, q, q).is_contiguous(), way(plan)


OPEN = {
    "causal": {"causal": True},
    "window": {"pattern": P.window(9) | P.sinks(1), "causal": True},
    "longnet": {"pattern": P.longnet([8, 16, 64], [1, 2, 4]), "causal": True},
    "longnet mean": {"pattern": P.longnet([8, 16], [1, 2], mix="mean"), "heads": 6, "kv_heads": 2},
    "segments": {"pattern": P.segments(16)},
    "documents": {"pattern": P.documents() & P.window(7), "causal": True},
    "padding": {"pattern": P.padding(), "kv_heads": 2},
    "softcap": {"pattern": P.segments(16), "softcap": 2.0, "causal": True},
    "mask": {"pattern": P.mask(lambda h, q, k: (q * k + h) % 3 != 0)},
}


def operands_at(spec, kv_len, batch):
    made = {"documents": torch.tensor([0, kv_len // 3, kv_len])}
    made["key_padding"] = torch.arange(kv_len) < torch.tensor([[kv_len]] * (batch - 1) + [[(kv_len + 1) // 2]])
    made["q_offset"] = torch.arange(batch) % kv_len
    return {name: made[name] for name in spec.operands}


@pytest.mark.parametrize("name", OPEN)
def test_an_open_length_gives_what_a_fixed_one_gives(name):
    options = {"heads": 4, "head_dim": 8, "dtype": "float64", **OPEN[name]}
    spec = AttentionSpec(seq_len=Dim("s", max=64), **options)
    plans = list(every_plan(spec))
    for length in (1, 7, 33, 64, 33):
        call = Call.of(spec.at(length, length), operands_at(spec, length, 2), batch=2)
        want = call.expected()
        for plan in plans:
            assert_agree(call.got(plan), want, 1e-12, f"{length} rows, {way(plan)}")


@pytest.mark.parametrize("name", ["causal", "window", "longnet", "padding"])
def test_two_open_lengths_align_at_the_end(name):
    options = {"heads": 4, "head_dim": 8, "dtype": "float64", **OPEN[name]}
    spec = AttentionSpec(seq_len=Dim("s", max=24), kv_len=Dim("k", max=40), **options)
    plans = list(every_plan(spec))
    for seq_len, kv_len in ((5, 40), (24, 9), (13, 13), (1, 21)):
        call = Call.of(spec.at(seq_len, kv_len), operands_at(spec, kv_len, 2), batch=2)
        want = call.expected()
        for plan in plans:
            assert_agree(call.got(plan), want, 1e-12, f"{seq_len} of {kv_len}, {way(plan)}")


def test_decoding_with_an_open_cache_and_a_position():
    spec = AttentionSpec(
        seq_len=1, kv_len=Dim("k", max=64), heads=4, kv_heads=2, head_dim=8, dtype="float64",
        pattern=P.window(9), causal=True, q_offset=True,
    )  # fmt: skip
    plans = list(every_plan(spec))
    for kv_len in (1, 8, 64):
        call = Call.of(spec.at(1, kv_len), {"q_offset": torch.tensor([0, kv_len - 1])}, batch=2)
        want = call.expected()
        for plan in plans:
            assert_agree(call.got(plan), want, 1e-12, f"{kv_len} keys, {way(plan)}")


def test_a_position_means_the_same_as_int_tensor_and_per_element():
    spec = AttentionSpec(
        seq_len=5, kv_len=32, heads=2, head_dim=8, dtype="float64", pattern=P.window(9), causal=True, q_offset=True
    )
    q, k, v = Call.of(spec, {"q_offset": 20}, batch=2).inputs
    for plan in every_plan(spec):
        first, *others = (
            plan(q, k, v, q_offset=x) for x in (20, torch.tensor(20), torch.tensor([20]), torch.tensor([20, 20]))
        )
        for other in others:
            assert torch.equal(first, other), way(plan)


TWICE = {
    "causal": {"causal": True},
    "longnet": {"pattern": P.longnet([3, 6], [1, 2]), "causal": True},
    "rows that a branch leaves out": {"pattern": P.longnet([6, 6], [3, 2])},
    "sum": {"pattern": P.mix([P.window(1), P.segments(3)], rule="sum", weights=[2.0, -0.5])},
    "grouped queries": {"pattern": P.longnet([3, 6], [1, 2]), "heads": 4, "kv_heads": 2},
    "softcap": {"pattern": P.window(1), "softcap": 1.5},
}


@pytest.mark.parametrize("name", TWICE)
def test_plain_torch_differentiates_twice(name):
    call = Call.of(AttentionSpec(seq_len=7, **{"heads": 2, "head_dim": 2, "dtype": "float64", **TWICE[name]}))
    leaves = [x.clone().requires_grad_() for x in call.inputs]
    for plan in every_plan(call.spec):
        if plan.schedule != "flash":
            assert torch.autograd.gradcheck(plan, leaves), way(plan)
            assert torch.autograd.gradgradcheck(plan, leaves), way(plan)


def test_plain_torch_differentiates_the_lse_twice():
    call = Call.of(AttentionSpec(seq_len=7, heads=2, head_dim=2, dtype="float64", pattern=P.longnet([3, 6], [1, 2])))
    plan = plan_for(call.spec, "math")
    leaves = [x.clone().requires_grad_() for x in call.inputs]
    assert torch.autograd.gradgradcheck(lambda *x: plan(*x, return_lse=True), leaves)


@pytest.mark.parametrize("name", ["causal", "longnet", "sum"])
def test_flash_refuses_to_be_differentiated_twice(name):
    """Never a silent zero, as a penalty on gradients of constant upstream would be under ``once_differentiable``."""
    spec = AttentionSpec(seq_len=7, **{"heads": 2, "head_dim": 2, "dtype": "float64", **TWICE[name]})
    call = Call.of(spec)
    leaves = [x.clone().requires_grad_() for x in call.inputs]
    out = plan_for(spec, "flash")(*leaves)
    (first,) = torch.autograd.grad(out, leaves[0], call.grad, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice|derivative for .* is not implemented"):
        first.norm().backward()


def test_first_gradients_that_keep_a_graph_are_the_same():
    call = Call.of(CASES["causal longnet"].spec, through_lse=False)
    plan = plan_for(call.spec, "flash")
    leaves = [x.clone().requires_grad_() for x in call.inputs]
    kept = torch.autograd.grad(plan(*leaves), leaves, call.grad, create_graph=True)
    plain = torch.autograd.grad(plan(*leaves), leaves, call.grad)
    for a, b in zip(kept, plain, strict=True):
        assert a.requires_grad
        assert torch.equal(a, b)
