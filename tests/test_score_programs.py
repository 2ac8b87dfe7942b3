"""Sink logits, biases and ALiBi slopes in compiled programs, in memory, and on CUDA."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import resolve
from attnplan.plan import Plan
from attnplan.runtime.scores import biased, spread
from attnplan.search import Found, _options, every_way
from attnplan.testing import cross_validate
from bench.memory import measured
from tests import oracle
from tests.running import every_plan, way
from tests.score_calls import BATCH, CASES, assert_same, by_plan, drawn, expected, numbers, spec_of


def compiled_plans(spec):
    target = resolve("cpu")
    for found_lowered, backend, schedule, candidate in _options(spec, target, "compiled", "auto"):
        if backend.name == "compiled" and not candidate.reasons:
            yield Plan(spec, target, Found(found_lowered, candidate, backend, schedule, (candidate,)), {}, strict=True)


COMPILED = {
    "sinks": (spec_of(P.window(20), seq_len=150, kv_heads=2, causal=True, sink_logits=True), None),
    "bias": (spec_of(P.window(9) | P.sinks(3), seq_len=150, kv_heads=2, causal=True, softcap=2.0, bias=True), None),
    "bias of keys": (spec_of(seq_len=150, bias=True), (4, 1, 150)),
    "all three": (
        spec_of(P.window(100), seq_len=150, causal=True, bias=True, alibi_slopes=True, sink_logits=True),
        (2, 1, 150, 150),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_tiles_agree_with_the_pairs_written_out(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # numbers are the same, seconds are saved
    spec, shape = COMPILED[name]
    given = drawn(spec, shape)
    want = numbers(lambda q, k, v, own: expected(spec, q, k, v, own), spec, given)
    plans = list(compiled_plans(spec))
    assert {p.schedule for p in plans} == {"inductor", "inductor-kept"}
    for plan in plans:
        assert_same(numbers(by_plan(plan), spec, given), want, way(plan))
    leaves = [x.detach().requires_grad_() for x in (*oracle.sample_inputs(spec, BATCH), *given.values())]
    upstream = torch.randn_like(leaves[0])
    grads = plan.gradients(
        (upstream, None), (*leaves[:3], *plan(*leaves[:3], return_lse=True, **given)), given, tuple(given)
    )
    wanted = torch.autograd.grad(plan(*leaves[:3], **dict(zip(given, leaves[3:], strict=True))), leaves, upstream)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["bias", "bias of keys"])
def test_flex_attention_gives_the_same_forward(name):
    spec, shape = COMPILED[name]
    spec = attrs.evolve(spec, dtype="float32", head_dim=16, value_dim=16)
    given = {n: x.detach().float() for n, x in drawn(spec, shape).items()}
    tensors = [x.detach() for x in oracle.sample_inputs(spec, BATCH, 0, torch.float32)]
    want, _ = expected(spec, *(x.double() for x in tensors), {n: x.double() for n, x in given.items()})
    plans = [p for p in compiled_plans(spec) if p.schedule == "flex"]
    assert plans
    with torch.no_grad():
        for plan in plans:
            assert (plan(*tensors, **given).double() - want).norm() / want.norm() < 2e-6


@pytest.mark.parametrize("name", ["sinks, longformer, bshd", "bias, window", "all three", "alibi, more keys"])
def test_cross_validation_knows_them(name):
    spec, _ = CASES[name]
    matrix = cross_validate(attrs.evolve(spec, dtype="float32"), backends=("eager", "reference"))
    assert matrix.ran
    matrix.check()


def test_compiled_tiles_count_positions_from_the_end_of_the_keys(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for spec, operands in (
        (spec_of(P.window(50), seq_len=70, kv_len=150, causal=True, alibi_slopes=True), {}),
        (
            spec_of(seq_len=7, kv_len=37, causal=True, q_offset=True, alibi_slopes=True),
            {"q_offset": torch.tensor([3, 22])},
        ),
    ):
        given = {**drawn(spec), **operands}
        want = numbers(lambda q, k, v, own, spec=spec: expected(spec, q, k, v, own), spec, given)
        plans = list(compiled_plans(spec))
        assert plans
        for plan in plans:
            assert_same(numbers(by_plan(plan), spec, given), want, way(plan))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["bias, window", "alibi, causal", "alibi, longnet", "all three"])
def test_the_peak_is_never_below_what_is_allocated(name, training, monkeypatch):
    monkeypatch.setattr("attnplan.cost.buffers._threads", lambda: 1)
    spec = attrs.evolve(CASES[name][0], seq_len=512, kv_len=512, batch=1, dtype="float32", training=training)
    tensors = [x.detach().requires_grad_(training) for x in oracle.sample_inputs(spec, 1, 0, torch.float32)]
    given = {n: x.detach().float().requires_grad_(training) for n, x in drawn(spec).items()}
    upstream = torch.randn(1, 4, 512, 8)
    for plan in every_plan(spec):
        if plan.backend == "reference":
            continue

        def call(plan=plan):
            out = plan(*tensors, **given)
            leaves = (*tensors, *given.values())
            return (out.detach(), *torch.autograd.grad(out, leaves, upstream)) if training else (out,)

        peak = measured(call, "cpu").allocated
        assert peak <= plan.predicted.peak_bytes, f"{way(plan)}: {peak} > {plan.predicted.peak_bytes}"


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 1, 1, 1), (2, 4, 7, 1), (1, 4, 1, 5), (2, 1, 7, 5), None])
@pytest.mark.parametrize("rows", [7, 1])
def test_what_is_learned_is_read_at_a_place_for_each_row_or_key(shape, rows, monkeypatch):
    """Inductor adds gradients at the places that were read, and cannot where these are one place for a whole tile."""
    name = "bias" if shape else "alibi_slopes"
    made = torch.randn(tuple(n if n != 7 else rows for n in shape) if shape else (2, 4), requires_grad=True)
    given = (made,) if shape else (made, torch.zeros(1, dtype=torch.int64))
    b, h, row, key = torch.tensor(0), torch.tensor(1), torch.arange(rows + 1).unsqueeze(1), torch.arange(6)
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.index.Tensor and args[0].is_floating_point():
                read.append(max(x.dim() for x in args[1] if x is not None))
            return func(*args, **(kwargs or {}))

    # one number in a compiled kernel, whatever its shape
    monkeypatch.setattr(torch, "zeros_like", lambda x: torch.zeros((), dtype=x.dtype))
    tensors = spread([name], given, rows)
    with Reads():
        found = biased(torch.zeros(rows + 1, 6), [name], tensors, b, h, row, key)
    assert read
    monkeypatch.undo()
    whole = biased(torch.zeros(rows + 1, 6), [name], given, b, h, row, key)
    assert torch.equal(found, whole)
    flow = torch.randn(rows + 1, 6)
    got, want = (torch.autograd.grad(x, made, flow)[0] for x in (found, whole))
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert spread([name], given, rows)[0] is made


# --------------------------------------------------------------------------------------------------------------- CUDA

ON_CUDA = {
    name: AttentionSpec(seq_len=333, heads=4, kv_heads=2, head_dim=64, causal=True, dtype="bfloat16", **options)
    for name, options in {
        "sinks": {"sink_logits": True},
        "sinks, window": {"sink_logits": True, "pattern": P.window(100)},
        "sinks, longnet": {"sink_logits": True, "pattern": P.longnet([64, 128, 256], [1, 2, 4])},
        "bias": {"bias": True},
        "bias, longformer": {"bias": True, "pattern": P.window(40) | P.sinks(5)},
        # one number for all keys of a row takes from the sink only: without one its gradient is 0
        "bias of heads": {"bias": True, "sink_logits": True},
        "alibi": {"alibi_slopes": True},
        "all three": {"bias": True, "alibi_slopes": True, "sink_logits": True, "pattern": P.window(100)},
    }.items()
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_CUDA)
def test_numbers_on_cuda(name):
    """By every schedule, FlexAttention's score functions and their gradients included."""
    spec = ON_CUDA[name]
    tensors = [x.detach().cuda() for x in oracle.sample_inputs(spec, BATCH, 0, torch.bfloat16)]
    shape = (4, 1, 1) if name == "bias of heads" else None
    # Slopes below 0 favour far keys: what the rounded output leaves in the sum of a row is then multiplied by far.
    drawn_here = {n: x.abs() if n == "alibi_slopes" else x for n, x in drawn(spec, shape).items()}
    given = {n: (x.detach() / 4).bfloat16().cuda() for n, x in drawn_here.items()}

    def wanted(q, k, v, own):
        return expected(spec, q, k, v, own)[0]

    def gradients(run, cast):
        leaves = [cast(x).detach().requires_grad_() for x in (*tensors, *given.values())]
        out = run(*leaves[:3], dict(zip(given, leaves[3:], strict=True)))
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    with torch.device("cuda"), torch.no_grad():
        sure = wanted(*(x.double() for x in tensors), {n: x.double() for n, x in given.items()})
    torch.manual_seed(0)
    # Rows agree in some of it, so that what is summed over all of them is more than the rounding of each.
    upstream = torch.randn_like(tensors[0]) + sure.bfloat16()
    with torch.device("cuda"):
        want = gradients(wanted, torch.Tensor.double)
    found = [p for _, p in ways_with_compiled(spec)]
    assert len(found) >= 2
    for plan in found:
        got = gradients(lambda q, k, v, own, plan=plan: plan(q, k, v, **own), lambda x: x)
        for what, a, b in zip(("output", *"qkv", *given), got, want, strict=True):
            error = (a.double() - b).norm() / b.norm()
            assert error < (1e-2 if what == "output" else 2e-2), f"{way(plan)}: {what} is off by {error:.1e}"


def ways_with_compiled(spec):
    target = resolve("cuda")
    for candidate, found in every_way(spec, target):
        if found is not None and candidate.backend != "reference":
            yield candidate, Plan(spec, target, found, {}, strict=True)
