"""Measured search: what is run, what is chosen, what is remembered."""

from __future__ import annotations

import json
import re

import attrs
import pytest

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan import tune as tuning
from attnplan.cost import resolve
from attnplan.errors import KernelError, NoBackendError
from attnplan.runtime import clock
from attnplan.runtime.clock import Times
from attnplan.tune import Trial, Tuning

SPEC = AttentionSpec(seq_len=256, heads=2, head_dim=16, dtype="float32", pattern=P.window(16) | P.sinks(2), causal=True)
CHEAP, DEAR = "decompose > eager (flash)", "blocks > eager (flash)"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNPLAN_CACHE", str(tmp_path / "cache"))
    attnplan.cache_clear()
    yield tmp_path / "cache"
    attnplan.cache_clear()


@pytest.fixture
def stopwatch(monkeypatch):
    """Let the clock say what a test wants, by the contestant's place in the order of prices."""
    raced = []

    def say(*seconds):
        def race(calls, on_gpu, plenty=None):
            raced.append(list(calls))
            return {name: Times((s,), s) for name, s in zip(calls, seconds, strict=False)}

        monkeypatch.setattr(clock, "race", race)
        return raced

    return say


def tuned(spec=SPEC, **options):
    return attnplan.compile(spec, device="cpu", tune=True, **options)


def test_the_fastest_is_taken_whatever_the_model_thought(stopwatch):
    raced = stopwatch(9.0, 1.0, 5.0)
    plan = tuned()
    first, second = raced[0][:2]
    assert f"{plan.strategy} > {plan.backend} ({plan.schedule})" == second
    assert plan.candidates[0].name == first, "the report still lists candidates by price"
    assert plan.tuning.chosen.name == second
    assert plan.tuning.gain == pytest.approx(8.0), "the model's own choice takes nine times as long"
    assert plan.tuning.error == pytest.approx(plan.predicted.seconds / 1.0 - 1)
    said = plan.explain()
    assert re.search(r"(?m)^tuned      fastest of \d, 1 s; the price is off by -100 %, the .* takes \+800 %", said)
    assert plan.explain("json")["tuning"]["seconds"] == 1.0
    assert plan.verify(rows=8)


def test_without_tune_nothing_is_measured(stopwatch):
    raced = stopwatch(9.0, 1.0)
    plan = attnplan.compile(SPEC, device="cpu")
    assert plan.tuning is None
    assert raced == []
    assert tuned() is not plan


def test_a_choice_is_remembered_and_measured_again_elsewhere(stopwatch, own_cache, monkeypatch):
    raced = stopwatch(9.0, 1.0)
    found = tuned()
    attnplan.cache_clear()
    again = tuned()
    assert len(raced) == 1
    assert again.tuning.remembered
    assert again.tuning.choice == found.tuning.choice
    assert attrs.evolve(again.tuning, remembered=False) == found.tuning
    attnplan.cache_clear()
    (path,) = own_cache.iterdir()
    data = json.loads(path.read_text())
    data["fingerprint"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(data))
    stopwatch(1.0, 9.0)
    assert not tuned().tuning.remembered, "measured with another torch"


def test_pins_always_win(stopwatch):
    raced = stopwatch(9.0, 1.0, 0.5)
    free = tuned()
    pinned = tuned(strategy=free.candidates[0].strategy)
    assert pinned.strategy == free.candidates[0].strategy != free.strategy
    assert all(name.startswith(f"{pinned.strategy} >") for name in raced[1])
    by_backend = tuned(backend="compiled")
    assert by_backend.backend == "compiled"
    assert all("compiled" in name for name in raced[2])


def test_a_memory_limit_still_holds(stopwatch):
    stopwatch(9.0, 1.0, 0.5)
    free = tuned()
    peaks = [c.prediction.peak_bytes for c in free.candidates if c.prediction]
    budget = min(peaks)
    assert tuned(max_memory=budget).predicted.peak_bytes <= budget


