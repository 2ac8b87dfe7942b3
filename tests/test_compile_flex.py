"""FlexAttention plans that a trace takes up whole: one graph for each structure."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from attnplan import patterns as P
from attnplan.backends.compiled.emit import Inlined
from attnplan.patterns import Shape
from attnplan.runtime.flex import FlexAttend, Options
from tests.traced import Layer, S, inputs, plan_of


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


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
