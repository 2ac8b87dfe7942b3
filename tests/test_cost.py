"""Costs: one rule per op, figures with sources, refusals in words."""

from __future__ import annotations

import json

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.backends import registry
from attnplan.cost import Cost, KernelModel, catalogue, price, resolve
from attnplan.cost.device import local_cpu
from attnplan.cost.joins import rows_there
from attnplan.cost.memory import peak_bytes
from attnplan.cost.rules import RULES, backward_cost, forward_cost
from attnplan.cost.setting import Setting, value_bytes
from attnplan.errors import PassError, SpecError
from attnplan.ir import Input, Op
from attnplan.ir.ops import OPS
from attnplan.lower import lower
from attnplan.search import candidates, every_way, lowerings
from attnplan.spec import DTYPES
from tests import strategies as some

KERNEL = KernelModel(efficiency=0.5)
SPEC = AttentionSpec(seq_len=4096, heads=8, head_dim=64, pattern=P.longnet([512, 1024], [1, 2]), causal=True)


def graph_of(spec, strategy="lattice"):
    return {x.strategy: x.graph for x in lowerings(spec)}[strategy]


def setting_of(spec, kernel=KERNEL, strategy="lattice"):
    graph = graph_of(spec, strategy)
    return graph, Setting.of(graph, spec, kernel)


# ---------------------------------------------------------------------------------------------------------- rules


def test_every_op_has_a_rule():
    assert set(RULES) == set(OPS.values())


def test_an_op_without_a_rule_is_an_error_and_never_free():
    graph, setting = setting_of(SPEC)
    some_input = next(n for n in graph if isinstance(n.op, Input))
    with pytest.raises(PassError, match=r"op 'input' has no cost rule; add one to attnplan/cost/rules\.py"):
        forward_cost(some_input, setting, {k: r for k, r in RULES.items() if k is not Input})

    @attrs.frozen
    class Unheard(Op):
        name = "unheard"

    with pytest.raises(PassError, match="op 'unheard' has no cost rule"):
        forward_cost(attrs.evolve(some_input, op=Unheard()), setting)


amounts = st.integers(0, 2**40)
costs = st.builds(Cost, amounts, amounts, amounts, amounts, st.integers(0, 1000))


@given(costs, costs, costs)
def test_costs_add_up(a, b, c):
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + Cost() == a
    assert (a + b).launches == a.launches + b.launches


def test_batch_multiplies_work_and_not_launches():
    for strategy in ("dense", "lattice"):
        one, many = (
            sum((forward_cost(n, s) for n in g), Cost())
            for g, s in (setting_of(attrs.evolve(SPEC, batch=b), strategy=strategy) for b in (2, 6))
        )
        assert (many.flops, many.exps) == (3 * one.flops, 3 * one.exps)
        assert many.launches == one.launches


def test_the_lattice_computes_the_pairs_of_the_pattern_and_little_else():
    spec = attrs.evolve(SPEC, causal=False)
    graph, setting = setting_of(spec)
    flops = sum(forward_cost(n, setting).flops for n in graph)
    assert flops == 4 * spec.count_pairs() * spec.head_dim
    dense, setting = setting_of(spec, strategy="dense")
    assert sum(forward_cost(n, setting).flops for n in dense) == 2 * 4 * 8 * 4096**2 * 64


def test_the_backward_costs_two_and_a_half_forwards():
    graph, setting = setting_of(SPEC)
    attend = next(n for n in graph if n.op.name == "attend")
    assert backward_cost(attend, setting).flops == 2.5 * forward_cost(attend, setting).flops


@pytest.mark.parametrize("writes_into", [False, True])
def test_disjoint_parts_are_copied_only_where_no_kernel_writes_them(writes_into):
    """What is emitted: fill the LSE and copy each part's, copy each part that is not in the output already."""
    spec = AttentionSpec(seq_len=64, heads=4, head_dim=16, dtype="bfloat16", pattern=P.documents([16, 40, 8]))
    graph = next(x.graph for x in lowerings(spec) if x.strategy == "decompose")
    join = graph[graph.output.args[0]]
    kernel = attrs.evolve(KERNEL, writes_into=writes_into)
    rows = 4 * 64
    cost = forward_cost(join, Setting.of(graph, spec, kernel))
    assert cost.bytes == (0 if writes_into else 2 * rows * 16 * 2) + 3 * rows * 4
    assert cost.launches == 1 + 3 + (0 if writes_into else 3)


def test_rows_that_a_kernel_wrote_are_not_moved_by_the_join():
    spec = AttentionSpec(seq_len=4096, heads=8, head_dim=64, dtype="bfloat16", pattern=P.grouped([512, 1024], [1, 2]))
    found = resolve("h100")
    way = next(w for c, w in every_way(spec, found) if w is not None and c.name == "lattice-views > flash (fa4)")
    graph, kernel = way.lowered.graph, way.schedule.priced
    join = graph[graph.output.args[0]]
    setting = Setting.of(graph, spec, kernel)
    parts = sum(value_bytes(n, setting) for n in graph.args(join))
    there = rows_there(graph, join, 0, writes_into=True)
    assert there > 0
    assert forward_cost(join, setting).bytes == parts + value_bytes(join, setting) - 2 * there * 64 * 2


