"""Kernels that write rows where the join would put them, on the CPU: a kernel that can, and Triton's interpreter."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnplan import patterns as P
from attnplan.backends.eager import FLASH_CPU
from attnplan.backends.eager.emit import emit
from attnplan.backends.eager.launches import launch_of
from attnplan.backends.eager.written import destinations
from attnplan.cost.joins import rows_there
from attnplan.runtime import attend as attends
from attnplan.runtime import views
from attnplan.runtime.fused import pull
from attnplan.runtime.kernels import KERNELS, FlashCPU
from tests.fused_cases import (
    SPECS,
    graph_of,
    interpreted,  # noqa: F401  # a fixture
    plan_of,
    spec_of,
)
from tests.running import TOLERANCES, Call, assert_agree


class Writing(FlashCPU):
    """The CPU kernel, writing to where it is told."""

    def forward(self, q, k, v, asked):
        out, lse = super().forward(q, k, v, asked)
        where = asked.into[0] if asked.into else None
        return (out if where is None else where.copy_(out)), lse

    def backward(self, grad, q, k, v, out, lse, asked):
        found = super().backward(grad, q, k, v, out, lse, asked)
        where = asked.into or (None, None, None)
        return tuple(x if y is None else y.copy_(x) for x, y in zip(found, where, strict=True))


@pytest.fixture
def joins(monkeypatch):
    """Let the CPU kernel write, into wholes full of NaN; return, for each join, the tensors that were there."""
    monkeypatch.setitem(KERNELS, "flash-cpu", Writing())
    monkeypatch.setattr(attends, "WRITES_INTO", frozenset({"flash-cpu"}))
    new, launch, found = views.empty_whole, pull._Pull._launch, []
    monkeypatch.setattr(views, "empty_whole", lambda x, like: new(x, like).fill_(torch.nan))

    def spied(self, out, lse, outs, lses, bases):
        found.append([i for i in range(len(outs)) if bases >> i & 1])
        return launch(self, out, lse, outs, lses, bases)

    monkeypatch.setattr(pull._Pull, "_launch", spied)
    return found


WRITTEN = {
    "longnet": [1, 1, 1, 1],
    "grouped": [5, 5, 5, 5],
    "rows without a key": None,
    "unlike offsets in a group": None,
    "ragged": None,
    "detached": [0, 1, 1, 1],
    "mean": [0, 0, 0, 0],
}
"""Parts that are there in the join of the output and in those of dq, dk and dv, where the number is plain to see."""
_QUICK = ("longnet", "grouped", "detached", "mean")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", [n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in WRITTEN])
def test_rows_that_kernels_write_are_neither_read_nor_written_again(name, joins):
    spec = attrs.evolve(SPECS[name], dtype="float32", layout="bhsd" if len(name) % 2 else "bshd", head_dim=8)
    call = Call.of(spec, batch=2, through_lse=False)
    assert_agree(call.got(plan_of(spec, "views")), call.expected(), TOLERANCES["float32"], name)
    assert len(joins) == 4
    if WRITTEN[name] is None:
        assert all(joins)
    elif name == "grouped":
        assert all(len(there) > 2 for there in joins)
    else:
        assert [len(there) for there in joins] == WRITTEN[name]


@pytest.mark.usefixtures("interpreted")
def test_gradients_through_the_lse_go_to_new_tensors(joins):
    spec = attrs.evolve(SPECS["grouped"], dtype="float32", head_dim=8)
    call = Call.of(spec, batch=2)
    assert_agree(call.got(plan_of(spec, "views")), call.expected(), TOLERANCES["float32"], "grouped")
    assert joins[0]
    assert not any(joins[1:])


def test_a_kernel_that_is_told_may_still_return_a_new_tensor(joins, monkeypatch):
    """As one behind an operator does, when somebody looks on: plain torch joins, and copies what was written."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    spec = attrs.evolve(SPECS["grouped"], dtype="float32")
    call, plan = Call.of(spec, batch=2), plan_of(spec, "views")
    monkeypatch.setitem(KERNELS, "flash-cpu", FlashCPU())
    with Watch():
        assert_agree(call.got(plan), call.expected(), TOLERANCES["float32"], "watched")
    assert not joins


@pytest.mark.usefixtures("interpreted")
def test_rows_elsewhere_are_read(joins, monkeypatch):
    spec = attrs.evolve(SPECS["grouped"], dtype="float32")
    call, plan = Call.of(spec, batch=2), plan_of(spec, "views")
    monkeypatch.setitem(KERNELS, "flash-cpu", FlashCPU())
    assert_agree(call.got(plan), call.expected(), TOLERANCES["float32"], "elsewhere")
    assert joins == [[]] * 4


def test_what_is_written_shares_no_row():
    def chosen(pattern, variant="views", operand=0, **options):
        graph = graph_of(spec_of(pattern, **options), variant)
        parts = graph.args(graph[graph.output.args[0]])
        found = destinations(graph, parts, launch_of(graph), operand)
        rows = [graph[i].type.rows for i in found]
        elements = [e for r in rows for e in r.elements()]
        assert len(elements) == len(set(elements))
        return [r.elements_count for r in rows]

    assert chosen(P.longnet([16, 32, 64], [1, 2, 4])) == [256], "the first branch, of which the others share rows"
    assert sum(chosen(P.grouped([16, 32], [1, 2]))) == 128 + 64
    assert sum(chosen(P.longnet([16, 32], [2, 4]))) == 128
    assert chosen(P.longnet([16, 32, 64], [1, 2, 4]), variant="batch") == [], "rows of a launch lie in its buffer"


def test_other_kernels_are_told_nothing():
    spec = SPECS["grouped"]
    program = emit(graph_of(spec, "views"), spec, FLASH_CPU, "cpu")
    assert "into" not in program.source


@pytest.mark.usefixtures("interpreted")
def test_what_is_no_view_is_not_written_into(joins):
    """More batch elements than the plan was made for: their rows do not fold into four dimensions."""
    spec = attrs.evolve(SPECS["grouped"], dtype="float32", batch=1, layout="bshd", head_dim=8)
    call = Call.of(spec, batch=3, through_lse=False)
    plan = plan_of(spec, "views")
    assert_agree(call.got(plan), call.expected(), TOLERANCES["float32"], "three batch elements")
    few = [len(there) for there in joins]
    joins.clear()
    call = Call.of(spec, batch=1, through_lse=False)
    assert_agree(call.got(plan), call.expected(), TOLERANCES["float32"], "one batch element")
    assert few < [len(there) for there in joins]


@pytest.mark.parametrize(
    ("pattern", "variant", "writes_into", "rows"),
    [
        (P.longnet([16, 32, 64], [1, 2, 4]), "views", False, 256 - 128),
        (P.longnet([16, 32, 64], [1, 2, 4]), "views", True, 256 - 128),
        (P.longnet([16, 32, 64], [1, 4, 4]), "copied", False, 256 - 64),
        (P.longnet([16, 32, 64], [1, 2, 4]), "batch", True, 0),
        (P.longnet([16, 32], [1, 2], mix="mean"), "views", True, 0),
        (P.grouped([16, 32], [1, 2]), "views", True, 128 + 64),
        (P.grouped([16, 32], [1, 2]), "views", False, 0),
    ],
)
def test_the_price_of_a_join_leaves_out_the_rows_that_are_there(pattern, variant, writes_into, rows):
    graph = graph_of(spec_of(pattern), variant)
    join = graph[graph.output.args[0]]
    assert [rows_there(graph, join, i, writes_into=writes_into) for i in range(3)] == [rows] * 3
