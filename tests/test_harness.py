"""The harness: who takes part, what is checked, what is written."""

from __future__ import annotations

import gc
import json
import time
import weakref

import attrs
import pytest
import torch
from click.testing import CliRunner

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cli import main
from attnplan.cost import resolve
from attnplan.errors import SpecError
from attnplan.harness import Asked, Contestant, contest, contestants, environment, read_rows, table, write_rows
from attnplan.harness import entrants as module
from attnplan.harness.entrants import PoisonedError, prepared
from attnplan.harness.peers import band, contestants_by_hand, dense_mask
from attnplan.runtime import clock, compiling
from attnplan.runtime.clock import Plenty, race

TARGET = resolve("cpu")
QUICK = Asked(plenty=Plenty(warm_ups=1, rounds=2, least=1, seconds=0.001))
SPECS = {
    "causal": AttentionSpec(seq_len=40, heads=2, head_dim=8, dtype="float32", causal=True),
    "window, grouped, ragged": AttentionSpec(
        seq_len=37, heads=4, kv_heads=2, head_dim=8, dtype="float32", pattern=P.window(5, 2), batch=2
    ),
    "more keys": AttentionSpec(seq_len=9, kv_len=33, heads=2, head_dim=8, dtype="float32", causal=True),
    "longnet": AttentionSpec(
        seq_len=48, heads=4, head_dim=8, dtype="float32", pattern=P.longnet([8, 16], [1, 2]), causal=True
    ),
    "documents": AttentionSpec(seq_len=48, heads=2, head_dim=8, dtype="float32", pattern=P.documents(), causal=True),
    "rows side by side": AttentionSpec(
        seq_len=24, heads=2, head_dim=8, dtype="float32", pattern=P.window(4), layout="bshd"
    ),
}


def everyone(spec, asked=QUICK, peers=frozenset({"sdpa"})):
    found, _ = contestants(spec, TARGET, asked)
    return found + contestants_by_hand(spec, "cpu", peers)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_every_candidate_and_the_call_by_hand_are_right_and_timed(name, training):
    spec = attrs.evolve(SPECS[name], training=training)
    asked = attrs.evolve(QUICK, without=frozenset({("compiled", "flex"), ("compiled", "inductor")}))
    rows = list(contest(spec, TARGET, everyone(spec, asked), asked))
    assert {"candidate", "peer"} == {r["kind"] for r in rows}
    assert all(r["ok"] and r["seconds"] > 0 and r["error"] < 4e-6 for r in rows), rows
    assert all(("gradient_error" in r) == training for r in rows)
    assert sum(r["kind"] == "candidate" for r in rows) >= 2
    json.dumps(rows)


@pytest.mark.parametrize("training", [False, True])
def test_a_contestant_that_is_wrong_is_not_timed(training):
    spec = attrs.evolve(SPECS["causal"], training=training)
    right = everyone(spec)[0]

    def wrong(q, k, v):
        return right.run(q, k, v) * (1 + 1e-4)

    rows = list(contest(spec, TARGET, [right, Contestant("wrong", wrong)], QUICK))
    assert rows[0]["ok"]
    assert not rows[1]["ok"]
    assert "differs from float64" in rows[1]["failed"]
    assert "seconds" not in rows[1]


def test_a_wrong_gradient_is_found():
    spec = attrs.evolve(SPECS["window, grouped, ragged"], training=True)
    right = everyone(spec)[0]

    def wrong(q, k, v):  # the same output, and no gradient through k
        return right.run(q, k.detach() + 0 * k, v)

    (row,) = contest(spec, TARGET, [Contestant("wrong", wrong)], QUICK)
    assert row["error"] < 1e-6
    assert row["gradient_error"] > 0.1
    assert "gradients" in row["failed"]


def test_a_contestant_that_raises_costs_only_itself():
    spec = SPECS["causal"]

    def raises(q, k, v):
        raise ValueError("no such kernel")

    rows = list(contest(spec, TARGET, [Contestant("bad", raises), everyone(spec)[0]], QUICK))
    assert rows[0]["failed"] == "ValueError: no such kernel"
    assert rows[1]["seconds"] > 0


def test_one_that_breaks_later_is_found_out_alone():
    spec = SPECS["causal"]
    calls = []

    def breaks(q, k, v):
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("the second call fails")
        return everyone(spec)[0].run(q, k, v)

    rows = list(contest(spec, TARGET, [Contestant("bad", breaks), everyone(spec)[0]], QUICK))
    assert "the second call fails" in rows[0]["failed"]
    assert rows[1]["seconds"] > 0


