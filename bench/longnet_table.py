"""The table that ``bench.longnet`` prints last."""

from __future__ import annotations

from typing import Any


def table(rows: list[dict[str, Any]]) -> None:
    """Print times, each beside the fastest kernels alone of its group."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row and "backward" in row:
            groups.setdefault((row["case"], row["causal"], row["backward"]), []).append(row)
    for (case, causal, backward), found in groups.items():
        alone = min((r["ms"] for r in found if r["name"].startswith("kernels")), default=float("nan"))
        print(f"\n{case}{' causal' if causal else ''} {'forward + backward' if backward else 'forward'}")
        for r in sorted(found, key=lambda r: r["ms"]):
            host, device, peak = r["host_ms"], r.get("graph_ms", 0), r.get("peak_mib", 0)
            print(f"  {r['name']:<32} {r['ms']:>9.3f} ms  {r['ms'] / alone:>6.2f} x kernels  host {host:>7.3f}", end="")
            print(f"  device {device:>8.3f}  peak {peak:>6} MiB")
