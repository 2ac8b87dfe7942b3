"""Cross-validation: what accepts a case of the catalogue computes it, and every published fault would be noticed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import ClassVar

import attrs
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.backends import Schedule, registry
from attnplan.backends.base import Backend
from attnplan.cli import main
from attnplan.cost import KernelModel
from attnplan.errors import NoBackendError, SpecError, VerifyError
from attnplan.lower import lower
from attnplan.runtime.interpreter import interpret
from attnplan.testing import (
    Case,
    Matrix,
    Report,
    Result,
    anchor,
    catalogue,
    cross_validate,
    cross_validate_catalogue,
    merge,
    numbers,
    validate,
)
from attnplan.testing.anchor import anchored
from attnplan.testing.catalogue import _FAMILIES, SIZES
from attnplan.testing.numbers import Call, relative, relative_lse
from attnplan.testing.reference import dense_attention
from attnplan.verify import Check
from tests import oracle
from tests.test_registry import point, provide  # noqa: F401

torch.set_num_threads(1)

HERE = __name__
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "third_party_backend"
NAMES = list(catalogue())
SPEC = AttentionSpec(seq_len=33, heads=4, kv_heads=2, head_dim=8, dtype="float32", pattern=P.window(5), causal=True)

# ------------------------------------------------------------------------------------------------------ the catalogue


def test_the_catalogue_is_large_and_names_no_case_twice():
    every = [case.name for family in _FAMILIES for case in family(SIZES["small"])]
    assert [name for name, count in Counter(every).items() if count > 1] == []
    assert len(every) == len(NAMES) >= 60
    assert len(NAMES) == len({(c.spec, str(c.operands)) for c in catalogue().values()}), "two cases are the same"


def test_a_fault_has_a_source_and_a_source_a_fault():
    assert [c.name for c in catalogue().values() if bool(c.fault) != bool(c.source)] == []


def test_the_page_lists_every_fault():
    page = (EXAMPLE.parent.parent / "docs" / "cross-validation.md").read_text(encoding="utf-8")
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


# ------------------------------------------------------------------------------------------------- published faults


def wrong_spec(change):
    """Compute another spec."""
    return lambda spec, right, other: other(change(spec))


def evolved(**changes):
    return wrong_spec(lambda spec: attrs.evolve(spec, **changes))


def wrong_gradient(change):
    """Compute the right numbers, and the gradients of another spec."""

    return lambda spec, right, other: map(_Swapped.apply, right, other(change(spec)))


class _Swapped(torch.autograd.Function):
    """Return the first tensor, with the gradient of the second."""

    @staticmethod
    def forward(ctx, right, wrong):
        return right.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def wrong_result(change):
    """Change output and LSE."""
    return lambda spec, right, other: change(*right)


def top_left(spec):
    return attrs.evolve(spec, pattern=P.band(None, -spec.shape.shift), causal=False)


def nan_in_empty_rows(out, lse):
    return out.masked_fill((lse == -torch.inf).unsqueeze(-1), torch.nan), lse


class _NaN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def after_the_first(value):
    def change(out, lse):
        return torch.cat([out[:1], torch.full_like(out[1:], value)]), lse

    return change


def summed_blocks(spec):
    layout = np.eye(5, dtype=bool) | (np.arange(25).reshape(5, 5) % 3 == 0)
    assert repr(spec.pattern) == repr(P.blocks(layout, 32))
    columns = [P.blocks(layout & (np.arange(5) == j), 32) for j in range(5)]
    return attrs.evolve(spec, pattern=P.mix(columns, rule="sum"))


def leaking_shift(spec):
    """The last half group, rolled to the front, is in one group with the first."""
    n = spec.seq_len
    rolled = P.mask(lambda h, q, k: (h >= 2) & (q < 16) & (k >= (n - 16) // 32 * 32 + 16))
    return attrs.evolve(spec, pattern=(spec.pattern & P.causal()) | rolled, causal=False)


def slots_for_positions(spec):
    w, r = spec.pattern.length, spec.pattern.rate
    return attrs.evolve(spec, pattern=spec.pattern & P.mask(lambda h, q, k: (k % w) // r <= q % w), causal=False)


FAULTS = {
    "causal, heads last": wrong_result(lambda out, lse: (_NaN.apply(out), lse)),
    "as many heads as rows": None,  # see the test below: its gradients come from transposed keys
    "one query, many keys": wrong_spec(top_left),
    "more keys than queries, causal": wrong_spec(top_left),
    "more queries than keys, causal": wrong_result(nan_in_empty_rows),
    "open length": wrong_result(lambda out, lse: (out, _NaN.apply(lse))),
    "scale": evolved(scale=None),
    "dropout": wrong_result(lambda out, lse: (torch.dropout(out, 0.2, True), lse)),
    "window, causal": evolved(pattern=P.window(19)),
    "window, one side": evolved(pattern=P.window(29, 0)),
    "window, more keys": evolved(pattern=P.causal()),
    "window, grouped": evolved(pattern=P.causal()),
    "window, grouped, one head": evolved(pattern=P.full()),
    "windows of each head": evolved(pattern=P.window(16)),
    "grouped queries": wrong_result(lambda out, lse: (out, lse * 0)),
    "one key head": wrong_result(lambda out, lse: (out, lse / math.log(2))),
    "documents, known, both directions": evolved(pattern=P.full()),
    "documents": evolved(pattern=P.full()),
    "documents of each element": wrong_result(after_the_first(torch.nan)),
    "documents, window": evolved(pattern=P.window(16, 0)),
    "documents, open length": wrong_result(after_the_first(0.0)),
    "padding": evolved(pattern=P.full()),
    "padding, causal": evolved(pattern=P.full(), causal=False),
    "padding at the front": wrong_result(lambda out, lse: (_NaN.apply(out), lse)),
    "longnet, padding": wrong_spec(lambda spec: attrs.evolve(spec, pattern=attrs.evolve(spec.pattern, where=P.full()))),
    "blocks": lambda spec, right, other: (other(summed_blocks(spec))[0], right[1]),
    "rows without a block": wrong_result(nan_in_empty_rows),
    "groups shifted by half": wrong_spec(leaking_shift),
    "longnet": wrong_gradient(lambda spec: attrs.evolve(spec, pattern=attrs.evolve(spec.pattern, mix="lse-detached"))),
    "longnet, both directions, grouped": wrong_gradient(lambda spec: attrs.evolve(spec, pattern=spec.branches[0])),
    "dilated, causal": wrong_spec(slots_for_positions),
    "rows that no branch covers": wrong_result(lambda out, lse: (out, lse.clamp(min=-1e8))),
    "grouped heads": wrong_result(lambda out, lse: (out * (torch.arange(5) < 4).reshape(-1, 1, 1), lse)),
    "grouped heads, mean, causal": wrong_result(lambda out, lse: (out / out.sum(2, keepdim=True), lse)),
    "mask function": wrong_gradient(lambda spec: attrs.evolve(spec, pattern=P.full())),
}
GRADIENTS_ALONE = {"causal, heads last", "as many heads as rows", "open length", "padding at the front", "longnet",
                   "longnet, both directions, grouped", "mask function"}  # fmt: skip
LSE_ALONE = {"grouped queries", "one key head"}


@attrs.frozen(cache_hash=True)
class Faulty(Backend):
    """The reference with a fault."""

    name: ClassVar[str] = "faulty"
    emitter: ClassVar[str] = HERE
    automatic: ClassVar[bool] = False
    naive: ClassVar[bool] = True
    fault: ClassVar = None
    louder: ClassVar = None
    """The input whose gradient is 1 % too large."""

    def schedules(self, device):
        return (Schedule("wrong", KernelModel(efficiency=0.1)),)

    def refuse(self, graph, spec, schedule, device):
        return ("too deep", "too wide") if spec.heads == 7 else ()


@attrs.frozen
class FaultyProgram:
    spec: AttentionSpec
    source: str = ""
    differentiable_lse: bool = True
    follows_lengths: bool = False

    def __call__(self, q, k, v, operands, return_lse):
        q, k, v = (
            _Swapped.apply(x, 1.01 * x) if name == Faulty.louder else x
            for name, x in zip("qkv", (q, k, v), strict=True)
        )

        def computed(spec, k=k, v=v):
            return interpret(lower(spec), q, k, v, operands, attrs.evolve(spec.shape, batch=len(q)))

        fault = Faulty.fault
        if fault is None:
            right, wrong = computed(self.spec), computed(self.spec, k.transpose(1, 2), v.transpose(1, 2))
            out, lse = map(_Swapped.apply, right, wrong)
        else:
            out, lse = fault(self.spec, computed(self.spec), computed)
        narrow = lse is not None and lse.dtype is torch.float64 and q.dtype is not torch.float64
        return out.to(q.dtype), lse.float() if narrow else lse


def emit(graph, spec, schedule, device):
    return FaultyProgram(spec)


@pytest.fixture
def faulty(provide):  # noqa: F811
    provide(point("faulty", f"{HERE}:Faulty"))
    return Faulty


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


# ------------------------------------------------------------------------------------------------- specs and reports


def test_refusals_have_every_reason_and_a_backend_that_cannot_run_is_listed(provide, monkeypatch):  # noqa: F811
    provide(point("faulty", f"{HERE}:Faulty"), point("bad", "no_such_module:Backend"))
    monkeypatch.setattr(Faulty, "fault", wrong_result(lambda out, lse: (out, lse)))
    matrix = cross_validate(catalogue()["seven heads, one key head"], device="cpu")
    refused = {r.way: r.reasons for r in matrix.refused}
    assert refused["naive > faulty (wrong)"] == ("too deep", "too wide")
    assert refused["bad"][0].startswith("entry point of quick-attention failed: ModuleNotFoundError")
    text = str(matrix)
    assert "refused   naive > faulty (wrong)  too deep\n" in text
    assert "too wide\n" in text
    monkeypatch.setattr(Faulty, "schedules", lambda self, device: ())
    (none,) = cross_validate(SPEC, device="cpu", backends="faulty").results
    assert none.reasons[0].startswith("has no schedule for cpu")
    assert not cross_validate(SPEC, device="cpu", backends="faulty").agrees
    with pytest.raises(NoBackendError, match="nothing ran\n  faulty: has no schedule for cpu"):
        cross_validate(SPEC, device="cpu", backends="faulty").check()


def test_what_does_not_fit_the_device_is_refused(monkeypatch):
    small = attrs.evolve(validate.resolve("cpu"), device=attrs.evolve(validate.resolve("cpu").device, memory=1000))
    monkeypatch.setattr(validate, "resolve", lambda device: small)
    matrix = cross_validate(SPEC)
    assert matrix.ran == ()
    reasons = {r.way: r.reasons[0] for r in matrix.refused}
    assert "beside inputs and output, more than the device's 0.977 KiB" in reasons["naive > reference (float64)"]


@pytest.mark.parametrize(
    "name", ["documents of each element", "offset of each element", "longnet", "dropout", "padding"]
)
def test_a_large_spec_is_compared_on_a_sample_of_its_rows(name, monkeypatch):
    case = catalogue(dtype="float64")[name]
    shape = case.called.shape
    pairs = case.called.batch * shape.heads * shape.kv_len * len(case.called.branches)
    monkeypatch.setattr(numbers, "PAIRS_AT_ONCE", 5 * pairs)
    matrix = cross_validate(case, device="cpu").check()
    assert matrix.rows == f"5 of {shape.seq_len}"


def test_operands_of_a_plain_spec_are_drawn():
    spec = attrs.evolve(SPEC, pattern=P.documents() & P.padding(), dropout=0.1)
    assert len(cross_validate(spec, device="cpu").check().ran) > 1
    assert cross_validate(spec, device="cpu", seed=1).agrees


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "window(5)"}, "needs an AttentionSpec or a Case, got str"),
        ({"backends": ["eagr"]}, "unknown backend 'eagr'; did you mean 'eager'?"),
        ({"backends": ""}, "unknown backend ''"),
        ({"backends": []}, "no backend to cross-validate"),
        ({"repeat": 0}, "repeat must be a positive int, got 0"),
        ({"repeat": True}, "repeat must be a positive int, got True"),
        ({"device": "gpu9"}, "unknown device 'gpu9'"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(arguments, message):
    with pytest.raises(SpecError, match=message.replace("(", r"\(").replace("?", r"\?")):
        cross_validate(**{"spec": SPEC, "device": "cpu", **arguments})


def test_hardware_elsewhere_is_refused():
    with pytest.raises(NoBackendError, match="NVIDIA H100"):
        cross_validate(SPEC, device="h100")
    with pytest.raises(NoBackendError, match="NVIDIA H100"):
        cross_validate_catalogue("h100")


def test_nan_and_infinity_survive_json():
    checks = (Check("output", math.nan, 1e-6), Check("lse", math.inf, 1e-6))
    matrix = Matrix("x", "y", (Result("dense", "a", "b", "differs", checks, 0.5, ("why",)),))
    again = Matrix.from_dict(json.loads(json.dumps(matrix.to_dict(), allow_nan=False)))
    assert again.results[0].wrong
    assert again.results[0].worst == math.inf
    assert [c.passed for c in again.results[0].checks] == [False, False]
    assert str(again) == str(matrix)


def few(monkeypatch, *names):
    found = {name: catalogue()[name] for name in names}
    monkeypatch.setattr(validate, "catalogue", lambda size, dtype: found)


def test_a_report_of_the_catalogue(monkeypatch, tmp_path):
    few(monkeypatch, "causal", "softcap")
    report = cross_validate_catalogue("cpu").check()
    assert (report.size, report.dtype) == ("small", "float32")
    assert report.versions[0]["torch"] == torch.__version__
    report.write(str(tmp_path / "run.json"))
    assert Report.read(str(tmp_path / "run.json")) == report
    text = str(report)
    assert "refused   eager (flash): the flash operator has no softcap" in text
    assert "softcap (dense" in text
    assert text.splitlines()[-1].startswith("ok        2 cases, ")
    none = run_of(("a", "refused"))
    two = attrs.evolve(none, matrices=(*none.matrices, attrs.evolve(none.matrices[0], name="window")))
    assert "refused   a: a (every case)\n" in str(two)


def results(*pairs):
    return tuple(
        Result("dense", name, "", status, reasons=(name,) if status == "refused" else ()) for name, status in pairs
    )


def run_of(*pairs, **options):
    fields = {"device": "a GPU", "size": "large", "dtype": "bfloat16", "versions": ({"x": "1"},), **options}
    return Report(matrices=(Matrix("causal", "spec", results(*pairs)),), **fields)


def test_runs_are_merged_and_the_worst_stands():
    one = run_of(("a", "agrees"), ("b", "refused"), ("c", "refused"), ("d", "agrees"))
    two = run_of(("a", "agrees"), ("b", "agrees"), ("c", "refused"), ("d", "failed"), ("e", "agrees"))
    both = merge([one, two])
    found = {r.backend: r.status for r in both.matrices[0].results}
    assert found == {"a": "agrees", "b": "agrees", "c": "refused", "d": "failed", "e": "agrees"}
    assert both.versions == ({"x": "1"}, {"x": "1"})
    assert merge([two, one]).matrices[0].agrees is False


def test_a_backend_that_is_absent_in_one_run_is_what_it_was_in_the_other():
    absent = Matrix("causal", "spec", (Result("", "a", "", "refused", reasons=("import failed",)),))
    one, two = attrs.evolve(run_of(), matrices=(absent,)), run_of(("a", "agrees"))
    for runs in ([one, two], [two, one]):
        assert [(r.way, r.status) for r in merge(runs).matrices[0].results] == [("dense > a", "agrees")]
    assert merge([one, one]).matrices[0].refused[0].reasons == ("import failed",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "another"}, "the runs differ in device: a GPU and another"),
        ({"dtype": "float16"}, "the runs differ in dtype"),
        ({"size": "small"}, "the runs differ in size"),
    ],
)
def test_runs_that_do_not_belong_together_are_not_merged(options, message):
    with pytest.raises(SpecError, match=message):
        merge([run_of(("a", "agrees")), run_of(("a", "agrees"), **options)])
    other = attrs.evolve(run_of(("a", "agrees")), matrices=(Matrix("window", "spec", ()),))
    with pytest.raises(SpecError, match="the runs differ in their cases: causal, window"):
        merge([run_of(("a", "agrees")), other])
    with pytest.raises(SpecError, match="at least one report"):
        merge([])


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "a list"), ("{}", "KeyError"), ("nonsense", "not JSON"), (None, "No such file")]
)
def test_a_file_that_is_no_report_is_refused(text, message, tmp_path):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=message):
        Report.read(str(path))
    with pytest.raises(SpecError, match="cannot write the report"):
        run_of().write(str(tmp_path / "no" / "folder.json"))


# ------------------------------------------------------------------------------------------------- the command line

FLAGS = ("--seq-len", "33", "--heads", "2", "--head-dim", "8", "--dtype", "float32", "--device", "cpu")


def command(code, *arguments):
    result = CliRunner().invoke(main, ["verify", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_command_prints_the_matrix():
    text = command(0, *FLAGS, "--softcap", "3", "--backends", "all").stdout
    assert "dense > eager (math)" in text
    assert "refused   dense > eager (flash)" in text
    facts = json.loads(command(0, *FLAGS, "--backends", "eager,reference", "--json").stdout)
    assert {r["status"] for r in facts["results"]} <= {"agrees", "refused"}
    assert {r["backend"] for r in facts["results"]} == {"eager", "reference"}


def test_the_command_exits_with_1_where_something_is_wrong_and_3_where_nothing_ran(faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", evolved(causal=False))
    wrong = command(1, *FLAGS, "--causal", "--backends", "all")
    assert "differs" in wrong.stdout, "the matrix is printed all the same"
    assert "VerifyError: causal" not in wrong.stdout
    assert "naive > faulty (wrong): output" in wrong.stderr
    none = command(3, "--seq-len", "9", "--heads", "7", "--head-dim", "8", "--backends", "faulty", "--device", "cpu")
    assert "refused   naive > faulty (wrong)  too deep" in none.stdout
    assert none.stderr.startswith("NoBackendError: ")


def test_the_command_runs_the_catalogue_and_merges_runs(monkeypatch, tmp_path):
    few(monkeypatch, "window", "documents")
    runs = [str(tmp_path / name) for name in ("one.json", "two.json")]
    for path, names in zip(runs, ("eager", "reference"), strict=True):
        text = command(0, "--catalogue", "--device", "cpu", "--backends", names, "--output", path).stdout
        assert "window" in text
    merged = command(0, "--merge", runs[0], "--merge", runs[1], "--output", str(tmp_path / "both.json"))
    assert "eager (flash)" in merged.stdout
    assert "reference (float64)" in merged.stdout
    both = Report.read(str(tmp_path / "both.json"))
    assert {r.backend for m in both.matrices for r in m.results} == {"eager", "reference"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*FLAGS, "--catalogue"), "a catalogue brings its specs; leave out"),
        (("spec.toml", "--catalogue"), "leave out spec.toml"),
        (("--catalogue", "--size", "huge", "--device", "cpu"), "unknown size 'huge'"),
        (("--catalogue", "--dtype", "int8", "--device", "cpu"), "unknown dtype 'int8'"),
        ((*FLAGS, "--size", "small"), "--size and --output belong to --catalogue or --merge"),
        ((*FLAGS, "--backends", "all", "--backend", "eager"), "pin one plan"),
        ((*FLAGS, "--backends", "nobody"), "unknown backend 'nobody'"),
        (("--merge", "no.json"), "cannot read the report 'no.json'"),
        (("--merge", "no.json", "--catalogue"), "--merge runs nothing"),
        (("--catalogue", "--output", "no/folder/x.json"), "there is no folder 'no/folder'"),
    ],
)
def test_bad_commands_are_refused_with_the_reason(arguments, message):
    result = command(2, *arguments)
    assert result.stdout == ""
    assert message in result.stderr


# --------------------------------------------------------------------------------------- a backend of another package


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install the example as pip would: its package on the path, and the metadata of its pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"banded_attention-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items())
             for group, points in project["entry-points"].items()]  # fmt: skip
    (info / "entry_points.txt").write_text("\n".join(lines))
    for path in (EXAMPLE, tmp_path):
        monkeypatch.syspath_prepend(str(path))
    registry.cache_clear()
    attnplan.cache_clear()
    yield tmp_path
    registry.cache_clear()
    attnplan.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "banded_attention"]:
        del sys.modules[name]


def test_the_example_is_found_through_its_entry_point_and_is_right(installed):
    assert list(registry().backends)[-1] == "banded"
    ran = [name for name, case in catalogue().items() if cross_validate(case, "cpu", ["banded"]).ran]
    assert set(ran) >= {"dense", "causal", "window", "window, causal", "window ahead", "grouped queries", "open length",
                        "more queries than keys, causal", "narrow values", "causal, heads last"}  # fmt: skip
    for name in ran:
        cross_validate(catalogue(dtype="float64")[name], "cpu", ["banded"]).check()
    matrix = cross_validate(catalogue()["documents"], "cpu", ["banded"])
    assert "knows bands only, not documents()" in str(matrix)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda i, j, low, high: (
            (i - j >= (-(10**9) if low is None else low)) & (i - j < (10**9 if high is None else high))
        ),
        lambda i, j, low, high: (
            (i - j > (-(10**9) if low is None else low)) & (i - j <= (10**9 if high is None else high))
        ),
    ],
    ids=["short on the left", "short on the right"],
)
def test_a_window_that_is_one_key_short_is_caught(wrong, installed, monkeypatch):
    import banded_attention.emit as emitter

    monkeypatch.setattr(emitter, "in_band", wrong)
    with pytest.raises(VerifyError, match=r"banded \(dense\): output"):
        cross_validate(catalogue()["window"], "cpu", ["banded"]).check()


def run_pytest(installed, *arguments):
    paths = [str(installed), str(EXAMPLE), str(EXAMPLE.parent.parent)]
    code = f"import sys; sys.path[:0] = {paths!r}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    rootdir = ("--rootdir", str(EXAMPLE), "-c", str(EXAMPLE / "pyproject.toml"), "-p", "no:cacheprovider", "-q")
    where = str(EXAMPLE / "tests")
    return subprocess.run([sys.executable, "-c", code, *rootdir, where, "--attnplan-device", "cpu", *arguments],
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_tests_of_the_example_pass_and_say_what_is_refused(installed):
    done = run_pytest(installed, "-rs", "-k", "window or documents", "--attnplan-dtype", "float64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "banded refuses: knows bands only, not" in done.stdout
    assert " passed" in done.stdout


def test_the_tests_of_the_example_fail_where_its_window_is_short(installed):
    package = installed / "banded_attention"
    package.mkdir()
    for file in (EXAMPLE / "banded_attention").glob("*.py"):
        text = file.read_text()
        (package / file.name).write_text(text.replace("i - j <= high", "i - j < high"))
    done = run_pytest(installed, "-k", "causal and window", "--tb=short")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differs" in done.stdout


def test_the_plugin_names_a_backend_that_is_not_there(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "def test_it(attnplan_case, attnplan_validate):\n    attnplan_validate('nobody', attnplan_case)\n"
    )
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "attnplan.testing.plugin", "-p", "no:cacheprovider",
                           "-q", "--rootdir", str(tmp_path), "-k", "causal", str(tmp_path), "--attnplan-device", "cpu"],
                          capture_output=True, text=True, check=False, cwd=EXAMPLE.parent.parent)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no installed package provides the backend 'nobody'" in done.stdout


def test_a_case_of_ones_own_is_validated_too():
    case = Case("mine", SPEC)
    assert cross_validate(case, "cpu").name == "mine"
