"""``explain(measure=True)``: whose time it is, what it adds up to, and when there is none to tell."""

from __future__ import annotations

import functools
import json
import time
from pkgutil import resolve_name

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from attnplan.errors import KernelError, NoBackendError
from attnplan.ir import Attend, Merge, Mix, Take
from attnplan.measure import measure
from attnplan.runtime import ranges
from tests.test_cli import FLAGS, LONGNET, ok, refused

PAUSE = 0.02
"""Seconds, far beyond what any op of these sizes takes."""
SPEC = AttentionSpec(
    seq_len=64, heads=2, head_dim=8, causal=True, dtype="float32", pattern=P.longnet([16, 32, 64], [1, 2, 4])
)


@pytest.fixture
def fresh(monkeypatch):
    """Plan anew, with a function of the runtime that pauses where ``when`` says so."""
    monkeypatch.setattr("attnplan.measure.MOST", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others may take as long as a pause to wake up after one

    def make(spec, path="", when=lambda *args, **kwargs: False, **pins):
        if path:
            holder, _, name = path.rpartition(".")
            original = getattr(resolve_name(holder), name)

            @functools.wraps(original)
            def slow(*args, **kwargs):
                if when(*args, **kwargs):
                    time.sleep(PAUSE)
                return original(*args, **kwargs)

            monkeypatch.setattr(path, slow)
        attnplan.cache_clear()
        return attnplan.compile(spec, **pins)

    yield make
    torch.set_num_threads(threads)
    attnplan.cache_clear()


def slow_ops(found):
    return {op for op, seconds in found.ops.items() if seconds > PAUSE / 2}


def ids(plan, *kinds):
    return [node.id for node in plan.graph if isinstance(node.op, kinds)]


# -------------------------------------------------------------------------------------------------- whose time it is


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_the_time_of_an_attend_is_booked_under_it(fresh, branch):
    rows = {0: (2, 4, 16), 1: (2, 2, 16), 2: (2, 16)}[branch]
    plan = fresh(SPEC, "attnplan.runtime.attend.attend", lambda q, *rest, **more: q.shape[1:-1] == rows)
    found = measure(plan)
    want = [n.id for n, op in plan.graph.of(Attend) if op.branch == branch]
    assert slow_ops(found) == set(want)
    assert found.seconds == pytest.approx(PAUSE, rel=0.5)
    assert PAUSE <= found.ops_seconds <= 1.5 * found.seconds


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_a_backward_is_booked_under_the_attend_that_it_is_of(fresh, branch):
    rows = {0: (2, 4, 16), 1: (2, 2, 16), 2: (2, 16)}[branch]
    training = attrs.evolve(SPEC, training=True)
    path = "attnplan.runtime.attend.attend_backward"
    plan = fresh(training, path, lambda grad, grad_lse, q, *rest, **more: q.shape[1:-1] == rows)
    found = measure(plan)
    assert slow_ops(found) == {n.id for n, op in plan.graph.of(Attend) if op.branch == branch}


def test_fetching_rows_is_the_time_of_the_take(fresh):
    capped = attrs.evolve(SPEC, softcap=2.0)
    plan = fresh(capped, "attnplan.runtime.views.gather", lambda *args: True, backend="eager", strategy="lattice")
    assert slow_ops(measure(plan)) == set(ids(plan, Take))


def test_each_operand_has_a_take_of_its_own(fresh):
    grouped = attrs.evolve(SPEC, softcap=2.0, kv_heads=1)
    path = "attnplan.runtime.views.gather"
    plan = fresh(grouped, path, lambda x, *place: x.shape[1] == 2, backend="eager", strategy="lattice")
    assert slow_ops(measure(plan)) == {n.id for n, _ in plan.graph.of(Take) if n.type.tensor == "q"}


def test_rows_of_a_whole_operand_are_the_time_of_the_attend(fresh):
    spec = attrs.evolve(SPEC, pattern=P.window(3) | P.global_tokens(4), softcap=2.0, causal=False)
    plan = fresh(spec, "attnplan.runtime.views.gather", lambda *args: True, backend="eager", strategy="decompose")
    whole = {n.id for n, _ in plan.graph.of(Attend) if any(not isinstance(a.op, Take) for a in plan.graph.args(n))}
    assert whole
    assert slow_ops(measure(plan)) == whole | set(ids(plan, Take))


def test_converting_the_inputs_belongs_to_no_op(fresh):
    capped = attrs.evolve(SPEC, softcap=2.0)
    plan = fresh(capped, "attnplan.runtime.views.widened", lambda x: True, backend="eager", strategy="lattice")
    found = measure(plan)
    assert slow_ops(found) == set()
    assert found.other > 2 * PAUSE


def test_joining_is_the_time_of_the_join(fresh):
    plan = fresh(SPEC, "attnplan.runtime.merge.merge", lambda *args, **more: True)
    assert slow_ops(measure(plan)) == set(ids(plan, Merge))
    mean = attrs.evolve(SPEC, pattern=P.longnet([16, 32], [1, 2], mix="mean"))
    plan = fresh(mean, "attnplan.runtime.merge.weighted_sum", lambda *args, **more: True)
    assert slow_ops(measure(plan)) == set(ids(plan, Mix))


def test_building_a_mask_is_the_time_of_its_attend(fresh):
    spec = attrs.evolve(SPEC, pattern=P.documents() | P.sinks(2), causal=False)
    plan = fresh(spec, "attnplan.runtime.masks.MaskBuilder.forward", lambda *args: True, strategy="dense")
    assert slow_ops(measure(plan)) == set(ids(plan, Attend))


def test_adding_a_gradient_up_belongs_to_the_attend_that_it_is_of(fresh):
    plan = fresh(attrs.evolve(SPEC, training=True), "attnplan.runtime.views.add_rows", lambda *args: True)
    assert slow_ops(measure(plan)) == set(ids(plan, Attend))


def test_what_belongs_to_no_op_is_counted_apart(fresh):
    plan = fresh(attrs.evolve(SPEC, training=True), "attnplan.runtime.views.zero_gradient", lambda *args: True)
    found = measure(plan)
    assert slow_ops(found) == set()
    assert found.other > 2 * PAUSE
    assert found.ops_seconds > found.other


def test_every_op_with_a_price_has_a_time(fresh):
    for spec in (SPEC, attrs.evolve(SPEC, training=True)):
        plan = fresh(spec)
        found = measure(plan)
        assert list(found.ops) == ids(plan, Attend, Merge, Mix, Take)
        assert min(found.ops.values()) > 0


# --------------------------------------------------------------------------------------------- nothing to tell apart


def test_a_plan_of_one_op_is_that_op(fresh):
    plain = attrs.evolve(SPEC, pattern=P.full())
    for backend in ("eager", "reference"):
        for training in (False, True):
            plan = fresh(attrs.evolve(plain, training=training), backend=backend)
            found = measure(plan)
            assert list(found.ops) == ids(plan, Attend)
            assert 0 < found.ops_seconds <= 3 * found.seconds


def test_a_program_without_modules_says_so(fresh):
    found = measure(fresh(SPEC, backend="reference"))
    assert found.ops is None
    assert found.ops_seconds is None
    assert "reference emits no program whose ops can be told apart" in found.note


def test_a_program_that_torch_differentiates_says_so(fresh):
    plan = fresh(attrs.evolve(SPEC, training=True, softcap=2.0))
    assert plan.schedule == "math"
    assert "torch differentiates this program itself" in measure(plan).note
    forward = measure(fresh(attrs.evolve(SPEC, softcap=2.0)))
    assert forward.note == ""
    assert forward.ops


def test_a_program_for_every_length_says_so(fresh):
    open_length = attrs.evolve(SPEC, seq_len=Dim("s", max=64), pattern=P.mix([P.window(8), P.segments(16)]))
    plan = fresh(open_length, strategy="dense")
    assert plan.program.follows_lengths
    assert "reads its lengths off its tensors" in measure(plan).note


def test_a_plan_that_moved_on_says_so(fresh):
    plan = fresh(SPEC)
    with pytest.warns(RuntimeWarning, match="failed"):
        plan._instead(KernelError("broken"))
    found = measure(plan)
    assert found.ops is None
    assert "the chosen kernel failed, and calls now run by <Plan " in found.note


def test_hardware_that_is_elsewhere_is_refused():
    plan = attnplan.compile(SPEC, device="h100", backend="eager")
    with pytest.raises(NoBackendError, match=r"nothing can be measured: NVIDIA H100 .* is not here"):
        plan.explain(measure=True)
    assert "nothing can be measured" in refused(3, "explain", *FLAGS, "--device", "h100", "--measure")


def test_a_call_that_fails_leaves_nobody_watching(fresh):
    plan = fresh(SPEC)
    watch = ranges.Watch(torch.device("cpu"))
    with pytest.raises(ValueError, match="mine"), watch.call():
        raise ValueError("mine")
    assert ranges._watch is None
    plan(*(torch.zeros(1, 2, 64, 8) for _ in range(3)))
    assert watch.modules == 0


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_page_shows_measured_beside_predicted(fresh):
    plan = fresh(SPEC)
    page = plan.explain(measure=True)
    assert "\nmeasured   " in page
    assert "of predicted    median of 3, " in page
    assert "           run op by op " in page
    head = next(line for line in page.splitlines() if line.startswith("  op "))
    assert head.split()[-8:] == ["GFLOP", "MiB", "us", "measured", "bound", "%", "of", "roofline"]
    assert " measured " not in plan.explain()
    facts = plan.explain("json")
    assert facts["measured"] is None
    assert {op["measured_seconds"] for op in facts["ops"]} == {None}


def test_the_figures_are_in_the_json(fresh):
    facts = json.loads(ok("explain", *LONGNET, "--measure", "--json"))
    whole = facts["measured"]
    assert 0 < whole["fastest_seconds"] <= whole["seconds"] <= whole["slowest_seconds"]
    assert (whole["timer"], whole["note"], whole["rounds"] >= 3) == ("clock", "", True)
    total = sum(op["measured_seconds"] for op in facts["ops"]) + whole["other_seconds"]
    assert total == pytest.approx(whole["ops_seconds"])


def test_an_op_that_only_costs_time_in_truth_is_shown():
    from attnplan.explain import _worth_showing

    ops = [{"seconds": 1.0, "measured_seconds": 1.0} for _ in range(12)]
    late = {"seconds": 0.0, "measured_seconds": 5.0}
    free = {"seconds": 0.0, "measured_seconds": 0.0}
    assert _worth_showing([*ops, late, free]) == ([*ops, late], 1)
