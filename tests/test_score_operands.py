"""Sink logits, biases and ALiBi slopes: what a call brings for the scores, under every plan, with its gradients."""

from __future__ import annotations

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from attnplan.backends import eager
from attnplan.cost import catalogue, resolve
from attnplan.errors import SpecError, VerifyError
from attnplan.ir import Attend, Output
from attnplan.ir.coverage import check_coverage, coverage, spec_coverage
from attnplan.lower import lower
from attnplan.plan import Plan
from attnplan.search import Found, _options, candidates, every_way
from attnplan.spec import LEARNED
from attnplan.testing import cross_validate
from bench.memory import measured
from tests import oracle
from tests.running import every_plan, way

BASE = AttentionSpec(seq_len=37, heads=4, head_dim=8, batch=2, dtype="float64")
BATCH = 2


def spec_of(pattern=None, **options):
    lengths = {"kv_len": options.get("seq_len", BASE.seq_len), **options}
    heads = {"kv_heads": options.get("heads", BASE.heads)}
    return attrs.evolve(BASE, pattern=pattern or P.full(), **{**heads, **lengths})


def drawn(spec, shape=None, seed=0):
    """Return random learned operands, as leaves; ``shape`` is that of the bias."""
    source = torch.Generator().manual_seed(seed + 7)
    sizes = {
        "bias": shape or (spec.heads, spec.seq_len, spec.kv_len), "alibi_slopes": (spec.heads,),
        "sink_logits": (spec.heads,),
    }  # fmt: skip
    return {
        name: torch.randn(sizes[name], generator=source, dtype=torch.float64).requires_grad_()
        for name in LEARNED
        if getattr(spec, name)
    }


def expected(spec, q, k, v, operands):
    """Return output and LSE in float64, every pair written out; a sink is one more key."""
    k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, 1) for x in (k, v))
    scores = (q @ k.mT) * spec.softmax_scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.bias:
        scores = scores + operands["bias"]
    if spec.alibi_slopes:
        first = operands.get("q_offset", torch.tensor(spec.kv_len - spec.seq_len)).reshape(-1, 1, 1, 1)
        ahead = torch.arange(spec.kv_len) - torch.arange(spec.seq_len)[:, None] - first
        scores = scores - operands["alibi_slopes"].reshape(-1, spec.heads, 1, 1) * ahead.abs()
    masks = [torch.tensor(m) for m in oracle.branch_masks(spec, {n: x.detach() for n, x in operands.items()}, len(q))]
    times = torch.stack(masks).sum(0).double()
    if spec.rule != "lse":
        outs = [attend(scores, m.double(), v, None)[0] for m in masks]
        return torch.stack(outs).mean(0) if spec.rule == "mean" else torch.stack(outs).sum(0), None
    return attend(scores, times, v, operands.get("sink_logits"))


def attend(scores, times, v, sinks):
    terms = torch.where(times > 0, scores + times.clamp(min=1).log(), -torch.inf)
    if sinks is not None:
        terms = torch.cat([terms, sinks.reshape(1, -1, 1, 1).expand(*terms.shape[:-1], 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    empty = (terms == -torch.inf).all(-1, keepdim=True)
    terms = terms.masked_fill(empty, 0)
    weights = terms.softmax(-1).masked_fill(empty, 0)
    return weights @ v, terms.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)


def numbers(run, spec, operands, seed=0):
    """Return everything that ``run`` gives for random inputs, by name."""
    leaves = [x.detach().requires_grad_() for x in oracle.sample_inputs(spec, BATCH, seed)]
    own = {n: x.detach().requires_grad_() if n in LEARNED else x for n, x in operands.items()}
    out, lse = run(*leaves, own)
    source = torch.Generator().manual_seed(seed + 1)
    loss = (out * torch.randn(out.shape, generator=source, dtype=torch.float64)).sum()
    if lse is not None:
        upstream = torch.randn(lse.shape, generator=source, dtype=torch.float64)
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * upstream).sum()
    asked = {**dict(zip("qkv", leaves, strict=True)), **{n: x for n, x in own.items() if n in LEARNED}}
    grads = torch.autograd.grad(loss, list(asked.values()))
    found = {"output": out.detach(), **{f"grad {n}": g for n, g in zip(asked, grads, strict=True)}}
    return found if lse is None else {**found, "lse": lse.detach()}


def by_plan(plan):
    def run(q, k, v, operands):
        swap = plan.spec.layout == "bshd"
        q, k, v = (x.transpose(1, 2) if swap else x for x in (q, k, v))
        found = plan(q, k, v, return_lse=plan.spec.has_lse, **operands)
        out, lse = found if plan.spec.has_lse else (found, None)
        return (out.transpose(1, 2) if swap else out), lse

    return run


def assert_same(got, want, what):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].shape == x.shape, f"{what}: {name}"
        finite = x > -torch.inf
        assert torch.equal(got[name] > -torch.inf, finite), f"{what}: {name}"
        error = (got[name][finite] - x[finite]).norm() / max(x[finite].norm().item(), 1e-3 * x.numel() ** 0.5)
        assert error < 1e-12, f"{what}: {name} is off by {error:.1e}"


