"""Plans around our own kernels: numbers in float64 by plain torch, emission, refusals, traces."""

from __future__ import annotations

from unittest import mock

import attrs
import pytest
import torch

from attnplan.backends.eager import FLASH_CPU
from attnplan.backends.eager.emit import emit
from attnplan.cost import resolve
from attnplan.search import _start, fusion_missing
from tests.fused_cases import SPECS, VARIANTS, graph_of, plan_of
from tests.running import TOLERANCES, Call, assert_agree, error


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", SPECS)
def test_numbers_in_float64(name, layout):
    spec = attrs.evolve(SPECS[name], dtype="float64", layout=layout)
    call = Call.of(spec, batch=2)
    want = call.expected()
    for variant in VARIANTS:
        assert_agree(call.got(plan_of(spec, variant)), want, TOLERANCES["float64"], variant)


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
