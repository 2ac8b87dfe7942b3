"""Lattices of the ``compiled`` backend: what Inductor fuses around torch's kernels, in a plan and in a user's graph."""

import itertools
import re
from weakref import WeakValueDictionary

import attrs
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import attnplan
from attnplan import AttentionSpec, Dim, NoBackendError, SpecError
from attnplan import patterns as P
from attnplan.backends.compiled import emit
from attnplan.backends.eager.places import place
from attnplan.ir import Axis, RowMap, Take
from attnplan.runtime import compiling, lattice_programs, lattices, views
from tests.running import TOLERANCES, Call

S = 75
SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Leave room for lattices in traces, whatever plans of other tests live."""
    torch._dynamo.reset()
    monkeypatch.setattr(lattice_programs, "_taken_up", WeakValueDictionary())


def spec_of(pattern, **options):
    given = {"seq_len": S, "heads": 4, "head_dim": 16, "causal": True, "dtype": "float64", **options}
    return AttentionSpec(pattern=pattern, **given)


def plan_of(pattern, **options):
    attnplan.cache_clear()
    plan = attnplan.compile(spec_of(pattern, **options), backend="compiled")
    assert plan.schedule == "sdpa"
    return plan


LONGNET = P.longnet([16, 32, 64], [1, 2, 4])
THREE = [P.segments(16), P.dilated(32, 2), P.full()]
CASES = {
    "longnet": (LONGNET, {}),
    "heads that share keys": (LONGNET, {"kv_heads": 2}),
    "heads that share keys and offsets": (P.longnet([16, 32, 64], [1, 2, 4], offset="block"), {"kv_heads": 2}),
    "heads that no rate divides": (LONGNET, {"heads": 5}),
    "grouped": (P.grouped([16, 32], [1, 2]), {}),
    "mean": (P.mix(THREE, rule="mean"), {}),
    "weighted sum": (P.mix(THREE, rule="sum", weights=[0.5, 2, 1]), {}),
    "lse-detached": (P.mix(THREE, rule="lse-detached"), {}),
    "rows without a key": (P.dilated(16, 2), {"layout": "bshd"}),
    "not causal": (LONGNET, {"causal": False}),
    "float32": (LONGNET, {"dtype": "float32", "layout": "bshd"}),
}


@pytest.mark.parametrize("name", CASES)
def test_lattices_agree_with_float64_forward_and_backward(name):
    pattern, options = CASES[name]
    plan = plan_of(pattern, **options)
    call = Call.of(plan.spec, batch=2)
    expected, got = call.expected(), call.got(plan)
    for (what, a), (_, b) in zip(expected.items(), got.items(), strict=True):
        error = (b.double() - a).norm() / a.norm()
        assert error.item() <= TOLERANCES[plan.spec.dtype], (name, what)


PLACES = [
    RowMap(0, 0, (Axis(4, 1), Axis(4, 0, 16), Axis(16, 0, 1))),
    RowMap(0, 0, (Axis(2, 2), Axis(2, 1), Axis(4, 0, 16), Axis(16, 0, 1))),
    RowMap(1, 65, (Axis(2, 2), Axis(5, 0, 2))),
    RowMap(0, 3, (Axis(3, 1), Axis(2, 0, 36), Axis(9, 0, 4))),  # the last segment ends ahead of the last row
    RowMap(2, 5, (Axis(2, 1), Axis(2, 0, 36), Axis(9, 0, 4))),  # and so far ahead that it is cut from others
    RowMap(0, 0, (Axis(2, 2, 0), Axis(2, 1, 1), Axis(2, 0, 32), Axis(16, 0, 2))),
    RowMap(0, 0, (Axis(2, 2, 2), Axis(2, 1, 1), Axis(16, 0, 4))),
    RowMap(3, 74, (Axis(1, 1, 1), Axis(1, 0, 4))),
    RowMap(1, 70, (Axis(5, 0, 1),)),
]


@pytest.mark.parametrize("rows", PLACES, ids=str)
def test_rows_are_taken_and_found_again_where_the_map_says(rows):
    place = (rows.head, rows.row, tuple((a.size, a.head, a.row) for a in rows.axes))
    x = torch.arange(4 * S, dtype=torch.float64).reshape(1, 4, S, 1) + 1
    taken = lattices.take(x, place)
    assert torch.equal(taken, views.rows(x, *place))
    walk = lattices.where_of(place, torch.arange(4).unsqueeze(1), torch.arange(S))
    back = torch.where(walk[1].unsqueeze(-1), lattices._pulled(taken, walk), 0)
    expected = torch.zeros_like(x)
    for head, row in rows.elements():
        expected[0, head, row] = x[0, head, row]
    assert torch.equal(back, expected)


def test_segments_are_slices_and_no_index():
    place = (0, 0, ((4, 1, 0), (4, 0, 16), (16, 0, 1)))
    x = torch.zeros(1, 4, S, 8)
    assert lattices.take(x, place).data_ptr() == x.data_ptr()


class Layer(nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.plan, self.mix = plan, nn.Linear(16, 16, dtype=getattr(torch, plan.spec.dtype))

    def forward(self, q, k, v, return_lse=False):
        found = self.plan(self.mix(q), k, v, return_lse=return_lse)
        return (found[0] * 2, found[1]) if return_lse else (found * 2,)


def inputs(dtype=torch.float64, batch=2):
    return tuple(torch.randn(batch, 4, R, 16, dtype=dtype, requires_grad=True) for _ in range(3))


def same(compiled, layer, given, **options):
    got, expected = compiled(*given, **options), layer(*given, **options)
    flow = [torch.randn_like(x) for x in expected]
    gradients = (torch.autograd.grad(x, given, flow) for x in (got, expected))
    for a, b in zip((*got, *next(gradients)), (*expected, *next(gradients)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


SMALL = P.longnet([8, 16], [1, 2])
"""Two parts, where :data:`R` rows are whole segments."""
R = 32


@pytest.mark.parametrize("rule", ["lse", "mean", "lse-detached"])
def test_a_trace_takes_a_lattice_up_whole(rule):
    branches = [P.segments(8), P.dilated(16, 2)]
    layer = Layer(plan_of(SMALL if rule == "lse" else P.mix(branches, rule=rule), seq_len=R))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    same(compiled, layer, inputs())
    if rule == "lse":
        same(compiled, layer, inputs(), return_lse=True)
    if rule == "mean":
        with pytest.raises((SpecError, torch._dynamo.exc.Unsupported), match="no one LSE under mix='mean'"):
            torch.compile(layer, fullgraph=True, backend="eager")(*inputs(), return_lse=True)
    assert counter.frame_count == 1 + (rule == "lse")
    text = "".join(graph.print_readable(print_output=False) for graph in counter.graphs)
    assert "attnplan.planned" not in text
    assert "_scaled_dot_product_flash_attention_for_cpu" in text


def test_equal_lattices_in_twelve_layers_are_one_graph():
    counter, given = CompileCounterWithBackend("eager"), inputs()
    plans = [plan_of(SMALL, seq_len=R, batch=batch) for batch in range(1, 13)]
    for plan in plans:
        layer = Layer(plan)
        expected = layer(*given)[0]
        layer.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(layer(*given)[0], expected, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 1


def test_different_lattices_in_twelve_layers_stay_within_the_limit():
    """A graph for each lattice that is taken up, and one for all others, which are one operator."""
    counter, given = CompileCounterWithBackend("eager"), tuple(x.detach() for x in inputs())
    plans = [plan_of(P.segments(width), seq_len=R) for width in range(4, 16)]
    for plan in plans:
        layer = Layer(plan)
        expected = layer(*given)[0]
        layer.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(layer(*given)[0], expected, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == lattice_programs.MOST_TAKEN_UP + 1
    assert attnplan.compile_report().lattices == lattice_programs.MOST_TAKEN_UP


def test_a_place_is_free_again_when_no_plan_needs_it():
    recipes = [lattices.Recipe("flash-cpu", (lattices.Part((0, n, ()), (0, n, ()), True, 1.0),)) for n in range(6)]
    held = [lattice_programs.taken_up(r) for r in recipes[:4]]
    assert None not in held
    assert lattice_programs.taken_up(recipes[4]) is None
    assert lattice_programs.taken_up(recipes[1]) is held[1]
    del held[2]
    assert lattice_programs.taken_up(recipes[5]) is not None


def test_a_lattice_is_exported_with_its_operators():
    layer, given = Layer(plan_of(SMALL, seq_len=R)), tuple(x.detach() for x in inputs())
    exported = torch.export.export(layer, given, strict=True).module()
    torch.testing.assert_close(exported(*given)[0], layer(*given)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("pattern", "options", "reason"),
    [
        (LONGNET, {"softcap": 2.0}, "no softcap"),
        (LONGNET, {"dropout": 0.1}, "dropout masks that depend on the plan"),
        (LONGNET, {"seq_len": Dim("s", max=64), "kv_len": Dim("s", max=64)}, "each length would be compiled by itself"),
        (LONGNET, {"sink_logits": True}, "take no data with a call, the spec has sink_logits"),
        (P.mix([P.segments(16) & P.window(3), P.dilated(32, 2)]), {}, "needs a mask for"),
        (P.window(9), {}, "takes none apart"),
    ],
)
def test_what_is_no_lattice_is_refused_with_the_reason(pattern, options, reason):
    spec = spec_of(pattern, **options)
    found = attnplan.search.candidates(spec, attnplan.cost.resolve("cpu"))
    reasons = [" ".join(c.reasons) for c in found if c.schedule == "sdpa" and c.strategy in ("dense", "lattice")]
    assert any(reason in text for text in reasons), reasons


@pytest.mark.parametrize("kernel", ["cudnn", "flash-cuda"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernels_of_a_gpu_take_the_shapes_of_a_lattice(kernel, kv_heads):
    """Operators on meta tensors check what they are given, and compute nothing."""
    spec = spec_of(LONGNET, dtype="bfloat16", kv_heads=kv_heads)
    (graph,) = (x.graph for x in attnplan.search.lowerings(spec) if x.strategy == "lattice")
    recipe = emit.recipe(graph, kernel)
    q, k = (torch.empty(2, h, S, 16, device="meta", dtype=torch.bfloat16) for h in (4, kv_heads))
    out, lse = lattices.forward(q, k, k, recipe)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)
    for grad_lse in (None, lse):
        found = lattices.backward(out, grad_lse, q, k, k, out, lse, (), recipe)
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (q, k, k)]


def test_a_gpu_offers_two_kernels_and_says_that_they_are_untested():
    spec = spec_of(LONGNET, dtype="bfloat16", head_dim=64)
    plan = attnplan.compile(spec, device="h100", backend="compiled")
    assert plan.schedule in ("sdpa-cudnn", "sdpa-flash")
    with pytest.raises(NoBackendError, match="takes float16 and bfloat16"):
        attnplan.compile(attrs.evolve(spec, dtype="float32"), device="h100", backend="compiled")


@pytest.mark.slow
def test_inductor_fuses_what_stands_around_the_kernels():
    """One kernel takes the rows of q, k and v of a part; one is the join, its LSE, and what the model does with it."""
    from torch._inductor.utils import run_and_get_code

    spec = spec_of(LONGNET, seq_len=128, dtype="float32")
    plan = attnplan.compile(spec, backend="compiled")
    given = tuple(torch.randn(1, 128, 4, 16).transpose(1, 2) for _ in range(3))
    gate = torch.randn(1, 128, 64)

    def block(q, k, v):
        return plan(q, k, v).transpose(1, 2).flatten(2) * torch.sigmoid(gate) + gate

    with torch.no_grad():
        expected = block(*given)
        got, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), *given)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    takes = [node.op.rows for node in plan.graph if isinstance(node.op, Take) and node.type.tensor == "q"]
    copied = sum(lattices._sliced(given[0], place(rows)) is None for rows in takes)
    assert (len(takes), copied) == (3, 2)
    assert len(re.findall(r"async_compile\.cpp_pybinding\(", code)) == copied + 1
    assert code.count("_scaled_dot_product_flash_attention_for_cpu.default(") == len(takes)


def traced(plan, **options):
    """Return a compiled function that calls a plan."""

    def call(*given, **operands):
        return plan(*given, **operands)

    found = torch.compile(call, fullgraph=True, **options)
    found.spec = plan.spec
    return found


@pytest.mark.slow
@pytest.mark.parametrize("taken_up", [True, False])
def test_inductor_trains_lattices_like_the_reference(taken_up, monkeypatch):
    """In a user's graph, and as programs of the plan itself behind one operator."""
    monkeypatch.setattr(lattice_programs, "MOST_TAKEN_UP", 4 if taken_up else 0)
    monkeypatch.setattr(compiling, "compiled", lambda f: torch.compile(f, dynamic=False, fullgraph=True))
    plan = plan_of(SMALL, seq_len=R, dtype="float32", kv_heads=2)
    call = Call.of(plan.spec, batch=2)
    counter = CompileCounterWithBackend("inductor")
    expected = call.expected()
    got = call.got(traced(plan, backend=counter))
    for (what, a), (_, b) in zip(expected.items(), got.items(), strict=True):
        assert ((b.double() - a).norm() / a.norm()).item() <= TOLERANCES["float32"], what
    nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert any("planned" in name for name in nodes) != taken_up