def test_an_error_that_costs_the_device_ends_the_contest():
    def poisons(q, k, v):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(PoisonedError, match="illegal memory access"):
        list(contest(SPECS["causal"], TARGET, [Contestant("bad", poisons)], QUICK))


def test_out_of_time_is_said():
    spec = SPECS["causal"]
    rows = list(contest(spec, TARGET, everyone(spec), attrs.evolve(QUICK, until=time.monotonic() - 1)))
    assert {r["skipped"] for r in rows} == {"out of time"}


def test_who_takes_part_and_why_not():
    spec = SPECS["window, grouped, ragged"]
    found, rest = contestants(spec, TARGET, attrs.evolve(QUICK, backends=frozenset({"eager"})))
    assert {c.facts["backend"] for c in found} == {"eager"}
    assert all(c.facts["predicted"] > 0 and c.facts["predicted_peak"] >= 0 and c.facts["graph"] for c in found)
    none, rest = contestants(spec, TARGET, attrs.evolve(QUICK, hopeless=0.5))
    assert none == []
    assert any("x the fastest" in r.get("skipped", "") for r in rest)
    none, rest = contestants(spec, TARGET, attrs.evolve(QUICK, memory=-1))
    assert none == []
    assert any("GiB" in r.get("skipped", "") for r in rest)


def test_hopeless_is_judged_by_those_that_take_part_and_some_always_do():
    spec = SPECS["causal"]
    found, _ = contestants(spec, TARGET, QUICK)
    order = sorted(found, key=lambda c: c.facts["predicted"])
    fastest = order[0]
    few = contestants(spec, TARGET, attrs.evolve(QUICK, hopeless=0.5, least=1))[0]
    of_backends = {c.facts["backend"]: c.name for c in reversed(order)}
    assert {c.name for c in few} == {fastest.name, *of_backends.values()}
    without = frozenset({*QUICK.without, (fastest.facts["backend"], fastest.facts["schedule"])})
    others = [c for c in order if (c.facts["backend"], c.facts["schedule"]) not in without]
    rest = contestants(spec, TARGET, attrs.evolve(QUICK, hopeless=1.0, without=without))[0]
    assert others[0].facts["predicted"] > fastest.facts["predicted"]
    assert [c.name for c in rest] == [others[0].name], "what does not take part makes no other hopeless"


def test_first_calls_are_timed_by_the_clock_that_is_given():
    ticks = iter(range(0, 1000, 7))
    asked = attrs.evolve(QUICK, clock=lambda: float(next(ticks)))
    spec = SPECS["causal"]
    rows = list(contest(spec, TARGET, contestants(spec, TARGET, asked)[0][:2], asked))
    assert [r["first_seconds"] for r in rows] == [7.0, 7.0]


def test_a_row_drawn_twice_counts_once():
    """One query row: every sample is of it, and its gradient is counted once for each head."""
    spec = AttentionSpec(seq_len=1, kv_len=20, heads=2, head_dim=8, dtype="float32", training=True)
    (row, *_) = contest(spec, TARGET, everyone(spec)[:1], QUICK)
    assert row["ok"], row


def test_the_layout_reaches_the_reference():
    spec = SPECS["rows side by side"]
    inputs = prepared(spec, "cpu")
    assert inputs.tensors[0].shape == (1, 24, 2, 8)
    other = prepared(attrs.evolve(spec, layout="bhsd"), "cpu")
    assert other.tensors[0].shape == (1, 2, 24, 8)


# ------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize(
    ("pattern", "causal", "expected"),
    [
        (P.full(), False, (None, None)),
        (P.full(), True, (None, 0)),
        (P.window(7), False, (7, 7)),
        (P.window(7, 3), True, (7, 0)),
        (P.window(7) & P.window(9, 1), False, (7, 1)),
        (P.window(7) | P.sinks(1), False, None),
        (P.longnet([8], [1]), False, None),
    ],
)
def test_bands_are_recognised(pattern, causal, expected):
    assert band(AttentionSpec(seq_len=32, heads=2, head_dim=8, pattern=pattern, causal=causal)) == expected


def test_the_mask_of_a_mixture_counts_branches():
    spec = AttentionSpec(seq_len=16, heads=2, head_dim=8, dtype="float64", pattern=P.longnet([4, 8], [1, 2]))
    mask = dense_mask(spec, "cpu")
    assert mask.shape == (1, 2, 16, 16)
    assert mask[0, 0, 0, 0] == pytest.approx(torch.tensor(2.0).log().item())
    assert mask[0, 0, 0, 1] == 0
    assert mask[0, 0, 0, 9] == -torch.inf


