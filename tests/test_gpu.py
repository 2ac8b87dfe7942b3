"""Parity on CUDA: eager flash and math against float64, in half precision and float32. Skipped without a device."""

from __future__ import annotations

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from tests.cuda_specs import FLOAT32_GRADIENT, OUTPUT, SHARED, assert_near, spec_of
from tests.running import Call, assert_agree, dense_sdpa, error, every_plan, way

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GRADIENT_RATIO = 1.5
"""Largest error of a gradient over that of dense SDPA in the same dtype on the same tensors."""

SPECS = SHARED | {
    "longnet": spec_of(P.longnet([128, 256, 512], [1, 2, 4])),
    "causal longnet": spec_of(P.longnet([128, 256, 512], [1, 2, 4]), causal=True),
    "ragged longnet": spec_of(P.longnet([64, 200], [1, 3]), seq_len=333, causal=True),
    "unlike offsets in a group": spec_of(P.longnet([64, 192], [2, 3]), heads=6, kv_heads=2, seq_len=301),
    "longnet in blocks": spec_of(P.longnet([64, 128], [1, 2], offset="block"), causal=True),
    "longnet mean": spec_of(P.longnet([64, 128], [1, 2], mix="mean"), causal=True),
    "segments": spec_of(P.segments(100), causal=True),
    "more keys": spec_of(seq_len=64, kv_len=512, causal=True),
    "narrow heads": spec_of(P.longnet([128, 256], [1, 2]), head_dim=16, causal=True),
    "wide heads": spec_of(P.longnet([128, 256], [1, 2]), head_dim=128, causal=True),
}  # fmt: skip


def ways_on_cuda(spec):
    """Iterate over the ways to run a spec on CUDA, the reference left out: it is what the oracle stands for."""
    found = [p for p in every_plan(spec, "cuda") if p.backend != "reference"]
    assert found
    return found


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", OUTPUT)
@pytest.mark.parametrize("name", SPECS)
def test_numbers_on_cuda(name, dtype, layout):
    spec = attrs.evolve(SPECS[name], dtype=dtype, layout=layout)
    call = Call.of(spec, batch=2, through_lse=False, device="cuda")
    want = call.expected()
    anchor = want if dtype == "float32" else dense_sdpa(call)
    for plan in ways_on_cuda(spec):
        assert_near(call.got(plan), want, anchor, dtype, GRADIENT_RATIO, way(plan))


@pytest.mark.parametrize("dtype", OUTPUT)
@pytest.mark.parametrize("name", ["causal", "causal longnet", "unlike offsets in a group", "rows without a key"])
def test_gradients_through_the_lse_on_cuda(name, dtype):
    call = Call.of(attrs.evolve(SPECS[name], dtype=dtype), batch=2, device="cuda")
    want = call.expected()
    for plan in ways_on_cuda(call.spec):
        assert_agree(call.got(plan), want, {"bfloat16": 1.5e-2, "float16": 4e-3, "float32": 5e-6}[dtype], way(plan))


@pytest.mark.parametrize("head_dim", [8, 248, 256])
def test_gradients_through_the_lse_for_heads_of_any_width(head_dim):
    """The LSE's gradient rides on more features of v: there must be room for them."""
    spec = attrs.evolve(SPECS["causal longnet"], head_dim=head_dim, value_dim=head_dim)
    call = Call.of(spec, batch=1, device="cuda")
    want = call.expected()
    for plan in ways_on_cuda(spec):
        assert_agree(call.got(plan), want, 1.5e-2, way(plan))


def test_half_precision_takes_the_fused_kernels_and_windows_are_their_own():
    assert {way(p) for p in ways_on_cuda(SPECS["causal longnet"])} >= {
        "dense > eager (math)", "lattice > eager (flash)", "lattice > eager (cudnn)", "lattice > eager (math)",
    }  # fmt: skip
    assert attnplan.compile(SPECS["causal longnet"], device="cuda").schedule != "math"
    assert attnplan.compile(SPECS["window"], device="cuda").schedule != "math"


