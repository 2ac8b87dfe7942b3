"""What ``bench.longnet`` makes of its rows: ratios beside their targets, timelines, and the picture over lengths."""

from __future__ import annotations

import time
from xml.etree import ElementTree

import pytest

from bench import longnet_lengths_plot, longnet_table, longnet_timeline
from bench.deadline import deadline


def rows(case, *, causal=False, backward=False, **ms):
    names = {"kernels": "kernels fa4", "views": "plan views fa4", "auto": "plan auto", "eager": "hand-written eager"}
    names |= {"compiled": "hand-written compiled", "published": "published on xformers"}
    where = {"case": case, "causal": causal, "backward": backward}
    return [{**where, "name": names[n], "ms": t, "peak_mib": 100 * t, "host_ms": 0.1} for n, t in ms.items()]


def found(given, **options):
    return {t["what"]: (t["value"], t["met"]) for t in longnet_table.targets(given, **options)}


def test_each_ratio_stands_beside_its_target():
    got = found(rows("A", kernels=1.0, views=1.10, auto=1.16, eager=5.0, compiled=2.2), on_cpu=False)
    assert got["A forward, auto: plan / kernels alone"] == (1.16, False)
    assert got["A forward, best plan by hand: plan / kernels alone"] == (1.1, True)
    assert got["A forward: auto / best plan by hand (plan views fa4)"] == (1.0545, False)
    assert got["A forward, auto: eager hand-written / plan"] == (4.3103, True)
    assert got["A forward, auto: compiled hand-written / plan"] == (1.8966, False)
    assert got["A forward, auto: peak memory / compiled hand-written's"] == (0.5273, False)


def test_the_backward_counts_causal_or_not_and_grouped_heads_count_in_milliseconds():
    got = found(rows("B", causal=True, backward=True, kernels=20.0, auto=22.1), on_cpu=False)
    assert got == {"B causal forward + backward, auto: plan / kernels alone": (1.105, False)}
    assert not found(rows("B", causal=True, kernels=20.0, auto=22.1), on_cpu=False)
    assert found(rows("gB", kernels=2.4, auto=2.69), on_cpu=False) == {"gB forward, auto: ms": (2.69, True)}
    got = found(rows("gA", backward=True, auto=2.0, published=5.9), on_cpu=False)
    assert got == {"gA forward + backward, auto: published class / plan": (2.95, False)}


def test_on_a_cpu_a_plan_is_compared_with_eager_code():
    got = found(
        rows("A/8", kernels=1.0, auto=1.2, eager=1.1) + rows("gA/8", causal=True, auto=1.0, eager=4.0), on_cpu=True
    )
    assert got == {
        "A/8 forward, auto: eager hand-written / plan": (0.9167, False),
        "gA/8 causal forward, auto: eager hand-written / plan": (4.0, True),
    }


def test_a_timeline_has_its_kernels_and_gaps():
    spans = [(0.0, 10.0, "attend"), (12.0, 20.0, "pull"), (18.0, 30.0, "attend"), (45.0, 50.0, "pull")]
    got = longnet_timeline.summary(spans)
    assert (got["span_us"], got["busy_us"], got["gaps_us"]) == (10.0, 7.0, 3.4)
    assert got["kernels"][0] == {"kernel": "attend", "calls": 0.4, "us": 4.4}
    assert got["gaps"][0] == {"between": "attend | pull", "us": 3.4}
    assert longnet_timeline.summary([]) == {"kernels": [], "gaps": []}


def test_the_picture_over_lengths_has_a_line_for_each_contestant():
    given = [
        {"name": n, "tokens": t, "ms": t * ns / 1e6}
        for n, ns in (("plan", 20.0), ("kernels", 18.0))
        for t in (1024, 2048)
    ]
    tree = ElementTree.fromstring(longnet_lengths_plot.svg([*given, {"failed": "no time left"}]))
    lines = [x for x in tree.iter() if x.tag.endswith("polyline")]
    assert len(lines) == 2
    ys = [[float(p.split(",")[1]) for p in x.get("points").split()] for x in lines]
    assert ys[0][0] == ys[0][1] < ys[1][0], "both are flat, and the slower one is higher"
    assert longnet_lengths_plot.flatness([*given, {"name": "plan", "tokens": 4096, "ms": 4096 * 23e-6}], 2048) == {
        "plan": (4096, 1.15),
        "kernels": (2048, 1.0),
    }
    with pytest.raises(ValueError, match="nothing to draw"):
        longnet_lengths_plot.svg([])


def test_a_step_that_hangs_ends():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="took more than 0 s"), deadline(0.1):
        time.sleep(5)
    assert time.monotonic() - start < 3
    with deadline(5):
        pass
