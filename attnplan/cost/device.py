"""Devices: a catalogue of data-sheet figures, and the device that is here, found without importing torch."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import attrs

from attnplan.errors import SpecError, did_you_mean


@attrs.frozen(cache_hash=True)
class Device:
    """Figures of one device."""

    name: str
    title: str
    kind: str
    """``"cpu"`` or ``"cuda"``."""
    flops: Mapping[str, float] = attrs.field(eq=lambda m: tuple(sorted(m.items())))
    """Peak matrix-product rate by dtype, in FLOP/s; ``"tf32"`` is float32 where TF32 is allowed."""
    bandwidth: float
    """Memory bandwidth, in bytes/s."""
    memory: int
    """Memory, in bytes."""
    source: str
    """Where the figures come from."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""
    match: tuple[str, ...] = ()
    """Parts of the product name by which the device is recognised."""
    units: int = 1
    """Streaming multiprocessors, or cores."""

    @property
    def launch(self) -> float:
        """Time to start one kernel or operator, in seconds."""
        return 6e-6 if self.kind == "cpu" else 4e-6

    def rate(self, dtype: str, precision: str = "ieee") -> float:
        """Return the peak rate for a dtype, in FLOP/s; 0 if it has none."""
        if dtype == "float32" and precision == "tf32" and "tf32" in self.flops:
            return self.flops["tf32"]
        return self.flops.get(dtype, 0.0)


@attrs.frozen
class Target:
    """A device to plan for, and, if it is here, the torch device to run on."""

    device: Device
    torch_device: str | None
    """``"cpu"``, ``"cuda:0"``, ...; None for hardware that is not here."""
    note: str = ""
    """What is assumed about the device."""


@lru_cache(maxsize=1)
def _built_in() -> Mapping[str, Device]:
    text = resources.files("attnplan.cost").joinpath("devices.toml").read_text(encoding="utf-8")
    return {name: _from_table(name, table) for name, table in tomllib.loads(text).items()}


def catalogue() -> Mapping[str, Device]:
    """Return the known devices by name: those of the package, and those of the user's file.

    The file is ``$ATTNPLAN_DEVICES``, or ``attnplan/devices.toml`` among the user's settings. It has a table for each
    device: ``title``, ``kind`` (``"cpu"`` or ``"cuda"``), ``tflops`` by dtype, ``bandwidth`` in GB/s, ``memory`` in
    GiB, ``units`` (streaming multiprocessors or cores) and ``source``; for CUDA ``capability``, and if it is to be
    recognised on a machine ``match``. A name of the package's is replaced.

    Raises
    ------
    SpecError
        If the file cannot be read, or a figure is missing, unknown or not positive.
    """
    path = devices_file()
    try:
        written = path.stat().st_mtime_ns
    except OSError as error:
        if "ATTNPLAN_DEVICES" in os.environ:
            raise SpecError(f"cannot read the device file {path}: {error.strerror}") from None
        return _built_in()
    return {**_built_in(), **_users(path, written)}


def devices_file() -> Path:
    """Return where the user's file of devices is looked for."""
    given = os.environ.get("ATTNPLAN_DEVICES")
    if given:
        return Path(given)
    settings = os.environ.get("XDG_CONFIG_HOME")
    return (Path(settings) if settings else Path.home() / ".config") / "attnplan" / "devices.toml"


@lru_cache(maxsize=8)
def _users(path: Path, written: int) -> Mapping[str, Device]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the device file {path}: {error.strerror}") from None
    except ValueError as error:  # no UTF-8, no TOML
        raise SpecError(f"the device file {path} is no TOML: {error}") from None
    for name, table in tables.items():
        _check_table(f"device {name!r} in {path}", name, table)
    return {name: _from_table(name, table) for name, table in tables.items()}


_FIGURES = ("bandwidth", "memory", "units")
_TEXTS = ("title", "source")
_OPTIONAL = ("capability", "match")
_RATES = ("float64", "float32", "tf32", "float16", "bfloat16")


def _check_table(what: str, name: str, table: Any) -> None:
    """Refuse a table of the user's file that says too little, or something impossible."""
    if name != name.lower() or name in ("auto", "cpu", "cuda"):
        raise SpecError(f"{what}: a name is in lower case, and none of auto, cpu, cuda")
    if not isinstance(table, dict):
        raise SpecError(f"{what} must be a table, got {table!r}")
    known = (*_TEXTS, "kind", "tflops", *_FIGURES, *_OPTIONAL)
    for key in table:
        if key not in known:
            raise SpecError(f"{what}: unknown figure {key!r}{did_you_mean(key, known)}")
    missing = [key for key in known if key not in table and key not in _OPTIONAL]
    if missing:
        raise SpecError(f"{what} lacks {', '.join(missing)}")
    for key in _TEXTS:
        if not isinstance(table[key], str) or not table[key]:
            raise SpecError(f"{what}: {key} must be text, got {table[key]!r}")
    if table["kind"] not in ("cpu", "cuda"):
        raise SpecError(f'{what}: kind must be "cpu" or "cuda", got {table["kind"]!r}')
    _check_figures(what, table)
    _check_recognition(what, table)


def _check_figures(what: str, table: dict[str, Any]) -> None:
    for key in _FIGURES:
        _check_positive(f"{what}: {key}", table[key])
    rates = table["tflops"]
    if not isinstance(rates, dict) or "float32" not in rates:
        raise SpecError(f"{what}: tflops must be a table by dtype that has float32, got {rates!r}")
    for dtype, rate in rates.items():
        if dtype not in _RATES:
            raise SpecError(f"{what}: unknown dtype {dtype!r} in tflops{did_you_mean(dtype, _RATES)}")
        _check_positive(f"{what}: tflops of {dtype}", rate)


