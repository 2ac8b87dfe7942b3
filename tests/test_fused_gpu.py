"""Our own kernels and the plans around them on a CUDA device. One process compiles all of it in under 90 seconds."""

from __future__ import annotations

import attrs
import pytest
import torch

import attnplan
from attnplan import patterns as P
from attnplan.backends import registry
from attnplan.backends.eager.launches import launch_of
from attnplan.cost import resolve
from attnplan.ir import Attend
from attnplan.runtime import merge as merges
from attnplan.runtime.fused.gather import Gather, gather_rows
from attnplan.runtime.fused.maps import Source
from attnplan.runtime.fused.pull import PullMerge as Joined
from attnplan.runtime.fused.pull import PullSum
from tests.fused_cases import SPECS, graph_of, plan_of, spec_of
from tests.running import Call, dense_sdpa, error, every_plan, lse_error, way

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OUTPUT = {"bfloat16": 4e-3, "float16": 1e-3}


def _on_cuda():
    target = resolve("cuda")
    for name in ("eager", "flash"):
        backend = registry().get(name)
        for schedule in backend.schedules(target.device):
            if schedule.fused and not backend.missing(schedule, target):
                yield name, schedule


KERNELS = ("cudnn", "fa4")
"""Those that win; what others return lies in memory as one of theirs, and is tested on the CPU."""
TRIED = [
    ("longnet", "views", "cudnn", "float16", "bshd"),
    ("longnet", "views", "fa4", "bfloat16", "bshd"),
    ("longnet", "batch", "cudnn", "bfloat16", "bshd"),
    ("grouped", "views", "flash-cuda", "bfloat16", "bhsd"),
    ("grouped mean", "views", "cudnn", "bfloat16", "bhsd"),
    ("grouped", "views", "fa4", "bfloat16", "bshd"),
    ("grouped queries", "views", "cudnn", "bfloat16", "bshd"),
    ("grouped queries", "batch", "fa4", "bfloat16", "bhsd"),
    ("ragged", "views", "fa4", "bfloat16", "bhsd"),
    ("rows without a key", "views", "flash-cuda", "bfloat16", "bshd"),
    ("detached", "views", "fa4", "bfloat16", "bshd"),
    ("mean", "views", "cudnn", "bfloat16", "bhsd"),
]
"""Each is a few Triton kernels to compile, which takes a second each: no product of all of these."""


