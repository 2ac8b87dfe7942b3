"""Our own kernels, run by Triton's interpreter on the CPU, against plain torch and the float64 oracle."""

from __future__ import annotations

from unittest import mock

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnplan import patterns as P
from attnplan.backends.eager import FLASH_CPU
from attnplan.backends.eager.emit import emit
from attnplan.backends.eager.launches import launch_of
from attnplan.ir import Axis, RowMap
from attnplan.runtime import merge as merges
from attnplan.runtime.fused.gather import Gather, gather_rows
from attnplan.runtime.fused.maps import Packing, Source
from attnplan.runtime.fused.pull import PullMerge as Joined
from attnplan.runtime.fused.pull import PullSum
from tests.fused_cases import (
    SPECS,
    VARIANTS,
    graph_of,
    interpreted,  # noqa: F401  # a fixture
    parts_with_extremes,
    plan_of,
    spec_of,
)
from tests.running import TOLERANCES, Call, assert_agree, error, lse_error

INTERPRETED = {
    "grouped queries": "batch",
    "unlike offsets in a group": "batch",
    "rows without a key": "views",
    "mean": "batch",
    "detached": "batch",
}


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.usefixtures("interpreted")
def test_triton_in_float32(name):
    spec = attrs.evolve(SPECS[name], dtype="float32", layout="bshd" if len(name) % 2 else "bhsd", batch=1)
    call, plan = Call.of(spec), plan_of(spec, INTERPRETED[name])
    with (
        mock.patch.object(merges, "merge", side_effect=AssertionError("plain torch ran")),
        mock.patch.object(merges, "weighted_sum", side_effect=AssertionError("plain torch ran")),
    ):
        assert_agree(call.got(plan), call.expected(), TOLERANCES["float32"], name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.usefixtures("interpreted")
def test_triton_everywhere(name, variant, layout):
    spec = attrs.evolve(SPECS[name], dtype="float32", layout=layout)
    call = Call.of(spec, batch=2)
    assert_agree(call.got(plan_of(spec, variant)), call.expected(), TOLERANCES["float32"], variant)


@pytest.mark.parametrize("features", [(8, 8), (24, 40), (1, 3)])
@pytest.mark.usefixtures("interpreted")
def test_gathers_of_any_width(features):
    """Widths that are no power of two, tensors of unlike widths and strides, and rows that end inside a block."""
    graph = graph_of(spec_of(P.longnet([6, 18], [1, 2]), seq_len=33, heads=3), "batch")
    launch = next(iter(launch_of(graph).values()))
    gather = Gather([launch.q] * 3 + [launch.k] * 2 + [launch.q] * 2)
    tall, wide = features
    tensors = [torch.randn(2, 3, 33, n) for n in (tall, wide, tall, wide, tall)]
    tensors[1] = torch.randn(2, 33, 3, wide).transpose(1, 2)
    flat = torch.randn(2, 3, 33)
    got = gather(tensors[0], None, *tensors[1:4], tensors[4], flat)
    assert got[1] is None
    for i, x in zip((0, 2, 3, 4, 5), tensors, strict=True):
        want = torch.empty_like(got[i])
        gather_rows(x, want, gather.packings[i])
        assert torch.equal(got[i], want)
    assert torch.equal(got[6], Gather(gather.packings[6:])(flat.unsqueeze(-1))[0].squeeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("interpreted")
def test_the_pull_kernel_guards_extreme_rows(dtype):
    places, outs, lses = parts_with_extremes()
    q = torch.zeros(2, 2, 19, 8, dtype=dtype)
    sources = [Source(i, p) for i, p in enumerate(places)]
    got, lse = Joined(sources, disjoint=False)(q, [x.to(dtype) for x in outs], lses)
    want, want_lse = merges.merge(q.double(), [x.to(dtype).double() for x in outs], [x.double() for x in lses], places)
    assert got.dtype == dtype
    assert lse.dtype == torch.float32
    assert bool(torch.isfinite(got).all())
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    assert bool((want_lse == -torch.inf).any()), "no row of this test is empty"
    assert bool((got[want_lse == -torch.inf] == 0).all())
    assert error(got, want) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    assert lse_error(lse, want_lse) < 1e-6


@pytest.mark.usefixtures("interpreted")
def test_a_row_of_one_part_is_that_part_bit_for_bit():
    place = (0, 1, ((2, 1, 0), (5, 0, 3)))
    out, lse = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5) * 40
    got, got_lse = Joined([Source(0, place)], disjoint=True)(torch.zeros(1, 2, 16, 16), [out], [lse])
    assert torch.equal(got[:, :, 1:15:3], out)
    assert torch.equal(got_lse[:, :, 1:15:3], lse)
    assert bool((got[:, :, 0:16:3] == 0).all())


@pytest.mark.usefixtures("interpreted")
def test_gradients_are_weighted_and_summed_in_float32():
    places, outs, _ = parts_with_extremes()
    like = torch.zeros(2, 2, 19, 8, dtype=torch.bfloat16)
    sources, weights = [Source(i, p) for i, p in enumerate(places)], [0.5, 1.0, 3.0]
    parts = [x.bfloat16() for x in outs]
    got = PullSum(sources, weights)(like, parts)
    want = merges.weighted_sum(like.double(), [x.double() for x in parts], weights, places)
    assert got.dtype == torch.bfloat16
    assert error(got, want) < 4e-3
    exact = PullSum(sources, weights)(like.float(), [x.float() for x in parts])
    assert error(exact, want) < 1e-7


@pytest.mark.usefixtures("interpreted")
def test_results_with_any_strides():
    """Kernels lay their results out as they like; tables follow, and are kept for each layout."""
    places, outs, lses = parts_with_extremes()
    join = Joined([Source(i, p) for i, p in enumerate(places)], disjoint=False)
    q = torch.zeros(2, 19, 2, 8).transpose(1, 2)
    first = join(q, outs, lses)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in outs]
    apart = [torch.stack([x, x], -1)[..., 0] for x in turned]  # features that lie apart
    shifted = []  # tensors that do not begin at a multiple of the unit of offsets
    for i, x in enumerate(outs):
        shifted.append(torch.empty(x.numel() + i)[i:].view(x.shape).copy_(x))
    for parts in (turned, apart, shifted):
        for a, b in zip(join(q, parts, [x.mT.contiguous().mT for x in lses]), first, strict=True):
            assert torch.equal(a, b)
    assert first[0].stride() == q.stride()
    assert len(join._tables) > 1


