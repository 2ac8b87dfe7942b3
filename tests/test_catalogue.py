"""The catalogue of specs, its reference and its anchor, and that everything that accepts a case computes it."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
import torch

from attnplan.testing import (
    anchor,
    catalogue,
    cross_validate,
)
from attnplan.testing.anchor import anchored
from attnplan.testing.catalogue import _FAMILIES, SIZES
from attnplan.testing.numbers import Call, relative, relative_lse
from attnplan.testing.reference import dense_attention
from tests import oracle
from tests.conftest import ROOT
from tests.faulty import (
    FAULTS,
    SPEC,
)

torch.set_num_threads(1)

NAMES = list(catalogue())


# ------------------------------------------------------------------------------------------------------ the catalogue


def test_the_catalogue_is_large_and_names_no_case_twice():
    every = [case.name for family in _FAMILIES for case in family(SIZES["small"])]
    assert [name for name, count in Counter(every).items() if count > 1] == []
    assert len(every) == len(NAMES) >= 60
    assert len(NAMES) == len({(c.spec, str(c.operands)) for c in catalogue().values()}), "two cases are the same"


def test_a_fault_has_a_source_and_a_source_a_fault():
    assert [c.name for c in catalogue().values() if bool(c.fault) != bool(c.source)] == []


def test_the_page_lists_every_fault():
    page = (ROOT / "docs" / "cross-validation.md").read_text(encoding="utf-8")
    listed = [line for line in page.splitlines() if line.startswith("| ")][-len(FAULTS) :]
    assert listed == [f"| {c.name} | {c.fault} | {c.source} |" for c in catalogue().values() if c.fault]
    assert f"\n{len(NAMES)} cases: " in page


@pytest.mark.parametrize("size", SIZES)
def test_the_catalogue_holds_every_kind_of_spec(size):
    specs = [c.called for c in catalogue(size).values()]
    kinds = {type(p).__name__ for spec in specs for p in spec.pattern.walk()}
    assert kinds >= {
        "Band",
        "Documents",
        "Padding",
        "Sinks",
        "GlobalTokens",
        "Blocks",
        "Neighborhood",
        "Mask",
        "Dilated",
    }
    assert {type(s.pattern).__name__ for s in specs} >= {"LongNet", "Grouped", "Mix"}
    assert {s.rule for s in specs} >= {"lse", "lse-detached", "mean", "sum"}
    assert {n for s in specs for n in s.operands} == {"documents", "key_padding", "q_offset", "dropout_seed"}
    assert any(s.softcap for s in specs)
    assert any(s.layout == "bshd" for s in specs)
    assert any(s.kv_heads == 1 for s in specs)
    assert any(s.value_dim != s.head_dim for s in specs)
    assert any(s.shape.shift > 0 for s in specs)
    assert any(s.shape.shift < 0 for s in specs)
    assert sum(s.shape.kv_len % 2 for s in specs) > 40, "most lengths are odd"


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_oracle(name):
    """The reference asks patterns which pairs meet; the oracle writes them out once more from their docstrings."""
    case = catalogue(dtype="float64")[name]
    if case.spec.dropout:
        pytest.skip("the oracle has no dropout; test_dropout.py compares with its hash")
    call = Call.random(case.called, case.operands, "cpu", 0)
    leaves = [x.clone().requires_grad_() for x in call.inputs]
    out, lse = oracle.dense(case.called, *leaves, operands=call.operands)
    loss = (out * call.grad).sum()
    if lse is not None:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * call.grad_lse).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    got = call.by_autograd("float64", True, dense_attention)
    for (_, ours), exact in zip(got.items(), (out, *grads), strict=True):
        assert relative(ours, exact) < 1e-13
    assert (got.lse is None) == (lse is None)
    assert lse is None or relative_lse(got.lse, lse) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_the_anchor_computes_the_case_in_float64(name):
    """By SDPA with masks, through the LSE too: exact where the dtype is, so that it stands for the dtype alone."""
    case = catalogue(dtype="float64")[name]
    call = Call.random(case.called, case.operands, "cpu", 1)
    _, got = anchored(call, through_lse=True)
    want = call.by_autograd("float64", True, dense_attention)
    for (what, ours), (_, exact) in zip(got.items(), want.items(), strict=True):
        assert relative(ours, exact) < 1e-12, what


def test_the_anchor_shows_no_row_without_a_key_to_a_kernel(monkeypatch):
    """Some kernels return NaN for such rows, and their gradients spread it."""
    original = anchor.F.scaled_dot_product_attention

    def strict(*args, attn_mask, **options):
        assert attn_mask.any(-1).all()
        return original(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(anchor.F, "scaled_dot_product_attention", strict)
    case = catalogue(dtype="float64")["rows without a block"]
    call = Call.random(case.called, case.operands, "cpu", 0)
    assert call.empty.any()
    assert relative(anchored(call, True)[1].out, call.by_autograd("float64", True, dense_attention).out) < 1e-12


def test_the_anchor_says_which_kernel_it_is_and_why_not_another(monkeypatch):
    call = Call.random(SPEC, None, "cpu", 0)
    right = anchor._by_sdpa(call, True)
    answers = iter([RuntimeError("no mask\nat line 7"), attrs.evolve(right, dk=right.dk * torch.nan), right])

    def answer(*_):
        found = next(answers)
        if isinstance(found, RuntimeError):
            raise found
        return found

    monkeypatch.setattr(anchor, "_by_sdpa", answer)
    name, numbers = anchor._by_first_kernel(call, True)
    assert name == "SDPA (math, cuDNN raised no mask, efficient gave NaN)"
    assert numbers is right
    answers = iter([RuntimeError("no")] * 3)
    name, numbers = anchor._by_first_kernel(call, True)
    assert name.startswith("plain torch (SDPA, cuDNN raised no")
    assert relative(numbers.dq, right.dq) < 1e-5


# ---------------------------------------------------------------------------------------------------- what is there


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow), "bfloat16",
                                   pytest.param("float16", marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_every_way_computes_every_case(name, dtype):
    matrix = cross_validate(catalogue("small", dtype)[name], device="cpu").check()
    assert "naive > reference (float64)" in {r.way for r in matrix.ran}
    assert {r.backend for r in matrix.ran} >= {"eager", "reference"}
    assert all(r.reasons for r in matrix.refused)
    assert all(r.seconds > 0 for r in matrix.ran)
    has_lse = catalogue()[name].spec.has_lse
    assert all(("lse" in {c.name for c in r.checks}) == has_lse for r in matrix.ran)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_every_way_computes_every_case_on_cuda(name):
    cross_validate(catalogue("large", "bfloat16")[name], device="cuda").check()