def on_gpu(kernel, device, strategy="lattice"):
    """Return a spec whose last segments are cut short, and how a schedule takes one of its graphs."""
    spec = spec_of(P.longnet([64, 128, 256], [1, 2, 4]), seq_len=300, head_dim=64, dtype="bfloat16")
    options = attnplan.search._options(spec, attnplan.cost.resolve(device), "compiled", "lattice")
    return spec, *next(o for o in options if (o[0].strategy, o[2].name) == (strategy, kernel))


@pytest.mark.parametrize("kernel", ["sdpa-cudnn", "sdpa-flash"])
def test_kernels_without_masks_take_segments_apart_that_are_cut_short(kernel):
    assert on_gpu(kernel, "h100")[-1].reasons == ()
    assert any("takes no mask" in why for why in on_gpu(kernel, "h100", "dense")[-1].reasons)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kernel", "inlined"), [*itertools.product(["sdpa-cudnn", "sdpa-flash"], [False, True])])
def test_lattices_agree_with_float64_on_cuda(kernel, inlined):
    spec, lowered, backend, schedule, candidate = on_gpu(kernel, "cuda")
    assert not candidate.reasons, candidate.reasons
    plan = attnplan.plan.Plan(spec, attnplan.cost.resolve("cuda"), attnplan.search.Found(
        lowered, candidate, backend, schedule, (candidate,)), {})  # fmt: skip
    call = Call.of(spec, batch=2, device="cuda")
    expected, got = call.expected(), call.got(traced(plan) if inlined else plan)
    for (what, a), (_, b) in zip(expected.items(), got.items(), strict=True):
        error = (b.double() - a).norm() / a.norm()
        assert error.item() <= (6e-3 if what == "out" else 2e-2), (kernel, what)
