"""What docs say about the planner's judgement comes from committed rows."""

from __future__ import annotations

import json

import attrs
import pytest

from attnplan.cost import price
from attnplan.harness import write_rows
from attnplan.harness.entrants import digest
from attnplan.search import every_way
from bench import grid, judge, performance, transfer
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
    device = judge.catalogue()["cpu-2core"]
    for case in cases:
        for candidate, way in every_way(case.spec, judge._target(device)):
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
    device, judged, stale = judge.read([rows[0]])
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
    _, judged, _ = judge.read([rows[0]])
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
    _, judged, stale = judge.read([path])
    assert stale == sum(r.get("graph") == "0" for r in made) > 0
    assert all(w.sample is not None for j in judged for w in j.ways if w.row["kind"] == "candidate")


def test_regret_is_against_the_best_of_a_kind(rows):
    _, judged, _ = judge.read([rows[0]])
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
