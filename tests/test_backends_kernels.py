"""The GPU backends against the oracle on the CPU, with stand-ins for the packages that check what they are given."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from attnplan.backends import eager, flash, xformers
from attnplan.cost import Target, catalogue
from attnplan.errors import KernelError, SpecError
from attnplan.ir.native import Lowered, lowered
from attnplan.lower import lower
from attnplan.plan import Plan
from attnplan.runtime import opaque
from attnplan.runtime.kernels_all import KERNELS
from attnplan.search import Found, _options, search
from tests import fake_kernels
from tests.running import Call, Numbers, assert_agree, way

BASE = AttentionSpec(seq_len=48, heads=4, head_dim=16, batch=2, dtype="float64")
H100 = Target(catalogue()["h100"], "cpu")


def spec_of(pattern=None, **options):
    lengths = {"kv_len": options.get("seq_len", BASE.seq_len), **options}
    heads = {"kv_heads": options.get("heads", BASE.heads), "value_dim": options.get("head_dim", BASE.head_dim)}
    return attrs.evolve(BASE, pattern=pattern or P.full(), **{**heads, **lengths})


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Pretend that every package is there, that kernels take float64, and that they have small tiles."""
    fake_kernels.install(monkeypatch)
    for module in (eager, flash, xformers):
        wider = {name: attrs.evolve(x, dtypes=(*x.dtypes, "float64")) for name, x in module.LIMITS.items()}
        monkeypatch.setattr(module, "LIMITS", wider)
    monkeypatch.setattr(flash, "_FA4_WIDTHS", ())
    monkeypatch.setattr(flash, "FA4", attrs.evolve(flash.FA4, tile=(8, 4)))
    monkeypatch.setattr(eager, "EFFICIENT", attrs.evolve(eager.EFFICIENT, tile=(8, 8), chunk=8))
    monkeypatch.setattr(xformers, "CUTLASS", attrs.evolve(xformers.CUTLASS, tile=(8, 8), chunk=8))


def plans(spec, target=H100):
    """Iterate over a plan for each strategy and schedule of the GPU backends that accepts a spec."""
    for found_lowered, backend, schedule, candidate in _options(spec, target, "auto", "auto"):
        if not candidate.reasons and schedule.runs:
            found = Found(found_lowered, candidate, backend, schedule, (candidate,))
            yield Plan(spec, target, found, {"backend": "auto", "strategy": "auto", "max_memory": None})


def ways(spec):
    return {f"{p.backend} ({p.schedule})" for p in plans(spec)}


def plan_by(spec, schedule, strategy=None, target=H100):
    return next(p for p in plans(spec, target) if p.schedule == schedule and strategy in (None, p.strategy))


