"""Costs of the host, and of masks: what operators around a kernel take."""

from __future__ import annotations

from math import prod

import attrs
import pytest

from attnplan import AttentionSpec, search
from attnplan import patterns as P
from attnplan.backends import eager
from attnplan.cost import Cost, price, resolve
from attnplan.cost.model import demands, timed
from attnplan.cost.parameters import CALIBRATED, defaults
from attnplan.cost.rules import backward_cost, forward_cost
from attnplan.cost.setting import Setting
from attnplan.cost.tiles import attend_tiles, launches_of_tiles
from attnplan.cost.views import views_of
from attnplan.errors import SpecError
from attnplan.ir import Attend
from attnplan.search import every_way

TARGET = resolve("h100")
TABLE = defaults("cuda")


def way_of(spec, name):
    return next(w for c, w in every_way(spec, TARGET) if w is not None and c.name == name)


def priced(spec, name, table=TABLE):
    way = way_of(spec, name)
    return price(way.lowered.graph, spec, way.schedule.priced, TARGET.device, table)


def spec_of(pattern=None, **rest):
    whole = {"seq_len": 1024, "heads": 8, "head_dim": 64, "dtype": "bfloat16", **rest}
    return AttentionSpec(**whole) if pattern is None else AttentionSpec(**whole, pattern=pattern)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_torch_differentiates_a_plan_of_one_call_for_less(name):
    key = {"flash": "flash-cuda"}.get(name, name)
    known = TABLE.kernels[key]
    slow = TABLE.replaced({f"kernels/{key}/direct": 1.0}, CALIBRATED)
    spec, way = spec_of(training=True), f"dense > eager ({name})"
    saved = priced(spec, way, slow).host - priced(spec, way).host
    assert saved == pytest.approx((1 - known.direct) * (known.backward_host + known.backward_call))
    for same in (spec_of(), spec_of(training=True, sink_logits=True)):
        assert priced(same, way, slow).host == priced(same, way).host
    lattice = spec_of(P.grouped([256, 512], [1, 2]), training=True)
    assert priced(lattice, f"lattice > eager ({name})", slow).host == priced(lattice, f"lattice > eager ({name})").host


def test_a_calibration_may_say_what_is_left_of_a_direct_backward_and_need_not():
    assert "kernels/cudnn/direct" in TABLE.numbers()
    without = TABLE.replaced({"kernels/cudnn/host": 1e-4}, CALIBRATED).kernels["cudnn"]
    assert without.direct == TABLE.kernels["cudnn"].direct < 1
    assert TABLE.replaced({"kernels/cudnn/direct": 0.6}, CALIBRATED).kernels["cudnn"].direct == 0.6
    with pytest.raises(SpecError, match="must be a positive number"):
        TABLE.replaced({"kernels/cudnn/direct": 0.0}, CALIBRATED)


def cost_of(spec, name, *, back=False):
    """Return what the attends of a way cost."""
    way = way_of(spec, name)
    graph = way.lowered.graph
    setting = Setting.of(graph, spec, way.schedule.priced)
    rule = backward_cost if back else forward_cost
    return sum((rule(n, setting) for n, _ in graph.of(Attend)), Cost())


@pytest.mark.parametrize("back", [False, True])
def test_the_host_makes_the_masks_of_what_comes_with_a_call(back):
    known, brought = (
        cost_of(spec_of(p, training=back), "dense > eager (cudnn)", back=back)
        for p in (P.documents([512, 512]), P.documents())
    )
    assert brought.launches == known.launches
    assert brought.views >= known.views + 10


def test_a_mask_is_made_before_the_kernel_that_reads_it():
    spec = spec_of(P.documents([512, 512]))
    pairs, item = 1024**2, 2
    whole, masked = (cost_of(s, "dense > eager (cudnn)") for s in (spec_of(), spec))
    assert masked.made == (3 * item + 4) * pairs
    assert masked.bytes == whole.bytes + item * pairs
    assert cost_of(spec_of(P.documents()), "dense > eager (cudnn)").made == masked.made + 5 * pairs
    assert (
        cost_of(spec_of(P.documents([512, 512]), training=True), "dense > eager (cudnn)", back=True).made == masked.made
    )
    assert cost_of(spec, "dense > eager (math)").made == 0  # which reads the boolean itself


