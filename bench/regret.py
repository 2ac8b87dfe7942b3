"""How often, and by how much, the planner's choice loses to the best of everything that was measured.

    python -m bench.regret --measure --gpu --json bench/results/regret-h100-xformers.json --budget 250 \\
        --peers sdpa,cudnn,flex
    python -m bench.regret --measure --gpu --json bench/results/regret-h100-fa4.json --budget 200 \\
        --backends flash --peers fa4,cudnn
    python -m bench.regret --measure --cpu --json bench/results/regret-cpu-2core.json --budget 840 --peers sdpa
    python -m bench.regret --judge bench/results/regret-h100-*.json --seed 1 --seed 2 --seed 3
    python -m bench.regret --ship bench/results/regret-h100-*.json

``--measure`` runs the grid of :mod:`bench.grid`: every candidate that accepts a spec, and calls by hand, take turns. On
a GPU several processes compile and check at once, and race one at a time (:mod:`bench.crew`); at the end, or at
SIGTERM, the standard error says what their time was spent on. Rows are written after each spec; with ``--resume`` those
stay whose graphs are the same. ``--judge`` fits the cost model to half of the rows, by the seed, and judges it on the
other half; ``--ship`` fits it to all of them, for the package.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.workers import start  # what imports torch is imported in functions: workers start before it is

if TYPE_CHECKING:
    from bench.grid import Case
    from bench.measuring import Rules

BEGAN = time.time()
Row = dict[str, Any]
WORKERS = 20
"""Processes on a GPU: nearly half of them wait for their turn."""
BY_HAND = ("sdpa", "cudnn", "flex", "fa4")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--measure", action="store_true")
    what.add_argument("--judge", nargs="+", type=Path, metavar="FILE")
    what.add_argument(
        "--ship", nargs="+", type=Path, metavar="FILE", help="fit everything, and write it for the package"
    )
    what.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", dest="grid", action="store_const", const="gpu")
    parser.add_argument("--cpu", dest="grid", action="store_const", const="cpu")
    parser.add_argument("--tiny", dest="grid", action="store_const", const="tiny", help="tries the script on a CPU")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--budget", type=float, default=420.0, metavar="SECONDS")
    parser.add_argument("--backends", default="", help="backends to measure, separated by commas; default: all")
    parser.add_argument("--peers", default=",".join(BY_HAND), help="calls by hand, separated by commas")
    parser.add_argument("--only", default="", help="measure the specs whose names hold this")
    parser.add_argument("--workers", type=int, help=f"processes; by default {WORKERS} on a GPU, and this one on a CPU")
    parser.add_argument("--seed", type=int, action="append", help="for --judge; give it several times")
    parser.add_argument("--leave", default="", help="for --ship: numbers that keep their published value, by commas")
    parser.add_argument(
        "--changed", default="", metavar="REGEX", help="for --ship: rows, as 'candidate, family, mode', of which only "
        "the device's time counts, as the host's path has changed",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="keep what --json says about graphs that are the same")
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.judge:
        from bench.judge import main as judge

        judge(given.judge, given.seed or [1, 2, 3], given.json)
    elif given.ship:
        from bench.judge import ship

        ship(given.ship, [name for name in given.leave.split(",") if name], given.changed)
    elif given.worker:
        worker(given)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the crew says what it did, and ends its workers
        count = WORKERS if given.workers is None and given.grid == "gpu" else given.workers or 0
        processes = [start(command_of(given)) for _ in range(count)]
        try:
            Measuring(given, processes).run()
        finally:
            for process in processes:
                process.kill()


def command_of(given: argparse.Namespace) -> list[str]:
    """Return what starts a worker."""
    passed = {"--backends": given.backends, "--peers": given.peers, "--only": given.only}
    options = [x for name, value in passed.items() for x in (name, value)]
    return [sys.executable, "-m", "bench.regret", "--worker", f"--{given.grid}", *options]


def select(given: argparse.Namespace) -> dict[str, Case]:
    from bench.grid import GRIDS, later_flex

    if given.grid is None:
        raise SystemExit("say --gpu, --cpu or --tiny")
    return {c.name: c for c in later_flex(GRIDS[given.grid]()) if given.only in c.name}


def rules_of(given: argparse.Namespace) -> Rules:
    from attnplan.cost import resolve
    from bench.measuring import Rules

    gpu = given.grid == "gpu"
    return Rules.of(resolve("cuda" if gpu else "cpu"), given.backends, given.peers, gpu=gpu)


def about_me() -> Row:
    """Return what a file of rows says about where it was measured."""
    from attnplan.harness import environment

    return environment()


def same_place(ours: Row, theirs: Row) -> bool:
    """Return whether two environments are one device with the same packages, whatever they say about attnplan."""

    def facts(x: Row) -> Row:
        return {"device": x["device"], **{n: v for n, v in x["versions"].items() if n != "attnplan"}}

    return facts(ours) == facts(theirs)


def worker(given: argparse.Namespace) -> None:
    """Measure what arrives on the standard input; what libraries print goes to the standard error."""
    from bench import crew

    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted to a JitArgument", UserWarning)
    crew.work(rules_of(given), select(given), about_me(), sys.stdin, said)


class Measuring:
    """One run over a grid: in several processes, which were started before, or in this one."""

    def __init__(self, given: argparse.Namespace, processes: list[subprocess.Popen[str]] | None = None) -> None:
        from attnplan.harness import read_rows

        self.given, self.processes = given, processes or []
        self.started = BEGAN if self.processes else time.time()
        self.until: float = self.started + given.budget
        self.cases = select(given)
        self.out: Path = given.json or Path(f"regret-{given.grid}.json")
        self.head: Row = {"grid": given.grid}
        self.rows: dict[str, list[Row]] = {}
        self.count = 0
        if given.resume and self.out.exists():
            self.head, rows = read_rows(self.out)
            self.head.pop("schema", None)
            for row in rows:
                if "mode" in row:
                    self.rows.setdefault(row["spec"], []).append(row)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.time()

    @property
    def known(self) -> dict[str, dict[str, str]]:
        """Digests of graphs by candidate, by spec."""
        return {
            spec: {r["candidate"]: r["graph"] for r in rows if "graph" in r and "skipped" not in r}
            for spec, rows in self.rows.items()
        }

    def run(self) -> None:
        """Measure, write what was measured after each spec, and print a table."""
        before = self.head.get("seconds", 0)
        if self.processes:
            self._together()
        else:
            self._here()
        self.head["seconds"] = before + time.time() - self.started
        self._write()
        print(summary([r for rows in self.rows.values() for r in rows]), flush=True)

    def _together(self) -> None:
        from bench import crew

        command, known = command_of(self.given), self.known
        crew.Crew(command, self._order(), self.until, known, self._done, self._here_is, self.processes).run()

    def _here(self) -> None:
        from bench.measuring import Job, measure

        rules = rules_of(self.given)
        self._here_is(about_me())
        for case in self._order():
            if self.left < 2:
                break
            self._done(case, measure(Job(case, self.left, known=self.known.get(case.name, {})), rules))

    def _order(self) -> list[Case]:
        """Return the specs that were not measured, then those that were, to see whether their graphs are the same."""
        return sorted(self.cases.values(), key=lambda c: c.name in self.rows)

    def _here_is(self, about: Row) -> None:
        if not same_place(about, self.head.setdefault("environment", about)):
            raise SystemExit(f"{self.out} holds rows of another device or of other versions: give another file")

    def _done(self, case: Case, rows: list[Row] | None) -> None:
        self.count += 1
        if rows is not None:
            self.rows[case.name] = rows
            self._write()
        spent = time.time() - self.started
        print(f"{self.count:>3}/{len(self.cases)} {spent:>4.0f} s  {brief(case, rows)}", flush=True)

    def _write(self) -> None:
        from attnplan.harness import write_rows

        order = [r for name in self.cases for r in self.rows.get(name, [])]
        others = [r for name, rows in self.rows.items() if name not in self.cases for r in rows]
        write_rows(self.out, self.head, order + others)


def brief(case: Case, rows: list[Row] | None) -> str:
    """Say what a spec's rows hold, on one line."""
    if rows is None:
        return f"{case.name}: as it was"
    found = [r for r in rows if "seconds" in r]
    failed = sum("failed" in r for r in rows)
    if not found:
        return f"{case.name}: nothing ran, {failed} failed"
    best = min(found, key=lambda r: r["seconds"])
    bad = f", {failed} failed" if failed else ""
    return f"{case.name}: {best['seconds'] * 1e6:,.0f} us {best['candidate']} of {len(found)}{bad}"


