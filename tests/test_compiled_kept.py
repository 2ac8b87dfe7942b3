"""Weights kept for the backward by compiled tiles: numbers, memory, and when they are chosen or refused."""

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, MemoryBudgetError, NoBackendError
from attnplan import patterns as P
from attnplan.runtime import chunks
from bench.memory import measured
from tests.running import Call
from tests.test_compiled_backend import CASES, plan_of, spec_of, traced_only

__all__ = ["traced_only"]
STATIC = [name for name, (spec, operands) in CASES.items() if not operands and spec.is_static]
MORE = {
    "far below the highest score of a part": spec_of(P.window(30) | P.global_tokens(3), scale=40.0),
    "rows without a key": spec_of(P.window(5) & ~P.window(1) & P.segments(7), causal=True),
    "causal, far more queries than keys": spec_of(P.full(), seq_len=90, kv_len=13, causal=True),
}


@pytest.mark.parametrize("name", [*STATIC, *MORE])
def test_gradients_from_kept_weights_agree_with_float64(name, traced_only, monkeypatch):
    spec = MORE[name] if name in MORE else CASES[name][0]
    monkeypatch.setattr(chunks, "_SCORES", 16 * 8 * 7)  # several chunks, the last of them padded
    plan = plan_of(spec, "inductor-kept")
    call = Call.of(spec, batch=2)
    expected, got = call.expected(), call.got(plan)
    for (what, a), (_, b) in zip(expected.items(), got.items(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12 * max(1.0, a.abs().max().item()), msg=f"{name}: {what}")
    torch.testing.assert_close(got.lse, expected.lse, rtol=1e-12, atol=1e-12)


def test_a_row_without_a_key_in_a_part_has_no_part_in_it(traced_only):
    """Its highest score there is -inf: as 0, beside an LSE of -1000, it would weigh infinitely much."""
    spec = spec_of(P.window(5) | P.global_tokens(3), seq_len=90, scale=1.0)
    plan = plan_of(spec, "inductor-kept")
    call = Call.of(spec)
    q, k, v = call.inputs
    call = attrs.evolve(call, inputs=(q * 0.01 - 12.0, k * 0.01 + 12.0, v))
    for (what, a), (_, b) in zip(call.expected().items(), call.got(plan).items(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9 * max(1.0, a.abs().max().item()), msg=what)


def test_a_backward_from_kept_weights_computes_no_scores(traced_only, monkeypatch):
    spec = spec_of(P.window(9), causal=True)
    plan = plan_of(spec, "inductor-kept")
    q, k, v = (x.requires_grad_() for x in Call.of(spec).inputs)
    with torch.no_grad():
        plan(q, k, v)  # nothing is kept where nothing is trained
    out = plan(q, k, v)
    monkeypatch.setattr("attnplan.runtime.chunk_programs._scores", None)
    first = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


TRAINED = AttentionSpec(
    seq_len=2048, heads=4, head_dim=32, pattern=P.window(200), causal=True, dtype="float32", training=True
)


def test_keeping_is_chosen_where_its_memory_is_there():
    kept = attnplan.compile(TRAINED, backend="compiled")
    assert kept.schedule == "inductor-kept"
    tiles = 4 * 16 * 3 * 128 * 128 * 4  # heads, tile rows, tiles of each, pairs, bytes
    assert tiles <= kept.predicted.memory.saved <= 1.2 * tiles
    less = attnplan.compile(TRAINED, backend="compiled", max_memory=kept.predicted.peak_bytes - 1)
    assert less.schedule == "inductor"
    assert less.predicted.memory.saved < tiles / 50
    assert less.predicted.seconds > kept.predicted.seconds
    assert attnplan.compile(attrs.evolve(TRAINED, training=False), backend="compiled").schedule == "flex"
    with pytest.raises(MemoryBudgetError):
        attnplan.compile(TRAINED, backend="compiled", max_memory="64 KiB")


@pytest.mark.parametrize("changes", [{"pattern": P.documents()}, {"q_offset": True}])
def test_keeping_is_refused_where_its_memory_is_not_known(changes):
    with pytest.raises(NoBackendError, match="known only when the call decides"):
        plan_of(attrs.evolve(spec_of(P.window(9), 90, causal=True), **changes), "inductor-kept")


@pytest.mark.parametrize("schedule", ["inductor", "inductor-kept"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": P.window(100) | P.global_tokens(20), "softcap": 2.0},
        {"pattern": P.random_blocks(0.3, 128, 0), "seq_len": 1001},
        {"kv_heads": 2, "dtype": "bfloat16"},
        {"layout": "bshd"},
    ],
)
def test_the_peak_of_compiled_tiles_is_predicted(schedule, changes, traced_only, monkeypatch):
    spec = attrs.evolve(TRAINED, **changes)
    with monkeypatch.context() as only:
        chosen = getattr(attnplan.backends.compiled, f"{schedule.upper().replace('-', '_')}_CPU")
        only.setattr(attnplan.backends.compiled.Compiled, "schedules", lambda self, device: (chosen,))
        attnplan.cache_clear()
        plan = attnplan.compile(spec, backend="compiled")
    call = Call.of(spec)

    def step():
        given = [x.transpose(1, 2).contiguous() for x in call.inputs] if spec.layout == "bshd" else call.inputs
        leaves = [x.detach().requires_grad_() for x in given]
        out = plan(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    step()
    given = 3 * call.inputs[0].nbytes if spec.layout == "bshd" else 0
    peak = measured(step, "cpu").allocated - given
    assert peak <= plan.predicted.peak_bytes <= 2 * peak, (peak, plan.predicted)
