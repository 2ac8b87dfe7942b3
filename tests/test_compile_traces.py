"""Plans inside compiled and exported models: no graph break, few graphs, the numbers of eager."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import attnplan
from attnplan import AttentionSpec, Dim, SpecError
from attnplan import nn as modules
from attnplan import patterns as P
from attnplan.backends.compiled.emit import Inlined
from attnplan.integrations import dynamo  # noqa: F401  # exported programs read their plans by it
from attnplan.ir import Attend
from attnplan.patterns import Shape
from attnplan.runtime.flex import FlexAttend, Options

S = 64


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.plan, self.mix = plan, nn.Linear(16, 16)

    def forward(self, q, k, v, **operands):
        return self.plan(self.mix(q), k, v, **operands) * 2


def plan_of(pattern=None, causal=False, backend="auto", **options):
    given = {"seq_len": S, "heads": 4, "head_dim": 16, "dtype": "float32", **options}
    return attnplan.compile(AttentionSpec(pattern=pattern or P.full(), causal=causal, **given), backend=backend)


def inputs(seq_len=S, batch=2, kv_len=None):
    sizes = ((batch, 4, n, 16) for n in (seq_len, kv_len or seq_len, kv_len or seq_len))
    return tuple(torch.randn(s, requires_grad=True) for s in sizes)


def same(compiled, layer, given, **operands):
    """Assert that a compiled layer gives what it gives in eager, forward and backward."""
    got, expected = compiled(*given, **operands), layer(*given, **operands)
    assert torch.equal(got, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(x, given, grad) for x in (got, expected)), strict=True):
        assert torch.equal(a, b)


WAYS = {
    "one call of SDPA": lambda: plan_of(causal=True),
    "strided views": lambda: plan_of(P.longnet([16, 32], [1, 2]), causal=True),
    "branches": lambda: plan_of(P.mix([P.window(4), P.full()], rule="mean")),
    "gathered tiles": lambda: plan_of(P.window(4) | P.global_tokens(4)),
    "plain torch": lambda: plan_of(P.window(4), softcap=2.0),
    "float64": lambda: plan_of(P.window(4), backend="reference"),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_plan_traces_without_a_break(name):
    layer, counter = Layer(WAYS[name]()), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    same(compiled, layer, inputs())
    with torch.no_grad():
        assert torch.equal(compiled(*inputs()[:3]), compiled(*inputs()[:3])) is False
    assert counter.frame_count <= 2  # with and without gradients


def test_a_plan_that_is_one_call_leaves_that_call_in_the_graph():
    counter = CompileCounterWithBackend("eager")
    torch.compile(Layer(plan_of(causal=True)), fullgraph=True, backend=counter)(*inputs())
    targets = [n.target for n in counter.graphs[0].graph.nodes]
    assert torch.nn.functional.scaled_dot_product_attention in targets


def test_twelve_plans_in_twelve_layers_are_one_graph():
    counter, given = CompileCounterWithBackend("aot_eager"), inputs()
    layers = [Layer(plan_of(P.window(n), causal=True)) for n in range(1, 13)]
    for layer in layers:
        eager = layer(*given)
        layer.compile(fullgraph=True, backend=counter)
        assert torch.equal(layer(*given), eager)
    assert counter.frame_count == 1


def test_layers_compile_one_graph_for_each_structure():
    counter, given = CompileCounterWithBackend("aot_eager"), inputs()
    specs = [{"causal": n % 2 == 0, "batch": n + 1} for n in range(12)]
    for options in specs:
        layer = Layer(plan_of(**options))
        eager = layer(*given)
        layer.compile(fullgraph=True, backend=counter)
        assert torch.equal(layer(*given), eager)
    assert counter.frame_count == 2


@pytest.mark.parametrize("pattern", [P.full(), P.window(8), P.longnet([16, 32], [1, 2])], ids=repr)
@pytest.mark.parametrize(("dynamic", "most"), [(None, 2), (True, 1)])
def test_five_batch_sizes_and_five_lengths_are_two_graphs(pattern, dynamic, most):
    length = Dim("s", max=128)
    layer, counter = Layer(plan_of(pattern, causal=True, seq_len=length, kv_len=length)), None
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    for i in range(5):
        for j in range(5):
            same(compiled, layer, inputs(40 + 8 * i + j, batch=2 + (i + j) % 5))
    assert counter.frame_count <= most


def test_new_documents_padding_and_offsets_are_no_new_graph():
    cases = (
        (plan_of(P.documents(), causal=True), S, lambda n: {"documents": torch.tensor([0, n, S])}),
        (plan_of(P.padding()), S, lambda n: {"key_padding": torch.arange(S).expand(2, -1) < n}),
        (plan_of(P.window(5), seq_len=1, kv_len=S, q_offset=True), 1, lambda n: {"q_offset": torch.tensor(n)}),
    )
    for plan, rows, operands in cases:
        layer, counter = Layer(plan), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for n in (3, 9, 30):
            same(compiled, layer, inputs(rows, kv_len=S), **operands(n))
        assert counter.frame_count == 1, plan


@pytest.mark.parametrize("name", ["one call of SDPA", "strided views", "plain torch"])
def test_the_lse_has_gradients_in_a_compiled_function(name):
    plan, given = WAYS[name](), inputs()

    def function(q, k, v):
        out, lse = plan(q, k, v, return_lse=True)
        return out.sum() + lse.sin().sum()

    got, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(*given), function(*given)
    for a, b in zip(*(torch.autograd.grad(x, given) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_views_that_begin_inside_their_storage_are_traced():
    plan = plan_of(P.longnet([16, 32], [1, 2]), layout="bshd")
    packed = torch.randn(2, S + 3, 3, 4, 16)

    def function(x):
        return plan(*x[:, 3:].unbind(2))

    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(packed), function(packed))


def test_a_call_that_does_not_fit_raises_as_in_eager():
    compiled = torch.compile(plan_of(causal=True), fullgraph=True, backend="aot_eager")
    with pytest.raises(SpecError, match="the spec needs"):
        compiled(*inputs(seq_len=S + 1))
    other = torch.compile(lambda *given: plan_of_documents(*given), fullgraph=True, backend="aot_eager")
    plan_of_documents = plan_of(P.documents())
    with pytest.raises(SpecError, match="needs documents with each call"):
        other(*inputs())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("pattern", [P.full(), P.window(8), P.longnet([16, 32], [1, 2])], ids=repr)
def test_exported_programs_hold_their_plans(pattern, strict):
    layer = Layer(plan_of(pattern, causal=True))
    given = tuple(x.detach() for x in inputs())
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, given, strict=strict), file)
    attnplan.cache_clear()  # what is loaded reads its plan from its own text
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(*given), layer(*given))


def test_a_plan_of_a_python_function_is_not_exported():
    layer = Layer(plan_of(P.mask(lambda h, q, k: (q - k) % 3 == 0)))
    with pytest.raises(SpecError, match="function"):
        torch.export.export(layer, tuple(x.detach() for x in inputs()), strict=False)


def test_copies_of_a_model_share_its_plans():
    layer = Layer(plan_of(P.window(8)))
    assert copy.deepcopy(layer).plan is layer.plan


def test_warmup_does_what_the_first_call_would():
    made = plan_of(P.window(7) | P.global_tokens(2))
    assert made._program is None
    assert made.warmup(backward=True) is made
    assert made._program is not None
    with pytest.raises(attnplan.NoBackendError, match="not here"):
        attnplan.compile(made.spec, device="h100").warmup()
    documents = plan_of(P.documents() & P.padding(), layout="bshd")
    assert documents.warmup(3)._program is not None


@pytest.mark.slow
def test_inductor_takes_plans_into_its_graphs():
    for name in ("one call of SDPA", "strided views"):
        layer, given = Layer(WAYS[name]()), inputs()
        got, expected = torch.compile(layer, fullgraph=True)(*given), layer(*given)
        torch.testing.assert_close(got, expected)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), given) for x in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)


class Flex(nn.Module):
    """What a plan is to a trace on CUDA, here on the CPU."""

    def __init__(self, width):
        super().__init__()
        options = Options((S, S), (16, 16), 0.25, None, False)
        self.inlined = Inlined(FlexAttend(P.window(width) & P.causal(), Shape(S, S, 4), 0, options, "cpu"))

    def forward(self, q, k, v):
        return self.inlined(q, k, v, {}, False)[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_twelve_flex_plans_are_taken_up_whole_as_one_graph():
    counter, given = CompileCounterWithBackend("eager"), tuple(x.detach() for x in inputs())
    for width in range(1, 13):
        layer = Flex(width)
        layer.compile(fullgraph=True, backend=counter)
        expected = plan_of(P.window(width), causal=True)(*given)
        torch.testing.assert_close(layer(*given), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    assert any("flex_attention" in str(n.target) for n in counter.graphs[0].graph.nodes)


@pytest.mark.slow
def test_flex_plans_run_in_compiled_layers_by_inductor():
    counter, given = CompileCounterWithBackend("inductor"), tuple(x.detach() for x in inputs())
    layers = [Layer(plan_of(P.window(n), causal=True, backend="compiled")) for n in range(1, 13)]
    with torch.no_grad():
        for n, layer in enumerate(layers, start=1):
            layer.compile(fullgraph=True, backend=counter)
            expected = plan_of(P.window(n), causal=True)(layer.mix(given[0]), *given[1:]) * 2
            torch.testing.assert_close(layer(*given), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_flex_plans_train_in_compiled_layers_where_flex_has_no_backward():
    layer, given = Layer(plan_of(P.window(9), causal=True, backend="compiled")), inputs()
    other = Layer(plan_of(P.window(9), causal=True))
    other.mix = layer.mix
    got, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given), other(*given)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), given) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_is_captured_in_a_cuda_graph():
    plan = attnplan.compile(
        AttentionSpec(
            seq_len=256, heads=4, head_dim=64, causal=True, dtype="bfloat16", pattern=P.longnet([64, 128], [1, 2])
        )
    ).warmup(1)
    given = [torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = plan(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan(*given)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected)


def test_the_profiler_names_the_ops_of_a_plan():
    plan, given = WAYS["strided views"](), inputs()
    expected = plan(*given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = plan(*given)
        out.sum().backward()
    assert torch.equal(out, expected)
    names = {event.key for event in profile.key_averages()}
    attends = [node.id for node, _ in plan.graph.of(Attend)]
    assert {f"attnplan: %{n} {what}" for n in attends for what in ("attend", "attend_backward")} <= names


def test_the_report_counts_graphs_and_says_why_there_are_several():
    before = attnplan.compile_report()

    def thrice(x):
        return x.sin()

    compiled = torch.compile(thrice, backend="eager", dynamic=False)
    for n in (2, 3, 4):
        compiled(torch.zeros(n))
    found = attnplan.compile_report()
    assert found.graphs - before.graphs == 3
    (where, (count, why)), *_ = [x for x in found.recompiles.items() if "thrice" in x[0]]
    assert count == 3
    assert "size mismatch" in why
    assert where in str(found)


# ------------------------------------------------------------------------- calls and modules whose plan is found later


class Calls(nn.Module):
    def __init__(self, pattern, **options):
        super().__init__()
        self.pattern, self.options = pattern, options

    def forward(self, q, k, v, **operands):
        return attnplan.attention(q * 2, k, v, self.pattern, **self.options, **operands) * 2


def test_one_call_traces_without_a_break_and_keeps_its_pattern():
    counter, given = CompileCounterWithBackend("aot_eager"), inputs()
    layers = [
        Calls(P.window(5), causal=True), Calls(P.window(9), causal=True), Calls(P.window(9)), Calls(None, softcap=2.0),
        Calls(P.longnet([16, 32], [1, 2]), causal=True), Calls(P.mix([P.window(4), P.full()], rule="mean")),
    ]  # fmt: skip
    expected = [layer(*given) for layer in layers]
    assert len({x.sum().item() for x in expected}) == len(layers)
    for layer, want in zip(layers, expected, strict=True):
        layer.compile(fullgraph=True, backend=counter)
        same(layer, lambda *x, layer=layer: Calls(layer.pattern, **layer.options)(*x), given)
        assert torch.equal(layer(*given), want)
    assert counter.frame_count == len(layers)


def test_one_call_takes_operands_lengths_and_layouts_in_a_trace():
    layer, counter = Calls(P.window(9), causal=True, layout="bshd"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (20, 30, 41):
        given = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs(length))
        same(compiled, layer, given, documents=torch.tensor([0, 7, length]))
    assert counter.frame_count <= 2
    out, lse = torch.compile(attnplan.attention, fullgraph=True, backend="aot_eager")(
        *inputs(), WINDOW, return_lse=True
    )
    want = attnplan.attention(*inputs(), WINDOW, return_lse=True)
    assert out.shape == want[0].shape
    assert lse.shape == want[1].shape
    with pytest.raises(SpecError, match="no one LSE under mix='mean'"):
        torch.compile(attnplan.attention, fullgraph=True, backend="eager")(*inputs(), MEAN, return_lse=True)


WINDOW = P.window(6)
MEAN = P.mix([P.window(4), P.full()], rule="mean")

MODULES = {
    "PlannedAttention": lambda: modules.PlannedAttention(P.window(7), causal=True, layout="bshd"),
    "DilatedAttention": lambda: modules.DilatedAttention([16, 32], [1, 2]),
    "LongNetAttention": lambda: modules.LongNetAttention([16, 32], [1, 2]),
    "zero padded": lambda: modules.LongNetAttention([16, 30], [1, 4], zero_key_padding=True),
    "ring": lambda: modules.RingDilatedAttentionV2([16, 32], [1, 2]),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_trace_without_a_break(name):
    layer, counter = MODULES[name](), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    given = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs())
    same(compiled, layer, given)
    if name != "PlannedAttention":
        same(compiled, layer, given, is_causal=True)
        same(compiled, layer, given, key_padding_mask=torch.arange(S).expand(2, -1) >= torch.tensor([[S], [40]]))
    assert counter.frame_count <= 3
    same(torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager"), layer, given)


def test_twelve_modules_in_twelve_layers_are_one_graph():
    counter, given = CompileCounterWithBackend("aot_eager"), inputs()
    for width in range(1, 13):
        layer = modules.PlannedAttention(P.window(width), causal=True)
        eager = layer(*given)
        layer.compile(fullgraph=True, backend=counter)
        assert torch.equal(layer(*given), eager)
    assert counter.frame_count == 1


def test_a_multihead_module_trains_in_a_trace_with_dropout():
    layer = modules.ImprovedMultiheadDilatedAttention(64, 4, [1, 2], [16, 32], dropout=0.5)
    x = torch.randn(2, S, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    one, other = compiled(x, x, x), compiled(x, x, x)
    one, other = (y[0] if isinstance(y, tuple) else y for y in (one, other))
    assert not torch.equal(one, other), "each call draws a mask of its own"
    torch.autograd.grad(one.sum(), x)


def test_mixed_layers_are_one_graph_for_each_structure():
    """Dense layers are one call of SDPA; windows, LongNet and documents are one operator."""
    counter, given = CompileCounterWithBackend("aot_eager"), inputs()
    kinds = [P.full(), P.window(7), P.longnet([16, 32], [1, 2]), P.window(5) | P.global_tokens(2)]
    for n in range(12):
        layer = Layer(plan_of(kinds[n % 4], causal=True, batch=n + 1))
        layer_eager = layer(*given)
        layer.compile(fullgraph=True, backend=counter)
        assert torch.equal(layer(*given), layer_eager)
    assert counter.frame_count == 2


def test_exporting_a_call_without_a_plan_says_what_to_do():
    layer = Calls(P.window(5))
    with pytest.raises(SpecError, match=r"call one made by attnplan\.compile"):
        torch.export.export(layer, tuple(x.detach() for x in inputs()), strict=False)


@pytest.mark.parametrize("name", ["PlannedAttention", "DilatedAttention"])
def test_a_copy_of_a_module_is_its_own_in_a_trace(name):
    layer = MODULES[name]()
    given = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        setattr(copied, "scale" if name == "PlannedAttention" else "softmax_scale", 3.0)
        compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
        same(compiled, copied, given)
        assert not torch.equal(compiled(*given), layer(*given))