def test_rows_that_no_part_covers_are_filled():
    spec = AttentionSpec(seq_len=64, heads=4, head_dim=16, dtype="bfloat16", pattern=P.documents([16, 48]))
    graph = next(x.graph for x in lowerings(spec) if x.strategy == "decompose")
    join, setting = graph[graph.output.args[0]], Setting.of(graph, spec, KERNEL)
    whole, first = (forward_cost(attrs.evolve(join, args=args), setting) for args in (join.args, join.args[:1]))
    assert (whole.launches, first.launches) == (1 + 2 + 2, 1 + 1 + 1 + 1)
    assert whole.bytes - first.bytes == 2 * (4 * 48 * 16 * 2) - 4 * 64 * 16 * 2


# ---------------------------------------------------------------------------------------------------------- prices


@pytest.mark.parametrize("device", [*catalogue(), "cpu"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "pattern", [P.full(), P.window(64), P.longnet([512, 1024], [1, 2]), P.documents()], ids=lambda p: type(p).__name__
)
def test_longer_sequences_cost_more(device, training, pattern):
    found = resolve(device).device
    for strategy in ("dense", "lattice"):
        seconds, peaks = [], []
        for length in (256, 512, 1024, 2048, 4096):
            spec = AttentionSpec(
                seq_len=length, heads=8, head_dim=64, pattern=pattern, causal=True, dtype="float32", training=training
            )
            graphs = {x.strategy: x.graph for x in lowerings(spec)}
            priced = price(graphs.get(strategy, graphs["dense"]), spec, KERNEL, found)
            seconds.append(priced.seconds)
            peaks.append(priced.peak_bytes)
        assert seconds == sorted(set(seconds))
        assert peaks == sorted(peaks)


def test_training_more_heads_and_more_features_cost_more():
    device = catalogue()["h100"]

    def seconds(**changes):
        spec = attrs.evolve(SPEC, **changes)
        return price(graph_of(spec), spec, KERNEL, device).seconds

    cheap = seconds()
    assert all(
        seconds(**c) > cheap for c in ({"training": True}, {"batch": 2}, {"head_dim": 128}, {"dtype": "float32"})
    )


@given(some.specs())
def test_predictions_are_sane_for_any_spec(spec):
    for lowered in lowerings(spec):
        for kernel in (KERNEL, KernelModel(0.3, skips_causal=False, materialises=True, tile=1)):
            found = price(lowered.graph, spec, kernel, catalogue()["cpu-2core"])
            assert found.seconds > sum(op.seconds for op in found.ops), "a call takes longer than its ops"
            assert len(found.ops) == len(lowered.graph)
            assert found.peak_bytes >= 0
            assert all(0 <= op.roofline <= 1 for op in found.ops)
            assert all(op.seconds >= op.host >= 0 for op in found.ops), "on a CPU the host computes"
            assert found.host >= sum(op.host for op in found.ops)
            assert all((op.seconds > 0) == (op.cost != Cost()) for op in found.ops)


@pytest.mark.parametrize("device", catalogue())
@pytest.mark.parametrize("length", [64, 4096, 262_144])
def test_the_share_of_the_roofline_is_a_share(device, length):
    for candidate in candidates(attrs.evolve(SPEC, seq_len=length, kv_len=length, dtype="float16"), resolve(device)):
        if candidate.prediction:
            assert all(0 <= op.roofline <= 1 for op in candidate.prediction.ops)
            assert {op.bound for op in candidate.prediction.ops} <= {"compute", "memory", "launch"}


def test_scores_in_memory_count_where_they_are_written():
    spec = attrs.evolve(SPEC, pattern=P.full(), causal=False, dtype="float32")
    graph = lower(spec)
    scores = 8 * 4096**2 * 4
    fused, written = (
        peak_bytes(graph, Setting.of(graph, spec, attrs.evolve(KERNEL, materialises=m))) for m in (False, True)
    )
    assert fused < scores <= written


# --------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("name", catalogue())
def test_the_figures_of_a_device_are_sane(name):
    device = catalogue()[name]
    assert device.name == name
    assert len(device.title) > 5
    assert len(device.source) > 10, "every figure has a source"
    assert set(device.flops) <= {*DTYPES, "tf32"}
    assert 1e10 <= device.flops["float64"] <= device.flops["float32"] <= 1e14
    assert device.flops["float32"] <= device.flops["float16"] < 1e16
    assert device.flops.get("bfloat16", device.flops["float16"]) == device.flops["float16"]
    assert 1e9 < device.bandwidth < 1e13
    assert 2**32 < device.memory < 2**40
    assert 10 < device.flops["float32"] / device.bandwidth * 4 < 1000, "operations for each float32 that is read"
    if device.kind == "cuda":
        assert device.capability is not None
        assert ("bfloat16" in device.flops) == ("tf32" in device.flops) == (device.capability >= (8, 0))
        assert device.match
    else:
        assert device.kind == "cpu"


def test_products_are_told_apart():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "Tesla V100-SXM2-32GB": "v100", "Tesla T4": "t4",
             "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA GeForce GTX 1080": "gtx1080", "NVIDIA B200": "b200"}  # fmt: skip
    for product, name in names.items():
        assert [d.name for d in catalogue().values() if any(part in product for part in d.match)] == [name]


