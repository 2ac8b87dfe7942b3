"""Our own kernels: rows gathered and joined in one launch, against brute force, plain torch, and the float64 oracle.

Triton runs its kernels on the CPU under ``TRITON_INTERPRET=1``, which is how they are tested without a GPU; on a GPU
the same graphs run compiled.
"""

from __future__ import annotations

import sys
from unittest import mock

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.backends import registry
from attnplan.backends.eager import FLASH_CPU
from attnplan.backends.eager.emit import emit
from attnplan.backends.eager.launches import launch_of
from attnplan.cost import Prediction, resolve
from attnplan.ir import Attend, Axis, RowMap
from attnplan.passes import BatchBranches, Canonicalize, FuseMerge, Lattice, Pipeline, PullMerge, SplitHeads, Views
from attnplan.plan import Plan
from attnplan.runtime import merge as merges
from attnplan.runtime.fused.gather import Gather, gather_rows
from attnplan.runtime.fused.launching import Launcher
from attnplan.runtime.fused.maps import FIELDS, Packing, Source, can_pull, division, pull_table
from attnplan.runtime.fused.pull import PullMerge as Joined
from attnplan.runtime.fused.pull import PullSum, view_of
from attnplan.runtime.fused.replay import Replay
from attnplan.runtime.fused.strided import Strided
from attnplan.search import Candidate, Found, Lowered, _start, fusion_missing
from tests.running import TOLERANCES, Call, assert_agree, dense_sdpa, error, every_plan, lse_error, way

_FRONT = (Canonicalize(), SplitHeads(), Lattice())
VARIANTS = {
    "views": lambda s: (Views(s.layout, s.batch), FuseMerge(), PullMerge()),
    "batch": lambda s: (FuseMerge(), PullMerge(), BatchBranches(s.layout, s.batch)),
    "both": lambda s: (Views(s.layout, s.batch), FuseMerge(), PullMerge(), BatchBranches(s.layout, s.batch)),
    "copied": lambda s: (FuseMerge(), PullMerge(), BatchBranches(s.layout, s.batch, whole=False)),
}


def _spec(pattern, seq_len=64, heads=4, **options):
    return AttentionSpec(
        **{"batch": 2, "head_dim": 8, "seq_len": seq_len, "heads": heads, "pattern": pattern, **options}
    )


SPECS = {
    "longnet": _spec(P.longnet([16, 32, 64], [1, 2, 4])),
    "ragged": _spec(P.longnet([16, 50], [1, 3]), seq_len=83, causal=True),
    "grouped queries": _spec(P.longnet([16, 32], [1, 2]), heads=8, kv_heads=4, causal=True),
    "unlike offsets in a group": _spec(P.longnet([16, 48], [2, 3]), seq_len=75, heads=6, kv_heads=2),
    "rows without a key": _spec(P.longnet([16, 24], [4, 3]), seq_len=75, heads=3),
    "mean": _spec(P.longnet([16, 32], [1, 2], mix="mean"), causal=True),
    "detached": _spec(P.longnet([16, 32], [1, 2], mix="lse-detached"), causal=True),
    "grouped": _spec(P.grouped([8, 16, 32], [1, 2, 4]), seq_len=70, heads=7),
    "grouped mean": _spec(P.grouped([8, 16, 32], [1, 2, 4], mix="mean"), heads=7, causal=True),
    "offsets in blocks": _spec(P.longnet([16, 32], [1, 2], offset="block"), heads=6, causal=True),
    "a whole branch": _spec(P.longnet([16, 64], [2, 1]), causal=True),
}  # fmt: skip


def graph_of(spec, variant):
    """Return the graph of a spec under one variant, every pass proved."""
    return Pipeline((*_FRONT, *VARIANTS[variant](spec))).run(*_start(spec))[0]


