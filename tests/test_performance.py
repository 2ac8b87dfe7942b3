"""What docs say about the planner's judgement comes from committed rows."""

from __future__ import annotations

import json

import attrs
import pytest

from attnplan.cost import price
from attnplan.harness import write_rows
from attnplan.harness.entrants import digest
from attnplan.search import every_way
from bench import (
    blocks_plot,
    budget_curve,
    grid,
    judge,
    longnet_lengths_plot,
    performance,
    targets,
    targets_longnet,
    transfer,
)
from bench.judged import _target, catalogue, priceable, read
from bench.regret import summary as regret_summary


def test_the_page_is_up_to_date():
    text = performance.PAGE.read_text(encoding="utf-8")
    assert performance.updated(text) == text, "run python -m bench.performance"


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_the_grids_are_what_was_promised(name):
    cases = grid.GRIDS[name]()
    families = dict(grid.counts(cases))
    assert all(families.values())
    assert {c.spec.training for c in cases} == {True, False}
    for first in range(14, 40):  # a run that is cut short has something of every family
        assert {c.family for c in cases[:first]} == set(families)
    if name == "gpu":
        assert len(cases) >= 120
        assert {64, 128, 256} <= {c.spec.head_dim for c in cases}
        sizes = {c.spec.batch * c.spec.heads for c in cases}
        assert min(sizes) == 1
        assert max(sizes) >= 128
        assert min(c.spec.shape.seq_len for c in cases) <= 128
        assert max(c.spec.shape.seq_len for c in cases) >= 2**18


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of rows as a small CPU would write them, with times that the model can learn."""
    cases = [c for c in grid.cpu() if c.spec.shape.seq_len <= 2048]
    made = []
    device = catalogue()["cpu-2core"]
    for case in cases:
        for candidate, way in every_way(case.spec, _target(device)):
            if way is not None and candidate.backend == "eager":
                facts = {"spec": case.name, "family": case.family, "kind": "candidate", "candidate": candidate.name,
                         "backend": candidate.backend, "graph": digest(way.lowered.graph)}  # fmt: skip
                seconds = 3 * price(way.lowered.graph, case.spec, way.schedule.priced, device).seconds
                made.append({**facts, "seconds": seconds, "spread": 0.0, "rounds": [seconds] * 4, "host": seconds,
                             "device": [], "ok": True, "error": 1e-7})  # fmt: skip
        made.append({"spec": case.name, "family": case.family, "kind": "peer", "candidate": "by hand: sdpa",
                     "backend": "sdpa", "seconds": 1.0, "spread": 0.0, "rounds": [1.0] * 4, "ok": True})  # fmt: skip
    path = tmp_path_factory.mktemp("rows") / "regret-cpu-2core.json"
    write_rows(path, {"grid": "cpu", "environment": {"device": "cpu", "versions": {"torch": "x"}}}, made)
    return path, made


@pytest.fixture(scope="module")
def judgement(rows):
    device, judged, stale = read([rows[0]])
    assert stale == 0
    return judged, judge.judge(judged, device, 1)


def test_a_model_that_can_learn_the_times_has_no_regret(judgement):
    judged, found = judgement
    assert found["regret"]["auto"]["worst"] < 0.05
    assert found["MAPE dense"] < 0.15
    assert found["MAPE data sheet"] == pytest.approx(2 / 3, abs=0.05)
    assert found["regret"]["always SDPA"]["mean"] > 1
    assert found["top-1 within noise"] > 0.9
    assert found["fitted specs"] + found["held-out specs"] == len(judged)
    assert "seed 1" in judge.render([found])


def test_halves_keep_forward_and_training_together_and_follow_the_seed(rows):
    _, judged, _ = read([rows[0]])
    first, second = judge.halves(judged, 1)
    shapes = [{j.case.name.rsplit(",", 1)[0] for j in half} for half in (first, second)]
    assert not shapes[0] & shapes[1]
    assert len(first) + len(second) == len(judged)
    assert [j.case.name for j in judge.halves(judged, 1)[0]] == [j.case.name for j in first]
    assert [j.case.name for j in judge.halves(judged, 2)[0]] != [j.case.name for j in first]


def test_rows_of_graphs_that_changed_are_left_out(rows, tmp_path):
    path = tmp_path / "regret-cpu-2core.json"
    made = [{**r, "graph": "0"} if r["kind"] == "candidate" and i % 2 else r for i, r in enumerate(rows[1])]
    write_rows(path, {"grid": "cpu", "environment": {"device": "cpu", "versions": {}}}, made)
    _, judged, stale = read([path])
    assert stale == sum(r.get("graph") == "0" for r in made) > 0
    assert all(w.sample is not None for j in judged for w in j.ways if w.row["kind"] == "candidate")


def test_a_choice_is_judged_among_what_one_environment_can_run(rows, tmp_path):
    """What needs torch alone is lent to environments that did not measure it, and learned from once."""
    by_spec = {name: [r for r in rows[1] if r["spec"] == name] for name in {r["spec"] for r in rows[1]}}
    name, mine = next((n, found) for n, found in by_spec.items() if sum(r["kind"] == "candidate" for r in found) > 2)
    first, second, third = [r for r in mine if r["kind"] == "candidate"][:3]
    hand = next(r for r in mine if r["kind"] == "peer")
    of_library = {**third, "backend": "xformers"}
    files = {
        "a": ({"torch": "x", "xformers": "x"}, [first, of_library, hand]),
        "b": ({"torch": "x", "flash-attn-4": "x"}, [second, {**first, "seconds": 9.0}]),
    }
    paths = []
    for stem, (versions, found) in files.items():
        paths.append(tmp_path / f"{stem}.json")
        write_rows(paths[-1], {"grid": "cpu", "environment": {"device": "cpu", "versions": versions}}, found)
    _, judged, stale = read(paths)
    assert stale == 0
    a, b = judged
    told = [[(w.name, w.lent) for w in one.ways] for one in (a, b)]
    assert told[0] == [(r["candidate"], False) for r in (first, of_library, hand)] + [(second["candidate"], True)]
    assert told[1] == [(r["candidate"], False) for r in (second, first)] + [(hand["candidate"], True)]
    assert (a.name, b.name) == (f"{name} [xformers]", f"{name} [flash-attn-4]")
    seconds = {w.name: w.seconds for w in b.ways}
    assert seconds[first["candidate"]] == 9.0, "each environment by its own run"
    assert [len(one.samples) for one in (a, b)] == [2, 2], "what is lent is no sample"
    assert read(paths[:1])[1][0].name == name


def test_regret_is_against_the_best_of_a_kind(rows):
    _, judged, _ = read([rows[0]])
    one = judged[0]
    fastest = min(one.ways, key=lambda w: w.seconds)
    slowest = max((w for w in one.ways if w.automatic), key=lambda w: w.seconds)
    assert judge.losses([one], lambda j: fastest) == [0.0]
    assert judge.losses([one], lambda j: slowest) == [slowest.seconds / fastest.seconds - 1]
    row = {**fastest.row, "kind": "peer", "backend": "sdpa", "seconds": fastest.seconds / 2}
    hand = attrs.evolve(fastest, name="by hand: sdpa", sample=None, automatic=False, row=row)
    beside = attrs.evolve(one, ways=(*one.ways, hand))
    assert judge.losses([beside], lambda j: fastest) == [0.0], "a call by hand is no candidate"
    assert judge.losses([beside], lambda j: fastest, "best") == [1.0]
    assert judge.losses([beside], lambda j: fastest, "best_candidate") == [0.0]
    assert judge.losses([one], lambda j: None) == []
    (found,) = judge._beaten([beside], lambda j: fastest)
    assert (found["auto"], found["faster"], found["slower by"]) == (fastest.name, "by hand: sdpa", 1.0)
    missing = attrs.evolve(hand, name="by hand: fa4", row={**row, "backend": "fa4"})
    other = attrs.evolve(one, ways=(*one.ways, missing))
    assert judge.losses([other], lambda j: fastest, "best") == [0.0], "no candidate had that library"
    assert list(judge._beaten([other], lambda j: fastest)) == []


def test_auto_is_judged_with_its_share_of_compiling(rows):
    device, judged, _ = read([rows[0]])
    choose = judge.by_price(device, judge.defaults("cpu"))
    one = next(j for j in judged if sum(w.automatic for w in j.ways) > 1)
    first = choose(one)
    ways = tuple(attrs.evolve(w, once=1.0) if w is first else w for w in one.ways)
    second = choose(attrs.evolve(one, ways=ways))
    assert second.automatic
    assert second.name != first.name
    case = next(c for c in grid.gpu() if c.name.startswith("window: window 4095") and not c.spec.training)
    known = priceable(case, catalogue()["h100"])
    _, _, _, _, automatic, once = known["dense > compiled (flex)"]
    assert (automatic, once) == (True, pytest.approx(6e-5))
    assert known["dense > eager (flash)"][4:] == (True, 0.0)
    assert not known["dense > compiled (flex-flash)"][4]


@pytest.mark.slow
def test_a_model_of_one_device_is_judged_on_another(rows, capsys, monkeypatch, tmp_path):
    out = tmp_path / "transfer.json"
    monkeypatch.setattr("sys.argv", ["transfer", "--from", str(rows[0]), "--to", str(rows[0]), "--json", str(out)])
    transfer.main()
    found = json.loads(out.read_text())
    assert found["from"] == found["to"] == "cpu-2core"
    assert found["regret"]["auto"]["worst"] < 0.05
    assert found["MAPE"] < 0.15


@pytest.mark.slow
def test_what_ships_for_kin_is_like_it(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "SHIPPED", tmp_path)
    monkeypatch.setattr(judge, "KIN", {"cpu-2core": ("h200",)})
    judge.ship([rows[0]], ["backward_host"])
    mine, kin = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("cpu-2core", "h200"))
    assert mine["numbers"]
    assert not any(name.endswith("backward_host") for name in mine["numbers"])
    assert kin["like"] == "cpu-2core"
    assert "transferred by data sheet" in kin["about"]


def test_the_page_is_made_of_rows_and_judgements(rows, judgement, tmp_path, monkeypatch):
    found = [judgement[1]]
    (tmp_path / rows[0].name).write_text(rows[0].read_text())
    (tmp_path / "judged-cpu-2core.json").write_text(json.dumps({"device": "cpu-2core", "seeds": found}))
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    monkeypatch.setattr(performance, "ROOT", tmp_path)
    text = performance.page()
    assert "## The planner on 2 cores" in text
    assert "| auto |" in text
    assert "always SDPA" in text
    again = performance.updated(f"before\n{performance.BEGIN}\nold\n{performance.END}\nafter\n")
    assert again == f"before\n{text}\nafter\n"
    assert performance.updated("a page\n") == f"a page\n\n{text}\n"
    assert "dense" in regret_summary(rows[1])


# ------------------------------------------------------------------------------------------------------------- targets


def put(folder, name, rows, **more):
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows, **more}))
    return targets.Results(folder)


def of(found, what):
    (one,) = [t for t in found if what in t.what]
    return one


def test_what_has_no_rows_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    empty = targets.Results(tmp_path)
    for make, _ in performance.PARTS.values():
        for target in make(empty):
            assert target.met is None, target.what
            assert "| - | not measured |" in target.line()
    text = "\n".join(performance.reached())
    assert ": 0 met, 0 missed, and" in text
    assert all(f"### {title}" in text for title in performance.PARTS)
    assert not empty.used


def test_limits_are_met_at_themselves_and_nothing_is_rounded_towards_them():
    assert targets.at_most("x", 1.02, 1.02).met is True
    assert targets.at_most("x", 1.0200001, 1.02).met is False
    assert targets.at_least("x", 0.95, 0.95).met is True
    assert targets.at_least("x", 0.9499999, 0.95).met is False


def test_one_spec_that_differs_is_a_disagreement(tmp_path):
    told = [{"status": s} for s in ("agrees", "agrees", "differs", "failed", "refused")]
    found = list(targets.agreement(put(tmp_path, "cross-validation-fa4-h100", [], matrices=[{"results": told}])))
    one = of(found, "with fa4")
    assert (one.figure, one.met) == ("1", False)
    assert one.note == "3 runs of 1 specs; 1 more raised, which is refused now"
    assert of(found, "with xformers").met is None
    put(tmp_path, "cross-validation-fa4-h100", [], matrices=[{"results": told[:2]}])
    assert of(targets.agreement(targets.Results(tmp_path)), "with fa4").met is True


def test_a_survivor_that_named_nobody_is_missed(tmp_path):
    whole = {"fault": "death", "times": 20, "named": 20, "slowest_s": 7.0}
    found = list(targets.rings(put(tmp_path, "ring-faults-cpu", [whole], timeout_s=2.0)))
    assert of(found, "faults that all survivors name").met is True
    assert of(found, "the slowest of them").met is True
    for one in ({"named": 19}, {"named": 19, "times": 19}):
        results = put(tmp_path, "ring-faults-cpu", [whole, whole | one | {"slowest_s": 7.1}], timeout_s=2.0)
        found = list(targets.rings(results))
        assert of(found, "faults that all survivors name").figure == "50 %"
        assert of(found, "faults that all survivors name").met is False
        assert of(found, "the slowest of them").met is False


def test_budgets_count_what_ran_and_what_was_off(tmp_path):
    good = {"name": "full", "measured": 10, "predicted": 11, "fits": True, "below": False, "close": True}
    bad = good | {"name": "window", "predicted": 20, "fits": False, "below": True, "close": False}
    rows = [*[good] * 78, {"name": "causal", "refused": "too small"}, {"name": "causal", "skipped": "no time"}]
    found = list(targets.budgets(put(tmp_path, "memory-h100", rows), "H100", "memory-h100"))
    assert [t.met for t in found] == [False, True, True, True]
    assert (found[0].figure, found[1].note) == ("79", "of 78 measured")
    found = list(targets.budgets(put(tmp_path, "memory-h100", [*rows, bad]), "H100", "memory-h100"))
    assert [t.met for t in found] == [True, False, False, False]
    assert found[3].note == "the worst: 2.00 x, window"


def test_only_pieces_of_enough_rows_count_for_halving(tmp_path):
    mib = 2**20
    rows = [{"name": "causal", "choice": "dense", "seconds": 1.0, "rows_of_piece": n, "over_twice_the_budget": t,
             "predicted": p * mib, "measured": 100 * mib}
            for n, t, p in ((8192, 1.02, 130), (4096, 1.11, 131), (4095, 3.0, 200))]  # fmt: skip
    found = list(targets.memory(put(tmp_path, "budget-curve-h100", rows)))
    one, off = of(found, "halving a budget"), of(found, "these: predicted above")
    assert (one.figure, one.met) == ("1.110", False)
    assert (off.figure, off.met, off.note) == ("1", False, "1.31 x: `dense`")
    put(tmp_path, "budget-curve-h100", [r | {"measured": r["predicted"] - 16 * mib} for r in rows])
    assert of(targets.memory(targets.Results(tmp_path)), "these: predicted above").met is True


def longnet_rows(auto, hand, *, backward=False, auto_host=0.1):
    where = {"case": "A", "causal": False, "backward": backward}
    one = {**where, "host_ms": 0.1, "peak_mib": 10}
    graphs = {} if backward else {"graph_ms": 1.0}
    return [
        {**where, "auto": "lattice-views > eager (cudnn)", "moved_mib": 3, "compulsory_mib": 2},
        {**one, "name": "kernels cudnn", "ms": 1.0, **graphs},
        {**one, "name": "plan views cudnn", "ms": hand, **graphs},
        {**one, "name": "plan auto", "ms": auto, **graphs, "host_ms": auto_host},
    ]


def test_missed_targets_of_longnet_say_what_the_rows_say(tmp_path):
    results = put(tmp_path, "longnet-forward-h100", longnet_rows(1.6, 1.1, auto_host=1.5))
    found = list(targets_longnet.longnet(results))
    ratio = of(found, "A forward: plan / kernels alone, cuDNN")
    choice = of(found, "A forward: auto / best plan by hand")
    assert (ratio.met, choice.met) == (False, False)
    assert ratio.note == "1.000 when both are replayed from CUDA graphs; host 1.50 of 1.60 ms"
    assert choice.note == "the same plan, timed twice; host 1.50 of 1.60 ms"
    assert "| A forward | cuDNN | 1.60 | 1.00 | - | - | - | 3 | 2 |" in list(targets_longnet.times(results))
    results = put(tmp_path, "longnet-training-h100", longnet_rows(1.3, 1.3, backward=True))
    found = list(targets_longnet.longnet(results))
    assert of(found, "A forward + backward: plan / kernels alone").note.startswith("host 0.10 of 1.30 ms; the device's")
    put(tmp_path, "longnet-forward-h100", longnet_rows(1.15, 1.15))
    assert of(targets_longnet.longnet(targets.Results(tmp_path)), "A forward: plan / kernels alone").met is True


def test_the_timeline_tells_kernels_from_the_ranges_around_them(tmp_path):
    where = {"case": "A", "causal": False, "backward": False, "span_us": 1.0, "gaps_us": 500.0}
    alone = [{"kernel": "cudnn_x_fprop", "calls": 5.0, "us": 1000.0}]
    plan = [
        {"kernel": "cudnn_x_fprop", "calls": 9.0, "us": 1100.0},
        {"kernel": "attnplan: %6 attend", "calls": 1.0, "us": 1100.0},
        {"kernel": "attnplan: %9 pull_kernel", "calls": 1.0, "us": 100.0},
        {"kernel": "pull_kernel", "calls": 1.0, "us": 100.0},
    ]
    rows = [{**where, "name": "timeline kernels cudnn", "kernels": alone},
            {**where, "name": "timeline views cudnn", "kernels": plan}]  # fmt: skip
    text = "\n".join(targets_longnet.timeline(put(tmp_path, "longnet-timeline-h100", rows)))
    assert "| A forward | 5 | 9 | 1.00 | 1.10 | 0.10 | 1.200 | 0.50 |" in text
    assert list(targets_longnet.timeline(put(tmp_path, "longnet-timeline-h100", rows[:1]))) == []


def test_pictures_are_those_of_their_rows(tmp_path):
    pictures = performance.ROOT / "docs" / "img"

    def rows(name):
        return json.loads((performance.RESULTS / f"{name}.json").read_text())["rows"]

    assert (pictures / "longnet-lengths.svg").read_text() == longnet_lengths_plot.svg(rows("longnet-lengths-h100"))
    blocks = blocks_plot.points(rows("kernels-fa4-h100"))
    curve = rows("budget-curve-h100")
    for picture, data in (("random-blocks.svg", blocks), ("time-budget.svg", curve)):
        assert f"data {blocks_plot.digest(data)}<" in (pictures / picture).read_text(), f"{picture} is out of date"
    blocks_plot.draw(rows("kernels-fa4-h100"), tmp_path / "blocks.svg")
    budget_curve.draw(curve, tmp_path / "curve.svg")
    assert blocks_plot.digest(blocks) in (tmp_path / "blocks.svg").read_text()
    assert blocks_plot.digest(curve) in (tmp_path / "curve.svg").read_text()
    text = (tmp_path / "curve.svg").read_text()
    assert "LongNet, 1048576 tokens" in text
    assert "causal, 65536 tokens" not in text, "one budget is no curve"


def test_a_plan_that_was_replayed_is_drawn_beside_itself():
    rows = [{"name": "plan auto", "tokens": 1000, "ms": 2.0, "graph_ms": 1.0}]
    assert longnet_lengths_plot.series(rows) == {
        "plan auto": [(1000, 2000.0)],
        "plan auto, CUDA graph": [(1000, 1000.0)],
    }
