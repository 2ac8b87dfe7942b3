"""What a fit of the cost model finds, and what of the model it can tell apart."""

from __future__ import annotations

import attrs
import pytest

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import catalogue, resolve
from attnplan.cost.fit import Sample, fitted
from attnplan.cost.model import loads, timed
from attnplan.cost.parameters import CALIBRATED, defaults
from attnplan.cost.setting import Setting
from attnplan.search import every_way


def test_attends_of_one_launch_fill_its_waves_together():
    """Six small attends by themselves leave most of the device idle; in one launch they share it."""
    spec = AttentionSpec(seq_len=4096, heads=6, head_dim=64, dtype="bfloat16",
                         pattern=P.grouped([1024, 2048, 4096], [1, 2, 4]))  # fmt: skip
    device, published = catalogue()["h100"], defaults("cuda")
    ways = {c.name: w for c, w in every_way(spec, resolve("h100")) if w is not None}
    way = ways["lattice-batch > eager (cudnn)"]
    found = loads(Setting.of(way.lowered.graph, spec, way.schedule.priced))
    attends = [x for x in found if x.work is not None]
    assert len(attends) > 1
    together = attends[0].work.launch
    assert all(x.work.launch == together for x in attends)
    assert together == sum(x.work.blocks * x.work.rows for x in attends)
    apart = [attrs.evolve(x, work=attrs.evolve(x.work, launch=0.0)) for x in attends]
    in_one, each = (
        sum(op.seconds for op in timed(x, spec, way.schedule.priced, device, published)[0]) for x in (attends, apart)
    )
    assert in_one < 0.7 * each
    twice = [attrs.evolve(x, work=attrs.evolve(x.work, blocks=x.work.blocks * 4096)) for x in apart]
    shares = [attrs.evolve(x, work=attrs.evolve(x.work, launch=together * 4096)) for x in twice]
    many, same = (
        sum(op.seconds for op in timed(x, spec, way.schedule.priced, device, published)[0]) for x in (twice, shares)
    )
    assert same == pytest.approx(many, rel=0.02), "where each fills the device, it makes no difference"


@pytest.mark.parametrize(("name", "strategy"), [("own_join", "lattice-batch"), ("own_copy", "lattice-batch"),
                                                ("join", "lattice"), ("copy", "lattice")])  # fmt: skip
def test_kernels_of_our_own_have_bandwidths_of_their_own(name, strategy):
    spec = AttentionSpec(
        seq_len=32_768, heads=8, head_dim=64, dtype="bfloat16", pattern=P.longnet([1024, 4096], [1, 4])
    )
    device, published = catalogue()["h100"], defaults("cuda")
    slower = published.replaced({name: 0.1 * published.numbers()[name]}, CALIBRATED)

    def device_seconds(candidate, table):
        way = next(w for c, w in every_way(spec, resolve("h100")) if c.name == f"{candidate} > eager (cudnn)")
        found = loads(Setting.of(way.lowered.graph, spec, way.schedule.priced))
        return sum(op.seconds for op in timed(found, spec, way.schedule.priced, device, table)[0])

    for candidate in ("lattice", "lattice-batch"):
        matters = device_seconds(candidate, slower) > 1.05 * device_seconds(candidate, published)
        assert matters == (candidate == strategy)


def test_a_machine_that_is_slower_throughout_is_known_from_one_kernel():
    device, published = catalogue()["h100"], defaults("cuda")
    slower = {n: x / 2 for n, x in published.numbers().items() if "peak" in n.split("/")}
    truth = published.replaced(slower, CALIBRATED)
    samples = []
    for rows in (4096, 16_384):
        spec = AttentionSpec(seq_len=rows, heads=16, head_dim=64, dtype="bfloat16")
        for candidate, way in every_way(spec, resolve("h100")):
            if way is not None and candidate.name == "dense > eager (cudnn)":
                found = loads(Setting.of(way.lowered.graph, spec, way.schedule.priced))
                ops, total, host = timed(found, spec, way.schedule.priced, device, truth)
                samples.append(Sample.of(found, spec, way.schedule.priced, total, sum(op.seconds for op in ops), host))
    table, _ = fitted(samples, device, published)
    for kernel in ("cudnn", "fa4"):
        ratio = table.kernels[kernel].forward.peak[128] / published.kernels[kernel].forward.peak[128]
        assert ratio == pytest.approx(0.5, rel=0.15), kernel