def _check_positive(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise SpecError(f"{what} must be a positive number, got {value!r}")


def _check_recognition(what: str, table: dict[str, Any]) -> None:
    capability, match = table.get("capability"), table.get("match", [])
    if (table["kind"] == "cuda") != (capability is not None):
        raise SpecError(f"{what}: a cuda device has a capability such as [9, 0], a cpu none; got {capability!r}")
    if capability is not None and not (
        isinstance(capability, list) and len(capability) == 2 and all(isinstance(n, int) and n >= 0 for n in capability)
    ):
        raise SpecError(f"{what}: capability must be two numbers such as [9, 0], got {capability!r}")
    if not isinstance(match, list) or not all(isinstance(part, str) and part for part in match):
        raise SpecError(f"{what}: match must be a list of parts of the product's name, got {match!r}")


def _from_table(name: str, table: dict[str, Any]) -> Device:
    capability = table.get("capability")
    return Device(
        name=name,
        title=table["title"],
        kind=table["kind"],
        flops={dtype: rate * 1e12 for dtype, rate in table["tflops"].items()},
        bandwidth=table["bandwidth"] * 1e9,
        memory=int(table["memory"] * 2**30),
        source=table["source"],
        capability=None if capability is None else (capability[0], capability[1]),
        match=tuple(table.get("match", ())),
        units=int(table["units"]),
    )


def resolve(device: object = "auto") -> Target:
    """Return the target that a ``device=`` argument names.

    Parameters
    ----------
    device
        ``"auto"``, a torch device or its name (``"cpu"``, ``"cuda:1"``), or a name of the catalogue (``"h100"``).

    Raises
    ------
    SpecError
        If the name is unknown (with a suggestion), or names a CUDA device on a machine without one.

    Examples
    --------
    >>> resolve("h100").device.capability
    (9, 0)
    >>> resolve("h10")
    Traceback (most recent call last):
    ...
    attnplan.errors.SpecError: unknown device 'h10'; did you mean 'h100'?
    """
    name = str(device).lower()
    if name == "auto":
        name = "cuda" if _cuda_is_usable() else "cpu"
    if name == "cpu":
        return Target(local_cpu(), "cpu")
    if name == "cuda" or name.startswith("cuda:"):
        return _local_cuda(name)
    known = catalogue()
    if name not in known:
        raise SpecError(f"unknown device {str(device)!r}{did_you_mean(name, [*known, 'auto', 'cpu', 'cuda'])}")
    return Target(known[name], None, "not here: packages assumed present")


@lru_cache(maxsize=1)
def local_cpu() -> Device:
    """Return the CPU of this machine, its peak estimated from cores, clock and vector width."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    info = _read("/proc/cpuinfo")
    clocks = [float(line.split(":")[1]) for line in info.splitlines() if line.startswith("cpu MHz")]
    hertz = (max(clocks) if clocks else 2500.0) * 1e6
    per_cycle = 64 if "avx512f" in info else 32 if "avx2" in info else 16
    peak = cores * hertz * per_cycle
    return Device(
        name="cpu",
        title=f"this machine's CPU, {cores} cores at {hertz / 1e9:.1f} GHz",
        kind="cpu",
        flops={"float64": peak / 2, "float32": peak, "bfloat16": peak, "float16": peak},
        bandwidth=12.5e9 * cores,
        memory=_memory_bytes(),
        units=cores,
        source=f"{cores} cores x {hertz / 1e9:.2f} GHz x {per_cycle} float32 operations a cycle, from the CPU's flags",
    )


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 * 2**30


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cuda_is_usable() -> bool:
    """Return whether torch would find a CUDA device, without importing torch if it is not imported yet."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return bool(torch.cuda.is_available())
    return bool(_gpu_names()) and not _torch_is_cpu_build()


def _gpu_names() -> list[str]:
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in found for line in _read(str(path)).splitlines()]
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]


def _torch_is_cpu_build() -> bool:
    try:
        return "+cpu" in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return True


def _local_cuda(name: str) -> Target:
    if not _cuda_is_usable():
        known = ", ".join(n for n, d in catalogue().items() if d.kind == "cuda")
        raise SpecError(
            f"device {name!r}: torch finds no CUDA device here; to plan for one that is elsewhere name it: {known}"
        )
    import torch

    index = int(name.partition(":")[2] or torch.cuda.current_device())
    if index >= torch.cuda.device_count():
        raise SpecError(f"device {name!r} does not exist: this machine has {torch.cuda.device_count()} CUDA devices")
    properties = torch.cuda.get_device_properties(index)
    here = f"cuda:{index}"
    for device in catalogue().values():
        if any(part in properties.name for part in device.match):
            memory, units = properties.total_memory, properties.multi_processor_count
            return Target(attrs.evolve(device, memory=memory, units=units), here)
    capability = (properties.major, properties.minor)
    like = max(
        (d for d in catalogue().values() if d.capability is not None and d.capability <= capability),
        key=lambda d: d.capability or (0, 0),
        default=catalogue()["gtx1080"],
    )
    changes: dict[str, Any] = {"title": properties.name, "capability": capability, "memory": properties.total_memory,
                               "units": properties.multi_processor_count}  # fmt: skip
    return Target(
        attrs.evolve(like, **changes), here, f"{properties.name} is not in the catalogue: priced as {like.name}"
    )
