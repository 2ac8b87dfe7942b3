"""Tries by hand what backends refuse: how many refusals of the catalogue's specs are wrong. Target: at most 2 %.

    python -m bench.kernels_refusals --gpu --budget 120 --json bench/results/refusals-fa4-h100.json
    python -m bench.kernels_refusals --json /tmp/tiny.json --budget 20       on the CPU

A refusal is tried by running the plan that it forbids, and comparing output, LSE and gradients with float64 as
cross-validation does. Where the adapter itself has no way to ask, the kernel is called by hand with the mask as a
tensor, on the sampled rows, if its interface takes one; if not, that is counted apart. A refusal was wrong if all
numbers agree. What a machine or a rule of ours forbids, and no kernel, is counted apart, too: a package that is
missing, a flag of the process, dropout masks that depend on the plan. A kernel that was forced may leave the device
unusable, or never return: tries run in a process of their own, replaced where it ends.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import attrs
import torch

from attnplan.backends import registry
from attnplan.cost import Target, price, resolve
from attnplan.search import Found, Option, _options
from attnplan.testing.catalogue import Case, catalogue
from attnplan.testing.matrix import AGREES, DIFFERS, FAILED, Result
from attnplan.testing.numbers import Call
from attnplan.testing.validate import _Comparison, _result
from bench.kernels_by_hand import MASKED_BY_HAND
from bench.kernels_clock import Ledger, Row

OURS = (
    "is not installed", "import of", "runs only when asked for", "was asked for", "process-wide flag", "draws dropout",
    "all are whole", "nothing here is cut into tiles", "looks masks up in at most", "deterministic=True",
    "needs compute capability", "runs up to compute capability", "more than the device's", "are Triton kernels",
)  # fmt: skip
"""What no kernel can be asked about here."""
STARTING = 60.0
"""Seconds that a process may take to begin."""
NOT_ITS_OWN = "not the kernel's"
Part = tuple[int, int]
"""Which of how many parts of the specs."""
_ORDINARY = re.compile(r"%?\d[\d.,]*|'[^']*'|`[^`]*`|for .*$|window\(.*$")


def kind(reason: str) -> str:
    """Return a reason without the numbers and patterns of one spec.

    Examples
    --------
    >>> kind("cuDNN takes no mask, %3 needs one for window(20)"), kind("needs head_dim <= 256, the spec has 320")
    ('cuDNN takes no mask, # needs one #', 'needs head_dim <= # the spec has #')
    """
    return _ORDINARY.sub("#", reason)


def refusals(case: Case, target: Target) -> Iterator[tuple[Option, list[str]]]:
    """Iterate over what refuses a spec, with the reasons that a kernel can be asked about."""
    for name, backend in registry().backends.items():
        if name in ("reference", "compiled"):
            continue
        for option in _options(case.spec, target, name, "auto"):
            if option[1] is backend and option[3].reasons and option[2].runs:
                yield option, [r for r in option[3].reasons if not any(o in r for o in OURS)]


def tries(cases: list[Case], target: Target) -> Iterator[tuple[Case, Option, list[str]]]:
    """Iterate over the refusals to try: of each spec and schedule one for each set of reasons."""
    for case in cases:
        seen = set()
        for option, reasons in refusals(case, target):
            key = (option[1].name, option[2].name, *sorted(map(kind, reasons)))
            if key not in seen:
                seen.add(key)
                yield case, option, reasons


def attempt(case: Case, option: Option, reasons: list[str], target: Target) -> Row:
    """Run what was refused, and say how it did."""
    lowered, backend, schedule, candidate = option
    row: Row = {"spec": case.name, "plan": candidate.name, "reasons": reasons}
    if len(reasons) < len(candidate.reasons) or not reasons:
        return row | {"verdict": NOT_ITS_OWN}
    comparison = _Comparison(Call.random(case.called, case.operands, str(target.torch_device), 0))
    prediction = price(lowered.graph, case.spec, schedule.priced, target.device)  # a plan has one, whatever it says
    forced = attrs.evolve(candidate, prediction=prediction, reasons=())
    found = _result(forced, Found(lowered, forced, backend, schedule, ()), case.spec, target, comparison, 1)
    if found.status == FAILED and found.reasons and "AssertionError" in found.reasons[0]:
        if schedule.runs not in MASKED_BY_HAND:
            return row | {"verdict": "no argument"}
        found, row = _by_hand(found, schedule.runs, comparison), {**row, "by hand": True}
    verdict = "wrong" if found.status == AGREES else "right"
    return row | {"verdict": verdict, "status": found.status, "worst": found.worst, "said": found.reasons[:1]}


def _by_hand(result: Result, kernel: str, comparison: _Comparison) -> Result:
    """Return what a kernel makes of the mask as a tensor."""
    call = comparison.call
    try:
        got = call.by_autograd(call.spec.dtype, False, MASKED_BY_HAND[kernel])
    except Exception as error:  # whatever it raises says that the refusal was right
        return attrs.evolve(result, reasons=(f"{type(error).__name__}: {error}"[:300],))
    checks = tuple(comparison.checks(got, False))
    status = AGREES if all(c.passed for c in checks) else DIFFERS
    return attrs.evolve(result, status=status, checks=checks, reasons=())


def child(on_gpu: bool, skip: int, part: Part) -> None:
    """Try one refusal after the other, a line for each; stop where the device does."""
    target = resolve("cuda" if on_gpu else "cpu")
    for number, (case, option, reasons) in enumerate(tries(cases_of(on_gpu)[part[0] :: part[1]], target)):
        if number < skip:
            continue
        print(json.dumps({"begun": number, "spec": case.name, "plan": option[3].name, "reasons": reasons}), flush=True)
        row = attempt(case, option, reasons, target)
        print(json.dumps({"done": number, "row": row}, default=str), flush=True)
        if on_gpu:
            torch.cuda.synchronize()  # raises where a kernel has left the device unusable
    print(json.dumps({"finished": True}), flush=True)


def cases_of(on_gpu: bool) -> list[Case]:
    """Return the specs, in an order in which any first part is mixed."""
    cases = list(catalogue(*(("large", "bfloat16") if on_gpu else ("small", "float32"))).values())
    return [c for start in range(7) for c in cases[start::7]]


def lines(skip: int, ledger: Ledger, on_gpu: bool, part: Part) -> Iterator[dict[str, Any]]:
    """Run a child from a number on and yield what it says, until it ends, hangs, or the budget is spent."""
    command = [sys.executable, "-m", "bench.kernels_refusals", "--child", str(skip), *(["--gpu"] if on_gpu else [])]
    command += ["--part", "/".join(map(str, part))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    said: Queue[str | None] = Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line)
        said.put(None)

    threading.Thread(target=listen, daemon=True).start()
    patience = max(STARTING, ledger.each)
    try:
        while True:
            try:
                line = said.get(timeout=min(patience, max(0.1, ledger.until - time.monotonic())))
            except Empty:
                return
            patience = ledger.each
            if line is None:
                return
            if line.startswith("{"):
                yield json.loads(line)
    finally:
        process.kill()
        process.wait()


def run(ledger: Ledger, on_gpu: bool, part: Part) -> None:
    """Try everything, with a new process after each that ended early."""
    skip, finished = 0, False
    while not finished and not ledger.spent:
        begun: dict[str, Any] | None = None
        for said in lines(skip, ledger, on_gpu, part):
            if "begun" in said:
                begun = said
            elif "done" in said:
                begun, skip = None, said["done"] + 1
                ledger.add(said["row"])
            finished = finished or "finished" in said
        if finished or ledger.spent:
            break
        if begun is None:  # it never began: nothing to leave out, so trying again would not help
            ledger.add({"verdict": "not tried", "said": "the process ended before its first try"})
            break
        row = {n: begun[n] for n in ("spec", "plan", "reasons")}
        ledger.add({**row, "verdict": "right", "status": "crashed", "said": "its process ended, or never returned"})
        skip = begun["begun"] + 1


def _part(text: str) -> Part:
    which, _, of = text.partition("/")
    return int(which), int(of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which nothing is begun")
    parser.add_argument("--each", type=float, default=40.0, help="seconds that one try may take")
    parser.add_argument("--part", type=_part, default=(0, 1), help="such as 0/4: every fourth spec, from the first on")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.gpu, given.child, given.part)
        return
    ledger = Ledger(given.json, given.budget, given.each, on_gpu=given.gpu)
    run(ledger, given.gpu, given.part)
    verdicts = Counter(row["verdict"] for row in ledger.found["rows"])
    tried = verdicts["right"] + verdicts["wrong"]
    print(f"{tried} refusals tried, {verdicts['wrong']} wrong ({100 * verdicts['wrong'] / max(1, tried):.1f} %); "
          f"{verdicts['no argument']} that no interface can ask; {verdicts[NOT_ITS_OWN]} not the kernels'")  # fmt: skip
    print(Counter((row.get("status"), str(row.get("said"))[:90]) for row in ledger.found["rows"]).most_common(12))
    for row in ledger.found["rows"]:
        if row["verdict"] == "wrong":
            print(f"  wrong: {row['spec']}, {row['plan']}: {'; '.join(row['reasons'])}")


if __name__ == "__main__":
    main()
