"""Every schedule of every GPU backend against float64 on a CUDA device; what is not installed is skipped."""

from __future__ import annotations

from functools import lru_cache

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attnplan import Dim
from attnplan import patterns as P
from attnplan.backends import eager, flash, registry, xformers
from attnplan.cost import resolve
from attnplan.plan import Plan
from attnplan.runtime import kernels_flash
from attnplan.runtime.fused.replay import backward_replay_of, replay_of
from attnplan.search import Found, _options
from tests.cuda_specs import SHARED, assert_near, spec_of
from tests.running import Call, Numbers, assert_agree, dense_sdpa, error, way

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SCHEDULES = {
    f"{backend.name} ({schedule.name})": (backend, schedule.name)
    for backend, schedules in (
        (eager.Eager(), (eager.CUDNN, eager.FLASH_CUDA, eager.EFFICIENT)),
        (xformers.XFormers(), (xformers.FLASH, xformers.CUTLASS, xformers.SPLIT_K)),
        (flash.Flash(), (flash.FA2, flash.FA3, flash.FA4, flash.FA4_MASKS)),
    )
    for schedule in schedules
}
DTYPES = ("bfloat16", "float16")
GRADIENT_RATIO = 2
"""Largest error of a gradient over that of dense SDPA in the same dtype on the same tensors."""
ROUNDED_PARTS = [
    ("eager (efficient)", "longformer"),
    ("xformers (cutlass)", "longformer"),
    ("flash (fa4-masks)", "longformer"),
]
LSE_GRADIENT = {"bfloat16": 1.5e-2, "float16": 4e-3}

SPECS = SHARED | {
    "wide heads": spec_of(causal=True, head_dim=128),
    "longnet": spec_of(P.longnet([128, 256, 512], [1, 2, 4]), causal=True),
    "longnet mean": spec_of(P.longnet([64, 128], [1, 2], mix="mean")),
    "more keys": spec_of(seq_len=65, kv_len=512, causal=True),
    "few queries, many keys": spec_of(seq_len=65, kv_len=5000, kv_heads=2),
    "window to both sides": spec_of(P.window(33, 90), seq_len=487),
    "window to the right": spec_of(P.window(0, 50)),
    "window, more keys": spec_of(P.window(60, 20), seq_len=230, kv_len=411),
    "window, more queries": spec_of(P.window(60, 20), seq_len=411, kv_len=230),
    "longformer": spec_of(P.window(64) | P.global_tokens(16)),
    "streaming": spec_of(P.window(100) | P.sinks(4), causal=True, kv_heads=2),
    "any mask": spec_of(P.window(50) | P.random_blocks(0.2, 64, 0), causal=True),
    "whole tiles": spec_of(P.random_blocks(0.3, 128, 0), seq_len=1024),
    "whole tiles, ragged": spec_of(P.random_blocks(0.4, 128, 1), seq_len=999, kv_heads=2, head_dim=128),
    "bshd": spec_of(P.window(64), causal=True, layout="bshd"),
}  # fmt: skip


@lru_cache(maxsize=1)
def target():
    return resolve("cuda")


def plans(name, spec):
    """Return the plans of one schedule for a spec; skip where it is not installed or refuses."""
    backend, wanted = SCHEDULES[name]
    schedule = next(s for s in backend.schedules(target().device) if s.name == wanted)
    missing = backend.missing(schedule, target())
    if missing:
        pytest.skip("; ".join(missing))
    made, reasons = [], []
    for lowered, one, found_schedule, candidate in _options(spec, target(), backend.name, "auto"):
        if (one.name, found_schedule.name) == (backend.name, wanted):
            reasons += candidate.reasons
            if not candidate.reasons:
                pins = {"backend": one.name, "strategy": "auto", "max_memory": None}
                made.append(Plan(spec, target(), Found(lowered, candidate, one, found_schedule, (candidate,)), pins))
    if not made:
        pytest.skip("refused: " + "; ".join(dict.fromkeys(reasons)))
    return made


@lru_cache(maxsize=4)
def expected(spec, through_lse):
    call = Call.of(spec, batch=2, through_lse=through_lse, device="cuda")
    return call, call.expected(), None if through_lse else dense_sdpa(call)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_numbers(schedule, dtype, name, request):
    if (schedule, name) in ROUNDED_PARTS:
        reason = "2.00 to 2.07 times SDPA's error: each part is rounded to half"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    spec = attrs.evolve(SPECS[name], dtype=dtype)
    made = plans(schedule, spec)
    call, want, anchor = expected(spec, False)
    for plan in made:
        assert_near(call.got(plan), want, anchor, dtype, GRADIENT_RATIO, way(plan))


