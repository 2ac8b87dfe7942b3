"""Plans inside compiled models: no graph break, few graphs, the numbers of eager."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import attnplan
from attnplan import Dim, SpecError
from attnplan import patterns as P
from tests.traced import WAYS, Layer, S, inputs, plan_of, same


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


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


@pytest.mark.slow
def test_inductor_takes_plans_into_its_graphs():
    for name in ("one call of SDPA", "strided views"):
        layer, given = Layer(WAYS[name]()), inputs()
        got, expected = torch.compile(layer, fullgraph=True)(*given), layer(*given)
        torch.testing.assert_close(got, expected)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), given) for x in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)


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
