"""Virtual rings in compiled graphs: one operator, or a break that says why."""

from __future__ import annotations

import attrs
import pytest
import torch

import attnplan
from attnplan import patterns as P
from attnplan.errors import NoBackendError, SpecError
from tests.test_ring_virtual import LENGTH, spec_of


@pytest.mark.parametrize(
    ("name", "strategy", "layout"),
    [
        ("causal", "zigzag > ring", "bhsd"),
        pytest.param("longnet", "contiguous > rows", "bshd", marks=pytest.mark.slow),
        pytest.param("sinks", "zigzag > ulysses", "bhsd", marks=pytest.mark.slow),
    ],
)
def test_a_ring_is_one_operator_of_a_compiled_graph(name: str, strategy: str, layout: str) -> None:
    plan = attnplan.compile(spec_of(name, 2, "float32", layout=layout), device="cpu", strategy=strategy)
    sizes = ((4, 8), (2, 8), (2, 8), (4, 8))
    shapes = [(2, h, LENGTH, d) if layout == "bhsd" else (2, LENGTH, h, d) for h, d in sizes]
    q, k, v, grad = (torch.randn(size, requires_grad=True) for size in shapes)
    grad_lse = torch.randn(2, 4, LENGTH)

    def model(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = plan(q * 2, k, v, return_lse=True)
        return out + 1, lse * 2

    torch.compiler.reset()
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        out, lse = run(q)
        both = torch.autograd.grad((out, lse), (q, k, v), (grad, grad_lse), retain_graph=True)
        alone = torch.autograd.grad(lse, (q, k), grad_lse)
        found.append([out, lse, *both, *alone])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(Exception, match=r"q has shape \[2, 3"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(q.detach()[:, :3])


def test_a_compiled_call_brings_its_operands() -> None:
    spec = spec_of("causal", 4, "float32")
    plan = attnplan.compile(attrs.evolve(spec, pattern=P.documents()), device="cpu", strategy="zigzag > ring")
    q, k, v = torch.randn(3, 1, 4, LENGTH, 8).unbind()
    compiled = torch.compile(plan, backend="aot_eager", fullgraph=True)
    for ends in ([0, 9, LENGTH], [0, 20, LENGTH]):
        documents = torch.tensor(ends, dtype=torch.int32)
        assert torch.equal(compiled(q, k, v, documents=documents), plan(q, k, v, documents=documents))
    with pytest.raises(SpecError, match="the spec needs documents with each call"):
        compiled(q, k, v)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", ["grouped mean", pytest.param("detached", marks=pytest.mark.slow)])
def test_a_compiled_model_breaks_its_graph_around_other_mixes(name: str) -> None:
    plan = attnplan.compile(spec_of(name, 4, "float32"), device="cpu", strategy="zigzag > ring")
    q, k, v = (torch.randn(1, 4, LENGTH, 8, requires_grad=True) for _ in range(3))

    def model(q: torch.Tensor) -> torch.Tensor:
        return plan(q * 2, k, v) + 1

    torch.testing.assert_close(torch.compile(model, backend="eager")(q), model(q))
    torch.compiler.reset()  # else what was compiled with the break is found again
    with pytest.raises(Exception, match=r"another rule than 'lse'.*without fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(q)


def test_a_ring_is_not_exported() -> None:
    plan = attnplan.compile(spec_of("causal", 4, "float32"), device="cpu", strategy="zigzag > ring")

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return plan(q, q, q)

    with pytest.raises(Exception, match="no part of an exported program"):
        torch.export.export(Model(), (torch.randn(1, 4, LENGTH, 8),))


@pytest.mark.parametrize("name", ["causal", "longnet"])
def test_the_compiled_backend_refuses_a_ring_with_the_reason(name: str) -> None:
    with pytest.raises(NoBackendError, match=r"(?s)compiled \(flex\): .*(some rows of the sequence only|whole inputs)"):
        attnplan.compile(spec_of(name, 2, "float32"), device="cpu", backend="compiled")