def test_a_fit_finds_the_numbers_that_made_the_times():
    """Times made by a table with other rates and overheads lead back to it."""
    device, published = catalogue()["h100"], defaults("cuda")
    truth = published.replaced(
        {
            "kernels/cudnn/forward/peak/64": 0.35,
            "kernels/cudnn/forward/half/64": 400.0,
            "kernels/cudnn/host": 9e-5,
            "kernels/flash-cuda/forward/peak/64": 0.4,
        },
        CALIBRATED,
    )
    samples = []
    for rows, heads in ((256, 4), (512, 8), (1024, 16), (4096, 16), (8192, 16), (16_384, 4)):
        for causal in (False, True):
            spec = AttentionSpec(seq_len=rows, heads=heads, head_dim=64, causal=causal)
            for candidate, way in every_way(spec, resolve("h100")):
                if way is not None and candidate.schedule in ("cudnn", "flash") and candidate.backend == "eager":
                    kernel = way.schedule.priced
                    found = loads(Setting.of(way.lowered.graph, spec, kernel))
                    ops, total, host = timed(found, spec, kernel, device, truth)
                    samples.append(Sample.of(found, spec, kernel, total, sum(op.seconds for op in ops), host))
    table, _ = fitted(samples, device, published)
    curve = table.kernels["cudnn"].forward
    assert curve.peak[64] == pytest.approx(0.35, rel=0.1)
    assert curve.half[64] == pytest.approx(400, rel=0.3)
    cudnn = table.kernels["cudnn"]
    assert cudnn.host * cudnn.quick == pytest.approx(9e-5 * published.kernels["cudnn"].quick, rel=0.1)
    assert table.kernels["flash-cuda"].forward.peak[64] == pytest.approx(0.4, rel=0.1)
    moved = {n: table.numbers()[n] / x for n, x in published.numbers().items() if n.startswith("kernels/fa4/")}
    assert len({round(x, 3) for n, x in moved.items() if "peak" in n}) == 1, "it moves with the others"
    assert all(x == pytest.approx(1) for n, x in moved.items() if "half" in n or "causal" in n)
    off = [abs(e) for s in samples for e, _ in s.errors(device, table)]
    assert max(off) < 0.1


def test_what_a_run_has_in_common_says_nothing_of_one_kernel():
    """One kernel was measured on slow hosts, the other on quick ones, both beside a third."""
    device, published = catalogue()["h100"], defaults("cuda")
    truth = published.replaced({"kernels/cudnn/host": 9e-5}, CALIBRATED)

    def samples(named):
        found = []
        for number, rows in enumerate((64, 128, 256, 384, 512, 640, 768, 896)):
            slow = number % 2 == 0
            spec = AttentionSpec(seq_len=rows, heads=2, head_dim=64)
            for candidate, way in every_way(spec, resolve("h100")):
                measured = ("cudnn" if slow else "flash", "efficient")
                if way is not None and candidate.backend == "eager" and candidate.schedule in measured:
                    kernel = way.schedule.priced
                    asked = loads(Setting.of(way.lowered.graph, spec, kernel))
                    ops, total, host = timed(asked, spec, kernel, device, truth)
                    pace, alone = (1.6 if slow else 0.8), sum(op.seconds for op in ops)
                    seconds = max(alone, total - host + pace * host)
                    run = f"run {number}" if named else ""
                    found.append(Sample.of(asked, spec, kernel, seconds, alone, pace * host, run=run))
        return found

    def ratio(named):
        kernels = fitted(samples(named), device, published)[0].kernels
        return of(kernels["cudnn"]) / of(kernels["flash-cuda"])

    def of(kernel):
        return kernel.quick * kernel.host + kernel.call

    want = of(truth.kernels["cudnn"]) / of(truth.kernels["flash-cuda"])
    named, unnamed = ratio(named=True), ratio(named=False)
    assert named < 1.4 * want
    assert unnamed > 1.7 * want


def host_of(spec, name):
    way = next(w for c, w in every_way(spec, resolve("h100")) if c.name == name)
    kernel = way.schedule.priced
    found = loads(Setting.of(way.lowered.graph, spec, kernel))
    return timed(found, spec, kernel, catalogue()["h100"], defaults("cuda"))[2], found


def test_what_the_host_does_for_rows_lists_and_documents_is_priced_and_takes_nothing_of_the_device():
    table = defaults("cuda")
    ladder = AttentionSpec(seq_len=4096, heads=4, head_dim=64, dtype="bfloat16", pattern=P.longnet([512, 1024], [1, 2]))
    attends = {name: [x for x in host_of(ladder, f"{name} > eager (cudnn)")[1] if x.work] for name in
               ("lattice-views", "lattice-batch")}  # fmt: skip
    assert [x.forward.views for x in attends["lattice-views"]] == [1] * len(attends["lattice-views"])
    assert not any(x.forward.views for x in attends["lattice-batch"])
    fused = host_of(ladder, "lattice > compiled (sdpa-cudnn)")[1]
    assert {x.forward.views for x in fused if x.work} == {3}
    gathered = host_of(attrs.evolve(ladder, training=True), "lattice-batch > eager (cudnn)")[1]
    assert [x.backward.views for x in gathered if x.kind == "take" and x.forward.launches] == [5]

    plain = AttentionSpec(seq_len=4096, heads=4, head_dim=64, dtype="bfloat16", causal=True)
    packed = attrs.evolve(plain, pattern=P.documents())
    flash = table.kernels["flash-cuda"]
    by_name = {"dense > flash (fa4)": table.kernels["fa4"].packed,
               "dense > eager (flash)": flash.packed + (1 - flash.quick) * flash.host}  # fmt: skip
    for name, more in by_name.items():
        apart = host_of(packed, name)[0] - host_of(plain, name)[0]
        assert apart == pytest.approx(6 * table.operator + more, rel=1e-6)
    blocks = AttentionSpec(seq_len=4096, heads=4, head_dim=64, dtype="bfloat16",
                           pattern=P.random_blocks(0.2, block_size=128))  # fmt: skip
    dense = attrs.evolve(blocks, pattern=P.full())
    apart = host_of(blocks, "blocks > flash (fa4)")[0] - host_of(dense, "dense > flash (fa4)")[0]
    assert apart == pytest.approx(4 * table.operator)
    (one,) = (x for x in host_of(blocks, "blocks > flash (fa4)")[1] if x.work)
    assert one.forward.launches == 1, "views start no kernel"
