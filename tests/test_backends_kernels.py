"""The GPU backends against the oracle on the CPU, with stand-ins for the packages that check what they are given."""

from __future__ import annotations

import sys

import attrs
import pytest
import torch

from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from attnplan.backends import flash
from attnplan.ir.native import Lowered, lowered
from attnplan.lower import lower
from attnplan.plan import Plan
from attnplan.runtime.kernels import Request
from attnplan.runtime.kernels_all import KERNELS
from attnplan.search import _options, every_way
from tests import fake_kernels
from tests.kernel_plans import H100, SPECS, packages, plan_by, plans, spec_of
from tests.running import Call, Numbers, assert_agree, way

__all__ = ["packages"]
pytestmark = [
    pytest.mark.usefixtures("packages"),
    pytest.mark.filterwarnings("error:.*this plan now runs.*:RuntimeWarning"),
]


@pytest.mark.parametrize("name", SPECS)
def test_every_schedule_agrees_with_the_oracle(name):
    call = Call.of(SPECS[name], batch=2)
    want = call.expected()
    tried = set()
    for plan in plans(call.spec):
        assert_agree(call.got(plan), want, 1e-11, way(plan))
        tried.add(plan.schedule)
    assert len(tried) >= 2, "at least two kernels take it"


@pytest.mark.parametrize("key", ["flash-cuda", "xformers-flash", "fa2", "fa3"])
def test_rows_without_a_key_are_looked_for_only_where_there_may_be_some(monkeypatch, key):
    kernel, looked = KERNELS[key], []
    module = sys.modules[type(kernel).__module__]
    for function in ("empty_rows_below", "empty_rows_above"):
        real = getattr(module, function)
        monkeypatch.setattr(module, function, lambda x, real=real: looked.append(1) or real(x))
    for rows, keys, times in ((40, 40, 0), (30, 40, 0), (40, 30, 2)):
        shapes = [(2, 4, rows, 16), (2, 4, keys, 16), (2, 4, keys, 16)]
        q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
        asked = Request(0.25, window=(3, 0))
        looked.clear()
        out, lse = kernel.forward(q, k, v, asked)
        kernel.backward(out, q, k, v, out, lse, asked)
        assert (len(looked), bool(lse.isneginf().any())) == (times, times > 0)
    looked.clear()
    packed = Request(0.25, documents=torch.tensor([0, 7, 40]))
    out, lse = kernel.forward(q, q, q, packed)
    kernel.backward(out, q, q, q, out, lse, packed)
    assert not looked


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
    for schedule, function in {"fa4": "fa4 forward", "fa2": "fa2 function"}.items():  # the first without its function
        fake_kernels.calls.clear()
        call = Call.of(spec, batch=2, through_lse=False)
        plan = plan_by(spec, schedule)
        plan(*call.inputs)
        assert fake_kernels.calls == {function: 1}
    plain = Call.of(SPECS["causal"], batch=2, through_lse=False)
    fake_kernels.calls.clear()
    plan_by(plain.spec, "fa4")(*plain.inputs)
    assert fake_kernels.calls == {"fa4 forward": 1}, "without gradients its kernel is enough"


@pytest.mark.parametrize("rows", [1, 5, 128])
@pytest.mark.parametrize("keys", [2048, 4096 + 77])
def test_few_queries_over_many_keys_are_split(rows, keys):
    spec = spec_of(seq_len=rows, kv_len=keys, heads=4, kv_heads=2)
    call = Call.of(spec, batch=1)
    fake_kernels.calls.clear()
    assert_agree(call.got(plan_by(spec, "fa4")), call.expected(), 1e-11, "split")
    assert fake_kernels.calls["fa4 pieces"] == keys // 1024


@pytest.mark.parametrize("pattern", [P.causal(), P.window(9), P.window(1500, 3)], ids=repr)
def test_windows_over_many_keys_are_not_split(pattern):
    spec = spec_of(pattern, seq_len=5, kv_len=2048)
    call = Call.of(spec, batch=1)
    fake_kernels.calls.clear()
    assert_agree(call.got(plan_by(spec, "fa4")), call.expected(), 1e-11, "not split")
    assert fake_kernels.calls["fa4 pieces"] == 0


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
    for key in (("eager", "flash"), ("xformers", "flash"), ("flash", "fa2"), ("flash", "fa3")):
        assert any("takes no mask, %" in reason for reason in reasons[key]), key
    assert not reasons["eager", "cudnn"]
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


def test_disjoint_parts_are_joined_by_our_own_kernel(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wider = {name: attrs.evolve(x, dtypes=(*x.dtypes, "float32")) for name, x in flash.LIMITS.items()}
    monkeypatch.setattr(flash, "LIMITS", wider)
    spec = attrs.evolve(spec_of(P.window(5) | P.global_tokens(3), seq_len=45, layout="bshd"), dtype="float32")
    call = Call.of(spec, batch=2)
    plan = plan_by(spec, "fa4", "decompose-pull")
    assert "pull_" in plan.source
    assert_agree(call.got(plan), call.expected(), 1e-6, way(plan))


@pytest.mark.parametrize("schedule", ["cudnn", "efficient"])
def test_the_lse_is_computed_for_a_backward_only(schedule):
    spec = AttentionSpec(seq_len=64, heads=2, head_dim=64, dtype="bfloat16", causal=True)
    found = next(f for c, f in every_way(spec, H100) if f is not None and c.name == f"dense > eager ({schedule})")
    program = Plan(spec, H100, found, {}).program
    assert ("None, True, 0.0" if schedule == "efficient" else "differentiable") in program.module.code
    assert "None, False, 0.0" in program.quick.code


def test_flash_attn_4_is_trained_without_its_own_function_which_keeps_the_host_busy():
    call = Call.of(SPECS["causal"], batch=2)
    plan = plan_by(call.spec, "fa4")
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    plan(*leaves).sum().backward()
    assert "fa4 function" not in fake_kernels.calls
    assert "fa4 backward" in fake_kernels.calls


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("spec", ["causal", "window", "longnet", "grouped queries"])
def test_xformers_checks_tensors_of_one_kind_once(spec, return_lse):
    call = Call.of(SPECS[spec], batch=2, through_lse=False)
    want, inputs = call.expected().out, [x.detach() for x in call.inputs]
    plan = next(p for p in plans(call.spec) if p._schedule.runs == "xformers-flash")
    KERNELS["xformers-flash"]._checked.clear()
    for already in (False, True):
        fake_kernels.calls.clear()
        got = plan(*inputs, return_lse=return_lse)
        assert (fake_kernels.calls["checks"] > 0) is not already
        assert fake_kernels.calls["flash forward"] > 0
        torch.testing.assert_close(got[0] if return_lse else got, want)


def test_xformers_checks_tensors_of_other_strides():
    inputs = [x.detach() for x in Call.of(SPECS["causal"], batch=2).inputs]
    plan = next(p for p in plans(SPECS["causal"]) if p._schedule.runs == "xformers-flash")
    plan(*inputs)
    fake_kernels.calls.clear()
    plan(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs))
    assert fake_kernels.calls == {"checks": 1, "flash forward": 1}


def test_xformers_checks_a_mask_in_each_call():
    call = Call.of(SPECS["any mask"], batch=2, through_lse=False)
    plan = plan_by(call.spec, "cutlass")
    for _ in range(2):
        fake_kernels.calls.clear()
        plan(*call.inputs)
        assert fake_kernels.calls["checks"] == fake_kernels.calls["cutlass forward"] > 0
