"""How often, and by how much, the planner's choice loses to the best of everything that was measured.

    python -m bench.regret --measure --gpu --json regret-h100.json --budget 420
    python -m bench.regret --measure --cpu --json bench/results/regret-cpu.json
    python -m bench.regret --judge bench/results/regret-h100-*.json --seed 1 --seed 2 --seed 3
    python -m bench.regret --ship bench/results/regret-h100-*.json

``--measure`` runs the grid of :mod:`bench.grid`: every candidate that accepts a spec, and calls by hand, take turns.
Rows are written after each spec. ``--judge`` fits the cost model to half of the rows, by the seed, and judges it on the
other half; ``--ship`` fits it to all of them, for the package.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.grid import GRIDS, Case

BY_HAND = ("sdpa", "cudnn", "flex", "fa4")
HAND_FLEX_ROWS = 16_384
"""Specs of the first rank with as many rows get FlexAttention by hand beside the plan that runs it."""
HUNG = 20.0
"""Seconds after which a contestant counts as hung."""
HANGS = 40.0
"""Seconds without a new contestant after which a process is taken to hang."""
RESTARTS = 12
PHASES = ("its preparation", "the race")
"""What may hang that is no contestant; the spec is left out then."""
FLEX_COST = 12.0
"""Seconds that a FlexAttention plan may take to compile, at worst: none is started with less time left."""
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--measure", action="store_true")
    what.add_argument("--judge", nargs="+", type=Path, metavar="FILE")
    what.add_argument(
        "--ship", nargs="+", type=Path, metavar="FILE", help="fit everything, and write it for the package"
    )
    what.add_argument("--warm", metavar="PART/PARTS", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", dest="grid", action="store_const", const="gpu")
    parser.add_argument("--cpu", dest="grid", action="store_const", const="cpu")
    parser.add_argument("--tiny", dest="grid", action="store_const", const="tiny", help="tries the script on a CPU")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--budget", type=float, default=420.0, metavar="SECONDS")
    parser.add_argument("--backends", default="", help="backends to measure, separated by commas; default: all")
    parser.add_argument("--peers", default=",".join(BY_HAND), help="calls by hand, separated by commas")
    parser.add_argument("--only", default="", help="measure the specs whose names hold this")
    parser.add_argument("--warmers", type=int, default=10, help="processes that compile FlexAttention beforehand")
    parser.add_argument("--seed", type=int, action="append", help="for --judge; give it several times")
    parser.add_argument("--leave", default="", help="for --ship: numbers that keep their published value, by commas")
    parser.add_argument("--resume", action="store_true", help="keep the rows in --json, and measure the other specs")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.judge:
        from bench.judge import main as judge

        judge(given.judge, given.seed or [1, 2, 3], given.json)
    elif given.ship:
        from bench.judge import ship

        ship(given.ship, [name for name in given.leave.split(",") if name])
    elif given.warm:
        warm(given)
    elif given.grid == "gpu" and not given.watched:
        watch(given)
    else:
        Measuring(given).run()


def marker_of(given: argparse.Namespace) -> Path:
    """Return the file that says which contestant runs, and by its time that something still happens."""
    out: Path = given.json or Path(f"regret-{given.grid}.json")
    return out.with_name(f".{out.name}.running")


def watch(given: argparse.Namespace) -> None:
    """Measure in another process, and start that anew, without the contestant that it hangs in, when it hangs."""
    until = given.until or time.time() + given.budget
    prewarm(given, until)
    argv = [a for a in sys.argv[1:] if a != "--resume"]
    command = [sys.executable, "-X", "faulthandler", "-m", "bench.regret", *argv, "--watched", "--until", str(until)]
    resume = given.resume
    marker = marker_of(given)
    marker.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(RESTARTS):
        started = time.time()
        running = subprocess.Popen([*command, "--resume"] if resume else command)
        while running.poll() is None:
            time.sleep(1)
            last = marker.stat().st_mtime if marker.exists() else started
            if time.time() - max(last, started) > HANGS:
                running.send_signal(signal.SIGABRT)  # the fault handler says where it hangs
                time.sleep(3)
                running.kill()
                running.wait()
        if running.returncode == 0 or time.time() > until or not marker.exists():
            return
        spec, name, _ = json.loads(marker.read_text(encoding="utf-8"))
        marker.write_text(json.dumps([spec, name, f"hung or died, code {running.returncode}"]), encoding="utf-8")
        print(f"starting again after {name} of {spec}", flush=True)
        resume = True


def select(given: argparse.Namespace) -> list[Case]:
    if given.grid is None:
        raise SystemExit("say --gpu, --cpu or --tiny")
    return [c for c in GRIDS[given.grid]() if given.only in c.name]


class Measuring:
    """One run over a grid, or what is left of it after an error that cost the process its device."""

    def __init__(self, given: argparse.Namespace) -> None:
        from attnplan.backends.base import import_failure
        from attnplan.cost import resolve
        from attnplan.harness import environment, read_rows

        self.given = given
        self.until = given.until or time.time() + given.budget
        self.target = resolve("cuda" if given.grid == "gpu" else "cpu")
        self.backends = frozenset(filter(None, given.backends.split(",")))
        self.peers = frozenset(filter(None, given.peers.split(",")))
        if import_failure("flash_attn.cute.interface") is not None:
            self.peers -= {"fa4"}
        self.cases = select(given)
        self.head: Row = {"grid": given.grid, "environment": environment()}
        self.rows: list[Row] = []
        self.out: Path = given.json or Path(f"regret-{given.grid}.json")
        self.marker = marker_of(given)
        if given.resume and self.out.exists():
            self.head, self.rows = read_rows(self.out)
            self.head.pop("schema", None)
            self.rows = [r for r in self.rows if "mode" in r or "failed" in r]
        self.broken = self._what_broke()
        self.marked = time.monotonic()

    def _what_broke(self) -> set[tuple[str, str]]:
        """Return the (spec, contestant) that ended an earlier process."""
        if not (self.given.resume and self.marker.exists()):
            return set()
        spec, name, error = json.loads(self.marker.read_text(encoding="utf-8"))
        self.rows.append({"spec": spec, "candidate": name, "failed": f"ended the process: {error}"})
        self.marker.unlink()
        return {(r["spec"], r["candidate"]) for r in self.rows if str(r.get("failed", "")).startswith("ended")}

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.time()

    def run(self) -> None:
        """Measure, and write what was measured after each spec."""
        import torch

        started = time.time()
        if self.given.grid == "gpu":
            threading.Thread(target=self._watch, daemon=True).start()
            if "ceilings" not in self.head:
                from attnplan.calibrate import ceilings

                try:
                    self.head["ceilings"] = ceilings(str(self.target.torch_device), budget=min(25.0, self.left / 8))
                except Exception as error:  # the grid is worth more
                    self.head["ceilings"] = {"failed": f"{type(error).__name__}: {error}"}
                self._write()
                print(f"ceilings after {time.time() - started:.0f} s", flush=True)
        done = {r["spec"] for r in self.rows if "mode" in r} | {spec for spec, name in self.broken if name in PHASES}
        for number, case in enumerate(self.cases):
            if case.name in done:
                continue
            if self.left < 2:
                self.rows.append({"spec": case.name, "skipped": "out of time"})
                continue
            self._mark(case.name, PHASES[0])
            self._case(case)
            self._write()
            if self.given.grid == "gpu":
                torch.cuda.empty_cache()
            print(f"{number + 1:>3}/{len(self.cases)} {time.time() - started:>4.0f} s  {self._brief(case)}", flush=True)
        self.head["seconds"] = self.head.get("seconds", 0) + time.time() - started
        self._write()
        print(summary(self.rows), flush=True)
        self.marker.unlink(missing_ok=True)

    def _case(self, case: Case) -> None:
        from attnplan.harness.entrants import PoisonedError, contest
        from attnplan.harness.peers import contestants_by_hand
        from attnplan.search import lowerings_clear

        facts = {"spec": case.name, "family": case.family, "mode": "training" if case.spec.training else "forward"}
        asked = self._asked(case)
        device = str(self.target.torch_device)
        try:
            entrants, rows = self._entrants(case, asked)
            hand, others = contestants_by_hand(case.spec, device, self._hands(case))
            entrants += [h for h in hand if (case.name, h.name) not in self.broken]
            lowerings_clear()
            rows += others
            rows += list(contest(case.spec, self.target, entrants, asked, case.operands))
        except PoisonedError as error:
            self._again(error)
        except Exception as error:  # one spec that fails must not cost the others
            rows = [{"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]
        self.rows += [{**facts, **row} for row in rows if "refused" not in row]

    def _entrants(self, case: Case, asked: Any) -> tuple[list[Any], list[Row]]:
        from attnplan.harness.entrants import contestants

        start = time.perf_counter()
        entrants, rows = contestants(case.spec, self.target, asked)
        refused = sum("refused" in r for r in rows)
        rows.append({"planning": time.perf_counter() - start, "refused_candidates": refused})
        kept = [e for e in entrants if (case.name, e.name) not in self.broken]
        return kept, rows

    def _hands(self, case: Case) -> frozenset[str]:
        wanted = set(self.peers)
        few = case.rank == 0 and case.spec.shape.seq_len == HAND_FLEX_ROWS and not case.spec.training
        if not (case.flex and few) or self.left < FLEX_COST:
            wanted.discard("flex")
        return frozenset(wanted)

    def _asked(self, case: Case) -> Any:
        from attnplan.harness.entrants import Asked
        from attnplan.runtime.clock import Plenty

        without = {("reference", "float64")}
        if self.given.grid == "cpu" or not case.flex or self.left < FLEX_COST:
            without |= {("compiled", "flex"), ("compiled", "inductor")}
        plenty = Plenty(rounds=8, seconds=0.05) if self.given.grid == "gpu" else Plenty(rounds=7, seconds=0.5, slow=1.0)
        return Asked(
            plenty=plenty,
            backends=self.backends,
            without=frozenset(without),
            memory=int(self.target.device.memory * 0.4),
            hopeless=25.0 if self.given.grid == "gpu" else 12.0,
            until=time.monotonic() + self.left,
            watch=lambda name: self._mark(case.name, name),
        )

    def _mark(self, spec: str, name: str) -> None:
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        self.marker.write_text(json.dumps([spec, name, "died"]), encoding="utf-8")
        self.marked = time.monotonic()

    def _watch(self) -> None:
        """Start anew where one contestant hangs; a kernel that never ends cannot be interrupted otherwise."""
        while True:
            time.sleep(1)
            if self.marker.exists() and time.monotonic() - self.marked > HUNG:
                self._again(TimeoutError(f"took longer than {HUNG:.0f} s"))

    def _again(self, error: Exception) -> None:
        """Start this process anew, without the contestant that poisoned it."""
        spec, name, _ = json.loads(self.marker.read_text(encoding="utf-8"))
        self.marker.write_text(json.dumps([spec, name, str(error)[:200]]), encoding="utf-8")
        self._write()
        print(f"starting again after {name} of {spec}: {error}", flush=True)
        argv = [a for a in sys.argv[1:] if a != "--resume"]
        again = [*argv, "--resume", *([] if self.given.until else ["--until", str(self.until)])]
        os.execv(sys.executable, [sys.executable, "-m", "bench.regret", *again])

    def _write(self) -> None:
        from attnplan.harness import write_rows

        write_rows(self.out, self.head, self.rows)

    def _brief(self, case: Case) -> str:
        found = [r for r in self.rows if r["spec"] == case.name and "seconds" in r]
        failed = sum("failed" in r for r in self.rows if r["spec"] == case.name)
        if not found:
            return f"{case.name}: nothing ran, {failed} failed"
        best = min(found, key=lambda r: r["seconds"])
        bad = f", {failed} failed" if failed else ""
        return f"{case.name}: {best['seconds'] * 1e6:,.0f} us {best['candidate']} of {len(found)}{bad}"


def prewarm(given: argparse.Namespace, until: float) -> None:
    """Compile FlexAttention for the marked specs in several processes at once: the compiler keeps what it made."""
    if given.warmers < 1 or given.resume or (given.backends and "compiled" not in given.backends):
        return
    share = (until - time.time()) / 4
    command = [sys.executable, "-m", "bench.regret", "--gpu", "--only", given.only]
    running = [
        subprocess.Popen(
            [*command, "--warm", f"{i}/{given.warmers}", "--budget", str(share)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        for i in range(given.warmers)
    ]
    deadline = time.time() + share
    for one in running:
        try:
            one.wait(max(0.1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()
    print(f"compiled beforehand, {until - time.time():.0f} s left", flush=True)


def warm(given: argparse.Namespace) -> None:
    """Run FlexAttention once for every n-th marked spec, so that its compilation is found by the next process."""
    import torch

    from attnplan.cost import resolve
    from attnplan.harness.entrants import Asked, contestants, prepared

    part, parts = map(int, given.warm.split("/"))
    until = time.time() + given.budget
    target = resolve("cuda")
    asked = Asked(backends=frozenset({"compiled"}), hopeless=1e9)
    marked = [c for c in select(given) if c.flex]
    for case in marked[part::parts]:
        if time.time() > until:
            return
        try:
            for one in contestants(case.spec, target, asked)[0]:
                inputs = prepared(case.spec, "cuda:0", 0, case.operands)
                inputs.errors(one.run)
                inputs.call(one.run)()
        except Exception as error:  # what fails here is reported by the run itself
            print(f"{case.name}: {error}", flush=True)
        torch.cuda.empty_cache()


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
        automatic = [r for r in timed if r["backend"] != "compiled"]
        if automatic:
            chosen = min(automatic, key=lambda r: r["predicted"])
            yield chosen["seconds"] / min(r["seconds"] for r in timed) - 1


if __name__ == "__main__":
    main()
