"""How long a dry run takes: ``python -m bench.ring_dry [--json PATH]``. A quiet machine is assumed; no GPU is used."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

SEGMENTS = [2048 * 2**j for j in range(20)]
SPECS = {
    "longnet, 2^30 tokens on 1,024 ranks": f"longnet({SEGMENTS}, {[2**j for j in range(20)]})",
    "causal, 2^30 tokens on 1,024 ranks": "full()",
    "window of 4,096, 2^30 tokens on 1,024 ranks": "window(4096)",
}
_TIMED = """
import sys, time
from attnplan import AttentionSpec
from attnplan.cost import catalogue
from attnplan.ring import choose
spec = AttentionSpec(seq_len=2**30, heads=32, kv_heads=8, head_dim=128, pattern=sys.argv[1], causal=True)
start, cpu = time.perf_counter(), time.process_time()
best = choose(spec, "128x8", catalogue()["h200"])[0]
took = time.perf_counter() - start, time.process_time() - cpu
print(*took, best.seconds, max(r.forward_bytes for r in best.ranks), best.name, sep="\\t")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    for name, pattern in SPECS.items():
        found = [
            subprocess.run([sys.executable, "-c", _TIMED, pattern], capture_output=True, text=True, check=True).stdout
            for _ in range(3)  # in processes of their own: nothing is cached
        ]
        best = min(found, key=lambda line: float(line.split("\t")[0])).strip().split("\t")
        seconds, cpu, predicted = map(float, best[:3])
        rows.append(
            {
                "spec": name,
                "planning_seconds": seconds,
                "cpu_seconds": cpu,
                "choice": best[4],
                "predicted_seconds": predicted,
                "received_bytes": int(best[3]),
            }
        )
        print(f"{name:<46} {seconds:6.2f} s ({cpu:.2f} s CPU)   {best[4]}, {predicted:.4g} s, {int(best[3]):,} bytes")
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
