"""A crew of processes measures a grid: checks side by side, races one at a time; what hangs or dies costs no other."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
import types
from itertools import pairwise
from pathlib import Path

import pytest

from bench import crew as crews
from bench.compilers import watch
from bench.crew import Crew
from bench.grid import gpu, later_flex, tiny
from bench.link import Link
from bench.measuring import PREPARATION, RACE
from bench.regret import Measuring, same_place
from bench.workers import start

WORKER = """
import json, os, sys, time

log = open({log!r}, "a")
me = os.getpid()

def say(message):
    print(json.dumps(message), flush=True)

def ask(phase, size=1):
    say({{"asks": phase, "size": size, "keeps": 0}})
    sys.stdin.readline()

def note(what):
    log.write(json.dumps([time.monotonic(), me, what]) + "\\n")
    log.flush()

def meeting(what):
    # goes on with it until another process is in a check, at most for some seconds; only the first that asks does
    try:
        os.close(os.open({log!r} + what, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    end = time.monotonic() + {patience}
    before = set()
    while time.monotonic() < end:
        notes = [json.loads(line) for line in open({log!r})]
        last = {{who: (at, done) for at, who, done in notes if who != me and done in ("checks", "checked")}}
        checks = {{(who, at) for who, (at, done) in last.items() if done == "checks"}}
        if before & checks:  # a note fell into it
            return
        before = checks
        note(what)
        time.sleep(0.002)

say({{"hello": {{"device": "fake", "versions": {{}}}}, "memory": 100}})
for line in sys.stdin:
    job = json.loads(line)
    name = job["spec"]
    if job["known"]:
        say({{"rows": None, "keeps": 0}})
        continue
    ask({preparation!r}, {size})
    note("checks")
    meeting("waits")
    time.sleep(0.05)
    note("checked")
    for contestant in ("good", "bad"):
        if contestant in job["broken"]:
            continue
        ask(contestant, {size})
        note("checks")
        if contestant == "bad" and "window" in name:
            {misbehaves}
        time.sleep(0.01)
        note("checked")
        say({{"leaves": "a compiler", "keeps": 0}})
        meeting("compiles")
        for _ in range(75):
            time.sleep(0.002)
            note("compiles")
        ask(contestant, {size})
    ask({race!r})
    note("races")
    time.sleep(0.03)
    note("raced")
    full = "blocks" in name or ("union" in name and not job["alone"])
    failed = {{"failed": "OutOfMemoryError: it is full"}} if full else {{}}
    row = {{"spec": name, "mode": "forward", "candidate": "good", "alone": job["alone"], **failed}}
    say({{"rows": [row], "keeps": 0}})
"""


def run(tmp_path, misbehaves="pass", *, count=3, size="1", until=20.0, known=None, patience=0.0):
    log = tmp_path / "log"
    script = tmp_path / "worker.py"
    facts = {"log": str(log), "misbehaves": misbehaves, "size": size, "patience": patience}
    facts |= {"preparation": PREPARATION, "race": RACE}
    script.write_text(WORKER.format(**facts), encoding="utf-8")
    found = {}
    command = [sys.executable, str(script)]
    crew = Crew(
        command,
        tiny(),
        time.time() + until,
        known or {},
        lambda case, rows: found.__setitem__(case.name, rows),
        lambda about: None,
        [start(command) for _ in range(count)],
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
    found, notes = run(tmp_path, until=60.0, patience=15.0)
    assert set(found) == {c.name for c in tiny()}
    races, checks = spans(notes, "races", "raced"), spans(notes, "checks", "checked")
    assert len(races) == len(tiny()) + 2, "two specs twice: they had too little memory"
    for i, race in enumerate(races):
        assert not any(overlap(race, other) for other in races[i + 1 :])
        assert not any(overlap(race, check) for check in checks)
    assert any(overlap(a, b) for i, a in enumerate(checks) for b in checks[i + 1 :]), "checks run side by side"
    compilers = [at for at, _, what in notes if what == "compiles"]
    late = 0.002  # a note is taken before it is written
    assert not any(start + late < at < end for at in compilers for start, end in races), "nothing works beside a race"
    assert any(start < at < end for at in compilers for start, end in checks), "compilers work while others are checked"


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
    found, _ = run(tmp_path, until=crews.LAST / 8)
    assert found == {}
    assert time.monotonic() - began < crews.LAST


def test_what_is_known_stays(tmp_path):
    name = tiny()[0].name
    found, _ = run(tmp_path, known={name: {"good": "a digest"}})
    assert found.pop(name) is None
    assert all(found.values())


def scaled(monkeypatch, scale):
    for name in ("LAST", "RESERVE", "LARGE", "LINGER"):
        monkeypatch.setattr(crews, name, getattr(crews, name) * scale)


def realistic(tmp_path, cases, scale):
    """Return a plan for fake workers: starts of 12 to 20 s, first calls and compilations as on a large GPU."""
    draw = random.Random(0).uniform

    def steps(i, name, case):
        times = {
            "cudnn": [["once", "library", 2.0], ["device", "", draw(0.5, 1.2)]],
            "fused": [["compile", f"fused{i % 12}", draw(1, 3)], ["device", "", draw(0.05, 0.3)]],
            "flex": [["compile", f"flex{case.name}".replace("/", ""), draw(5, 15)], ["device", "", draw(0.2, 0.5)]],
        }
        return [[what, key, t * scale] for what, key, t in times.get(name, [["device", "", draw(0.05, 0.5)]])]

    specs = {}
    for i, case in enumerate(cases):
        names = ["flash", "efficient", "cudnn", "fused", "cutlass"] + ["flex"] * case.flex
        specs[case.name] = {
            "planning": draw(0.1, 1) * scale,
            "preparation": draw(0.05, 0.5) * scale,
            "preparation bytes": 10,
            "contestants": [[name, steps(i, name, case)] for name in names],
            "bytes": dict.fromkeys(names, 20),
            "race": draw(0.3, 1.5) * scale,
        }
    (tmp_path / "cache").mkdir()
    facts = {"starting": [12 * scale, 20 * scale], "log": str(tmp_path / "log"), "cache": str(tmp_path / "cache")}
    (tmp_path / "plan.json").write_text(json.dumps({**facts, "specs": specs}), encoding="utf-8")


@pytest.mark.timing
def test_the_device_races_for_most_of_the_time(tmp_path, monkeypatch, capsys):
    scale, cases = 0.05, later_flex(gpu())
    scaled(monkeypatch, scale)
    realistic(tmp_path, cases, scale)
    command = [sys.executable, str(Path(__file__).with_name("fake_worker.py")), str(tmp_path / "plan.json")]
    began, found = time.monotonic(), {}
    Crew(
        command,
        cases,
        time.time() + 100 * scale,
        {},
        lambda case, rows: found.setdefault(case.name, (time.monotonic() - began) / scale),
        lambda about: None,
        [start(command) for _ in range(12)],
    ).run()
    notes = [json.loads(line) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    races = sorted((begin, end) for begin, end, what in notes if what == "race")
    checks = [(begin, end) for begin, end, what in notes if what == "check"]
    assert not any(overlap(a, b) for a, b in pairwise(races))
    assert not any(overlap(race, check) for race in races for check in checks)
    assert min(found.values()) < 40
    assert sum(end - begin for begin, end in races) >= 0.45 * (races[-1][1] - races[0][0])
    assert {c.family for c in cases if c.name in found} == {c.family for c in cases}
    said = capsys.readouterr().err
    assert "races," in said
    assert "waiting for a race" in said
    assert "process 11: " in said


class Wire:
    """Stands for a worker's streams: writes down what it says, and lets it in each time."""

    def __init__(self):
        self.said = []

    def write(self, text):
        self.said.append(json.loads(text))

    def flush(self):
        pass

    def readline(self):
        time.sleep(0.01)
        return "go"


def test_a_worker_leaves_the_device_while_a_compiler_works():
    wire = Wire()
    link = Link(wire, wire, lambda: 7)
    with link.away("Triton"):
        pass
    assert wire.said == [], "it was not on the device"
    link.gate("one", 5)
    with link.away("Inductor"), link.away("Triton"):
        pass
    ask = {"asks": "one", "size": 5, "keeps": 7}
    assert wire.said == [ask, {"leaves": "Inductor", "keeps": 7}, ask]
    link.gate(RACE, 9)
    with link.away("Triton"):
        pass
    assert wire.said[3:] == [{"asks": RACE, "size": 9, "keeps": 7}]
    before, real = link.clock(), time.perf_counter()
    link.gate("two", 1)
    assert link.clock() - before <= time.perf_counter() - real - 0.01
    link.finish(None)
    with link.away("Triton"):
        pass
    assert wire.said[-1] == {"rows": None, "keeps": 7}


def test_a_compiler_that_fails_asks_for_the_device_all_the_same():
    wire = Wire()
    link = Link(wire, wire, lambda: 0)
    link.gate("one", 5)
    with pytest.raises(ValueError, match="no code"), link.away("Triton"):
        raise ValueError("no code")
    assert [next(iter(m)) for m in wire.said] == ["asks", "leaves", "asks"]


def test_compilers_are_watched_once(monkeypatch):
    callback = pytest.importorskip("torch._dynamo.callback")
    installs = callback.CompilationCallbackHandler.install_callbacks
    while hasattr(installs, "watched"):
        installs = installs.__wrapped__
    handler = type("Handler", (callback.CompilationCallbackHandler,), {"install_callbacks": installs})
    fake = types.SimpleNamespace(CompilationCallbackHandler=handler)
    monkeypatch.setitem(sys.modules, "torch._dynamo.callback", fake)
    jit = type("JITFunction", (), {"_do_compile": lambda self, key: f"{key} compiled"})
    monkeypatch.setitem(sys.modules, "triton.runtime.jit", types.SimpleNamespace(JITFunction=jit))
    compiler = type("CompileCallable", (), {"__call__": lambda self, x: x + 1})
    monkeypatch.setitem(sys.modules, "cutlass.cute", types.SimpleNamespace(compile=compiler()))
    seen = []

    @contextlib.contextmanager
    def away(name):
        seen.append(name)
        yield
        seen.append("back")

    watch(away)
    watch(away)
    with handler().install_callbacks(callback.CallbackTrigger.DYNAMO, "0"):
        assert seen == ["Inductor"]
    with handler().install_callbacks(callback.CallbackTrigger.TRITON_AUTOTUNING, "0"):
        assert seen == ["Inductor", "back"], "kernels run on the device to choose among them"
    assert jit()._do_compile("a kernel") == "a kernel compiled"
    assert sys.modules["cutlass.cute"].compile(1) == 2
    assert seen == ["Inductor", "back", "Triton", "back", "flash-attn 4's compiler", "back"]


def test_a_compiler_of_another_version_is_left_alone_and_said_once(monkeypatch, capsys):
    monkeypatch.setattr("bench.compilers._UNKNOWN", set())
    monkeypatch.setitem(sys.modules, "triton.runtime.jit", types.SimpleNamespace(JITFunction=object))
    for compiler in ("torch._dynamo.callback", "cutlass.cute"):  # the real ones stay as they are for other tests
        monkeypatch.delitem(sys.modules, compiler, raising=False)
    watch(contextlib.nullcontext)
    watch(contextlib.nullcontext)
    assert capsys.readouterr().err.count("Triton is not watched") == 1


def test_flex_comes_later_and_nothing_is_lost():
    cases = gpu()
    order = later_flex(cases, first=24, between=2)
    assert sorted(c.name for c in order) == sorted(c.name for c in cases)
    places = [i for i, c in enumerate(order) if c.flex]
    assert places == list(range(24, 24 + 3 * len(places), 3))
    assert {c.family for c in order[:24]} == {c.family for c in cases}
    assert {c.spec.training for c in order[:24]} == {False, True}
    assert [c for c in order if not c.flex] == [c for c in cases if not c.flex]


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