CASES = {
    "sinks, full": (spec_of(sink_logits=True), {}),
    "sinks, causal, grouped": (spec_of(causal=True, kv_heads=2, sink_logits=True), {}),
    "sinks, window": (spec_of(P.window(5), causal=True, sink_logits=True), {}),
    "sinks, rows without a key": (spec_of(P.dilated(12, 3), sink_logits=True), {}),
    "sinks, longnet": (spec_of(P.longnet([8, 16, 64], [1, 2, 4]), causal=True, kv_heads=2, sink_logits=True), {}),
    "sinks, longformer, bshd": (spec_of(P.window(3) | P.global_tokens(2), layout="bshd", sink_logits=True), {}),
    "sinks, documents": (
        spec_of(P.documents(), causal=True, sink_logits=True), {"documents": torch.tensor([0, 5, 5, 18, 37])}
    ),
    "sinks, padding of everything": (
        spec_of(P.padding(), sink_logits=True), {"key_padding": torch.arange(37) < torch.tensor([[0], [21]])}
    ),
    "bias, full": (spec_of(bias=True), {}),
    "bias, causal, grouped": (spec_of(causal=True, kv_heads=2, bias=True), {}),
    "bias, window": (spec_of(P.window(5, 2), kv_heads=1, bias=True), {}),
    "bias, more keys": (spec_of(seq_len=19, kv_len=37, causal=True, bias=True), {}),
    "bias, rows without a key": (spec_of(P.dilated(12, 3), bias=True), {}),
    "bias, longnet": (spec_of(P.longnet([8, 16, 64], [1, 2, 4]), causal=True, kv_heads=2, bias=True), {}),
    "bias, longnet mean": (spec_of(P.longnet([8, 16], [1, 2], mix="mean"), bias=True), {}),
    "bias, longformer": (spec_of(P.window(3) | P.global_tokens(2), bias=True, layout="bshd"), {}),
    "bias, softcap": (spec_of(causal=True, softcap=2.0, bias=True), {}),
    "alibi, causal": (spec_of(causal=True, alibi_slopes=True), {}),
    "alibi, both sides": (spec_of(P.window(9), kv_heads=2, alibi_slopes=True), {}),
    "alibi, more keys": (spec_of(seq_len=19, kv_len=37, causal=True, alibi_slopes=True), {}),
    "alibi, longnet": (spec_of(P.longnet([8, 16, 64], [1, 2, 4]), causal=True, alibi_slopes=True), {}),
    "alibi, offsets": (
        spec_of(seq_len=7, kv_len=37, causal=True, q_offset=True, alibi_slopes=True),
        {"q_offset": torch.tensor([3, 22])},
    ),
    "all three": (
        spec_of(P.window(9) | P.sinks(3), causal=True, kv_heads=2, bias=True, alibi_slopes=True, sink_logits=True), {}
    ),
}  # fmt: skip


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


def test_kernels_that_add_nothing_to_scores_say_so():
    spec = attrs.evolve(BASE, dtype="bfloat16", causal=True, head_dim=64, value_dim=64, bias=True)
    found = {(c.backend, c.schedule): c.reasons for c in candidates(spec, resolve("h100"))}
    for key in (("eager", "cudnn"), ("eager", "flash"), ("flash", "fa4"), ("xformers", "flash")):
        assert any("adds nothing to scores, %3 has bias" in reason for reason in found[key]), key
    assert not found["eager", "efficient"]
    slopes = attrs.evolve(spec, bias=False, alibi_slopes=True)
    found = {(c.backend, c.schedule): c.reasons for c in candidates(slopes, resolve("h100"))}
    assert any("rounds the distances of alibi_slopes" in reason for reason in found["eager", "efficient"])
    assert "h100" in catalogue()
    assert eager.FLASH_CPU.runs == "flash-cpu"