def test_few_candidates_are_measured_and_always_two():
    class Found:
        candidates = tuple(
            attrs.evolve(c, prediction=attrs.evolve(c.prediction, seconds=s))
            for c, s in zip(
                [c for c in attnplan.compile(SPEC, device="cpu").candidates if c.prediction] * 9,
                (1.0, 1.5, 1.9, 1.99, 2.0, 2.0, 2.5, 9.0), strict=False,
            )
        )  # fmt: skip

    assert len(tuning._few(Found)) == tuning.MOST
    Found.candidates = (Found.candidates[0], *Found.candidates[-2:])
    assert [c.prediction.seconds for c in tuning._few(Found)] == [1.0, 2.5]


def test_a_candidate_that_fails_is_no_choice(stopwatch, monkeypatch):
    stopwatch(1.0)
    real = tuning._call
    failing = []

    def call(plan, *args, **options):
        made = real(plan, *args, **options)
        if failing:
            return made
        failing.append(plan.strategy)

        def fails():
            raise KernelError("out of order")

        return fails

    monkeypatch.setattr(tuning, "_call", call)
    plan = tuned()
    assert plan.strategy != failing[0]
    assert plan.tuning.trials[0].failed == "out of order"
    assert plan.tuning.gain == 0.0


def test_if_everything_fails_the_reasons_are_raised(monkeypatch):
    def call(plan, *args, **options):
        def fails():
            raise RuntimeError(f"{plan.strategy} is broken")

        return fails

    monkeypatch.setattr(tuning, "_call", call)
    with pytest.raises(NoBackendError, match="decompose is broken"):
        tuned()


def test_hardware_that_is_elsewhere_cannot_be_measured():
    with pytest.raises(NoBackendError, match=r"tune=True measures, and NVIDIA H100 SXM5 80 GB is not here"):
        attnplan.compile(SPEC, device="h100", tune=True)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(stopwatch, tmp_path, monkeypatch):
    stopwatch(9.0, 1.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNPLAN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="the tuned choice is not remembered"):
        assert tuned().tuning is not None


def test_a_damaged_memory_is_measured_anew(stopwatch, own_cache):
    raced = stopwatch(9.0, 1.0)
    tuned()
    (path,) = own_cache.iterdir()
    path.write_text("{")
    attnplan.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"is damaged .* and was moved to .*; measuring again"):
        assert not tuned().tuning.remembered
    assert len(raced) == 2


def test_a_memory_that_names_another_candidate_is_not_trusted(stopwatch, own_cache):
    stopwatch(9.0, 1.0)
    tuned()
    (path,) = own_cache.iterdir()
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "choice": ["dense", "eager", "nothing"]}))
    attnplan.cache_clear()
    assert not tuned().tuning.remembered


def test_a_mask_function_is_tuned_and_not_remembered(stopwatch, own_cache):
    stopwatch(9.0, 1.0)
    spec = attrs.evolve(SPEC, pattern=P.mask(lambda h, q, k: (q - k) % 3 == 0))
    assert tuned(spec).tuning is not None
    assert not own_cache.exists()


def test_training_is_measured_with_its_backward():
    plan = tuned(attrs.evolve(SPEC, training=True))
    assert plan.tuning.chosen.seconds > 0
    assert len({t.name for t in plan.tuning.trials}) >= 2


def test_the_report_of_a_tuning_adds_up():
    found = Tuning(("a", "b", "c"), (Trial("slow", 1.0, 3.0), Trial("fast", 1.5, 2.0), Trial("broken", 1.6, None)))
    assert found.chosen.name == "fast"
    assert found.error == pytest.approx(-0.25)
    assert found.gain == pytest.approx(0.5)


def test_an_equal_tuned_compilation_returns_the_same_plan(stopwatch):
    stopwatch(9.0, 1.0)
    assert tuned() is tuned()
    assert resolve("cpu").torch_device == "cpu"
