"""Calls and modules whose plan is found when a compiled program runs."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import attnplan
from attnplan import SpecError
from attnplan import nn as modules
from attnplan import patterns as P
from tests.traced import S, inputs, same


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


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