@pytest.mark.parametrize("name", ["rows without a key", "more queries"])
@pytest.mark.parametrize("dtype", OUTPUT)
def test_rows_without_a_key_are_nothing_on_cuda(name, dtype):
    call = Call.of(attrs.evolve(SPECS[name], dtype=dtype), batch=2, device="cuda")
    empty = call.expected().lse == -torch.inf
    assert empty.any()
    for plan in ways_on_cuda(call.spec):
        got = call.got(plan)
        assert all(x.isfinite().all() for _, x in got.items()), way(plan)
        assert (got.out[empty] == 0).all(), way(plan)
        assert (got.dq[empty] == 0).all(), way(plan)
        assert torch.equal(got.lse == -torch.inf, empty), way(plan)


@pytest.mark.parametrize("name", ["causal", "causal longnet", "unlike offsets in a group"])
def test_strides_change_nothing_on_cuda(name):
    call = Call.of(SPECS[name], batch=2, device="cuda", through_lse=False)
    orders = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    )
    for plan in ways_on_cuda(call.spec):
        plain = call.got(plan)
        for order in orders:
            leaves = [x.clone().requires_grad_() for x in call.inputs]
            got = call.results(plan, leaves, [order(x) for x in leaves])
            for (_, a), (what, b) in zip(got.items(), plain.items(), strict=True):
                assert error(a, b.double()) < 1e-2, f"{way(plan)}: {what}"


def test_operands_and_open_lengths_on_cuda():
    spec = AttentionSpec(
        seq_len=Dim("s", max=512), heads=8, kv_heads=2, head_dim=64, dtype="float32", causal=True,
        pattern=P.documents() & P.padding(),
    )  # fmt: skip
    plan = attnplan.compile(spec, device="cuda")
    for length in (17, 200):
        operands = {
            "documents": torch.tensor([0, length // 3, length], device="cuda"),
            "key_padding": torch.arange(length, device="cuda") < torch.tensor([[length], [length // 2]], device="cuda"),
        }
        call = Call.of(spec.at(length, length), operands, batch=2, device="cuda")
        assert_agree(call.got(plan), call.expected(), FLOAT32_GRADIENT, f"{length} rows")


def test_float32_ignores_and_keeps_the_flags_of_torch():
    """IEEE float32 is promised; whether the process allows TF32 is not for a plan to change."""
    before = torch.backends.cuda.matmul.allow_tf32
    call = Call.of(attrs.evolve(SPECS["causal longnet"], dtype="float32"), batch=1, device="cuda")
    for plan in ways_on_cuda(call.spec):
        call.got(plan)
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize("name", SPECS)
def test_plans_on_cuda_verify_themselves(name):
    for plan in ways_on_cuda(SPECS[name]):
        plan.verify(rows=32)


def test_an_empty_batch_on_cuda():
    for name in ("causal", "causal longnet", "grouped queries"):
        for plan in ways_on_cuda(SPECS[name]):
            spec = plan.spec
            q = torch.empty(0, spec.heads, spec.seq_len, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            k = torch.empty(0, spec.kv_heads, spec.seq_len, 64, dtype=torch.bfloat16, device="cuda")
            out, lse = plan(q, k, k, return_lse=True)
            assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
            assert plan(q, k, k).shape == q.shape


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_call_does_not_wait_for_the_device():
    """Operands on the device are never read by the host (design: without a host synchronisation)."""
    spec = spec_of(P.documents() & P.padding(), dtype="bfloat16", causal=True)
    plan = attnplan.compile(spec, device="cuda")
    call = Call.of(
        spec,
        {
            "documents": torch.tensor([0, 100, 512], device="cuda"),
            "key_padding": torch.ones(2, 512, dtype=torch.bool, device="cuda"),
        },
        batch=2,
        device="cuda",
    )
    call.got(plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaves = [x.clone().requires_grad_() for x in call.inputs]
        out = plan(*leaves, **call.operands)
        torch.autograd.grad(out, leaves, call.grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
