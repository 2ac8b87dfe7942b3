"""Tries each extra as its users install it: what loads, what conflicts with what, and what attnplan says then.

    python -m bench.installs --wheels DIR --gpu --json bench/results/installs-h100.json

Each combination of packages is installed from wheels in ``DIR``, without their dependencies and without the network,
into a folder of its own, and asked in a process of its own: which schedules are usable, and why the others are not;
with ``--gpu`` also whether a causal plan runs by each that is. ``--needs`` names folders with what flash-attn 4 depends
on, without flash-attn 4 itself. On a machine without ``DIR`` it asks about what is installed already.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

COMBINATIONS = {
    "nothing": (),
    "attnplan[xformers]": ("xformers", "nvidia-cuda-runtime-cu12"),
    "xformers without the runtime of CUDA 12": ("xformers",),
    "attnplan[flash]": ("flash-attn-4",),
    "both": ("xformers", "nvidia-cuda-runtime-cu12", "flash-attn-4"),
}

ASK = """
import json, sys
import torch
from attnplan import AttentionSpec
from attnplan.backends import registry
from attnplan.cost import resolve
from attnplan.plan import Plan
from attnplan.search import every_way

target = resolve("cuda" if sys.argv[1] == "gpu" else "cpu")
from attnplan.cost import Target, catalogue
asked = target if sys.argv[1] == "gpu" else Target(catalogue()["h100"], "cpu")
said = {}
for backend in registry().backends.values():
    for schedule in backend.schedules(asked.device):
        if backend.name in ("xformers", "flash"):
            said[f"{backend.name} ({schedule.name})"] = list(backend.missing(schedule, asked)) or ["usable"]
ran = {}
if sys.argv[1] == "gpu":
    spec = AttentionSpec(seq_len=1024, heads=4, head_dim=64, causal=True, dtype="bfloat16")
    q, k, v = (torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    for candidate, found in every_way(spec, target):
        if found is not None and candidate.backend in ("xformers", "flash"):
            try:
                out = Plan(spec, target, found, {"backend": candidate.backend})(q, k, v).float()
                ran[candidate.name] = f"off by {((out - want).norm() / want.norm()).item():.1e}"
            except Exception as error:
                ran[candidate.name] = f"{type(error).__name__}: {error}"[:300]
print("SAID " + json.dumps({"torch": torch.__version__, "said": said, "ran": ran}))
"""


def asked(
    packages: tuple[str, ...], wheels: Path | None, on_gpu: bool, seconds: float, needs: str = ""
) -> dict[str, object]:
    """Install wheels into a folder, and return what a process that sees them says."""
    with tempfile.TemporaryDirectory() as folder:
        if packages and wheels is not None:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
            done = subprocess.run(
                [*pip, "--find-links", str(wheels), *packages], capture_output=True, text=True, timeout=seconds
            )
            if done.returncode:
                return {"pip": done.stderr.strip()[-400:]}
        path = [folder, str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        path += [needs] if "flash-attn-4" in packages else []
        libraries = [str(p.parent) for p in Path(folder).rglob("libcudart.so*")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in path if p),
            "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        }
        command = [sys.executable, "-c", ASK, "gpu" if on_gpu else "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
        for line in done.stdout.splitlines():
            if line.startswith("SAID "):
                found: dict[str, object] = json.loads(line.removeprefix("SAID "))
                return found
        return {"failed": (done.stderr.strip() or "it said nothing")[-400:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder with wheels")
    parser.add_argument("--needs", default="", help="folders with what flash-attn 4 depends on, separated by colons")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--each", type=float, default=60.0, help="seconds that one combination may take")
    given = parser.parse_args()
    rows = []
    for name, packages in COMBINATIONS.items() if given.wheels else {"what is installed": ()}.items():
        try:
            row: dict[str, object] = {
                "packages": name,
                **asked(packages, given.wheels, given.gpu, given.each, given.needs),
            }
        except Exception as error:  # one combination must not cost the others
            row = {"packages": name, "failed": f"{type(error).__name__}: {error}"[:400]}
        rows.append(row)
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(name)
        shown = [row.get("said") or {}, row.get("ran") or {}]
        for key, value in chain(*(x.items() for x in shown if isinstance(x, dict))):
            print(f"    {key:<34} {'; '.join(value) if isinstance(value, list) else value}"[:200])
        for key in ("pip", "failed"):
            if key in row:
                print(f"    {key}: {row[key]}")


if __name__ == "__main__":
    main()