@pytest.mark.parametrize("name", ["full", "causal", "grouped queries", "window", "more keys", "more queries", "bshd"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_the_lse_plans_agree_too(schedule, name):
    """A plan that is one kernel call takes another way then."""
    made = plans(schedule, SPECS[name])
    call, want, _ = expected(SPECS[name], False)
    swap = (lambda x: x.transpose(1, 2)) if call.spec.layout == "bshd" else (lambda x: x)
    for plan in made:
        leaves = [x.detach().requires_grad_() for x in call.inputs]
        out = swap(plan(*(swap(x) for x in leaves)))
        grads = torch.autograd.grad(out, leaves, call.grad)
        got = Numbers(out.detach(), want.lse, *grads)
        assert_agree(got, want, LSE_GRADIENT["bfloat16"], way(plan))


@pytest.mark.parametrize("name", ["causal", "longnet", "window", "rows without a key", "whole tiles", "wide heads"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_through_the_lse(schedule, name):
    made = plans(schedule, SPECS[name])
    call, want, _ = expected(SPECS[name], True)
    for plan in made:
        assert_agree(call.got(plan), want, LSE_GRADIENT["bfloat16"], way(plan))


@pytest.mark.parametrize("name", ["causal", "window", "longnet", "more queries"])
@pytest.mark.parametrize("schedule", ["flash (fa2)", "flash (fa3)", "flash (fa4)"])
def test_a_softcap_is_the_kernels_own(schedule, name):
    spec = attrs.evolve(SPECS[name], softcap=5.0)
    made = plans(schedule, spec)
    call = Call.of(spec, batch=2, device="cuda", through_lse=False)
    want = call.expected()
    for plan in made:
        assert_agree(call.got(plan), want, LSE_GRADIENT["bfloat16"], way(plan))


@pytest.mark.parametrize("boundaries", ["shared", "each"])
@pytest.mark.parametrize(
    "pattern", [P.documents(), P.documents() & P.window(60), P.documents() & P.window(60, 30)], ids=repr
)
@pytest.mark.parametrize("options", [{"causal": True}, {}, {"kv_heads": 2, "causal": True}], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_documents_that_arrive_with_the_call(schedule, options, pattern, boundaries):
    spec = spec_of(pattern, seq_len=487, **options)
    made = plans(schedule, spec)
    cuts = [[0, 5, 5, 200, 487]] if boundaries == "shared" else [[0, 5, 200, 487], [0, 486, 486, 487]]
    given = {"documents": torch.tensor(cuts, device="cuda").squeeze(0)}
    call = Call.of(spec, given, batch=2, device="cuda", through_lse=False)
    want = call.expected()
    for plan in made:
        assert_agree(call.got(plan), want, LSE_GRADIENT["bfloat16"], way(plan))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_open_lengths(schedule):
    spec = spec_of(P.window(50), seq_len=Dim("s", max=512), kv_len=Dim("k", max=512), causal=True)
    for plan in plans(schedule, spec):
        for lengths in ((170, 170), (90, 330), (330, 90), (2, 200)):
            call = Call.of(spec.at(*lengths), batch=2, device="cuda", through_lse=False)
            assert_agree(call.got(plan), call.expected(), LSE_GRADIENT["bfloat16"], f"{way(plan)} at {lengths}")


@pytest.mark.parametrize("name", ["causal", "longnet", "window", "grouped queries"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_strides_change_nothing(schedule, name):
    made = plans(schedule, SPECS[name])
    call = Call.of(SPECS[name], batch=2, device="cuda", through_lse=False)
    orders = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x], dim=2)[:, :, 0],
        lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],  # rows that no kernel can load aligned
    )
    for plan in made:
        plain = call.got(plan)
        for order in orders:
            leaves = [x.clone().requires_grad_() for x in call.inputs]
            got = call.results(plan, leaves, [order(x) for x in leaves])
            for (_, a), (what, b) in zip(got.items(), plain.items(), strict=True):
                assert error(a, b.double()) < 1e-2, f"{way(plan)}: {what}"


@pytest.mark.parametrize("name", ["causal", "window", "longnet"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_traced_plans_give_the_same(schedule, name):
    made = plans(schedule, SPECS[name])
    call = Call.of(SPECS[name], batch=2, device="cuda", through_lse=False)
    for plan in made:
        torch.compiler.reset()
        leaves = [x.detach().requires_grad_() for x in call.inputs]
        found = [f(*leaves) for f in (plan, torch.compile(lambda q, k, v: plan(q, k, v), fullgraph=True))]  # noqa: B023
        grads = [torch.autograd.grad(out, leaves, call.grad) for out in found]
        for a, b in zip((found[0], *grads[0]), (found[1], *grads[1]), strict=True):
            assert error(b, a.double()) < 1e-2, way(plan)


@pytest.mark.parametrize("name", ["causal", "window", "longnet"])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if not name.startswith("eager")])
def test_selective_checkpointing_saves_the_attention(schedule, name):
    made = plans(schedule, SPECS[name])
    call = Call.of(SPECS[name], batch=2, device="cuda", through_lse=False)
    for plan in made:
        seen = []

        def decide(ctx, op, *args, **kwargs):
            ours = "attnplan" in str(op) and "forward" in str(op)
            if ours and not ctx.is_recompute:
                seen.append(op)  # noqa: B023
            return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

        leaves = [x.detach().requires_grad_() for x in call.inputs]
        want = torch.autograd.grad(plan(*leaves), leaves, call.grad)
        out = checkpoint(
            plan,
            *leaves,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(decide),
        )
        got = torch.autograd.grad(out, leaves, call.grad)
        attends = [n for n in plan.graph if n.op.name == "attend"]
        assert len(seen) == len({n.id if n.op.launch is None else f"launch {n.op.launch}" for n in attends})
        for a, b in zip(got, want, strict=True):
            assert error(a, b.double()) < 1e-2, way(plan)


@pytest.mark.parametrize(
    "name", ["causal", "window", "window, more keys", "whole tiles", "whole tiles, ragged", "longformer", "any mask"]
)
@pytest.mark.parametrize("schedule", ["flash (fa4)", "flash (fa4-masks)"])
def test_kernels_that_are_started_again_work_on_the_tensors_of_each_call(schedule, name):
    """The second call of a kind and all behind it go without the host code of flash-attn 4."""
    made = plans(schedule, SPECS[name])
    interface = kernels_flash.module(kernels_flash.Flash4.interface)
    forward = replay_of(interface._flash_attn_fwd, kernels_flash.forward_options)._known
    backward = backward_replay_of(interface, kernels_flash.backward_options)._known
    forward.clear()
    backward.clear()
    each = [Call.of(SPECS[name], batch=2, seed=seed, device="cuda", through_lse=False) for seed in range(3)]
    for call in each:
        want = call.expected()
        for plan in made:
            assert_agree(call.got(plan), want, LSE_GRADIENT["bfloat16"], way(plan))
            with torch.no_grad():
                assert error(plan(*call.inputs), want.out) < 1e-2, way(plan)
    assert forward
    assert None not in forward.values(), "a call that is not as expected enters the interface each time"
    assert SPECS[name].kv_heads != SPECS[name].heads or None not in backward.values()


def test_gradients_by_cudnn_do_not_depend_on_what_was_compiled_before():
    """PyTorch keeps a compiled backward whatever the strides of the output and its gradient: ours fit each other."""
    lengths = ([64, 128], [1, 2])
    specs = [spec_of(P.longnet(*lengths)), spec_of(P.longnet(*lengths, mix="mean")), spec_of(causal=True), spec_of()]
    for spec in (*specs, *reversed(specs)):
        call = Call.of(spec, batch=2, device="cuda", through_lse=False)
        by_rows = call.grad.transpose(1, 2).contiguous().transpose(1, 2)
        want = call.expected()
        for one in (call, attrs.evolve(call, grad=by_rows)):
            q, k, v = (x.detach().requires_grad_() for x in one.inputs)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                F.scaled_dot_product_attention(q, k, v, is_causal=spec.causal).backward(by_rows)
            for plan in plans("eager (cudnn)", spec):
                assert_agree(one.got(plan), want, LSE_GRADIENT["bfloat16"], way(plan))


def deterministic_schedules():
    return [
        (f"{backend.name} ({schedule.name})", backend, schedule)
        for backend in registry().backends.values()
        for schedule in backend.schedules(target().device)
        if schedule.deterministic and backend.automatic
    ]


@pytest.mark.parametrize("name", ["causal", "grouped queries", "longnet", "window", "longformer", "streaming"])
def test_what_is_called_deterministic_repeats_bit_for_bit_thirty_times(name):
    spec = SPECS[name]
    tried = 0
    for _, backend, schedule in deterministic_schedules():
        for lowered, one, found_schedule, candidate in _options(spec, target(), "auto", "auto"):
            if (one.name, found_schedule.name) != (backend.name, schedule.name) or candidate.reasons:
                continue
            plan = Plan(spec, target(), Found(lowered, candidate, one, found_schedule, (candidate,)), {}, strict=True)
            call = Call.of(spec, batch=2, device="cuda")
            first = call.got(plan)
            for _ in range(30):
                again = call.got(plan)
                assert torch.equal(again.lse, first.lse), way(plan)
                for (what, a), (_, b) in zip(again.items(), first.items(), strict=True):
                    assert torch.equal(a, b), f"{way(plan)}: {what}"
            tried += 1
    assert tried
