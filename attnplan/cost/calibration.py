"""Calibrations: measured numbers of one machine in place of published ones, and which of them a plan is priced with.

In order: the one in the user's cache for the device that is here; the one that comes with the package for that device
or its kin; the published numbers. A calibration whose fingerprint differs from this machine is used with a note.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from attnplan.cost import cache
from attnplan.cost.device import Device, Target
from attnplan.cost.parameters import CALIBRATED, SHIPPED, Parameters, defaults
from attnplan.errors import SpecError
from attnplan.packages import PACKAGES, installed

SCHEMA = 1
"""Version of calibration files."""
KIN = {"cpu": "cpu-2core"}
"""Devices without a calibration of their own, and whose they use."""


def fingerprint(device: Device) -> dict[str, Any]:
    """Return what a calibration depends on: device, driver, versions. Imports no torch.

    Examples
    --------
    >>> from attnplan.cost import resolve
    >>> sorted(fingerprint(resolve("cpu").device))
    ['device', 'driver', 'memory', 'units', 'versions']
    """
    return {
        "device": device.name if device.kind == "cuda" else _cpu_model(),
        "units": device.units,
        "memory": device.memory,
        "driver": _driver() if device.kind == "cuda" else None,
        "versions": installed(PACKAGES),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def _driver() -> str | None:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((w for w in words if w[:1].isdigit() and "." in w), None)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between two fingerprints.

    Examples
    --------
    >>> differences({"units": 132, "versions": {"torch": "2.11.0"}}, {"units": 132, "versions": {"torch": "2.13.0"}})
    ['torch 2.11.0, here 2.13.0']
    """
    found = [
        f"{key} {then.get(key)}, here {now.get(key)}" for key in now if key != "versions" and then.get(key) != now[key]
    ]
    old, new = (x.get("versions", {}) for x in (then, now))
    names = [n for n in dict.fromkeys([*old, *new]) if old.get(n) != new.get(n)]
    return found + [f"{n} {old.get(n, 'not installed')}, here {new.get(n, 'not installed')}" for n in names]


def file_name(device: Device) -> str:
    """Return the name of the file that holds a device's calibration."""
    return f"calibration-{device.name}.json"


def calibrated_at(target: Target) -> int:
    """Return when the user's calibration of a device that is here was written, in nanoseconds; 0 if there is none."""
    return cache.stamp(file_name(target.device)) if target.torch_device is not None else 0


def parameters_for(target: Target) -> Parameters:
    """Return the numbers with which plans for a device are priced; their ``note`` says what is odd about them."""
    stamped = calibrated_at(target)
    return _parameters_for(target.device, str(cache.cache_dir()) if stamped else "", stamped)


@lru_cache(maxsize=32)
def _parameters_for(device: Device, directory: str, stamped: int) -> Parameters:
    """Return the numbers for a device; the file's directory and time are part of what is remembered."""
    note = ""
    if stamped:
        kept = cache.read(file_name(device), SCHEMA)
        note = kept.note
        if kept.data is not None:
            try:
                return _used(device, kept.data)
            except (SpecError, KeyError, TypeError, AttributeError) as error:
                path = cache.cache_dir() / file_name(device)
                note = f"{path} is no calibration ({error}) and {cache.set_aside(path)}"
    found = shipped(device.name) or shipped(KIN.get(device.name, ""))
    if found is None:
        return defaults(device.kind).replaced({}, defaults(device.kind).basis, note)
    about = found.get("about", "")
    return defaults(device.kind).replaced(found["numbers"], SHIPPED, "; ".join(filter(None, (note, about))))


def _used(device: Device, data: Mapping[str, Any]) -> Parameters:
    changed = differences(data["fingerprint"], fingerprint(device))
    note = f"calibrated with {'; '.join(changed)}: run `attnplan calibrate` again" if changed else ""
    scale = data["peak"] / device.rate("float32")  # a CPU's clock, and its peak with it, is read anew each time
    numbers = {n: x * scale if "/peak/" in n else x for n, x in data["numbers"].items()}
    return defaults(device.kind).replaced(numbers, CALIBRATED, note)


@lru_cache(maxsize=16)
def shipped(name: str) -> dict[str, Any] | None:
    """Return the calibration that comes with the package for a device of the catalogue, None if there is none."""
    file = resources.files("attnplan.cost").joinpath("calibrations", f"{name}.json")
    if not name or not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    like = found.get("like")
    if like:  # rates are shares of the data sheet: another device's serve, scaled by its own
        other = shipped(like)
        assert other is not None, f"{name} is calibrated like {like}, which is not calibrated"
        return {**other, "about": found["about"]}
    return found


def save(device: Device, numbers: Mapping[str, float], more: Mapping[str, Any]) -> Path:
    """Write the calibration of a device to the user's cache, and return where it is.

    Raises
    ------
    SpecError
        If a number is impossible, or the file cannot be written.
    """
    defaults(device.kind).replaced(numbers, CALIBRATED)
    data = {"fingerprint": fingerprint(device), "peak": device.rate("float32"), "numbers": dict(numbers), **more}
    return cache.write(file_name(device), SCHEMA, data)