@pytest.mark.parametrize("features", [1, 40, 72])
@pytest.mark.usefixtures("interpreted")
def test_pulls_of_any_width(features):
    places, outs, lses = parts_with_extremes()
    outs = [torch.randn(*x.shape[:-1], features).masked_fill(x[..., :1] == 0, 0) for x in outs]
    q = torch.zeros(2, 2, 19, 128)[..., :features]
    got, lse = Joined([Source(i, p) for i, p in enumerate(places)], disjoint=False)(q, outs, lses)
    want, want_lse = merges.merge(q.double(), [x.double() for x in outs], [x.double() for x in lses], places)
    assert error(got, want) < 1e-6
    assert lse_error(lse, want_lse) < 1e-6


@pytest.mark.usefixtures("interpreted")
def test_a_dispatch_mode_sees_operators_of_torch():
    """What looks at a program has to see what runs: there the kernels are plain torch."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    spec = attrs.evolve(SPECS["longnet"], dtype="float32")
    call, plan = Call.of(spec, batch=2), plan_of(spec, "batch")
    want = plan(*call.inputs)
    with Watch():
        got = plan(*call.inputs)
    assert error(got, want.double()) < 1e-6
    assert any("copy_" in name for name in seen)


def parts_with_a_base(layout, dtype=torch.float32, features=8):
    """Return a part that holds every row of 2 heads, as a kernel may lay it out, and two that hold some."""
    places = [
        (0, 0, ((2, 1, 0), (3, 0, 6), (6, 0, 1))),
        (0, 1, ((2, 1, 1), (3, 0, 6), (2, 0, 3))),
        (1, 4, ((1, 0, 0), (4, 0, 4))),
    ]
    sources = [
        Source(0, places[0], Packing((places[0],), ((1,),), ((0,),))),
        Source(1, places[1]),
        Source(2, places[2]),
    ]
    draw = torch.Generator().manual_seed(3)
    base = torch.randn(6, 6, 2, features, generator=draw).to(dtype).transpose(1, 2)  # [B * segments, H, R, D]
    base = base if layout == "bshd" else base.contiguous()
    some = [torch.randn(2, *(n for n, _, _ in p[2]), features, generator=draw).to(dtype) for p in places[1:]]
    lses = [torch.randn(x.shape[:-1], generator=draw) * 30 for x in (base, *some)]
    lses[1][0, 0, 0] = -torch.inf
    some[0][0, 0, 0] = 0
    return places, sources, [base, *some], lses


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_merged_into_the_one_that_holds_every_row(dtype):
    """Where that lies in memory as the whole does. Its other rows are neither read nor written."""
    places, sources, outs, lses = parts_with_a_base("bshd", dtype)
    q = torch.zeros(2, 18, 2, 8, dtype=dtype).transpose(1, 2)
    outs[0][:, 0, 0] = -0.0  # the sum of a row that is written begins with 0, and would be 0
    want, want_lse = Joined(sources, disjoint=False)(q, outs, lses)
    join = Joined(sources, disjoint=False, base=0)
    before = outs[0].clone()
    got, lse = join(q, outs, lses)
    assert got.untyped_storage().data_ptr() == outs[0].untyped_storage().data_ptr()
    assert torch.equal(got, want)
    assert torch.equal(lse, want_lse)
    held = {(h, r) for p in places[1:] for h, r in RowMap(p[0], p[1], tuple(Axis(*a) for a in p[2])).elements()}
    alone = [(h, r) for h in range(2) for r in range(18) if (h, r) not in held]
    assert 0 < len(alone) < 36
    rows = before.unflatten(0, (2, 3)).transpose(1, 2).flatten(2, 3)
    for head, row in alone:
        assert torch.equal(got[:, head, row], rows[:, head, row])
        assert torch.equal(got[:, head, row].signbit(), rows[:, head, row].signbit()), "it was written"
    exact, _ = merges.merge(
        q.double(),
        [x.double() for x in join.parts([before, *outs[1:]])],
        [x.double() for x in join.parts(lses)],
        places,
    )
    assert error(got, exact) < (4e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.usefixtures("interpreted")
def test_gradients_are_added_to_the_one_of_every_row():
    _, sources, outs, _ = parts_with_a_base("bshd", torch.bfloat16)
    x = torch.zeros(2, 18, 2, 8, dtype=torch.bfloat16).transpose(1, 2)
    want = PullSum(sources, [1.0] * 3)(x, outs)
    for weights, shared in (([2.0, 1.0, 1.0], False), ([1.0, 1.0, 1.0], True)):
        got = PullSum(sources, weights, 0)(x, outs)
        assert (got.untyped_storage().data_ptr() == outs[0].untyped_storage().data_ptr()) == shared
    assert torch.equal(got, want)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("why", ["layout", "dtype", "alignment", "weights", "another layout of the whole"])
def test_what_does_not_lie_as_the_whole_does_is_left_as_it_is(why):
    _, sources, outs, lses = parts_with_a_base("bhsd" if why == "layout" else "bshd")
    if why == "alignment":
        outs[0] = torch.empty(outs[0].numel() + 4)[4:].as_strided(outs[0].shape, outs[0].stride()).copy_(outs[0])
    dtype = torch.bfloat16 if why == "dtype" else torch.float32
    q = torch.zeros(2, 18, 2, 8, dtype=dtype).transpose(1, 2)
    q = q.contiguous() if why == "another layout of the whole" else q
    weights = [0.5, 0.25, 0.25] if why == "weights" else None
    before = outs[0].clone()
    want, want_lse = Joined(sources, disjoint=False, weights=weights)(q, outs, lses)
    got, lse = Joined(sources, disjoint=False, weights=weights, base=0)(q, outs, lses)
    assert torch.equal(outs[0], before)
    assert torch.equal(got, want)
    assert weights is not None or torch.equal(lse, want_lse)


def test_the_base_is_a_part_of_every_row_alone_in_its_tensor():
    def bases(name, variant, pattern=None):
        spec = SPECS[name] if pattern is None else spec_of(pattern)
        program = emit(graph_of(spec, variant), spec, FLASH_CPU, "cpu")
        modules = [*program.forward.named_modules(), *program.backward.named_modules()]
        return {key.split("_")[-1] if "_d" in key else "out": m.base for key, m in modules if key.startswith("pull")}

    assert bases("longnet", "views") == {"out": 0, "dq": 0, "dk": 0, "dv": 0}
    assert bases("longnet", "copied") == {"out": 0, "dq": 0, "dk": 0, "dv": 0}
    assert bases("longnet", "batch") == {"out": None, "dq": None, "dk": None, "dv": None}, "not alone"
    assert bases("grouped", "views") == {"out": None, "dq": None, "dk": None, "dv": None}, "not every head"
    assert bases("detached", "views")["out"] is None, "its backward needs each branch's output"
    assert bases("", "views", P.longnet([16, 32], [2, 4])) == {"out": None, "dq": None, "dk": None, "dv": None}
