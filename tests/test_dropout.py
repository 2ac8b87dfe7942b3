"""Dropout: one mask per (seed, batch, head, query, key), whatever the plan."""

import pytest
import torch

import attnplan
from attnplan import AttentionSpec, SpecError
from attnplan import patterns as P
from attnplan.runtime.dropout import keep_mask

CASES = {
    "causal": {"pattern": P.full(), "causal": True},
    "longnet": {"pattern": P.longnet([4, 8, 16], [1, 2, 4]), "causal": True},
    "grouped heads": {"pattern": P.longnet([8, 32], [1, 4]), "kv_heads": 2},
    "mean": {"pattern": P.grouped([4, 8], [1, 2], mix="mean")},
    "window and sinks": {"pattern": P.window(3) | P.sinks(2)},
}


def made(case, layout="bhsd", dtype="float64", dropout=0.3):
    spec = AttentionSpec(
        seq_len=29, heads=4, head_dim=8, value_dim=6, dtype=dtype, dropout=dropout, layout=layout, **CASES[case]
    )
    torch.manual_seed(0)
    sizes = [(spec.heads, 8), (spec.kv_heads, 8), (spec.kv_heads, 6)]
    q, k, v = (torch.randn(2, h, 29, d, dtype=getattr(torch, dtype)) for h, d in sizes)
    return spec, (q, k, v) if layout == "bhsd" else tuple(x.transpose(1, 2) for x in (q, k, v))


@pytest.mark.parametrize("case", CASES)
def test_every_plan_drops_the_same_pairs(case):
    spec, inputs = made(case)
    swapped, other = made(case, layout="bshd")
    want = attnplan.compile(spec, "cpu", backend="reference")(*inputs, dropout_seed=5)
    for strategy in ("dense", "lattice"):
        try:
            plan = attnplan.compile(spec, "cpu", backend="eager", strategy=strategy)
        except attnplan.NoBackendError:
            continue  # this pattern has no lattice
        torch.testing.assert_close(plan(*inputs, dropout_seed=5), want, rtol=1e-12, atol=1e-12)
    got = attnplan.compile(swapped, "cpu")(*other, dropout_seed=5).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_at_a_fixed_seed_the_output_is_linear_in_v(case):
    spec, (q, k, v) = made(case)
    plan = attnplan.compile(spec, "cpu")
    other = torch.randn_like(v)
    both = plan(q, k, 2 * v - 3 * other, dropout_seed=1)
    apart = 2 * plan(q, k, v, dropout_seed=1) - 3 * plan(q, k, other, dropout_seed=1)
    torch.testing.assert_close(both, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["causal", "longnet", "mean"])
def test_first_and_second_gradients_are_those_of_the_output(case):
    spec, inputs = made(case)
    plan = attnplan.compile(spec, "cpu")
    small = [x[:1].detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: plan(*x, dropout_seed=3), small, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: plan(*x, dropout_seed=3), small, fast_mode=True)


def test_the_mean_over_seeds_is_the_output_without_dropout():
    spec, inputs = made("causal", dropout=0.2)
    plain, _ = made("causal", dropout=0.0)
    plan = attnplan.compile(spec, "cpu")
    mean = torch.stack([plan(*inputs, dropout_seed=s) for s in range(3000)]).mean(0)
    want = attnplan.compile(plain, "cpu")(*inputs)
    assert (mean - want).norm() / want.norm() < 0.02


def test_the_lse_does_not_depend_on_dropout():
    spec, inputs = made("longnet")
    plain, _ = made("longnet", dropout=0.0)
    lse = attnplan.compile(spec, "cpu")(*inputs, return_lse=True, dropout_seed=9)[1]
    torch.testing.assert_close(lse, attnplan.compile(plain, "cpu")(*inputs, return_lse=True)[1])


def test_seeds_differ_and_a_tensor_is_as_good_as_an_int():
    spec, inputs = made("causal")
    plan = attnplan.compile(spec, "cpu")
    one = plan(*inputs, dropout_seed=2**40 + 1)
    assert torch.equal(one, plan(*inputs, dropout_seed=torch.tensor(2**40 + 1)))
    assert not torch.equal(one, plan(*inputs, dropout_seed=1))
    assert not torch.equal(one, plan(*inputs, dropout_seed=2**40 + 2))


def test_the_generator_is_uniform_and_its_coordinates_are_independent():
    axis = torch.arange(40)
    grid = torch.meshgrid(axis[:4], axis[:8], axis, axis, indexing="ij")
    for dropout in (0.1, 0.5, 0.9):
        kept = keep_mask(11, *grid, dropout).float()
        for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
            assert (kept.mean(dims) - (1 - dropout)).abs().max() < 0.05
    half = keep_mask(11, *grid, 0.5).float() - 0.5
    for dim in range(4):
        assert abs((half.narrow(dim, 0, 3) * half.narrow(dim, 1, 3)).mean()) < 0.02


@pytest.mark.parametrize("seed", [1.5, True, "7", torch.tensor([1, 2]), torch.tensor(1.0)])
def test_a_seed_that_is_no_integer_is_refused(seed):
    spec, inputs = made("causal")
    with pytest.raises(SpecError, match="dropout_seed must be an int"):
        attnplan.compile(spec, "cpu")(*inputs, dropout_seed=seed)


def test_a_missing_seed_is_asked_for():
    spec, inputs = made("causal")
    with pytest.raises(SpecError, match=r"needs dropout_seed with each call"):
        attnplan.compile(spec, "cpu")(*inputs)


def test_a_seed_without_dropout_is_refused():
    spec, inputs = made("causal", dropout=0.0)
    with pytest.raises(SpecError, match=r"takes no dropout_seed: its spec would need dropout above 0"):
        attnplan.compile(spec, "cpu")(*inputs, dropout_seed=1)


def test_fused_kernels_refuse_dropout_with_the_reason():
    spec, _ = made("causal")
    reasons = [c.reasons for c in attnplan.compile(spec, "cpu").candidates if c.schedule == "flash"]
    assert all(any("dropout masks that depend on the plan" in r for r in refused) for refused in reasons)
    assert reasons


def test_verify_covers_dropout():
    spec, _ = made("longnet")
    assert all(check.passed for check in attnplan.compile(spec, "cpu").verify(rows=16).checks)
