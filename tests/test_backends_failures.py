"""Kernels that raise, packages that are missing or do not load, and what is deterministic."""

from __future__ import annotations

import attrs
import pytest
import torch

from attnplan.backends import eager, flash, xformers
from attnplan.cost import Target, catalogue
from attnplan.errors import KernelError, SpecError
from attnplan.runtime.kernels_all import KERNELS
from attnplan.search import search
from tests import fake_kernels
from tests.kernel_plans import H100, SPECS, Counting, float32_call, packages, plan_by
from tests.running import Call

__all__ = ["packages"]
pytestmark = pytest.mark.usefixtures("packages")


def test_a_kernel_that_raises_is_reported_with_backend_shapes_and_cause():
    call = float32_call(SPECS["window"])
    fake_kernels.broken.update({"fa4 function", "fa4 forward"})
    plan = plan_by(call.spec, "fa4")
    plan.strict = True
    message = (
        r"flash-attn 4 \(fa4\) failed in its forward on q \[2, 4, 48, 16\], k \[2, 4, 48, 16\], v \[2, 4, 48, 16\] "
        r"torch.bfloat16 cpu: AssertionError: head_dim is not supported by fa4 forward"
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
    with pytest.warns(RuntimeWarning, match=r"dense > eager \(cudnn\) failed: .*; this plan now runs lattice"):
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
    fake_kernels.broken.add("fa4 forward")
    with pytest.raises(KernelError, match="flash-attn 4"):
        plan(*call.inputs)


def test_errors_of_users_are_not_reported_as_a_kernels():
    plan = plan_by(SPECS["window"], "fa4")
    with pytest.raises(SpecError, match="q must be a tensor"):
        plan(None, None, None)


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