def test_a_mixture_without_a_mask_has_no_call_by_hand():
    spec = AttentionSpec(
        seq_len=16, heads=2, head_dim=8, dtype="float32", pattern=P.grouped([4, 8], [1, 2], mix="mean")
    )
    assert dense_mask(spec, "cpu") is None
    assert contestants_by_hand(spec, "cpu", frozenset({"sdpa", "cudnn", "fa4"})) == ([], [])


# -------------------------------------------------------------------------------------------------------- clock, rows


BY_FLEX = {
    "window": (P.window(15), None),
    "union": (P.window(8) | P.global_tokens(4), None),
    "documents": (P.documents([40, 8, 80, 128]), None),
    "documents with the call": (P.documents(), [0, 16, 64, 256]),
    "blocks": (P.random_blocks(0.5, 64, 0), None),
    "longnet": (P.longnet([64, 128], [1, 2]), None),
    "grouped": (P.grouped([64, 128], [1, 2]), None),
}


@pytest.mark.parametrize("name", [n if n == "longnet" else pytest.param(n, marks=pytest.mark.slow) for n in BY_FLEX])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_by_hand_says_every_family(name, monkeypatch):
    monkeypatch.setattr(compiling, "compiled", lambda function: function)
    pattern, cuts = BY_FLEX[name]
    spec = AttentionSpec(seq_len=256, heads=4, head_dim=8, dtype="float32", pattern=pattern, causal=name != "union")
    operands = None if cuts is None else {"documents": torch.tensor(cuts, dtype=torch.int32)}
    (hand,), failed = contestants_by_hand(spec, "cpu", frozenset({"flex"}))
    assert not failed
    error, _ = prepared(spec, "cpu", 0, operands).errors(hand.run)
    assert error < 1e-5


def test_flex_by_hand_is_left_out_where_it_cannot_say_the_spec():
    mean = attrs.evolve(SPECS["longnet"], pattern=P.mix([P.window(4), P.window(8)], rule="mean"))
    long = AttentionSpec(seq_len=2**14, heads=2, head_dim=8, dtype="float32", causal=True)
    for spec in (mean, long):
        assert contestants_by_hand(spec, "cpu", frozenset({"flex"})) == ([], [])


def test_a_burst_is_led_by_a_call_that_is_not_timed(monkeypatch):
    happened = []

    class Event:
        def record(self):
            happened.append("event")

        def elapsed_time(self, other):
            return 3.0

    monkeypatch.setattr(clock, "_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seconds, _ = clock.once(lambda: happened.append("call"), True, 3, led=True)
    assert happened == ["call", "event", "call", "call", "call", "event"]
    assert seconds == pytest.approx(1e-3)


def test_contestants_take_turns():
    order = []
    race(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, False, Plenty(rounds=3, seconds=1e-9, least=3)
    )
    told = "".join(order)
    assert told.count("ab") >= 1
    half = len(told) // 2
    assert {"a", "b"} == set(told[half:]), "neither is done before the other"


def test_close_contestants_whose_times_vary_get_further_rounds_and_the_others_none(monkeypatch):
    paces = {"steady": [1.0], "varies": [1.0, 1.4], "slow": [3.0, 4.0]}
    calls = dict.fromkeys(paces, 0)

    def once(call, on_gpu, count=1, *, led=False):
        name = call()
        seconds = paces[name][calls[name] % len(paces[name])]
        calls[name] += 1
        return seconds * 1e-4, 0.0

    monkeypatch.setattr(clock, "once", once)
    plenty = Plenty(warm_ups=1, rounds=6, least=6, further=10, further_seconds=1.0)
    found = race({name: lambda name=name: name for name in paces}, False, plenty)
    assert {name: len(times.seconds) for name, times in found.items()} == {"steady": 6, "varies": 16, "slow": 6}
    brief = attrs.evolve(plenty, further_seconds=0.005)
    found = race({name: lambda name=name: name for name in paces}, False, brief)
    assert 6 < len(found["varies"].seconds) < 16, "as many as there is time for"


def test_nobody_is_always_the_first_of_a_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    race(calls, False, Plenty(warm_ups=1, rounds=3, least=3, seconds=1e-9))
    rounds = [name for i, name in enumerate(order[3:]) if i == 0 or order[3:][i - 1] != name]
    assert rounds[::3] == ["a", "b", "c"]


def test_a_slow_call_is_timed_once_more_and_no_more():
    calls = []

    def slow():
        calls.append(1)
        time.sleep(0.02)

    found = race({"slow": slow}, False, Plenty(warm_ups=1, slow=0.01))["slow"]
    assert len(calls) == 2
    assert 0.02 <= found.median < 0.2
    assert found.spread == 0.0


def test_rows_survive_a_file_and_a_broken_one_is_named(tmp_path):
    rows = [{"spec": "a", "candidate": "x", "seconds": 1e-3, "spread": 0.1, "error": 1e-7, "predicted": 2e-3},
            {"spec": "a", "candidate": "y", "failed": "boom"}]  # fmt: skip
    path = tmp_path / "deep" / "rows.json"
    write_rows(path, {"environment": environment()}, rows)
    head, again = read_rows(path)
    assert again == rows
    assert head["environment"]["cores"] >= 1
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]
    assert path.read_text().count("\n  {") == 2, "a line for each row"
    (tmp_path / "bad").write_text("[]")
    with pytest.raises(SpecError, match="holds no rows of measurements"):
        read_rows(tmp_path / "bad")
    with pytest.raises(SpecError, match="cannot read"):
        read_rows(tmp_path / "nothing")
    text = table(rows)
    assert "x 1 " in text
    assert "failed: boom" in text