def test_an_unknown_dtype_has_no_rate_and_tf32_only_where_allowed():
    h100, v100 = catalogue()["h100"], catalogue()["v100"]
    assert v100.rate("bfloat16") == 0
    assert h100.rate("float32") < h100.rate("float32", "tf32")
    assert v100.rate("float32") == v100.rate("float32", "tf32")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10", "unknown device 'h10'; did you mean 'h100'"),
        ("H1000", "unknown device 'H1000'; did you mean 'h100'"),
        ("cpuu", "unknown device 'cpuu'; did you mean 'cpu'"),
        ("toaster", "unknown device 'toaster'; known: a100, auto, b200, cpu,"),
    ],
)
def test_an_unknown_device_gets_a_suggestion(name, message):
    with pytest.raises(SpecError, match=message):
        resolve(name)


def test_the_cpu_that_is_here_says_where_its_figures_come_from():
    target = resolve("cpu")
    assert target.torch_device == "cpu"
    assert "cores x" in target.device.source
    assert target.device is local_cpu()
    assert resolve("H100").device is catalogue()["h100"], "names are found in any case"
    assert resolve("h100").torch_device is None


# -------------------------------------------------------------------------------------------------------- refusals

GPUS = ("gtx1080", "t4", "v100", "a100", "rtx4090", "h100", "b200")
REFUSABLE = {
    "causal": {"causal": True},
    "longnet": {"pattern": P.longnet([512, 1024], [1, 2]), "causal": True},
    "window": {"pattern": P.window(128), "causal": True},
    "wide heads": {"head_dim": 264},
    "odd heads": {"head_dim": 36},
    "softcap and value_dim": {"softcap": 30.0, "value_dim": 32},
    "dropout and tf32": {"dropout": 0.1, "precision": "tf32"},
    "200 features": {"head_dim": 200},
    "documents, grouped queries": {"pattern": P.documents() & P.window(64, 8), "kv_heads": 2},
    "longformer": {"pattern": P.window(128) | P.global_tokens(16)},
    "whole blocks": {"pattern": P.random_blocks(0.1, 256, 0)},
    "partial blocks": {"pattern": P.random_blocks(0.1, 100, 0)},
    "one key": {"seq_len": 4, "kv_len": 1},
}


def said(spec, device):
    """Return a line for each reason, with every way that it refuses, and one for what is accepted."""
    found = {}
    for candidate in sorted(candidates(spec, resolve(device)), key=lambda c: c.name):
        for reason in candidate.reasons or ("accepts",):
            ways = found.setdefault((f"{candidate.backend} ({candidate.schedule})", reason), [])
            ways.append(candidate.strategy)
    accepted = [f"{way}: {', '.join(names)}" for (way, reason), names in found.items() if reason == "accepts"]
    refused = [f"  {way}: {reason}" for way, reason in found if reason != "accepts"]
    return ["  accepts " + "; ".join(accepted), *refused]


def test_refusals_read_as_reviewed(golden):
    lines = []
    for device in ("cpu-2core", *GPUS):
        old = device in ("gtx1080", "t4", "v100")
        for dtype in ("float16" if old else "bfloat16", "float32"):
            for name, options in REFUSABLE.items():
                spec = AttentionSpec(**{"seq_len": 4096, "heads": 8, "head_dim": 64, "dtype": dtype, **options})
                lines += [f"# {name}, {dtype}, {device}", *said(spec, device)]
    lines += [
        "# full, bfloat16, gtx1080",
        *said(AttentionSpec(seq_len=64, heads=8, head_dim=64, dtype="bfloat16"), "gtx1080"),
    ]
    golden("refusals", "\n".join(lines) + "\n")


def test_backends_declare_schedules_for_every_kind_of_device():
    for backend in registry().backends.values():
        for device in catalogue().values():
            schedules = backend.schedules(device)
            assert len({s.name for s in schedules}) == len(schedules)
            assert schedules or device.kind == "cpu", "what needs a GPU has none for a CPU"
            assert all(0 < s.kernel.efficiency <= 1 and s.title for s in schedules)
    json.dumps({b.name: b.versions() for b in registry().backends.values()})