def _schedule(runs):
    """Return the backend and the schedule of a kernel; skip where its package is not installed."""
    for backend, schedule in _on_cuda():
        if schedule.runs == runs:
            return backend, schedule
    pytest.skip(f"{runs} is not installed")


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("name", "variant", "runs", "dtype", "layout"), TRIED)
def test_fused_plans_on_cuda(name, variant, runs, dtype, layout):
    backend, schedule = _schedule(runs)
    spec = attrs.evolve(SPECS[name], dtype=dtype, layout=layout, head_dim=64, value_dim=64)
    call = Call.of(spec, batch=2, through_lse=False, device="cuda")
    want, dense = call.expected(), dense_sdpa(call)
    floor = 1e-3 * want.out.numel() ** 0.5
    assert not registry().get(backend).refuse(graph_of(spec, variant), spec, schedule, resolve("cuda").device)
    plan = plan_of(spec, variant, schedule, backend, "cuda")
    for turn in ("first call", "a call of recorded kernels"):
        got = call.got(plan)
        assert error(got.out, want.out, floor) <= OUTPUT[dtype], turn
        if got.lse is not None:
            assert lse_error(got.lse, want.lse) <= 1e-4, turn
        for gradient in ("dq", "dk", "dv"):
            ours, anchor, exact = (getattr(n, gradient) for n in (got, dense, want))
            assert error(ours, exact, floor) <= 1.5 * max(error(anchor, exact, floor), 1e-6), f"{turn}: {gradient}"


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("runs", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_plans_repeat_what_they_gave(runs, causal):
    """The second call takes recorded kernels, and merges into the first branch's rows; it gives the same bits."""
    backend, schedule = _schedule(runs)
    pattern = P.longnet([256, 512, 1024], [1, 2, 4])
    spec = spec_of(pattern, 1024, head_dim=64, dtype="bfloat16", layout="bshd", causal=causal)
    plan = plan_of(spec, "views", schedule, backend, "cuda")
    tensors = [torch.randn(2, 1024, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    leaves = [x.requires_grad_() for x in tensors[:3]]
    first, second = (torch.autograd.grad(plan(*leaves), leaves[1:], tensors[3]) for _ in range(2))
    for x, y in zip(first, second, strict=True):  # dq is summed by atomics inside the kernels
        assert torch.equal(x, y)
    assert torch.equal(plan(*leaves), plan(*leaves))


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "bshd"), (torch.bfloat16, "bhsd")])
def test_compiled_kernels_are_the_plain_ones(dtype, layout):
    """Triton's kernels against plain torch on the same device, at sizes of many blocks."""
    spec = spec_of(P.longnet([512, 1024, 2048], [1, 2, 4]), seq_len=4000, heads=6, kv_heads=3, layout="bshd")
    graph = graph_of(spec, "batch")
    for launch in {id(x): x for x in launch_of(graph).values()}.values():
        for heads, packing in ((6, launch.q), (3, launch.k)):
            plain, turned = torch.randn(2, heads, 4000, 64), torch.randn(2, 4000, heads, 72).transpose(1, 2)
            x = (plain if layout == "bhsd" else turned).to("cuda", dtype)
            (got,) = Gather((packing,))(x)
            want = torch.empty_like(got)
            gather_rows(x, want, packing)
            assert torch.equal(got, want)
            parts = [Source(0, p, packing, i) for i, p in enumerate(packing.places)]
            lses = torch.randn(got.shape[:3], device="cuda")
            lses[0] = -torch.inf
            got[0] = 0
            join = Joined(parts, disjoint=False)
            out, lse = join(x, [got], [lses])
            exact, exact_lse = merges.merge(
                x.double(), [p.double() for p in join.parts([got])], join.parts([lses.double()]),
                [p.place for p in parts],
            )  # fmt: skip
            assert lse_error(lse, exact_lse) < 1e-6
            assert error(out, exact) < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
            total = PullSum(parts, [1.0] * len(parts))(x, [got])
            again = PullSum(parts, [1.0] * len(parts))(x, [got])
            assert torch.equal(total, again)


def _captured(plan, inputs):
    """Return a CUDA graph of one call, and what it writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            plan(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan(*inputs)
    return graph, out


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["views", "batch"])
def test_plans_are_captured_in_cuda_graphs_and_never_wait(variant):
    spec = spec_of(P.longnet([128, 256, 512], [1, 2, 4]), seq_len=512, head_dim=64, dtype="bfloat16", layout="bshd")
    tensors = [torch.randn(2, 512, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    for backend, schedule in _on_cuda():
        if schedule.runs not in KERNELS:
            continue
        plan = plan_of(spec, variant, schedule, backend, "cuda")
        want = plan(*tensors[3:])
        graph, out = _captured(plan, tensors[:3])
        for x, y in zip(tensors[:3], tensors[3:], strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want), schedule.name
        try:
            torch.cuda.set_sync_debug_mode("error")
            plan(*tensors[:3])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.gpu
def test_the_search_offers_fused_plans_on_cuda():
    spec = spec_of(P.longnet([128, 256, 512], [1, 2, 4]), seq_len=512, head_dim=64, dtype="bfloat16", causal=True)
    found = {p.strategy: p for p in every_plan(spec, "cuda")}
    for strategy in ("lattice-views", "lattice-batch"):
        found[strategy].verify()
        assert strategy in way(found[strategy])
        assert any(op.launch is not None for _, op in found[strategy].graph.of(Attend)) == (strategy == "lattice-batch")
    assert attnplan.compile(spec, device="cuda").strategy in found
