"""Every way to run a spec gives the numbers of the oracle: output, LSE, gradients, also through the LSE."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnplan import patterns as P
from tests import oracle
from tests import strategies as some
from tests.cases import CASES
from tests.running import TOLERANCES, Call, assert_agree, dense_sdpa, error, every_plan, lse_error, way

BFLOAT16_OUTPUT = 4e-3
BFLOAT16_LSE = 1e-4  # kept in float32; the kernel's exponential is an approximation
BFLOAT16_GRADIENT_RATIO = 1.5
"""Largest error of a gradient over the error that dense SDPA makes in bfloat16 on the same tensors."""

# Dense SDPA has no operands and no softcap to anchor to; those cases are compared in float64 and float32.
ANCHORED = [name for name, case in CASES.items() if not case.operands and case.spec.softcap is None]


def call_of(name, dtype, **options):
    case = CASES[name]
    return Call.of(attrs.evolve(case.spec, dtype=dtype), case.operands, case.batch, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_every_way_gives_the_numbers_of_the_oracle(name, dtype):
    call = call_of(name, dtype)
    want = call.expected()
    lse_dtype = getattr(torch, dtype)
    for plan in every_plan(call.spec):
        got = call.got(plan)
        assert_agree(got, want, TOLERANCES[dtype], f"{name}, {way(plan)}")
        assert got.out.dtype is lse_dtype
        assert got.lse is None or got.lse.dtype is lse_dtype


def test_the_cases_take_every_way():
    taken = Counter(way(plan) for case in CASES.values() for plan in every_plan(case.spec))
    assert sorted(taken) == [
        "blocks > eager (flash)",
        "blocks-rows > eager (flash)",
        "decompose > eager (flash)",
        "decompose > eager (math)",
        "dense > eager (flash)",
        "dense > eager (math)",
        "lattice > eager (flash)",
        "lattice > eager (math)",
        "naive > reference (float64)",
    ]
    assert taken.pop("blocks-rows > eager (flash)") == 4, "every case in which a row sees all keys, and some do not"
    assert min(taken.values()) > 10


@pytest.mark.parametrize("name", ANCHORED)
def test_half_precision_is_near_dense_sdpa(name):
    """The anchor is dense SDPA with the pattern as a mask: the fair price of computing the same numbers in bfloat16.

    Unmasked SDPA would be none: its rows average over more keys, so that errors are of another size.
    """
    call = call_of(name, "bfloat16", through_lse=False)
    want, anchor = call.expected(), dense_sdpa(call)
    floor = 1e-3 * want.out.numel() ** 0.5
    for plan in every_plan(call.spec):
        got = call.got(plan)
        assert error(got.out, want.out) <= BFLOAT16_OUTPUT, way(plan)
        if got.lse is not None:
            assert got.lse.dtype is torch.float32
            assert lse_error(got.lse, want.lse) <= BFLOAT16_LSE, way(plan)
        for gradient in ("dq", "dk", "dv"):
            ours, dense, exact = (getattr(n, gradient) for n in (got, anchor, want))
            # where the exact gradient is 0, as for a row with one key, 1e-7 per element is rounding
            ratio = error(ours, exact, floor) / max(error(dense, exact, floor), 1e-4)
            assert ratio <= BFLOAT16_GRADIENT_RATIO, f"{way(plan)}: {gradient} errs {ratio:.2f} times as much as SDPA"


@pytest.mark.parametrize("name", ["causal longnet", "unlike offsets in a group", "window", "longnet detached"])
def test_half_precision_gradients_through_the_lse_are_near(name):
    """SDPA returns no LSE, so there is no anchor: the bound is that of ``verify`` for bfloat16."""
    call = call_of(name, "bfloat16")
    want = call.expected()
    for plan in every_plan(call.spec):
        assert_agree(call.got(plan), want, 1.5e-2, way(plan))


@pytest.mark.parametrize("name", ["causal longnet", "unlike offsets in a group", "causal window"])
def test_float16_is_nearer_than_bfloat16(name):
    call = call_of(name, "float16", through_lse=False)
    want = call.expected()
    for plan in every_plan(call.spec):
        assert_agree(call.got(plan), want, 2e-3, way(plan))


@settings(max_examples=50)
@given(st.data())
def test_any_spec_runs_alike_in_every_way(data):
    spec = data.draw(some.specs(masks=True))
    values = data.draw(some.operands(spec))
    call = Call.of(spec, values, spec.batch, seed=data.draw(st.integers(0, 9)))
    want = call.expected()
    for plan in every_plan(spec):
        got = call.got(plan)
        for name, a, b in ((n, getattr(got, n), getattr(want, n)) for n in ("out", "lse", "dq", "dk", "dv")):
            if a is None and b is None:
                continue
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda t, n=name, p=plan: f"{p!r} {n}: {t}")


ROWS_WITHOUT_KEYS = (
    "no key at all", "rows without a key", "documents longer than the queries", "an element without real keys",
    "more queries", "more queries in segments", "more queries detached", "more queries, mean",
    "detached with rows that no branch covers",
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ROWS_WITHOUT_KEYS)
def test_a_row_without_a_key_is_exactly_nothing(name, dtype):
    call = call_of(name, dtype)
    masks = oracle.branch_masks(call.spec, call.operands, CASES[name].batch)
    empty = torch.tensor(~sum(masks).astype(bool).any(-1))
    unseen = torch.tensor(~sum(masks).astype(bool).any(2))
    if name != "documents longer than the queries":
        assert empty.any()
    for plan in every_plan(call.spec):
        got = call.got(plan)
        assert all(x.isfinite().all() for _, x in got.items()), way(plan)
        assert (got.out[empty] == 0).all(), way(plan)
        assert (got.dq[empty] == 0).all(), way(plan)
        assert got.lse is None or torch.equal(got.lse == -torch.inf, empty), way(plan)
        if call.spec.heads == call.spec.kv_heads:
            assert (got.dk[unseen] == 0).all(), way(plan)
            assert (got.dv[unseen] == 0).all(), way(plan)


@pytest.mark.parametrize("name", ["causal", "causal longnet", "unlike offsets in a group", "longnet mean", "softcap"])
def test_the_output_without_gradients_or_lse_is_the_same(name):
    """Inference, a call for the output alone and a training call may take different programs."""
    call = call_of(name, "float64", through_lse=False)
    want = call.expected()
    for plan in every_plan(call.spec):
        with torch.no_grad():
            assert error(plan(*call.inputs, **call.operands), want.out) <= 1e-12
        leaves = [x.clone().requires_grad_() for x in call.inputs]
        out = plan(*leaves, **call.operands)
        for got, exact in zip(torch.autograd.grad(out, leaves, call.grad), (want.dq, want.dk, want.dv), strict=True):
            assert error(got, exact) <= 1e-12, way(plan)


@pytest.mark.parametrize("which", range(3))
def test_gradients_may_be_wanted_for_one_input_only(which):
    call = call_of("unlike offsets in a group", "float64")
    want = call.expected()
    for plan in every_plan(call.spec):
        inputs = [x.detach().requires_grad_(place == which) for place, x in enumerate(call.inputs)]
        out, lse = plan(*inputs, return_lse=True)
        (got,) = torch.autograd.grad(call.loss(out, lse), [inputs[which]])
        assert error(got, (want.dq, want.dk, want.dv)[which]) <= 1e-12, way(plan)


def test_gradients_may_come_from_the_lse_alone():
    call = call_of("causal longnet", "float64")
    call = attrs.evolve(call, grad=torch.zeros_like(call.grad))
    want = call.expected()
    assert want.dv.norm() == 0
    for plan in every_plan(call.spec):
        leaves = [x.clone().requires_grad_() for x in call.inputs]
        _, lse = plan(*leaves, return_lse=True)
        grads = torch.autograd.grad(lse, leaves, call.grad_lse, allow_unused=True, materialize_grads=True)
        for got, exact in zip(grads, (want.dq, want.dk, want.dv), strict=True):
            assert error(got, exact, floor=1.0) <= 1e-12, way(plan)


@pytest.mark.parametrize(
    "name", ["causal", "causal longnet", "unlike offsets in a group", "longnet detached", "mask of heads"]
)
def test_gradients_through_the_lse_where_a_kernel_has_no_room_for_them(name, monkeypatch):
    """As on CUDA with 256 features a head."""
    monkeypatch.setattr("attnplan.runtime.attend._has_room", lambda *_: False)
    call = call_of(name, "float64")
    want = call.expected()
    for plan in every_plan(call.spec):
        assert_agree(call.got(plan), want, 1e-12, way(plan))


def test_a_key_that_both_branches_see_counts_twice():
    twice, once = (attrs.evolve(CASES["causal"].spec, pattern=p) for p in (P.mix([P.window(4)] * 2), P.window(4)))
    call = Call.of(twice)
    out, lse = next(every_plan(once))(*call.inputs, return_lse=True)
    for plan in every_plan(twice):
        got, got_lse = plan(*call.inputs, return_lse=True)
        assert error(got, out) <= 1e-12
        assert error(got_lse, lse + torch.log(torch.tensor(2.0, dtype=torch.float64))) <= 1e-12
