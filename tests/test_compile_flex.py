"""FlexAttention plans that a trace takes up whole: one graph for each structure."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnplan import patterns as P
from attnplan.backends.compiled.emit import Inlined
from attnplan.ir import Axis, RowMap
from attnplan.patterns import Shape
from attnplan.runtime.compiling import COMPILED
from attnplan.runtime.device_tables import compacted
from attnplan.runtime.flex import FlexAttend, Options, _sized, arriving_tables
from attnplan.runtime.masks import MaskBuilder
from attnplan.runtime.scores import position
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


class Made(TorchFunctionMode):
    """Notes tensors that are made of numbers of the host."""

    def __init__(self, brought):
        super().__init__()
        self.brought = brought

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and found.is_meta and not isinstance(args[0], torch.Tensor):
            self.brought.append(func.__name__)
        return found


class Watch(TorchDispatchMode):
    """Notes what brings data from the host to the device, which is ``meta`` here: such a copy fails in a capture."""

    def __init__(self):
        super().__init__()
        self.brought = []
        self.made = Made(self.brought)

    def __enter__(self):
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if len({x.device.type for x in (*args, found) if isinstance(x, torch.Tensor)}) > 1:
            self.brought.append(str(func))
        return found


def test_the_watch_sees_what_it_is_there_for():
    here, number = torch.ones(3), torch.tensor(3)
    for bring in (
        lambda: here.to("meta"), lambda: torch.empty(3, device="meta").copy_(here), lambda: number.to("meta"),
        lambda: torch.tensor([1, 2], device="meta"), lambda: torch.tensor(1, device="meta"),
    ):  # fmt: skip
        with Watch() as watch:
            bring()
        assert watch.brought


CALLS = {
    "static": (P.window(9) | P.sinks(2), (), {}),
    "documents and padding": (
        P.window(9) & P.documents() & P.padding(), (), {"documents": [0, 20, 64], "key_padding": [[True] * 64] * 2},
    ),
    "a number as offset": (P.window(9) & P.causal(), (), {"q_offset": 3}),
    "a tensor of the host as offset": (P.window(9) & P.causal(), (), {"q_offset": torch.tensor(3)}),
    "slopes": (P.causal(), ("bias", "alibi_slopes"), {"bias": [[[0.5]]] * 4, "alibi_slopes": [0.5] * 4}),
    "slopes, and a number as offset": (P.causal(), ("alibi_slopes",), {"alibi_slopes": [0.5] * 4, "q_offset": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_copies_nothing_from_the_host(name, monkeypatch):
    """Tables, captures and biases of a call are made on the device, ``meta`` here, which also has no values to read."""
    where, biases, given = CALLS[name]
    options = Options((64, 64), (16, 16), 0.25, None, False, biases)
    shift = None if "q_offset" in given else 0
    flex = FlexAttend(where, Shape(64, 64, 4, 2), shift, options, "meta")
    seen = []
    monkeypatch.setattr(flex.like, "compiled", lambda key, *args: seen.append(args))
    monkeypatch.setattr(flex, "tabulate", lambda key, *args: arriving_tables(*args))
    operands = {n: torch.tensor(x).to("meta") if isinstance(x, list) else x for n, x in given.items()}
    for x in operands.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    q = torch.empty(2, 4, 64, 8, device="meta")
    with Watch() as watch:
        flex(q, q, q, operands, False)
    assert not watch.brought
    _, _, _, rows, columns, captures, made, *_ = seen[0]
    assert {x.device.type for x in (*rows, *columns, *captures, *made)} == {"meta"}
    assert len(made) == sum({"bias": 1, "alibi_slopes": 2}[n] for n in biases)
    assert all(64 in x.shape for x in made if x.requires_grad), "what is learned has a row for each query"


def test_masks_of_data_that_arrives_look_up_tables_that_are_there():
    """After the first call, which makes them."""
    rows = RowMap(0, 0, (Axis(4, 1), Axis(64, 0, 1)))
    where, x = P.random_blocks(0.5, 8, 0) & P.documents(), torch.empty(1, 4, 64, 8)
    masks = MaskBuilder(where, rows, rows, 0, Shape(64, 64, 4, 1))
    first, second = (masks({"documents": torch.tensor(ends)}, x, x) for ends in ([0, 20, 64], [0, 40, 64]))
    again = MaskBuilder(where, rows, rows, 0, Shape(64, 64, 4, 1))
    assert torch.equal(again({"documents": torch.tensor([0, 40, 64])}, x, x), second)
    assert not torch.equal(first, second)
    meta, ends = x.to("meta"), {"documents": torch.tensor([0, 20, 64]).to("meta")}
    masks(ends, meta, meta)
    with Watch() as watch:
        masks(ends, meta, meta)
    assert not watch.brought


def test_positions_are_what_they_were_on_the_host():
    assert position(3, torch.device("cpu")).tolist() == 3
    assert position(torch.tensor([3, 5]), torch.device("cpu")).tolist() == [3, 5]
    assert position(torch.tensor(3), torch.device("meta")).device.type == "meta"


@pytest.mark.slow
def test_tables_of_a_call_are_compiled_as_they_are_written():
    """Compiled is what a GPU does; sizes and strides are part of it, since whole graphs are compiled for them."""
    ends, real = torch.tensor([[0, 20, 64], [0, 0, 64]]), torch.rand(2, 64) > 0.3
    before = COMPILED["block tables"]
    for where, operands, more in (
        (P.window(9) & P.documents() & P.padding(), {"documents": ends, "key_padding": real},
         {"documents": torch.tensor([[0, 5, 9, 64], [0, 1, 2, 64]]), "key_padding": ~real}),
        (P.window(9) & P.causal(), {"q_offset": torch.tensor([0, 0])}, {"q_offset": torch.tensor([0, 0])}),
    ):  # fmt: skip
        options, shift = Options((64, 64), (16, 16), 0.25, None, False), None if "q_offset" in operands else 0
        flex = FlexAttend(where, Shape(64, 64, 4, 2), shift, options, "cpu")
        flex.narrow = True
        for given in (operands, more):
            rows, columns, captures = flex.tables(given, 2)
            for a, b in zip(captures, flex.condition.captures(given, 2, 64, torch.device("cpu")), strict=True):
                assert torch.equal(a, b)
            found = flex.table(given)
            want = (*_sized(found, 4, True), *_sized(found.by_columns(4), 4, True))
            for a, b in zip((*rows, *columns), want, strict=True):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()
    assert COMPILED["block tables"] == before + 2, "another number of documents is no other graph"


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=30, deadline=None)
def test_tables_by_columns_hold_the_tiles_of_those_by_rows(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    states = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=rows * columns, max_size=rows * columns)))
    states = states.reshape(1, 1, rows, columns)
    by_rows = compacted(torch.arange(columns), states)
    for found, expected in ((by_rows, states), (by_rows.by_columns(columns), states.transpose(-1, -2))):
        for count, index, state in ((*found[:2], 1), (*found[2:], 2)):
            kept = (expected[0, 0] == state).nonzero().tolist()
            got = [(r, index[0, 0, r, i].item()) for r in range(len(expected[0, 0])) for i in range(count[0, 0, r])]
            assert got == [tuple(x) for x in kept]