def plan_of(spec, variant, schedule=FLASH_CPU, backend="eager", device="cpu"):
    graph, target = graph_of(spec, variant), resolve(device)
    candidate = Candidate(variant, backend, schedule.name, Prediction(0.0, 0, ()))
    lowered = Lowered("lattice", graph, ())
    return Plan(spec, target, Found(lowered, candidate, registry().get(backend), schedule, (candidate,)), {})


@pytest.fixture
def interpreted(monkeypatch):
    """Make Triton interpret its kernels, here alone; skip where it is not installed."""
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "attnplan.runtime.fused.triton_kernels", raising=False)
    yield
    sys.modules.pop("attnplan.runtime.fused.triton_kernels", None)


# ------------------------------------------------------------------------------------------------------------- row maps


@given(st.integers(1, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
def test_divisions_by_multiplication_are_exact(divisor, numbers):
    factor, shift = division(divisor)
    multiples = [n // divisor * divisor for n in numbers]
    for n in (*numbers, *multiples, *(max(0, m - 1) for m in multiples), 2**31 - 1):
        assert factor < 2**32, "the kernel multiplies 32 by 32 bits"
        assert 2 * n * factor >> 32 >> shift == n // divisor


def walk_back(table, head, row):
    """Do what the kernel does: return (tensor, offset in units) of each part that holds a (head, row)."""
    for e in range(table.entries):
        numbers = table.numbers[(head * table.entries + e) * FIELDS :][:FIELDS]
        tensor, first, n1, w, f1, h1, n2, r, f2, h2, offset, _, s1, s2 = numbers[:14]
        beyond = row - first
        ahead = max(beyond, 0)
        outer = 2 * ahead * f1 >> 32 >> h1
        rest = ahead - outer * w
        inner = 2 * rest * f2 >> 32 >> h2
        if beyond >= 0 and outer < n1 and inner < n2 and rest == inner * r:
            assert table.tensors[2 * e] <= tensor < table.tensors[2 * e + 1]
            yield tensor, offset + outer * s1 + inner * s2


PLACES = {
    "whole": (0, 0, ((3, 1, 0), (24, 0, 1))),
    "segments": (0, 0, ((3, 1, 0), (3, 0, 8), (8, 0, 1))),
    "dilated": (0, 0, ((3, 1, 1), (3, 0, 8), (2, 0, 3))),
    "some heads": (1, 2, ((2, 1, 1), (2, 0, 12), (3, 0, 4))),
    "one row": (2, 23, ((1, 0, 0),)),
    "ends early": (0, 1, ((2, 2, 0), (5, 0, 2))),
    "three axes of rows": (0, 0, ((3, 1, 0), (2, 0, 1), (2, 0, 12), (3, 0, 4))),
}


@pytest.mark.parametrize("name", PLACES)
def test_maps_are_walked_back_to_where_they_come_from(name):
    place = PLACES[name]
    rows = RowMap(place[0], place[1], tuple(Axis(n, h, r) for n, h, r in place[2]))
    assert can_pull(place)
    other = (0, 3, ((3, 1, 0), (5, 0, 4)))
    made = [torch.zeros(1, *rows.sizes, 8), torch.zeros(1, 3, 5, 8)]
    sources = [Source(0, place), Source(1, other)]
    table = pull_table(sources, [(x.stride(), x.stride()[:-1]) for x in made], 3, 24)
    found = {}
    for head in range(3):
        for row in range(24):
            for tensor, at in walk_back(table, head, row):
                if tensor == 0:
                    found[at * table.unit // 8] = (head, row)
                else:
                    assert at * table.unit // 8 == head * 5 + (row - 3) // 4
    assert table.unit == 8
    assert not table.wide
    assert [found[i] for i in range(len(found))] == list(rows.elements())


def test_offsets_beyond_32_bits_make_a_wide_table():
    place = (0, 0, ((3, 1, 0), (24, 0, 1)))
    for stride, wide in ((2**26 * 16, False), (2**27 * 16, True)):
        table = pull_table([Source(0, place)], [((0, 0, stride, 1), (1, 1, 1))], 3, 24)
        assert table.wide == wide, stride


def test_maps_that_show_a_row_twice_are_not_walked_back():
    assert not can_pull((0, 0, ((4, 0, 4), (8, 0, 1))))
    assert not can_pull((0, 0, ((4, 0, 0), (8, 0, 1))))
    assert can_pull((0, 0, ((2, 0, 16), (2, 0, 8), (2, 0, 1))))


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", SPECS)
def test_numbers_in_float64(name, layout):
    spec = attrs.evolve(SPECS[name], dtype="float64", layout=layout)
    call = Call.of(spec, batch=2)
    want = call.expected()
    for variant in VARIANTS:
        assert_agree(call.got(plan_of(spec, variant)), want, TOLERANCES["float64"], variant)


INTERPRETED = {
    "grouped queries": "batch",
    "unlike offsets in a group": "batch",
    "rows without a key": "views",
    "mean": "batch",
    "detached": "batch",
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_triton_in_float32(name, interpreted):
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
def test_triton_everywhere(name, variant, layout, interpreted):
    spec = attrs.evolve(SPECS[name], dtype="float32", layout=layout)
    call = Call.of(spec, batch=2)
    assert_agree(call.got(plan_of(spec, variant)), call.expected(), TOLERANCES["float32"], variant)


@pytest.mark.parametrize("features", [(8, 8), (24, 40), (1, 3)])
def test_gathers_of_any_width(features, interpreted):
    """Widths that are no power of two, tensors of unlike widths and strides, and rows that end inside a block."""
    graph = graph_of(_spec(P.longnet([6, 18], [1, 2]), seq_len=33, heads=3), "batch")
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


def test_a_row_of_the_buffer_is_the_row_that_the_table_says():
    graph = graph_of(SPECS["unlike offsets in a group"], "batch")
    for launch in set(launch_of(graph).values()):
        x = torch.randn(2, 6, 75, 4)
        for packing in (launch.q, launch.k):
            (made,) = Gather((packing,))(x)
            table = packing.table()
            assert len(table) * 2 == made.shape[0] * made.shape[1]
            for i, (head, first, step) in enumerate(table):
                cell, shared = divmod(i, packing.group)
                rows = torch.arange(made.shape[2]) * step + first
                for batch in range(2):
                    assert torch.equal(made[batch * len(table) // packing.group + cell, shared], x[batch, head, rows])


def parts_with_extremes():
    """Return parts over rows of 2 heads whose LSEs are huge, tiny and -inf, and rows that no part holds."""
    places = [
        (0, 0, ((2, 1, 0), (2, 0, 8), (4, 0, 2))),
        (0, 1, ((2, 1, 1), (3, 0, 4))),
        (1, 0, ((1, 0, 0), (13, 0, 1))),
    ]
    outs, lses = [], []
    for i, (_, _, axes) in enumerate(places):
        sizes = (2, *(n for n, _, _ in axes))
        outs.append(torch.randn(*sizes, 8, generator=torch.Generator().manual_seed(i)))
        lse = torch.randn(sizes, generator=torch.Generator().manual_seed(i + 9)) * 60
        lses.append(lse.masked_fill(lse.abs() < 20, -torch.inf))
        outs[-1] = outs[-1].masked_fill(lses[-1].unsqueeze(-1) == -torch.inf, 0)
    return places, outs, lses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pull_kernel_guards_extreme_rows(dtype, interpreted):
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


def test_a_row_of_one_part_is_that_part_bit_for_bit(interpreted):
    place = (0, 1, ((2, 1, 0), (5, 0, 3)))
    out, lse = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5) * 40
    got, got_lse = Joined([Source(0, place)], disjoint=True)(torch.zeros(1, 2, 16, 16), [out], [lse])
    assert torch.equal(got[:, :, 1:15:3], out)
    assert torch.equal(got_lse[:, :, 1:15:3], lse)
    assert bool((got[:, :, 0:16:3] == 0).all())


def test_gradients_are_weighted_and_summed_in_float32(interpreted):
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


def test_results_with_any_strides(interpreted):
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
def test_pulls_of_any_width(features, interpreted):
    places, outs, lses = parts_with_extremes()
    outs = [torch.randn(*x.shape[:-1], features).masked_fill(x[..., :1] == 0, 0) for x in outs]
    q = torch.zeros(2, 2, 19, 128)[..., :features]
    got, lse = Joined([Source(i, p) for i, p in enumerate(places)], disjoint=False)(q, outs, lses)
    want, want_lse = merges.merge(q.double(), [x.double() for x in outs], [x.double() for x in lses], places)
    assert error(got, want) < 1e-6
    assert lse_error(lse, want_lse) < 1e-6


def test_a_dispatch_mode_sees_operators_of_torch(interpreted):
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


def test_what_is_compiled_is_started_again_without_triton():
    """Only for the same numbers, grid and alignment."""
    bound, started = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: started.append((grid, args))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args: bound.append((grid, args)) or Compiled()

    start, cpu = Launcher(Kernel), torch.device("cpu")
    for grid, key, pointers in (((1, 1, 1), "a", 64), ((1, 1, 1), "b", 64), ((2, 1, 1), "a", 64), ((1, 1, 1), "a", 72)):
        start(grid, key, cpu, pointers, key)
    assert [(g, a) for g, a in bound] == [
        ((1, 1, 1), ("a",)),
        ((1, 1, 1), ("b",)),
        ((2, 1, 1), ("a",)),
        ((1, 1, 1), ("a",)),
    ]
    assert not started
    start((1, 1, 1), "b", cpu, 128, "b")
    start((1, 1, 1), "a", cpu, 128, "a")
    assert started == [((1, 1, 1), ("b",)), ((1, 1, 1), ("a",))]


class Interface:
    """Stands for flash-attn 4: looks its kernel up in a table, and calls it."""

    def __init__(self, *, kernels=1):
        self.kernels, self.entered, self.ran = kernels, 0, []

        def kernel(q, k, v, out, lse, scale, *rest):
            self.ran.append((q.shape, scale, rest))
            scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
            if rest[-1]:
                scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
            out.copy_(torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v))
            lse.copy_(scores.logsumexp(-1))

        def forward(q, k, v, *, softmax_scale, causal, out, lse, return_lse):
            self.entered += 1
            for _ in range(self.kernels):
                forward.compile_cache[causal](q.detach(), k, v, out, lse, softmax_scale, None, (None, None), causal)

        forward.compile_cache = {False: kernel, True: kernel}
        self.forward = forward


@pytest.mark.parametrize("kernels", [1, 2])
def test_flash_attention_4_is_started_again_without_its_host_code(kernels):
    """A call of two kernels is none that can be replayed: the interface is called each time."""
    interface = Interface(kernels=kernels)
    table, replay = interface.forward.compile_cache, Replay(interface.forward)
    for turn in range(3):
        for causal in (False, True):
            q, k, v = (torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(turn + i)) for i in range(3))
            out, lse = replay(q, k, v, 0.3, causal)
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            want = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal, scale=0.3)
            assert error(out.transpose(1, 2), want.double()) < 1e-6
            assert lse.shape == (2, 3, 5)
    assert interface.forward.compile_cache is table
    assert interface.entered == (2 if kernels == 1 else 6)
    replay(*(torch.randn(2, 5, 3, 8).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(3)), 0.3, True)
    assert interface.entered == (3 if kernels == 1 else 7), "other strides are another call"


def views_of(spec):
    """Return the launches of a spec that run on views."""
    found = launch_of(graph_of(spec, "views"), spec.layout, spec.batch)
    return [launch for launch in found.values() if launch.views]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", SPECS)
def test_rows_of_an_attend_in_four_dimensions(name, layout):
    """Each row of the view is the row that the table says; a view where strides allow, a copy where they do not."""
    spec = attrs.evolve(SPECS[name], layout=layout)
    shape = spec.shape
    for launch in views_of(spec):
        for packing, heads, length in ((launch.q, spec.heads, shape.seq_len), (launch.k, spec.kv_heads, shape.kv_len)):
            whole = torch.randn(3, length, heads, 5) if layout == "bshd" else torch.randn(3, heads, length, 5)
            whole = whole[1:]  # with an offset in its storage
            x = whole.transpose(1, 2) if layout == "bshd" else whole
            apart = torch.randn(2, heads, length + 3, 5)[:, :, :length]  # batch and heads do not nest
            for source in (x, apart):
                rows, none, flat = Strided((packing,) * 3)(source, None, source[..., 0])
                assert none is None
                assert torch.equal(flat, rows[..., 0])
                table = packing.table()
                assert rows.shape[0] * rows.shape[1] == 2 * len(table)
                for i, (head, first, step) in enumerate(table):
                    cell, inner = divmod(i, packing.group)
                    at = torch.arange(rows.shape[2]) * step + first
                    for batch in range(2):
                        got = rows[batch * len(table) // packing.group + cell, inner]
                        assert torch.equal(got, source[batch, head, at])


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_segments_of_whole_sequences_are_views_without_a_copy(layout):
    """Those of a first rate also for more batch elements than the plan was priced for."""
    spec = _spec(P.longnet([16, 32, 64], [1, 2, 4]), layout=layout, batch=1)
    launches = views_of(spec)
    assert len(launches) > 3
    for batch in (1, 2):
        x = torch.randn(batch, 4, 64, 5) if layout == "bhsd" else torch.randn(batch, 64, 4, 5).transpose(1, 2)
        for launch in launches[: 1 if batch > 1 else None]:
            (rows,) = Strided((launch.q,))(x)
            assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_a_view_of_a_part_is_what_the_kernel_wrote_for_it():
    packing = Packing(((0, 0, ((2, 1, 0), (3, 0, 2))), (1, 1, ((1, 1, 0), (3, 0, 2)))), ((0,), (0,)), ((), ()))
    made = torch.arange(2 * 3 * 3.0).reshape(6, 1, 3)  # two batch elements of three cells
    second = view_of(made, Source(0, packing.places[1], packing, 1))
    assert torch.equal(second, made.reshape(2, 3, 3)[:, 2:])


# -------------------------------------------------------------------------------------------------- plans and emission


def test_one_launch_is_one_call_of_the_kernel():
    spec = attrs.evolve(SPECS["longnet"], layout="bshd")
    forward = emit(graph_of(spec, "batch"), spec, FLASH_CPU, "cpu").forward
    names = [n.target for n in forward.graph.nodes if n.op == "call_module"]
    calls = [n for n in forward.graph.nodes if getattr(n.target, "__name__", "") == "attend"]
    assert len(calls) == 1
    assert [n.partition("_")[0] for n in names] == ["gather", "pull"]


def test_a_plan_without_triton_is_refused_with_the_reason():
    graph, cuda = graph_of(SPECS["longnet"], "views"), attrs.evolve(resolve("h100"), torch_device="cuda")
    with mock.patch("attnplan.search.import_failure", return_value="ImportError: no"):
        (reason,) = fusion_missing(graph, cuda)
        assert "Triton" in reason
        assert "ImportError: no" in reason
        assert not list(fusion_missing(graph, resolve("h100")))  # elsewhere packages are assumed present
        assert not list(fusion_missing(_start(SPECS["longnet"])[0], cuda))
    with mock.patch("attnplan.search.import_failure", return_value=None):
        assert not list(fusion_missing(graph, cuda))


def test_traced_plans_run_the_same_kernels():
    spec = attrs.evolve(SPECS["longnet"], dtype="float32")
    plan, call = plan_of(spec, "batch"), Call.of(spec, batch=2)
    plan._expose()
    compiled = torch.compile(lambda q, k, v: plan(q, k, v) * 2, fullgraph=True, backend="eager")
    assert error(compiled(*call.inputs), plan(*call.inputs).double() * 2) < 1e-6


# ----------------------------------------------------------------------------------------------------------------- GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OUTPUT = {"bfloat16": 4e-3, "float16": 1e-3}


def _on_cuda():
    target = resolve("cuda")
    for name in ("eager", "flash"):
        backend = registry().get(name)
        for schedule in backend.schedules(target.device):
            if schedule.fused and not backend.missing(schedule, target):
                yield name, schedule


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", OUTPUT)
@pytest.mark.parametrize("name", SPECS)
def test_fused_plans_on_cuda(name, dtype, layout):
    spec = attrs.evolve(SPECS[name], dtype=dtype, layout=layout, head_dim=64, value_dim=64)
    call = Call.of(spec, batch=2, through_lse=False, device="cuda")
    want, dense = call.expected(), dense_sdpa(call)
    floor = 1e-3 * want.out.numel() ** 0.5
    tried = 0
    for backend, schedule in _on_cuda():
        for variant in VARIANTS:
            if registry().get(backend).refuse(graph_of(spec, variant), spec, schedule, resolve("cuda").device):
                continue
            tried += 1
            got, what = call.got(plan_of(spec, variant, schedule, backend, "cuda")), f"{variant} {schedule.name}"
            assert error(got.out, want.out, floor) <= OUTPUT[dtype], what
            if got.lse is not None:
                assert lse_error(got.lse, want.lse) <= 1e-4, what
            for gradient in ("dq", "dk", "dv"):
                ours, anchor, exact = (getattr(n, gradient) for n in (got, dense, want))
                assert error(ours, exact, floor) <= 1.5 * max(error(anchor, exact, floor), 1e-6), f"{what}: {gradient}"
    assert tried


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_kernels_are_the_plain_ones(dtype):
    """Triton's kernels against plain torch on the same device, at sizes of many blocks, in both layouts."""
    spec = _spec(P.longnet([512, 1024, 2048], [1, 2, 4]), seq_len=4000, heads=6, kv_heads=3, layout="bshd")
    graph = graph_of(spec, "batch")
    for launch in {id(x): x for x in launch_of(graph).values()}.values():
        for heads, packing in ((6, launch.q), (3, launch.k)):
            for x in (torch.randn(2, heads, 4000, 64), torch.randn(2, 4000, heads, 72).transpose(1, 2)):
                x = x.to("cuda", dtype)
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
@pytest.mark.parametrize("variant", VARIANTS)
def test_plans_are_captured_in_cuda_graphs_and_never_wait(variant):
    spec = _spec(P.longnet([128, 256, 512], [1, 2, 4]), seq_len=512, head_dim=64, dtype="bfloat16", layout="bshd")
    tensors = [torch.randn(2, 512, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    for backend, schedule in _on_cuda():
        if schedule.name not in ("cudnn", "flash", "fa4"):
            continue
        plan = plan_of(spec, variant, schedule, backend, "cuda")
        want = plan(*tensors[3:])
        graph, out = _captured(plan, tensors[:3])
        for x, y in zip(tensors[:3], tensors[3:], strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want), schedule.name
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan(*tensors[:3])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.gpu
def test_the_search_offers_fused_plans_on_cuda():
    spec = _spec(P.longnet([128, 256, 512], [1, 2, 4]), seq_len=512, head_dim=64, dtype="bfloat16", causal=True)
    found = {p.strategy: p for p in every_plan(spec, "cuda")}
    for strategy in ("lattice-views", "lattice-batch"):
        found[strategy].verify()
        assert strategy in way(found[strategy])
        assert any(op.launch is not None for _, op in found[strategy].graph.of(Attend)) == (strategy == "lattice-batch")
    assert attnplan.compile(spec, device="cuda").strategy in found
