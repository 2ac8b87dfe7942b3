"""Every fault of a published library, rebuilt on purpose, is noticed by cross-validation."""

from __future__ import annotations

import sys
from collections import Counter

import attrs
import pytest
import torch

from attnplan.errors import VerifyError
from attnplan.testing import (
    catalogue,
    cross_validate,
)
from tests.faulty import (
    FAULTS,
    GRADIENTS_ALONE,
    HERE,
    LSE_ALONE,
    SPEC,
    Faulty,
    FaultyProgram,
    wrong_gradient,
    wrong_result,
)

torch.set_num_threads(1)


def test_every_fault_of_the_catalogue_has_been_rebuilt():
    assert list(FAULTS) == [c.name for c in catalogue().values() if c.fault]


@pytest.mark.parametrize("name", FAULTS)
def test_published_faults_are_caught(name, faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", FAULTS[name])
    matrix = cross_validate(catalogue(dtype="float64")[name], device="cpu", backends=["faulty"])
    (result,) = matrix.results
    assert result.status == "differs", result
    passed = {c.name for c in result.checks if c.passed}
    if name in GRADIENTS_ALONE:
        assert passed >= {"output", "lse"}, "the forward pass is right"
    if name in LSE_ALONE:
        assert {"output"} <= passed
        assert "lse" not in passed
    with pytest.raises(VerifyError, match=r"naive > faulty \(wrong\): (output|lse|grad|empty)"):
        matrix.check()


def test_without_a_fault_it_agrees(faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", wrong_result(lambda out, lse: (out, lse)))
    for name in FAULTS:
        cross_validate(catalogue(dtype="float64")[name], device="cpu", backends=["faulty"]).check()


@pytest.mark.parametrize("factor", [1.02, 0.98])
def test_a_gradient_that_errs_more_than_the_dtype_is_caught_in_half_precision(factor, faulty, monkeypatch):
    """The anchor is tight: 2 % are a few times what bfloat16 costs."""
    louder = wrong_gradient(lambda spec: attrs.evolve(spec, scale=factor * spec.softmax_scale))
    monkeypatch.setattr(Faulty, "fault", louder)
    (result,) = cross_validate(catalogue(dtype="bfloat16")["longnet"], device="cpu", backends=["faulty"]).results
    assert {c.name for c in result.checks if not c.passed} >= {"grad q", "grad k"}


@pytest.mark.parametrize("name", "qkv")
def test_each_gradient_is_compared(name, faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "louder", name)
    monkeypatch.setattr(Faulty, "fault", wrong_result(lambda out, lse: (out, lse)))
    (result,) = cross_validate(catalogue()["causal"], device="cpu", backends=["faulty"]).results
    assert [c.name for c in result.checks if not c.passed] == [f"grad {name}"]


def raising(error):
    def fault(spec, right, other):
        raise error

    return fault


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (raising(AssertionError("head_dim")), "AssertionError: head_dim"),
        (
            wrong_result(lambda out, lse: (out[:, :, :-1], lse)),
            r"output is torch.float32 \[2, 4, 148, 16\], it must be",
        ),
        (wrong_result(lambda out, lse: (out, lse.half())), "LSE is torch.float16"),
    ],
)
def test_a_kernel_that_raises_or_returns_something_else_has_failed(fault, words, faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", fault)
    matrix = cross_validate(catalogue()["causal"], device="cpu", backends=["faulty", "reference"])
    assert Counter(r.status for r in matrix.results) == {"failed": 1, "agrees": 1}
    with pytest.raises(VerifyError, match=words):
        matrix.check()


def test_rows_without_a_key_are_exactly_nothing(faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", wrong_result(lambda out, lse: (out + 1e-300, lse)))
    (result,) = cross_validate(
        catalogue(dtype="float64")["rows without a block"], device="cpu", backends=["faulty"]
    ).results
    assert [c.name for c in result.checks if not c.passed] == ["empty rows"]


def test_an_lse_without_gradient_is_not_compared_through_and_said_so(faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", wrong_result(lambda out, lse: (out, lse.detach())))
    here = sys.modules[HERE]
    monkeypatch.setattr(here, "emit", lambda graph, spec, *_: FaultyProgram(spec, differentiable_lse=False))
    (result,) = cross_validate(SPEC, device="cpu", backends=["faulty"]).check().results
    assert result.reasons == ("the LSE is not differentiable: gradients are those of the output",)
    monkeypatch.setattr(here, "emit", lambda graph, spec, *_: FaultyProgram(spec))
    assert not cross_validate(SPEC, device="cpu", backends=["faulty"]).agrees, "it says that it is"
