"""Plans that are exported, copied, warmed up, captured in CUDA graphs and watched by the profiler."""

import copy
import io

import pytest
import torch

import attnplan
from attnplan import AttentionSpec, SpecError
from attnplan import patterns as P
from attnplan.integrations import dynamo  # noqa: F401  # exported programs read their plans by it
from attnplan.ir import Attend
from tests.traced import WAYS, Layer, inputs, plan_of


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


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


CAPTURED = {
    "views": ("auto", P.longnet([64, 128], [1, 2]), {}),
    "FlexAttention": ("compiled", P.window(100) | P.sinks(4), {}),
    "tables that follow documents": ("compiled", P.documents(), {"documents": torch.tensor([0, 100, 256])}),
    "a fused lattice": ("compiled", P.longnet([64, 128], [1, 2]), {}),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CAPTURED)
def test_a_call_is_captured_in_a_cuda_graph(name):
    """A capture fails where a call waits for the device or takes memory of the host's that is not pinned."""
    backend, pattern, operands = CAPTURED[name]
    spec = AttentionSpec(seq_len=256, heads=4, head_dim=64, causal=True, dtype="bfloat16", pattern=pattern)
    plan = attnplan.compile(spec, device="cuda", backend=backend).warmup(1)
    operands = {n: x.cuda() for n, x in operands.items()}
    given = [torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    with torch.no_grad():
        expected = plan(*given, **operands)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = plan(*given, **operands)
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