def summary(rows: list[Row]) -> str:
    """Return a small table: by family, what ran, failed, won, and what the planner's own choice lost."""
    lines = [f"{'family':<10} {'specs':>5} {'rows':>5} {'failed':>6} {'skipped':>7}  regret as priced: mean, worst"]
    for family in dict.fromkeys(r.get("family", "") for r in rows):
        mine = [r for r in rows if r.get("family", "") == family]
        losses = list(_losses(mine))
        mean = f"{100 * sum(losses) / len(losses):6.1f} %" if losses else "-"
        worst = f"{100 * max(losses):6.1f} %" if losses else "-"
        lines.append(
            f"{family or '-':<10} {len({r['spec'] for r in mine}):>5} {sum('seconds' in r for r in mine):>5} "
            f"{sum('failed' in r for r in mine):>6} {sum('skipped' in r for r in mine):>7}  {mean} {worst}"
        )
    for row in rows:
        if "failed" in row:
            lines.append(f"  failed: {row['spec']}: {row.get('candidate', '')}: {row['failed'][:160]}")
    return "\n".join(lines)


def _losses(rows: list[Row]) -> Iterator[float]:
    for spec in dict.fromkeys(r["spec"] for r in rows):
        timed = [r for r in rows if r["spec"] == spec and "seconds" in r and "predicted" in r]
        automatic = [r for r in timed if r["backend"] != "compiled" or r["schedule"] == "flex"]
        if automatic:
            chosen = min(automatic, key=lambda r: r["predicted"])
            yield chosen["seconds"] / min(r["seconds"] for r in timed) - 1


if __name__ == "__main__":
    main()
