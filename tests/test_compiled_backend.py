"""The ``compiled`` backend: numbers beside the float64 oracle, one program for a structure, refusals with reasons."""

import inspect
from typing import get_args
from unittest import mock

import attrs
import numpy as np
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, Dim, NoBackendError, SpecError
from attnplan import patterns as P
from attnplan.backends import compiled
from attnplan.backends.compiled import emit
from attnplan.patterns import Shape
from attnplan.runtime import flex
from attnplan.runtime.compiling import COMPILED
from attnplan.runtime.conditions import condition
from tests.running import TOLERANCES, Call

SMALL = attrs.evolve(compiled.INDUCTOR_CPU, tile=(16, 8))


@pytest.fixture
def traced_only(monkeypatch):
    """Run the functions that would be compiled as they are: numbers are the same, and seconds are saved."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def plan_of(spec: AttentionSpec, schedule: str = "inductor"):
    tile = (128, 128) if schedule == "flex" else (16, 8)
    chosen = attrs.evolve(getattr(compiled, f"{schedule.upper().replace('-', '_')}_CPU"), tile=tile)
    with mock.patch.object(compiled.Compiled, "schedules", return_value=(chosen,)):
        attnplan.cache_clear()
        return attnplan.compile(spec, backend="compiled")


def spec_of(pattern, seq_len=75, kv_len=90, **options) -> AttentionSpec:
    given = {"heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float64", **options}
    return AttentionSpec(seq_len=seq_len, kv_len=kv_len, pattern=pattern, **given)


CASES = {
    "window": (spec_of(P.window(9), causal=True), {}),
    "window of more queries than keys": (spec_of(P.window(9), seq_len=90, kv_len=75, causal=True), {}),
    "longformer with softcap": (spec_of(P.window(5) | P.global_tokens(3), softcap=1.5), {}),
    "indices": (spec_of(P.window(2) | P.global_tokens([7, 60])), {}),
    "heads differ": (spec_of((P.heads(0, 1) & P.window(3)) | (P.heads(1, 4) & P.window(11, 0))), {}),
    "blocks": (spec_of(P.random_blocks(0.2, 16, 0)), {}),
    "dilation": (spec_of(P.dilated(30, 3)), {}),
    "value_dim": (spec_of(P.window(9), value_dim=5), {}),
    "documents": (spec_of(P.documents(), 90, causal=True), {"documents": torch.tensor([[0, 31, 90], [0, 89, 90]])}),
    "no key at all": (spec_of(P.padding()), {"key_padding": torch.zeros(2, 90, dtype=torch.bool)}),
    "padding": (spec_of(P.padding()), {"key_padding": torch.arange(90) < torch.tensor([[40], [0]])}),
    "offsets": (spec_of(P.window(6), 9, q_offset=True), {"q_offset": torch.tensor([4, 60])}),
}


@pytest.mark.parametrize("name", CASES)
def test_tiles_agree_with_float64_forward_and_backward(name, traced_only):
    spec, operands = CASES[name]
    plan = plan_of(spec)
    call = Call.of(spec, operands, batch=2)
    expected, got = call.expected(), call.got(plan)
    for (what, a), (_, b) in zip(expected.items(), got.items(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12 * max(1.0, a.abs().max().item()), msg=f"{name}: {what}")
    torch.testing.assert_close(got.lse, expected.lse, rtol=1e-12, atol=1e-12)


def test_flex_and_compiled_tiles_agree_with_float64(monkeypatch):
    """The real thing: three programs, one by FlexAttention and two of tiles."""
    spec = AttentionSpec(
        seq_len=300, kv_len=500, heads=4, kv_heads=2, head_dim=16, causal=True, dtype="float32",
        pattern=P.window(40) | P.sinks(3), softcap=3.0,
    )  # fmt: skip
    plan = plan_of(spec, "flex")
    call = Call.of(spec, batch=2)
    expected = call.expected()
    with torch.no_grad():
        out = plan(*call.inputs)
    got = call.got(plan)
    for what, a, b in (("flex", expected.out, out), *((n, a, dict(got.items())[n]) for n, a in expected.items())):
        assert ((b.double() - a).norm() / a.norm()).item() <= TOLERANCES["float32"], what
    before = sum(COMPILED.values())
    other = plan_of(attrs.evolve(spec, pattern=P.window(30) | P.sinks(7)), "flex")
    with torch.no_grad():
        other(*call.inputs)
    assert sum(COMPILED.values()) == before, "plans of one structure share one program"


def test_plans_of_one_structure_share_one_condition():
    shape = Shape(64, 64, 2)
    windows = {id(condition(P.window(n) & P.causal(), shape, 0).module) for n in range(1, 13)}
    assert len(windows) == 1
    assert condition(P.window(3), shape, 0).module is not condition(P.segments(3), shape, 0).module


def test_conditions_agree_with_patterns_everywhere():
    shape = Shape(20, 24, 4)
    q, k = torch.arange(20).reshape(-1, 1), torch.arange(24)
    for pattern in (P.window(3) & P.causal(), P.sinks(2) | ~P.window(4), P.heads(1, 3) & P.dilated(8, 2)):
        made = condition(pattern, shape, 4)
        for h in range(4):
            got = made.module(torch.tensor(0), torch.tensor(h), q, k, *made.constants)
            expected = pattern.pairs({}, torch.tensor(h), q + 4, k)
            assert torch.equal(got.expand(20, 24), expected.expand(20, 24)), (pattern, h)


def by_numpy(h, q, k):
    """A rule that no tracer sees through: what it returns would be baked in as a constant."""
    found = np.less_equal(np.asarray(k), np.asarray(q)) | (np.asarray(h) < 0)
    return found if isinstance(q, np.ndarray) else torch.from_numpy(np.asarray(found))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout": 0.1}, "compiled scores have no dropout"),
        ({"pattern": P.longnet([16, 32], [1, 2])}, "one attend over whole inputs"),
        ({"pattern": P.mask(by_numpy)}, "cannot be traced for a compiler"),
        ({"dtype": "float64"}, "FlexAttention takes float32"),
        ({"pattern": P.documents() | P.window(4)}, "mixes data of the call into a union"),
        ({"pattern": P.segments(4), "q_offset": True}, "bands only are judged on the device"),
    ],
)
def test_what_cannot_be_compiled_is_refused_when_planning(changes, reason):
    spec = attrs.evolve(spec_of(P.window(4), 90, dtype="float32"), **changes)
    with mock.patch.object(compiled.Compiled, "schedules", return_value=(compiled.FLEX_CPU,)):
        attnplan.cache_clear()
        with pytest.raises((NoBackendError, SpecError), match=reason):
            attnplan.compile(spec, backend="compiled")


def test_open_lengths_have_a_program_each(traced_only):
    open_length = Dim("s", max=64)
    plan = plan_of(spec_of(P.window(5), open_length, open_length, causal=True))
    for length in (33, 64, 17):
        spec = spec_of(P.window(5), length, length, causal=True)
        call = Call.of(spec)
        got, expected = call.got(plan), call.expected()
        torch.testing.assert_close(got.dq, expected.dq, rtol=0, atol=1e-12)


def test_second_derivatives_are_refused(traced_only):
    spec = spec_of(P.window(5), 90)
    q, k, v = (x.requires_grad_() for x in Call.of(spec).inputs)
    grads = torch.autograd.grad(plan_of(spec)(q, k, v).square().sum(), (q, k, v), create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        sum(x.square().sum() for x in grads).backward()


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_what_compiles_is_a_candidate_where_candidates_are_measured(device):
    """On a CPU, where the seconds of compiling are not known, nowhere else."""
    target = attnplan.cost.resolve(device)
    window = {"cpu": {"flex", "inductor", "inductor-kept"}, "h100": {"flex"}}[device]
    lattice = {"cpu": {"sdpa"}, "h100": set()}[device]  # on a GPU it has not been run
    for pattern, expected in ((P.window(100), window), (P.longnet([64, 128], [1, 2]), lattice)):
        spec = attrs.evolve(FLASH_SPEC, pattern=pattern)
        for measured in (False, True):
            found = attnplan.search.search(spec, target, measured=measured)
            schedules = {c.schedule for c in found.candidates if c.backend == "compiled" and not c.reasons}
            assert schedules == (expected if measured or device == "h100" else set()), (pattern, measured)


FLASH_SPEC = AttentionSpec(seq_len=512, heads=4, head_dim=64, pattern=P.window(100), causal=True, dtype="bfloat16")


def flash_reasons(spec, device="h100"):
    found = attnplan.search.candidates(spec, attnplan.cost.resolve(device))
    (one,) = (c for c in found if c.schedule == "flex-flash" and c.strategy == "dense")
    return [reason for reason in one.reasons if "asked for" not in reason]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "takes float16 and bfloat16"),
        ({"head_dim": 80}, "head_dim == value_dim of 64 or 128"),
        ({"value_dim": 128}, "head_dim == value_dim of 64 or 128"),
        ({"softcap": 2.0}, "without score functions"),
        ({"alibi_slopes": True}, "no gradients of what scores capture"),
        ({"sink_logits": True}, "no gradient of the LSE"),
    ],
)
def test_the_flash_kernel_of_flex_says_what_it_does_not_take(changes, reason):
    assert flash_reasons(FLASH_SPEC) == []
    (found,) = flash_reasons(attrs.evolve(FLASH_SPEC, **changes))
    assert reason in found


def test_the_flash_kernel_of_flex_is_for_one_generation_and_untested():
    assert any("compute capability 9.0 only" in reason for reason in flash_reasons(FLASH_SPEC, "a100"))
    assert not compiled.FLEX_FLASH.tested


@pytest.mark.parametrize(("version", "refused"), [("2.11.0", True), ("2.12.1+cu130", True), ("2.13.0", False)])
def test_the_flash_kernel_of_flex_needs_a_torch_that_has_it_whole(version, refused):
    here = attrs.evolve(attnplan.cost.resolve("h100"), torch_device="cuda")
    backend = compiled.Compiled()
    with (
        mock.patch.object(compiled.Compiled, "versions", return_value={"torch": version}),
        mock.patch("attnplan.backends.base._version", return_value=version),
        mock.patch("attnplan.backends.base.import_failure", return_value=None),
    ):
        reasons = backend.missing(compiled.FLEX_FLASH, here)
        assert any("since torch 2.13" in reason for reason in reasons) == refused
        assert backend.missing(compiled.FLEX_CUDA, here) == ()


def test_flex_is_told_its_kernel_in_words_that_torch_knows(monkeypatch):
    """Both options exclude one another, and a name that torch does not know would be no error."""
    from torch._inductor.kernel.flex import flex_decoding
    from torch.nn.attention import flex_attention as torch_flex

    known = torch_flex.FlexKernelOptions.__annotations__
    assert {"FORCE_USE_FLEX_ATTENTION", "BACKEND"} <= set(known)
    assert '"FORCE_USE_FLEX_ATTENTION"' in inspect.getsource(flex_decoding._use_flex_decoding)
    assert "FLASH" in get_args(torch_flex._Backend)
    told = []
    monkeypatch.setattr(flex, "flex_attention", lambda *x, kernel_options, **_: told.append(kernel_options) or x[0])
    for kernel, length, group in (("FLASH", 512, 1), ("", 512, 1), ("", 100, 4), ("", 32, 4)):
        options = flex.Options((length, length), (128, 128), 1.0, None, group > 1, (), kernel)
        q, k = (mock.Mock(is_cuda=True, shape=(1, h, length, 64)) for h in (group, 1))
        told.append(flex._kernel_options(q, k, options))
    assert told == [{"BACKEND": "FLASH"}, None, {"FORCE_USE_FLEX_ATTENTION": True}, None]
    options = flex.Options((64, 64), (16, 16), 1.0, None, False, (), "FLASH")
    attend = flex.FlexAttend(P.window(9), Shape(64, 64, 4), 0, options, "cpu")
    q = torch.zeros(1, 4, 64, 16)
    attend.traced(q, q, q, {}, False)
    assert told[-1] == {"BACKEND": "FLASH"}


def test_an_lse_that_has_no_gradient_is_refused():
    program = emit.FlexProgram(mock.Mock(table=None), "", False)
    program.flex.like.options.kernel = "FLASH"
    program = emit.FlexProgram(program.flex, "", False)
    assert not program.differentiable_lse
    q = torch.zeros(1, 1, 4, 16, requires_grad=True)
    with pytest.raises(SpecError, match="no gradient of the LSE"):
        program(q, q, q, {}, True)
    assert not program.inlined.takes(q, q, q, True)
    assert program.inlined.takes(q, q, q, False)


def test_the_report_says_that_it_compiles():
    plan = attnplan.compile(spec_of(P.window(5), 90, dtype="float32", head_dim=64), device="h100", backend="compiled")
    assert plan.schedule == "flex"
    assert "compiles once for each layout of its tensors, at its first call, about 6 s\n" in plan.explain()
    flash = attnplan.compile(FLASH_SPEC, device="h100", backend="compiled").candidates
    once = {c.schedule: c.prediction.compile_seconds for c in flash if c.prediction}
    assert once == {"flex": 6.0, "flex-flash": 0.0}, "what was never run has no known seconds"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", ["window", "longformer with softcap", "heads differ", "blocks", "documents", "padding"]
)
def test_flex_agrees_with_float64_on_cuda_forward_and_backward(name):
    given, operands = CASES[name]
    spec = attrs.evolve(given, head_dim=32, value_dim=32, dtype="float32")
    operands = {n: x.cuda() for n, x in operands.items()}
    call = Call.of(spec, operands, batch=2, device="cuda")
    plan = attnplan.compile(spec, device="cuda", backend="compiled")
    expected, got = call.expected(), call.got(plan)
    for (what, a), (_, b) in zip(expected.items(), got.items(), strict=True):
        error = (b.double() - a).norm() / a.norm()
        assert error.item() <= 5e-6, (name, what)
    torch.testing.assert_close(got.lse.double(), expected.lse.double(), rtol=1e-5, atol=1e-5)