SPECS = {
    "full": spec_of(),
    "causal": spec_of(causal=True),
    "causal, odd length": spec_of(seq_len=37, causal=True),
    "grouped queries": spec_of(causal=True, kv_heads=2),
    "one key head": spec_of(P.window(5), causal=True, kv_heads=1),
    "longnet": spec_of(P.longnet([16, 32, 48], [1, 2, 4]), causal=True),
    "grouped longnet": spec_of(P.longnet([16, 32], [1, 2]), kv_heads=2, causal=True),
    "longnet mean": spec_of(P.longnet([16, 32], [1, 2], mix="mean")),
    "longnet detached": spec_of(P.longnet([16, 32], [1, 2], mix="lse-detached"), causal=True),
    "rows without a key": spec_of(P.longnet([16, 24], [4, 3]), seq_len=37),
    "beside the diagonal": spec_of(P.band(20, -4)),
    "beside it on the right": spec_of(P.band(-4, 20)),
    "more keys": spec_of(seq_len=19, kv_len=48, causal=True),
    "more queries": spec_of(seq_len=40, kv_len=11, causal=True),
    "window": spec_of(P.window(7), causal=True),
    "window to both sides": spec_of(P.window(3, 9)),
    "window to the right": spec_of(P.window(0, 5)),
    "window, more keys": spec_of(P.window(6, 2), seq_len=23, kv_len=41),
    "window, more queries": spec_of(P.window(6, 2), seq_len=41, kv_len=23),
    "window of segments": spec_of(P.window(7) & P.segments(20), causal=True),
    "longformer": spec_of(P.window(5) | P.global_tokens(3)),
    "streaming": spec_of(P.window(9) | P.sinks(3), causal=True, kv_heads=2),
    "any mask": spec_of(P.window(5) | P.random_blocks(0.3, 4, 0), causal=True),
    "whole tiles": spec_of(P.random_blocks(0.3, 8, 0)),
    "whole tiles, ragged": spec_of(P.random_blocks(0.4, 8, 1), seq_len=45, kv_heads=2),
    "heads differ": spec_of((P.heads(0, 2) & P.segments(16)) | (P.heads(2, 4) & P.full())),
    "bshd": spec_of(P.window(7), causal=True, layout="bshd"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_every_schedule_agrees_with_the_oracle(name):
    call = Call.of(SPECS[name], batch=2)
    want = call.expected()
    tried = set()
    for plan in plans(call.spec):
        assert_agree(call.got(plan), want, 1e-11, way(plan))
        tried.add(plan.schedule)
    assert len(tried) >= 2, "at least two kernels take it"


NATIVE = {
    "window": {"flash", "fa2", "fa3", "fa4"},
    "window to both sides": {"flash", "fa2", "fa3", "fa4"},
    "window, more keys": {"flash", "fa2", "fa3", "fa4"},
    "more keys": {"flash", "fa2", "fa3", "fa4"},
    "more queries": {"flash", "fa2", "fa3", "fa4"},
    "whole tiles": {"fa4"},
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_conditions_run_as_one_attend_without_a_mask(name):
    spec = SPECS[name]
    for schedule in NATIVE[name]:
        plan = plan_by(spec, schedule)
        assert len([n for n in plan.graph if n.op.name == "attend"]) == 1
        assert "where_" not in plan.source or "blocks" in plan._schedule.native
        assert plan.strategy == ("blocks" if name == "whole tiles" else "dense")


def test_plans_that_are_one_call_call_the_package_itself():
    spec = attrs.evolve(SPECS["window"], softcap=None)
    for schedule, function in {"fa4": "fa4 function", "fa2": "fa2 function"}.items():
        fake_kernels.calls.clear()
        call = Call.of(spec, batch=2, through_lse=False)
        plan = plan_by(spec, schedule)
        plan(*call.inputs)
        assert fake_kernels.calls == {function: 1}


@pytest.mark.parametrize("name", ["full", "causal", "grouped queries", "window", "more keys", "more queries", "bshd"])
def test_without_the_lse_plans_agree_too(name):
    """A plan that is one kernel call takes another way then."""
    call = Call.of(SPECS[name], batch=2, through_lse=False)
    want = call.expected()
    swap = (lambda x: x.transpose(1, 2)) if call.spec.layout == "bshd" else (lambda x: x)
    for plan in plans(call.spec):
        if plan.backend == "eager":  # those are torch's own operators, which have no stand-in
            continue
        leaves = [x.detach().requires_grad_() for x in call.inputs]
        out = swap(plan(*(swap(x) for x in leaves)))
        grads = torch.autograd.grad(out, leaves, call.grad)
        assert_agree(Numbers(out.detach(), want.lse, *grads), want, 1e-11, way(plan))


@pytest.mark.parametrize("schedule", ["fa2", "fa3", "fa4"])
@pytest.mark.parametrize("name", ["causal", "window", "grouped queries", "longnet", "more queries"])
def test_a_softcap_is_the_kernels_own(name, schedule):
    spec = attrs.evolve(SPECS[name], softcap=3.0)
    call = Call.of(spec, batch=2)
    want = call.expected()
    assert_agree(call.got(plan_by(spec, schedule)), want, 1e-11, schedule)
    no_cap = Call.of(SPECS[name], batch=2).expected()
    assert (no_cap.out - want.out).norm() > 1e-3 * want.out.norm()


DOCUMENTS = {
    "shared": lambda n: torch.tensor([0, 5, 5, n // 2, n]),
    "each its own": lambda n: torch.tensor([[0, 5, n // 2, n], [0, n - 1, n - 1, n]], dtype=torch.int32),
}


@pytest.mark.parametrize("boundaries", DOCUMENTS)
@pytest.mark.parametrize(
    "pattern", [P.documents(), P.documents() & P.window(6), P.documents() & P.window(4, 3)], ids=repr
)
@pytest.mark.parametrize(
    "options", [{"causal": True}, {}, {"kv_heads": 2, "causal": True}, {"layout": "bshd"}], ids=str
)
def test_documents_that_arrive_with_the_call_are_lengths_to_the_kernel(pattern, boundaries, options):
    spec = spec_of(pattern, seq_len=37, **options)
    call = Call.of(spec, {"documents": DOCUMENTS[boundaries](37)}, batch=2)
    want = call.expected()
    found = [p for p in plans(spec) if "documents" in p._schedule.native]
    assert {"flash", "fa2", "fa3", "fa4"} <= {p.schedule for p in found}
    for plan in found:
        assert len(plan.graph) == 5, "one attend"
        assert_agree(call.got(plan), want, 1e-11, way(plan))


def test_open_lengths_decide_the_window_at_each_call():
    spec = spec_of(P.window(5), seq_len=Dim("s", max=48), kv_len=Dim("k", max=48), causal=True)
    for schedule in ("flash", "fa4", "fa2"):
        plan = plan_by(spec, schedule)
        for lengths in ((17, 17), (9, 33), (33, 9), (1, 20)):
            call = Call.of(spec.at(*lengths), batch=2)
            assert_agree(call.got(plan), call.expected(), 1e-11, f"{schedule} at {lengths}")


def test_what_no_window_says_is_refused_and_never_dropped():
    reasons = {
        (b.name, s.name): c.reasons for _, b, s, c in _options(SPECS["any mask"], H100, "auto", "auto") if s.runs
    }
    for key in (("eager", "flash"), ("eager", "cudnn"), ("xformers", "flash"), ("flash", "fa2"), ("flash", "fa3")):
        assert any("takes no mask, %" in reason for reason in reasons[key]), key
    assert any("are partial" in reason for reason in reasons["flash", "fa4"])
    assert not reasons["eager", "efficient"]


@pytest.mark.parametrize(
    ("pattern", "native", "found"),
    [
        (P.window(3), {"window"}, Lowered((3, 3))),
        (P.window(3), {"causal-window"}, None),
        (P.window(3) & P.causal(), {"causal-window"}, Lowered((3, 0))),
        (P.window(200), set(), Lowered()),
        (P.window(46, 46), {"window"}, Lowered((46, 46))),
        (P.window(47, 47), set(), Lowered()),
        (P.documents() & P.window(3), {"window"}, None),
        (P.documents() & P.window(3), {"window", "documents"}, Lowered((3, 3), documents=True)),
        (P.documents() & P.padding(), {"window", "documents"}, None),
        (P.segments(8), {"window", "documents"}, None),
    ],
    ids=repr,
)
def test_conditions_in_the_arguments_of_a_kernel(pattern, native, found):
    graph = lower(spec_of(pattern))
    node = next(n for n in graph if n.op.name == "attend")
    assert lowered(graph, node, frozenset(native)) == found


def test_what_a_kernel_cannot_say_has_no_such_form():
    everything = frozenset({"window", "documents", "causal-window"})
    for spec in (
        SPECS["beside the diagonal"],  # a negative limit is none to the kernels
        SPECS["beside it on the right"],
        spec_of(P.documents(), q_offset=True, kv_len=64),
        spec_of(P.documents(), q_offset=True),
        spec_of(P.documents(), seq_len=20, kv_len=48),
    ):
        graph = lower(spec)
        assert lowered(graph, next(n for n in graph if n.op.name == "attend"), everything) is None


# ------------------------------------------------------------------------------------- operators, modes, checkpointing


def float32_call(spec):
    return Call.of(attrs.evolve(spec, dtype="bfloat16"), batch=2, through_lse=False)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", ["fa2", "fa4"])
def test_a_dispatch_mode_sees_the_registered_operator_and_plain_eager_goes_without(schedule):
    call = float32_call(SPECS["window"])
    plan = plan_by(call.spec, schedule)
    want = plan(*call.inputs)
    with Counting() as mode:
        got = plan(*call.inputs)
        plan(*call.inputs, return_lse=True)
    assert mode.seen.count("attnplan.flash_forward.default") == 2
    assert torch.equal(got, want)


def test_the_operators_of_xformers_are_a_family_of_their_own():
    call = float32_call(SPECS["window"])
    with Counting() as mode:
        next(p for p in plans(call.spec) if p.backend == "xformers" and p.schedule == "flash")(*call.inputs)
    assert mode.seen.count("attnplan.xformers_forward.default") == 1


@pytest.mark.parametrize("name", ["window", "longnet", "whole tiles"])
@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing_saves_the_attention(name, policy):
    call = float32_call(SPECS[name])
    plan = plan_by(call.spec, "fa4")
    attends = len([n for n in plan.graph if n.op.name == "attend"])
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    want = torch.autograd.grad(plan(*leaves), leaves, call.grad)

    def decide(ctx, op, *args, **kwargs):
        return policy if "attnplan" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    fake_kernels.calls.clear()
    out = checkpoint(
        plan, *leaves, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(decide)
    )
    got = torch.autograd.grad(out, leaves, call.grad)
    forwards = fake_kernels.calls["fa4 forward"]
    assert forwards == (attends if policy == CheckpointPolicy.MUST_SAVE else 2 * attends)
    assert fake_kernels.calls["fa4 backward"] == attends
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["causal", "window", "grouped queries", "whole tiles"])
def test_plans_trace_without_a_break_and_give_the_same(name):
    call = float32_call(SPECS[name])
    plan = plan_by(call.spec, "fa4")
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    want = plan(*leaves)
    got = torch.compile(lambda q, k, v: plan(q, k, v), backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x, leaves, call.grad) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", ["fa2", "fa4", "xformers-flash"])
@pytest.mark.parametrize("window", [[-1, -1], [3, 0]])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(kernel, window, packed):
    family = opaque.FAMILIES["xformers" if "xformers" in kernel else "flash"]
    q = torch.randn(2, 12, 2, 16, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 2, 12, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    documents = torch.tensor([0, 5, 12]) if packed else None
    given = (q, k, v, None, None, documents, [], kernel, False, [*window, 0, 0], 0.25, 0.0)
    torch.library.opcheck(family, given)


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_kernel_that_raises_is_reported_with_backend_shapes_and_cause():
    call = float32_call(SPECS["window"])
    fake_kernels.broken.update({"fa4 function", "fa4 forward"})
    plan = plan_by(call.spec, "fa4")
    plan.strict = True
    message = (
        r"flash-attn 4 \(fa4\) failed in its forward on q \[2, 4, 48, 16\], k \[2, 4, 48, 16\], v \[2, 4, 48, 16\] "
        r"torch.bfloat16 cpu: AssertionError: head_dim is not supported by fa4 function"
    )
    with pytest.raises(KernelError, match=message) as caught:
        plan(*call.inputs)
    assert isinstance(caught.value.__cause__, AssertionError)
    with Counting(), pytest.raises(KernelError, match="failed in its forward"):
        plan(*call.inputs)


def test_auto_moves_on_with_a_warning_that_names_both_and_stays_there(monkeypatch):
    call = float32_call(SPECS["window"])
    monkeypatch.setattr(eager.Eager, "schedules", lambda self, device: (eager.MATH_CUDA,))
    plan = plan_by(call.spec, "fa4")
    want = plan(*call.inputs)
    fake_kernels.broken.update({"fa4 function", "fa4 forward"})
    with pytest.warns(
        RuntimeWarning, match=r"dense > flash \(fa4\) failed: .*; this plan now runs dense > flash \(fa3"
    ):
        got = plan(*call.inputs)
    torch.testing.assert_close(got, want)
    fake_kernels.calls.clear()
    plan(*call.inputs)
    assert not any("fa4" in name for name in fake_kernels.calls), "what failed once is not tried again"
    fake_kernels.broken.add("fa2 function")  # flash-attn 3's stand-in shares it
    with pytest.warns(RuntimeWarning, match=r"\(fa3\) failed: .* now runs"):
        torch.testing.assert_close(plan(*call.inputs), want)


def test_an_operator_of_torch_that_raises_is_reported_too(monkeypatch):
    call = Call.of(SPECS["longnet"], batch=2)
    plan = plan_by(call.spec, "cudnn")
    plan.strict = True

    def fail(*args, **options):
        raise RuntimeError("cuDNN Frontend error: no valid execution plans built")

    monkeypatch.setattr(fake_kernels.Aten, "_scaled_dot_product_cudnn_attention", fail)
    with pytest.raises(
        KernelError, match=r"eager \(cudnn\) failed on q \[2, 4, 48, 16\], .*: RuntimeError: cuDNN"
    ) as caught:
        plan(*call.inputs)
    assert isinstance(caught.value.__cause__, RuntimeError)
    plan.strict = False
    with pytest.warns(RuntimeWarning, match=r"lattice > eager \(cudnn\) failed: .*; this plan now runs lattice"):
        plan(*call.inputs)


def test_a_lack_of_memory_is_not_a_kernels_failure(monkeypatch):
    call = float32_call(SPECS["window"])

    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(KERNELS["fa4"], "run_direct", fail)
    with pytest.raises(torch.OutOfMemoryError):
        plan_by(call.spec, "fa4")(*call.inputs)


@pytest.mark.parametrize("changes", [{"strict": True}, {"pins": {"backend": "flash", "strategy": "auto"}}], ids=str)
def test_a_pinned_or_strict_plan_never_moves(changes):
    call = float32_call(SPECS["window"])
    plan = plan_by(call.spec, "fa4")
    for name, value in changes.items():
        setattr(plan, name, value)
    fake_kernels.broken.add("fa4 function")
    with pytest.raises(KernelError, match="flash-attn 4"):
        plan(*call.inputs)


def test_errors_of_users_are_not_reported_as_a_kernels():
    plan = plan_by(SPECS["window"], "fa4")
    with pytest.raises(SpecError, match="q must be a tensor"):
        plan(None, None, None)


# --------------------------------------------------------------------------------------------------- what is installed


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.12: cannot open"), SystemError("odd"), AttributeError("x")]
)
def test_whatever_an_import_raises_is_the_reason(monkeypatch, error):
    from attnplan.backends import base

    def fail(name):
        raise error

    monkeypatch.setattr(base, "import_module", fail)
    base.import_failure.cache_clear()
    reasons = flash.Flash().missing(flash.FA4, H100)
    assert reasons == (f"import of flash_attn.cute.interface failed: {type(error).__name__}: {error}",)
    both = xformers.XFormers().missing(xformers.FLASH, H100)
    assert [reason.split(" failed")[0] for reason in both] == [
        "import of mslk.attention.fmha", "import of xformers.ops.fmha",
    ]  # fmt: skip
    base.import_failure.cache_clear()


def test_a_package_that_is_missing_is_named_and_elsewhere_it_is_assumed(monkeypatch):
    from attnplan.backends import base

    monkeypatch.setattr(base, "_version", lambda name: "2.13" if name == "torch" else None)
    assert flash.Flash().missing(flash.FA2, H100) == ("package 'flash-attn' is not installed",)
    assert xformers.XFormers().missing(xformers.FLASH, H100) == ("package 'mslk' or 'xformers' is not installed",)
    assert flash.Flash().missing(flash.FA2, Target(catalogue()["h100"], None)) == ()


def test_the_successor_of_xformers_comes_first(monkeypatch):
    import sys
    from types import ModuleType

    from attnplan.runtime import kernels_xformers

    successor = fake_kernels.xformers()
    for name, module in {"mslk": ModuleType("mslk"), "mslk.attention": ModuleType("a"),
                         "mslk.attention.fmha": successor}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    kernels_xformers.fmha.cache_clear()
    assert kernels_xformers.fmha() is successor
    kernels_xformers.fmha.cache_clear()


def test_deterministic_plans_use_only_schedules_that_are_known_to_repeat():
    found = search(attrs.evolve(SPECS["window"], dtype="bfloat16"), H100, deterministic=True)
    assert found.schedule.deterministic
    assert all(c.reasons for c in found.candidates if c.schedule != "math")


def test_every_kernel_of_a_schedule_exists():
    for device in catalogue().values():
        for backend in (eager.Eager(), flash.Flash(), xformers.XFormers()):
            for schedule in backend.schedules(device):
                assert not schedule.runs or schedule.runs in KERNELS
                assert schedule.kernel.masks == bool(schedule.native & {"mask", "blocks"} or not schedule.runs)
    assert np.isfinite(len(KERNELS))
