"""Calibration: what is written, what is read back, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import attrs
import pytest

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import cache, catalogue, parameters_for, price, resolve
from attnplan.cost import calibration as calibrations
from attnplan.cost.parameters import CALIBRATED, DATA_SHEET, Curve, defaults
from attnplan.errors import NoBackendError, SpecError
from attnplan.search import every_way

SPEC = AttentionSpec(seq_len=1024, heads=4, head_dim=64, dtype="float32", causal=True)
PEAK = "kernels/flash-cpu/forward/peak/64"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNPLAN_CACHE", str(tmp_path / "cache"))
    calibrations._parameters_for.cache_clear()
    return tmp_path / "cache"


def saved(numbers=None, **more):
    return calibrations.save(resolve("cpu").device, {PEAK: 0.123} if numbers is None else numbers, more)


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_published_number_is_positive_and_can_be_replaced(kind):
    table = defaults(kind)
    numbers = table.numbers()
    assert len(numbers) > 30
    assert all(0 < x < 1e4 for x in numbers.values())
    doubled = table.replaced({n: 2 * x for n, x in numbers.items()}, CALIBRATED)
    assert doubled.numbers() == {n: 2 * x for n, x in numbers.items()}
    assert doubled.basis == CALIBRATED
    assert table.basis == DATA_SHEET, "the published table stays as it is"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"kernels/flash/peak": 1.0}, "unknown number 'kernels/flash/peak'"),
        ({PEAK: -0.5}, "must be a positive number, got -0.5"),
        ({PEAK: float("nan")}, "must be a positive number, got nan"),
        ({PEAK: True}, "must be a positive number, got True"),
        ({PEAK: "fast"}, "must be a positive number, got 'fast'"),
    ],
)
def test_impossible_numbers_are_refused(numbers, message):
    with pytest.raises(SpecError, match=message):
        defaults("cpu").replaced(numbers, CALIBRATED)


def test_curves_interpolate_and_never_extrapolate():
    curve = Curve({64: 0.4, 128: 0.6}, {64: 100.0, 128: 200.0})
    assert curve.at(64) == (0.4, 100.0)
    assert curve.at(96) == (pytest.approx(0.5), pytest.approx(150.0))
    assert curve.at(128) == curve.at(4096) == (0.6, 200.0)
    assert curve.at(16) == (pytest.approx(0.1), 100.0), "narrow heads fill less of a matrix unit"


def test_every_schedule_of_the_package_is_in_the_table():
    """A kernel without numbers would never be calibrated."""
    from attnplan.backends import registry

    for device in ("cpu-2core", "h100"):
        found = catalogue()[device]
        known = defaults(found.kind).kernels
        for backend in registry().backends.values():
            for schedule in backend.schedules(found):
                assert backend.naive or schedule.priced.key in known, (backend.name, schedule.name)


# ------------------------------------------------------------------------------------------------------ the model


def seconds(device="h100", schedule="cudnn", **changes):
    spec = attrs.evolve(SPEC, dtype="bfloat16", **changes)
    return next(
        c.prediction.seconds for c, w in every_way(spec, resolve(device)) if w is not None and c.schedule == schedule
    )


def test_an_incomplete_last_wave_is_waited_for():
    """132 units, tiles of 128 rows: 128 blocks of 1,024 rows fill one wave, 17 heads need a second one."""
    alone = {h: seconds(heads=h, kv_heads=h, seq_len=1024, kv_len=16_384, causal=False) for h in (16, 17, 33)}
    assert alone[17] > 1.3 * alone[16]
    assert alone[33] < 1.8 * alone[17], "the waste shrinks with the number of waves"


def test_few_blocks_do_not_fill_the_device():
    few = seconds(heads=1, kv_heads=1, seq_len=16_384, kv_len=16_384, causal=False)
    many = seconds(heads=16, kv_heads=16, seq_len=16_384, kv_len=16_384, causal=False)
    assert many < 16 * few
    half = seconds(heads=1, kv_heads=1, seq_len=4096, kv_len=16_384, causal=False)
    assert half > 0.9 * few / 1.2, "a quarter of the rows takes as long: 32 blocks of 132 units"


def test_a_causal_launch_takes_at_least_as_long_as_its_longest_block():
    lone = seconds(heads=1, kv_heads=1, seq_len=16_384, kv_len=16_384)
    whole = seconds(heads=1, kv_heads=1, seq_len=16_384, kv_len=16_384, causal=False)
    assert lone > 0.8 * whole, "with few blocks, halving the pairs halves nothing"
    assert seconds(heads=64, kv_heads=64, seq_len=4096, kv_len=4096) < 0.7 * seconds(
        heads=64, kv_heads=64, seq_len=4096, kv_len=4096, causal=False
    )


def test_short_calls_take_as_long_as_the_host():
    spec = attrs.evolve(SPEC, seq_len=128, kv_len=128, dtype="bfloat16")
    found = next(c.prediction for c, w in every_way(spec, resolve("h100")) if w is not None and c.schedule == "cudnn")
    assert found.seconds == pytest.approx(found.host, rel=0.2)
    assert found.seconds > 3 * sum(op.seconds for op in found.ops)


def test_a_kernel_that_splits_keys_fills_the_device_with_one_row():
    changes = {"seq_len": 1, "kv_len": 65_536, "heads": 4, "kv_heads": 4, "head_dim": 128, "value_dim": 128, "batch": 8,
               "causal": False}  # fmt: skip
    table = defaults("cuda").kernels
    assert table["flash-cuda"].splits
    assert not table["cudnn"].splits
    assert seconds(schedule="flash", **changes) < seconds(schedule="cudnn", **changes)


def test_documents_that_come_with_the_call_are_priced_as_eight():
    whole = seconds(schedule="flash", seq_len=32_768, kv_len=32_768)
    packed = seconds(schedule="flash", seq_len=32_768, kv_len=32_768, pattern=P.documents())
    assert packed < 0.3 * whole


def of_tiles(pattern, schedule="fa4-masks", **numbers):
    spec = AttentionSpec(seq_len=16_384, heads=8, head_dim=64, pattern=pattern)
    found = next(f for c, f in every_way(spec, resolve("h100")) if c.strategy == "blocks" and c.schedule == schedule)
    table = defaults("cuda").replaced({f"kernels/fa4/{n}": x for n, x in numbers.items()}, CALIBRATED)
    ops = price(found.lowered.graph, spec, found.schedule.priced, resolve("h100").device, table).ops
    return sum(op.seconds for op in ops)


def test_tiles_that_are_compared_take_longer_and_whole_ones_do_not():
    window = P.window(200) | P.sinks(64)
    assert of_tiles(window, compare=800.0) > 1.5 * of_tiles(window, compare=1e-3)
    whole = P.blocks([[i <= j < i + 8 for j in range(64)] for i in range(64)], 256)
    assert of_tiles(whole, "fa4", compare=800.0) == of_tiles(whole, "fa4", compare=1e-3)


def test_the_row_of_tiles_that_sees_every_key_ends_last():
    alone, joined = of_tiles(P.window(200) | P.sinks(64)), of_tiles(P.window(200) | P.global_tokens(64))
    assert joined > 2 * alone, "128 tiles in one row, each of them compared; 5 in the others"


# ---------------------------------------------------------------------------------------------------------- fitting


# ------------------------------------------------------------------------------------------------------ what is kept


def test_a_calibration_is_read_back_and_prices_plans(own_cache):
    before = attnplan.compile(SPEC, device="cpu").predicted
    path = saved()
    assert path == own_cache / "calibration-cpu.json"
    table = parameters_for(resolve("cpu"))
    assert (table.basis, table.note) == (CALIBRATED, "")
    assert table.kernels["flash-cpu"].forward.peak[64] == pytest.approx(0.123)
    after = attnplan.compile(SPEC, device="cpu").predicted
    assert after.basis == CALIBRATED
    assert after.seconds > 1.2 * before.seconds, "plans are priced anew, in this process too"
    assert os.listdir(own_cache) == ["calibration-cpu.json"], "no draft is left"


def test_a_device_that_is_elsewhere_is_not_priced_with_this_machines_numbers():
    saved()
    assert parameters_for(resolve("cpu-2core")).basis != CALIBRATED


def test_another_fingerprint_is_used_with_a_note(own_cache):
    path = saved()
    data = json.loads(path.read_text())
    data["fingerprint"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(data))
    table = parameters_for(resolve("cpu"))
    assert table.basis == CALIBRATED
    assert table.note.startswith("calibrated with torch 1.0, here ")
    assert "run `attnplan calibrate` again" in table.note
    plan = attnplan.compile(attrs.evolve(SPEC, heads=2, kv_heads=2), device="cpu")
    assert table.note in plan.explain()


def test_a_faster_clock_scales_the_rates():
    device = resolve("cpu").device
    path = saved()
    data = json.loads(path.read_text())
    data["peak"] = 2 * device.rate("float32")
    path.write_text(json.dumps(data))
    assert parameters_for(resolve("cpu")).kernels["flash-cpu"].forward.peak[64] == pytest.approx(0.246)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"numbers": {}}', '{"schema": 1}', '{"schema": 1, "fingerprint": {}, "numbers": 3}',
             '{"schema": 1, "fingerprint": {}, "peak": 1, "numbers": {"no/such": 1.0}}', "\x00\xff"],
)  # fmt: skip
def test_a_damaged_file_is_moved_aside_and_planning_goes_on(own_cache, text):
    own_cache.mkdir()
    path = own_cache / "calibration-cpu.json"
    path.write_text(text)
    table = parameters_for(resolve("cpu"))
    assert table.basis != CALIBRATED
    assert "was moved to calibration-cpu.json.damaged" in table.note
    assert not path.exists()
    assert (own_cache / "calibration-cpu.json.damaged").exists()
    assert "damaged" not in parameters_for(resolve("cpu")).note, "said once; then there is no file"


def test_a_file_of_another_version_is_left_alone(own_cache):
    path = saved()
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "schema": 99}))
    table = parameters_for(resolve("cpu"))
    assert "has schema 99, this version reads 1" in table.note
    assert path.exists()


def test_a_cache_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ATTNPLAN_CACHE", str(blocked / "cache"))
    with pytest.raises(SpecError, match=r"cannot write .*calibration-cpu\.json: .*; set ATTNPLAN_CACHE to a directory"):
        saved()


def test_a_directory_of_another_user_is_not_used(own_cache, monkeypatch):
    saved()
    monkeypatch.setattr(cache, "_is_foreign", lambda owner: True)
    with pytest.raises(SpecError, match="belongs to another user; set ATTNPLAN_CACHE"):
        saved()
    calibrations._parameters_for.cache_clear()
    table = parameters_for(resolve("cpu"))
    assert "belongs to another user and is not used" in table.note
    assert table.basis != CALIBRATED


def test_a_full_disk_leaves_what_was_there(own_cache, monkeypatch):
    path = saved()
    before = path.read_text()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(SpecError, match="No space left on device"):
        saved({PEAK: 0.9})
    assert path.read_text() == before
    assert os.listdir(own_cache) == [path.name], "no half of a file is left"


def test_a_file_is_replaced_in_one_step(own_cache, monkeypatch):
    path = saved()
    before = path.read_text()

    def interrupted(self, target):
        raise OSError(4, "Interrupted system call")

    monkeypatch.setattr(cache.Path, "replace", interrupted)
    with pytest.raises(SpecError, match="Interrupted system call"):
        saved({PEAK: 0.9})
    monkeypatch.undo()
    assert path.read_text() == before
    assert os.listdir(own_cache.parent / "cache") == [path.name]


def test_impossible_numbers_are_never_written(own_cache):
    with pytest.raises(SpecError, match="positive"):
        saved({PEAK: 0.0})
    assert not own_cache.exists()


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTNPLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "attnplan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir().parts[-2:] == (".cache", "attnplan")


# ---------------------------------------------------------------------------------------------------------- measuring


def test_a_short_calibration_measures_and_improves_on_the_data_sheet(own_cache):
    from attnplan.calibrate import calibrate

    named = []
    found = calibrate(resolve("cpu"), 2.0, named.append)
    assert named[0].startswith("dense")
    assert found.measurements >= 2
    assert found.error < found.error_before
    assert found.path == own_cache / "calibration-cpu.json"
    assert json.loads(found.path.read_text())["numbers"] == found.numbers
    assert parameters_for(resolve("cpu")).basis == CALIBRATED


def test_an_interruption_writes_nothing(own_cache, monkeypatch):
    from attnplan import calibrate as module

    saved()
    before = (own_cache / "calibration-cpu.json").read_text()

    def interrupted(*args):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.calibrate(resolve("cpu"), 5.0)
    assert (own_cache / "calibration-cpu.json").read_text() == before
    assert os.listdir(own_cache) == ["calibration-cpu.json"]


def test_hardware_that_is_elsewhere_cannot_be_calibrated():
    from attnplan.calibrate import calibrate

    with pytest.raises(NoBackendError, match="H100 SXM5 80 GB is not here to be measured"):
        calibrate(resolve("h100"))


def test_the_command_says_what_it_did_and_survives_an_interruption(own_cache):
    from click.testing import CliRunner

    from attnplan.cli import main

    done = CliRunner().invoke(main, ["calibrate", "--device", "cpu", "--budget", "1", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "written nowhere" in done.output
    assert not own_cache.exists()
    refused = CliRunner().invoke(main, ["calibrate", "--device", "h100"])
    assert refused.exit_code == 3
    assert "calibrate where it is" in refused.output


@pytest.mark.slow
def test_an_interrupted_command_leaves_nothing(own_cache):
    code = [sys.executable, "-m", "attnplan", "calibrate", "--device", "cpu"]
    running = subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(8)
    running.send_signal(2)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted: nothing was written" in said
    assert not own_cache.exists()


# --------------------------------------------------------------------------------------------------------- what ships


@pytest.mark.parametrize("name", [n for n in catalogue() if calibrations.shipped(n)])
def test_what_ships_says_where_it_was_measured(name):
    table = parameters_for(resolve(name))
    found = calibrations.shipped(name)
    assert table.basis == "calibrated elsewhere"
    assert "calibrated on" in found["about"] or "transferred" in found["about"]
    assert table.note == found["about"]
    assert price_of(name) > 0


def price_of(name):
    device = resolve(name)
    way = next(w for _, w in every_way(SPEC, device) if w is not None)
    return price(way.lowered.graph, SPEC, way.schedule.priced, device.device, parameters_for(device)).seconds