def test_a_mask_that_no_strides_express_is_copied_first(monkeypatch):
    spec = spec_of(P.documents([512, 512]))
    once, spread = cost_of(spec, "dense > eager (cudnn)"), 8 * 1024**2
    monkeypatch.setattr("attnplan.cost.rules.mask_spread", lambda *given: spread)
    copied = cost_of(spec, "dense > eager (cudnn)")
    assert copied.made == 8 * once.made + 1024**2 + spread
    assert copied.bytes == once.bytes + 2 * (spread - 1024**2)


def test_no_arithmetic_hides_what_makes_a_mask():
    spec = spec_of(P.documents([512, 512]))
    way = way_of(spec, "dense > eager (cudnn)")
    loads = demands(way.lowered.graph, spec, way.schedule.priced)
    without = tuple(attrs.evolve(x, forward=attrs.evolve(x.forward, made=0.0)) if x.work else x for x in loads)
    seconds = [
        sum(op.seconds for op in timed(x, spec, way.schedule.priced, TARGET.device, TABLE)[0]) for x in (loads, without)
    ]
    made = sum(x.forward.made for x in loads) / (TARGET.device.bandwidth * TABLE.join)
    assert seconds[0] - seconds[1] == pytest.approx(made)


@pytest.mark.parametrize("whole", [False, True])
def test_whole_tiles_are_gathered_by_fewer_operators(whole):
    rows = 8192
    spec = spec_of(P.random_blocks(0.2, 128) if whole else P.window(256), seq_len=rows, causal=not whole)
    way = way_of(spec, "blocks > eager (cudnn)")
    graph, tiled = way.lowered.graph, [pair for pair in way.lowered.graph.of(Attend) if pair[1].tile]
    for node, op in tiled:
        q, k = (graph[a].type.rows for a in node.args[:2])
        kept, heads = attend_tiles(op, q, k, spec), prod(q.sizes[:-1])
        least, most = (launches_of_tiles(q.length, kept, heads, op.tile, whole=x) for x in (True, False))
        assert least < 0.6 * most
        assert forward_cost(node, Setting.of(graph, spec, way.schedule.priced)).launches == (least if whole else most)


def views_by_attend(spec, name, *, back=False):
    way = way_of(spec, name)
    graph = way.lowered.graph
    setting = Setting.of(graph, spec, way.schedule.priced)
    return [(bool(setting.copied.intersection(n.args)), views_of(n, setting, back=back)) for n, _ in graph.of(Attend)]


def test_rows_that_are_folded_or_copied_keep_the_host_busy():
    grouped = spec_of(P.grouped([256, 512], [1, 2]), training=True)
    longnet = spec_of(P.longnet([256, 512], [1, 2]), training=True)
    views = dict(views_by_attend(grouped, "lattice-views > eager (cudnn)"))
    folded = dict(views_by_attend(grouped, "lattice > eager (cudnn)"))
    assert views == {False: 1}
    assert folded[False] > views[False]
    copied = dict(views_by_attend(longnet, "lattice > eager (cudnn)"))[True]
    assert copied > 1
    assert dict(views_by_attend(longnet, "lattice > eager (cudnn)", back=True))[True] > copied
    assert dict(views_by_attend(longnet, "lattice-batch > eager (cudnn)"))[True] == 0


def test_plain_torch_makes_indices_for_rows_and_a_mask_for_causal_ones():
    name, grouped = "lattice > eager (math)", spec_of(P.grouped([256, 512], [1, 2]))
    assert all(n > 30 for _, n in views_by_attend(grouped, name))
    assert views_by_attend(spec_of(), "dense > eager (math)") == [(False, 0)]
    whole, causal = (cost_of(spec_of(causal=c), "dense > eager (math)") for c in (False, True))
    assert causal.launches == whole.launches + 6


@pytest.mark.parametrize(("longer", "chosen"), [(1.0, "efficient"), (1.04, "efficient"), (1.06, "cudnn")])
def test_of_near_ties_the_schedule_wins_that_was_run_on_hardware(longer, chosen, monkeypatch):
    untried = attrs.evolve(eager.CUDNN, tested="")
    monkeypatch.setattr(eager.Eager, "schedules", lambda self, device: (untried, eager.EFFICIENT))
    price_of = search.priced

    def priced_so(graph, spec, schedule, target):
        return attrs.evolve(price_of(graph, spec, schedule, target), seconds=1.0 if schedule is untried else longer)

    monkeypatch.setattr(search, "priced", priced_so)
    found = search.search(spec_of(causal=True), TARGET, backend="eager")
    assert found.schedule.name == found.candidates[0].schedule == chosen
