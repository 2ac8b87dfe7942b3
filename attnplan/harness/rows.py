"""Rows of measurements as files and as tables, and the environment in which they were taken."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attnplan.errors import SpecError
from attnplan.packages import installed
from attnplan.units import format_seconds

SCHEMA = 1
"""Version of the files that :func:`write_rows` writes."""


def environment() -> dict[str, Any]:
    """Return what a measurement depends on: device, driver, versions.

    Examples
    --------
    >>> "torch" in environment()["versions"]
    True
    """
    import torch

    gpu = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "kind": "cuda" if gpu else "cpu",
        "capability": list(torch.cuda.get_device_capability()) if gpu else None,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": installed(),
    }


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), None)


def write_rows(path: Path, head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, one a line, in place of a file of that name: all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    front = json.dumps({"schema": SCHEMA, **head}, indent=1)
    text = front[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def read_rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (everything but the rows, rows) of a file.

    Raises
    ------
    SpecError
        If it is no such file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found.pop("rows")
    except OSError as error:
        raise SpecError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SpecError(f"{str(path)!r} holds no rows of measurements") from None
    return found, rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as text, the fastest of each spec first."""
    by_spec: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_spec.setdefault(row.get("spec", ""), []).append(row)
    lines = []
    for spec, found in by_spec.items():
        timed = sorted((r for r in found if "seconds" in r), key=lambda r: r["seconds"])
        lines.append(spec)
        for row in timed:
            factor = row["seconds"] / timed[0]["seconds"]
            said = f" predicted {format_seconds(row['predicted']):<9}" if "predicted" in row else " " * 20
            lines.append(
                f"  {row['candidate']:<36} {format_seconds(row['seconds']):<9} x {factor:<6.3g}{said} "
                f"spread {100 * row['spread']:.0f} %  error {row['error']:.0e}"
            )
        lines += [f"  {r['candidate']:<36} failed: {r['failed']}" for r in found if "failed" in r]
        lines += [f"  {r['candidate']:<36} skipped: {r['skipped']}" for r in found if "skipped" in r]
    return "\n".join(lines) + "\n"