def test_sinks_run_on_every_kernel():
    spec = attrs.evolve(BASE, dtype="bfloat16", causal=True, head_dim=64, value_dim=64, sink_logits=True)
    accepted = {c.schedule for c in candidates(spec, resolve("h100")) if not c.reasons}
    assert {"cudnn", "flash", "fa2", "fa3", "fa4", "efficient", "math"} <= accepted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_logits": True, "pattern": P.longnet([8, 16], [1, 2], mix="mean")}, "sink_logits join one softmax"),
        ({"bias": 1}, "bias must be True or False, got 1"),
        ({"alibi_slopes": True, "ring_size": 2}, "alibi_slopes need ring_size=1"),
    ],
)
def test_specs_that_cannot_be_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        attrs.evolve(BASE, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the spec needs bias, sink_logits with each call"),
        ({"bias": torch.zeros(4, 37, 37)}, "the spec needs sink_logits with each call"),
        ({"bias": torch.zeros(4, 36, 37), "sink_logits": torch.zeros(4)},
         r"bias must be a floating-point tensor \[4, 37, 37\] or \[2, 4, 37, 37\], with sizes of 1 .*\[4, 36, 37\]"),
        ({"bias": torch.zeros(37, 37), "sink_logits": torch.zeros(4)}, r"got torch.float32 \[37, 37\]"),
        ({"bias": torch.zeros(4, 37, 37, dtype=torch.int64), "sink_logits": torch.zeros(4)}, "got torch.int64"),
        ({"bias": torch.zeros(1, 1, 1), "sink_logits": torch.zeros(1)}, r"tensor \[4\]; got torch.float32 \[1\]"),
        ({"bias": torch.zeros(1, 1, 1), "sink_logits": 0.5}, "got 0.5"),
        ({"bias": torch.zeros(1, 1, 1), "sink_logits": torch.zeros(4), "alibi_slopes": torch.zeros(4)},
         "this plan takes no alibi_slopes: its spec would need alibi_slopes=True"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused(given, message):
    plan = attnplan.compile(attrs.evolve(BASE, bias=True, sink_logits=True), device="cpu")
    q, k, v = (torch.zeros(2, 4, 37, 8, dtype=torch.float64) for _ in range(3))
    with pytest.raises(SpecError, match=message):
        plan(q, k, v, **given)


# --------------------------------------------------------------------------------------------------- compiled programs


def compiled_plans(spec):
    target = resolve("cpu")
    for found_lowered, backend, schedule, candidate in _options(spec, target, "compiled", "auto"):
        if backend.name == "compiled" and not candidate.reasons:
            yield Plan(spec, target, Found(found_lowered, candidate, backend, schedule, (candidate,)), {})


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
    assert {p.schedule for p in plans} == {"inductor"}
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


def test_refusals_on_every_golden_device_read_as_reviewed(golden):
    """What ``attnplan backends --spec FILE --device NAME`` lists for specs with biases and sinks."""
    lines = []
    options = {
        "sinks": {"sink_logits": True},
        "bias": {"bias": True},
        "alibi, window": {"alibi_slopes": True, "pattern": P.window(512)},
    }
    for device in ("cpu-2core", "gtx1080", "t4", "v100", "a100", "rtx4090", "h100", "b200"):
        dtype = "float16" if device in ("gtx1080", "t4", "v100") else "bfloat16"
        for name, given in options.items():
            spec = AttentionSpec(seq_len=4096, heads=8, head_dim=64, causal=True, dtype=dtype, **given)
            lines.append(f"# {name}, {dtype}, {device}")
            for c in sorted(candidates(spec, resolve(device)), key=lambda c: c.name):
                reasons = [r for r in c.reasons if "runs only when asked for" not in r]
                lines.append(f"  {c.name}: {'; '.join(reasons) or 'accepts'}")
    golden("refusals-score-operands", "\n".join(lines) + "\n")


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


# --------------------------------------------------------------------------------------------------------------- CUDA

ON_CUDA = {
    name: AttentionSpec(seq_len=333, heads=4, kv_heads=2, head_dim=64, causal=True, dtype="bfloat16", **options)
    for name, options in {
        "sinks": {"sink_logits": True},
        "sinks, window": {"sink_logits": True, "pattern": P.window(100)},
        "sinks, longnet": {"sink_logits": True, "pattern": P.longnet([64, 128, 256], [1, 2, 4])},
        "bias": {"bias": True},
        "bias, longformer": {"bias": True, "pattern": P.window(40) | P.sinks(5)},
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
    given = {n: (x.detach() / 4).bfloat16().cuda() for n, x in drawn(spec).items()}
    upstream = torch.randn_like(tensors[0])

    def gradients(run, cast):
        leaves = [cast(x).detach().requires_grad_() for x in (*tensors, *given.values())]
        out = run(*leaves[:3], dict(zip(given, leaves[3:], strict=True)))
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    with torch.device("cuda"):
        want = gradients(lambda q, k, v, own: expected(spec, q, k, v, own)[0], torch.Tensor.double)
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
            yield candidate, Plan(spec, target, found, {})
