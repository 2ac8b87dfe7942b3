"""Calls with sink logits, biases and ALiBi slopes, and what they should give: every pair written out in float64."""

from __future__ import annotations

import attrs
import torch

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.spec import LEARNED
from tests import oracle

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
