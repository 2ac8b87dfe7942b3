"""Judges the planner on one device with a cost model that was fitted to another: only data-sheet figures differ.

    python -m bench.transfer --from bench/results/regret-h100-*.json --to bench/results/regret-h200-*.json

Numbers of a calibration are shares of a device's data-sheet figures, so those of an H100 can price plans for an H200.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from attnplan.cost.fit import fitted
from attnplan.cost.parameters import defaults
from bench.judge import by_price, errors, losses, summary
from bench.judged import read


def transferred(source: list[Path], target: list[Path]) -> dict[str, Any]:
    """Return the regret on the rows of ``target`` of a model that is fitted to all rows of ``source``."""
    device, learned, _ = read(source)
    other, judged, stale = read(target)
    table, _ = fitted([s for one in learned for s in one.samples], device, defaults(device.kind))
    return {
        "from": device.name,
        "to": other.name,
        "specs": len(judged),
        "out of date": stale,
        "regret": {
            "auto": summary(losses(judged, by_price(other, table))),
            "auto, data sheet": summary(losses(judged, by_price(other, defaults(other.kind)))),
        },
        "MAPE": statistics.mean(abs(e) for _, _, e in errors(judged, other, table)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--to", dest="target", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = transferred(given.source, given.target)
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