def test_an_empty_file_of_rows_is_a_file_of_rows(tmp_path):
    write_rows(tmp_path / "none.json", {"a": 1}, [])
    assert read_rows(tmp_path / "none.json") == ({"schema": 1, "a": 1}, [])


def test_bench_runs_specs_side_by_side_and_writes_rows(tmp_path):
    out = tmp_path / "rows.json"
    options = ["--seq-len", "32", "--heads", "2", "--head-dim", "8", "--dtype", "float32", "--device", "cpu"]
    done = CliRunner().invoke(
        main, ["bench", *options, "--backends", "eager", "--peers", "sdpa", "--rounds", "2", "--output", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "by hand: sdpa" in done.output
    head, rows = read_rows(out)
    assert head["environment"]["versions"]["torch"] == torch.__version__
    assert {r["candidate"] for r in rows if "seconds" in r} >= {"dense > eager (flash)", "by hand: sdpa"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backends", "eagre"], "unknown backend 'eagre'; did you mean 'eager'"),
        (["--peers", "sdpaa"], "unknown peer 'sdpaa'; did you mean 'sdpa'"),
        (["--device", "h100"], "is not here to run on"),
        (["--output", "/proc/none/rows.json"], "cannot write '/proc/none/rows.json'"),
    ],
)
def test_bench_refuses_what_it_cannot_do(options, message):
    base = ["bench", "--seq-len", "16", "--heads", "1", "--head-dim", "8", "--dtype", "float32", "--rounds", "2"]
    done = CliRunner().invoke(main, [*base, "--backends", "eager", "--peers", "", "--device", "cpu", *options])
    assert done.exit_code in (2, 3)
    assert message in done.output


def test_a_poisoned_device_is_reported_and_ends_the_run(monkeypatch):
    from attnplan.harness import run

    def poisoned(*args, **options):
        raise PoisonedError("illegal memory access")

    monkeypatch.setattr(run, "contest", poisoned)
    rows = run.run_specs({"a": SPECS["causal"], "b": SPECS["longnet"]}, TARGET, frozenset({"eager"}), frozenset())
    assert "cannot be used any more" in rows[-1]["failed"]
    assert {r["spec"] for r in rows} == {"a"}
    assert module.PoisonedError is PoisonedError


def test_no_garbage_is_collected_while_a_burst_is_timed_and_all_of_it_between_rounds():
    seen, kept = [], []

    class Cycle:
        def __init__(self):
            self.itself = self

    def call():
        seen.append(gc.isenabled())
        one = Cycle()
        kept.append(weakref.ref(one))

    race({"cycles": call}, on_gpu=False, plenty=Plenty(warm_ups=1, rounds=3, seconds=1e-9))
    assert not any(seen)
    assert gc.isenabled()
    assert gc.get_freeze_count() < 1000, "Python 3.12 starts with a few hundred"
    alive = sum(one() is not None for one in kept)
    assert alive < len(kept) / 2


@pytest.mark.parametrize(("frozen", "freezes"), [(0, True), (375, True), (100_000, False)])
def test_what_exists_is_frozen_for_a_race_unless_the_program_froze_something(monkeypatch, frozen, freezes):
    done = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen)
    monkeypatch.setattr(gc, "freeze", lambda: done.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: done.append("unfreeze"))
    race({"nothing": lambda: None}, on_gpu=False, plenty=Plenty(rounds=1))
    assert done == ["freeze", "unfreeze"] * freezes


def test_the_collector_is_as_it_was_after_a_race_that_fails():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        race({"fails": fail}, on_gpu=False)
    assert gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        race({"nothing": lambda: None}, on_gpu=False, plenty=Plenty(rounds=1))
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()
