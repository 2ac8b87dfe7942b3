"""How strong the coverage proof is: mutate the rewrites one syntax node at a time and see which mutants it refuses.

Every mutant of ``lower.py`` and of the passes compiles a corpus of specs through the real pipelines, with the mutated
module patched in and nothing written to disk. Where the proof passes and the graph differs from the unmutated one, the
float64 interpreter says whether the meaning changed. ``docs/mutants.md`` has the method and the figures.

    python -m bench.mutants --json bench/results/mutants.json --docs docs/mutants.md      # about five minutes
    python -m bench.mutants --sample 40 --seed 1
    python -m bench.mutants --from bench/results/mutants.json --docs docs/mutants.md      # only write the page again
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import click

from bench.mutants.report import document, explained, render, write_json
from bench.mutants.syntax import mutants
from bench.mutants.workers import run


def measure(sample: int | None = None, seed: int = 0, jobs: int = 2) -> dict[str, Any]:
    """Judge every mutant, or a random sample of them."""
    chosen = mutants()
    if sample is not None and sample < len(chosen):
        chosen = random.Random(seed).sample(chosen, sample)
    start = time.monotonic()
    rows = run(chosen, jobs)
    return document(rows, time.monotonic() - start, jobs)


@click.command(help=__doc__.split("\n\n    ", 1)[0] if __doc__ else None)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what was found.")
@click.option("--docs", "docs_file", type=click.Path(path_type=Path), help="Write the page that explains it.")
@click.option("--from", "from_file", type=click.Path(path_type=Path, exists=True), help="Read a run, do not run.")
@click.option("--sample", type=click.IntRange(min=1), help="Judge that many mutants, drawn at random.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sample.")
@click.option("--jobs", default=2, show_default=True, help="Number of processes.")
def main(
    json_file: Path | None, docs_file: Path | None, from_file: Path | None, sample: int | None, seed: int, jobs: int
) -> None:
    """Run from the command line."""
    data = json.loads(from_file.read_text(encoding="utf-8")) if from_file else measure(sample, seed, jobs)
    if json_file:
        write_json(json_file, data)
    if docs_file:
        docs_file.write_text(render(data), encoding="utf-8")
    for name, value in data["summary"].items():
        click.echo(f"{name.replace('_', ' '):<26}{value}")
    for row in data["mutants"]:
        if row["verdict"] == "survivor":
            click.echo(explained(row))


if __name__ == "__main__":
    main()
