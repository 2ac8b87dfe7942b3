"""A crew of processes measures a grid: checks side by side, races one at a time; what hangs or dies costs no other."""

from __future__ import annotations

import json
import sys
import time

import pytest

from bench import crew as crews
from bench.crew import Crew
from bench.grid import tiny
from bench.measuring import PREPARATION, RACE
from bench.regret import Measuring, same_place

WORKER = """
import json, os, sys, time

log = open({log!r}, "a")

def say(message):
    print(json.dumps(message), flush=True)

def ask(phase, size=1):
    say({{"asks": phase, "size": size}})
    sys.stdin.readline()

def note(what):
    log.write(json.dumps([time.monotonic(), os.getpid(), what]) + "\\n")
    log.flush()

say({{"hello": {{"device": "fake", "versions": {{}}}}}})
for line in sys.stdin:
    job = json.loads(line)
    name = job["spec"]
    if job["known"]:
        say({{"rows": None}})
        continue
    ask({preparation!r}, {size})
    note("checks")
    time.sleep(0.05)
    for contestant in ("good", "bad"):
        if contestant in job["broken"]:
            continue
        say({{"does": contestant}})
        if contestant == "bad" and "window" in name:
            {misbehaves}
    note("checked")
    ask({race!r})
    note("races")
    time.sleep(0.03)
    note("raced")
    full = "blocks" in name or ("union" in name and not job["alone"])
    failed = {{"failed": "OutOfMemoryError: it is full"}} if full else {{}}
    say({{"rows": [{{"spec": name, "mode": "forward", "candidate": "good", "alone": job["alone"], **failed}}]}})
"""


def run(tmp_path, misbehaves="pass", *, count=3, size="1", until=20.0, known=None, memory=100):
    log = tmp_path / "log"
    script = tmp_path / "worker.py"
    facts = {"log": str(log), "preparation": PREPARATION, "race": RACE, "misbehaves": misbehaves, "size": size}
    script.write_text(WORKER.format(**facts), encoding="utf-8")
    found = {}
    crew = Crew(
        [sys.executable, str(script)],
        tiny(),
        count,
        time.time() + until,
        memory,
        known or {},
        lambda case, rows: found.__setitem__(case.name, rows),
        lambda about: None,
    )
    crew.run()
    notes = sorted(json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()) if log.exists() else []
    assert all(w.process.poll() is not None for w in crew.workers)
    return found, notes


def spans(notes, start, end):
    opened, found = {}, []
    for at, who, what in notes:
        if what == start:
            opened[who] = at
        elif what == end:
            found.append((opened.pop(who), at))
    return found


def overlap(one, other):
    return one[0] < other[1] and other[0] < one[1]


def test_every_spec_is_measured_and_races_have_the_device_to_themselves(tmp_path):
    found, notes = run(tmp_path)
    assert set(found) == {c.name for c in tiny()}
    races, checks = spans(notes, "races", "raced"), spans(notes, "checks", "checked")
    assert len(races) == len(tiny()) + 2, "two specs twice: they had too little memory"
    for i, race in enumerate(races):
        assert not any(overlap(race, other) for other in races[i + 1 :])
        assert not any(overlap(race, check) for check in checks)
    assert any(overlap(a, b) for i, a in enumerate(checks) for b in checks[i + 1 :]), "checks run side by side"


def test_specs_that_need_the_whole_device_are_checked_one_at_a_time(tmp_path):
    found, notes = run(tmp_path, size="80")
    assert len(found) == len(tiny())
    checks = spans(notes, "checks", "checked")
    assert not any(overlap(a, b) for i, a in enumerate(checks) for b in checks[i + 1 :])


def test_what_did_not_fit_beside_others_is_measured_alone(tmp_path):
    found, _ = run(tmp_path)
    alone = {name for name, rows in found.items() if rows[0]["alone"]}
    assert alone == {c.name for c in tiny() if c.family in ("union", "blocks")}
    assert {name for name, rows in found.items() if "failed" in rows[0]} == {
        c.name for c in tiny() if "blocks" in c.name
    }


def test_a_process_that_dies_is_replaced_and_the_contestant_left_out(tmp_path):
    found, _ = run(tmp_path, "os._exit(70)")
    for case in tiny():
        failed = [r for r in found[case.name] if "ended" in r.get("failed", "")]
        if "window" in case.name:
            assert [r["candidate"] for r in failed] == ["bad"]
            assert failed[0]["failed"] == "ended the process: died with code 70"
            assert [r["candidate"] for r in found[case.name] if "failed" not in r] == ["good"]
        else:
            assert not failed


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(crews, "PATIENCE_FOR_ONE", 0.5)
    found, _ = run(tmp_path, "time.sleep(100)", count=2)
    failed = [r for rows in found.values() for r in rows if "ended" in r.get("failed", "")]
    assert {r["failed"] for r in failed} == {"ended the process: hung"}
    assert len(found) == len(tiny())


def test_nothing_is_started_when_the_time_is_over(tmp_path):
    began = time.monotonic()
    found, _ = run(tmp_path, until=crews.RESERVE / 2)
    assert found == {}
    assert time.monotonic() - began < crews.RESERVE


def test_what_is_known_stays(tmp_path):
    name = tiny()[0].name
    found, _ = run(tmp_path, known={name: {"good": "a digest"}})
    assert found.pop(name) is None
    assert all(found.values())


def test_rows_of_another_device_are_not_continued():
    here = {"device": "A", "versions": {"torch": "2", "attnplan": "1"}}
    assert same_place(here, {**here, "versions": {"torch": "2", "attnplan": "2"}})
    assert not same_place(here, {**here, "device": "B"})
    assert not same_place(here, {**here, "versions": {"torch": "3", "attnplan": "1"}})


@pytest.mark.slow
def test_resuming_measures_what_is_missing_and_what_changed(tmp_path, monkeypatch, capsys):
    from bench.regret import parse

    out = tmp_path / "rows.json"
    argv = ["regret", "--measure", "--tiny", "--only", "full", "--peers", "sdpa", "--json", str(out), "--resume"]
    monkeypatch.setattr(sys, "argv", argv)
    Measuring(parse()).run()
    first = json.loads(out.read_text(encoding="utf-8"))
    Measuring(parse()).run()
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["rows"] == first["rows"]
    changed = next(r for r in first["rows"] if "graph" in r)
    changed["graph"] = "another"
    out.write_text(json.dumps(first), encoding="utf-8")
    Measuring(parse()).run()
    last = json.loads(out.read_text(encoding="utf-8"))
    assert all(r.get("graph") != "another" for r in last["rows"])
    kept = [r for r in first["rows"] if r["spec"] != changed["spec"]]
    assert [r for r in last["rows"] if r["spec"] != changed["spec"]] == kept
    assert "as it was" in capsys.readouterr().out
