"""The user's file of devices: what it adds, and what is refused in words."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

import attnplan
from attnplan import AttentionSpec
from attnplan.cli import main
from attnplan.cost import catalogue, resolve
from attnplan.errors import SpecError

GOOD = """
[l40s]
title = "NVIDIA L40S"
kind = "cuda"
capability = [8, 9]
match = ["L40S"]
tflops = { float32 = 91.6, float16 = 362, bfloat16 = 362 }
bandwidth = 864
memory = 48
units = 142
source = "NVIDIA L40S datasheet (2023)"
"""


@pytest.fixture
def devices_file(tmp_path, monkeypatch):
    path = tmp_path / "devices.toml"
    monkeypatch.setenv("ATTNPLAN_DEVICES", str(path))

    def write(text):
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_device_of_the_user_is_planned_for(devices_file):
    devices_file(GOOD)
    device = resolve("l40s").device
    assert (device.units, device.capability, device.bandwidth) == (142, (8, 9), 864e9)
    assert "h100" in catalogue()
    spec = AttentionSpec(seq_len=512, heads=2, head_dim=64, causal=True)
    assert attnplan.compile(spec, device="l40s").device == device
    done = CliRunner().invoke(main, ["devices"])
    assert "NVIDIA L40S datasheet (2023)" in done.output


def test_a_name_of_the_package_is_replaced(devices_file):
    devices_file(GOOD.replace("[l40s]", "[h100]"))
    assert resolve("h100").device.title == "NVIDIA L40S"


def test_the_file_may_change_while_a_process_runs(devices_file):
    import os

    path = devices_file(GOOD)
    assert resolve("l40s").device.units == 142
    path.write_text(GOOD.replace("142", "99"))
    os.utime(path, ns=(1, 1))
    assert resolve("l40s").device.units == 99


def test_it_is_found_among_the_users_settings(tmp_path, monkeypatch):
    monkeypatch.delenv("ATTNPLAN_DEVICES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert "l40s" not in catalogue()
    (tmp_path / "attnplan").mkdir()
    (tmp_path / "attnplan" / "devices.toml").write_text(GOOD)
    assert "l40s" in catalogue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("bandwidth = 864\n", ""), r"device 'l40s' in .*devices\.toml lacks bandwidth"),
        (("bandwidth = 864", "bandwidth = -864"), "bandwidth must be a positive number, got -864"),
        (("memory = 48", "memory = 0"), "memory must be a positive number, got 0"),
        (("memory = 48", 'memory = "48 GiB"'), "memory must be a positive number, got '48 GiB'"),
        (("units = 142", "units = true"), "units must be a positive number, got True"),
        (("units = 142", "units = inf"), "units must be a positive number, got inf"),
        (("units = 142", "units = 142\nbandwith = 3"), "unknown figure 'bandwith'; did you mean 'bandwidth'"),
        (("float32 = 91.6, ", ""), "tflops must be a table by dtype that has float32"),
        (("float16 = 362", "half = 362"), "unknown dtype 'half' in tflops"),
        (("float16 = 362", "float16 = -1"), "tflops of float16 must be a positive number, got -1"),
        (("tflops = { float32 = 91.6, float16 = 362, bfloat16 = 362 }", "tflops = 91.6"), "tflops must be a table"),
        (('kind = "cuda"', 'kind = "gpu"'), 'kind must be "cpu" or "cuda", got \'gpu\''),
        (("capability = [8, 9]\n", ""), r"a cuda device has a capability such as \[9, 0\]"),
        (("capability = [8, 9]", "capability = 8.9"), r"capability must be two numbers such as \[9, 0\], got 8.9"),
        (('match = ["L40S"]', 'match = "L40S"'), "match must be a list of parts of the product's name"),
        (('title = "NVIDIA L40S"', "title = 40"), "title must be text, got 40"),
        (("[l40s]", "[L40S]"), "a name is in lower case"),
        (("[l40s]", "[cuda]"), "none of auto, cpu, cuda"),
        (("[l40s]", "a = 1\n[l40s]"), "must be a table, got 1"),
        (("[l40s]", "[l40s"), "is no TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(devices_file, change, message):
    assert change[0] in GOOD
    devices_file(GOOD.replace(*change))
    with pytest.raises(SpecError, match=message):
        resolve("h100")


def test_a_file_that_is_named_and_missing_is_said(devices_file):
    with pytest.raises(SpecError, match=r"cannot read the device file .*No such file"):
        catalogue()
