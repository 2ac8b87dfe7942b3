"""Bytes that one call sends, as torch's profiler counts messages: compared with the plan's figure."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

SIZES = {"Byte": 1, "Char": 1, "Half": 2, "BFloat16": 2, "Float": 4, "Int": 4, "Double": 8, "Long": 8}


def profiled_bytes(call: Callable[[], Any], ranks: int, kind: str) -> dict[str, Any]:
    """Run a call under the profiler; return the bytes this rank sends, by kind of message, as torch recorded them.

    A gather counts what is sent to the others. The record of gloo has no messages from point to point.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if kind == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as found:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    sent: dict[str, int] = {}
    seen: dict[str, int] = {}
    for event in events:
        about = event.get("args", {})
        name = about.get("Collective name")
        if event.get("name") != "record_param_comms" or name is None:
            continue
        seen[name] = seen.get(name, 0) + 1
        size = int(about.get("In msg nelems", 0)) * SIZES.get(about.get("dtype", ""), 0)
        if "gather" in name:
            size *= ranks - 1
        if "recv" not in name and "barrier" not in name:
            sent[name] = sent.get(name, 0) + size
    return {"messages": seen, "sent": sent, "total": sum(sent.values())}
