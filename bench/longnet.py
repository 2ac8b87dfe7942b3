"""LongNet plans beside their own attention kernels, and beside the code that users write. Rows are written as JSON.

    python -m bench.longnet --gpu --half forward --json bench/results/longnet-forward-h100.json --budget 150
    python -m bench.longnet --gpu --half training --json bench/results/longnet-training-h100.json --budget 150
    python -m bench.longnet --gpu --timeline --cases A,gB --json ...    where the time of plans goes, kernel by kernel
    python -m bench.longnet --json bench/results/longnet-cpu.json       on the CPU, beside eager hand-written code
    python -m bench.longnet --tiny                                      on the CPU: tries the script, measures nothing

All contestants of a case take turns in one process; medians of the time between two events. ``kernels`` is attention
alone on rows that lie gathered, one call a branch, or all of equal length in one call. The last row, ``targets``, has
every ratio beside what it should be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan import AttentionSpec
from attnplan import compile as compile_spec
from attnplan import patterns as P
from attnplan.cost import Prediction
from attnplan.passes import BatchBranches, Canonicalize, FuseMerge, Lattice, Pipeline, PullMerge, SplitHeads, Views
from attnplan.plan import Plan
from attnplan.runtime.attend import attend
from attnplan.search import Candidate, Found, Lowered, _start
from bench.longnet_bytes import compulsory, moved
from bench.longnet_clock import Bench, Call
from bench.longnet_peers import Case, eager_longnet, flex_longnet, kernels_alone, published, rows_in_float64
from bench.longnet_table import table, targets
from bench.longnet_timeline import timeline

A = Case("A", "longnet", 65_536, 12, 64, (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
B = Case("B", "longnet", 131_072, 16, 128, (4096, 16384, 65536, 131072), (1, 4, 16, 16))
CASES = [A, B, attrs.evolve(A, name="gA", kind="grouped"), attrs.evolve(B, name="gB", kind="grouped")]
ON_CPU = [
    Case("A/8", "longnet", 8192, 12, 64, (256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16)),
    Case("B/16", "longnet", 8192, 16, 128, (256, 1024, 4096, 8192), (1, 4, 16, 16)),
]
ON_CPU += [attrs.evolve(case, name=f"g{case.name}", kind="grouped") for case in ON_CPU]
TINY = [
    Case("A", "longnet", 256, 6, 16, (32, 64, 128), (1, 2, 4)),
    Case("gA", "grouped", 256, 6, 16, (32, 64, 128), (1, 2, 4)),
]
_FRONT = (Canonicalize(), SplitHeads(), Lattice())
_COMPILED = ("A", "B")
"""Cases whose hand-written code is compiled, too, which takes tens of seconds."""


def variants(layout: str, batch: int) -> dict[str, Pipeline]:
    """Return the pipelines that are raced: which rows are views, and which are copied into one launch."""
    batched = BatchBranches(layout, batch)
    return {
        "views": Pipeline((*_FRONT, Views(layout, batch), FuseMerge(), PullMerge())),
        "batch": Pipeline((*_FRONT, FuseMerge(), PullMerge(), batched)),
        "copied": Pipeline((*_FRONT, FuseMerge(), PullMerge(), attrs.evolve(batched, whole=False))),
    }


def spec_of(case: Case, dtype: str) -> AttentionSpec:
    make = P.longnet if case.kind == "longnet" else P.grouped
    return AttentionSpec(
        seq_len=case.tokens, heads=case.heads, head_dim=case.head_dim, pattern=make([*case.segments], [*case.rates]),
        causal=case.causal, dtype=dtype, layout="bshd",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- contestants


def plan_of(bench: Bench, case: Case, variant: str, backend: Any, schedule: Any) -> Plan:
    """Return the plan of one variant and schedule."""
    spec = spec_of(case, bench.dtype)
    graph, steps = variants("bshd", 1)[variant].run(*_start(spec))
    reasons = backend.refuse(graph, spec, schedule, bench.target.device)
    if reasons:
        raise ValueError("; ".join(reasons))
    candidate = Candidate(variant, backend.name, schedule.name, Prediction(0.0, 0, ()))  # measured, not priced
    found = Found(Lowered("lattice", graph, steps), candidate, backend, schedule, (candidate,))
    return Plan(spec, bench.target, found, {"backend": backend.name})


def forward_of(plan: Plan, tensors: list[Tensor]) -> Call:
    return partial(plan, *tensors[:3])


def training_of(function: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    """Return a call of forward and backward that keeps no gradient."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    grad = tensors[3]

    def run() -> Any:
        return torch.autograd.grad(function(q, k, v), (q, k, v), grad)

    return run


def contest(bench: Bench, case: Case, *, backward: bool) -> dict[str, Callable[[], Call]]:
    """Return the contestants of a case: kernels alone, plans of each variant and kernel, what the planner chooses.

    On a CPU the variants, which are there for GPUs, do not run.
    """
    names = () if case in (*ON_CPU, *(attrs.evolve(c, causal=True) for c in ON_CPU)) else tuple(variants("bshd", 1))
    made: dict[str, Callable[[], Call]] = {}
    tensors = bench.tensors(case, 4)
    for backend, schedule in bench.schedules:
        runs = schedule.runs
        for batched in (False, True):
            alone = (kernels_alone, case, runs, bench.device, bench.dtype)
            made[f"kernels {runs}{' batched' if batched else ''}"] = partial(*alone, batched=batched, backward=backward)
        for variant in names:

            def make(variant: str = variant, backend: Any = backend, schedule: Any = schedule) -> Call:
                plan = plan_of(bench, case, variant, backend, schedule)
                return training_of(plan, tensors) if backward else forward_of(plan, tensors)

            made[f"plan {variant} {runs}"] = make
    made["plan auto"] = partial(automatic, bench, case, tensors, backward=backward)
    return made


def automatic(bench: Bench, case: Case, tensors: list[Tensor], *, backward: bool) -> Call:
    """Return the plan that the planner chooses; write which it is, and its bytes beside those that nothing avoids."""
    spec = attrs.evolve(spec_of(case, bench.dtype), training=backward)
    plan = compile_spec(spec, device="cuda" if bench.gpu else "cpu")
    item = tensors[0].element_size()
    row = {
        "auto": f"{plan.strategy} > {plan.backend} ({plan.schedule})",
        "predicted_ms": round(plan.predicted.seconds * 1e3, 4),
        "predicted_mib": round(sum(op.cost.bytes for op in plan.predicted.ops) / 2**20),
    }
    runs = next((s.runs for b, s in bench.schedules if (b.name, s.name) == (plan.backend, plan.schedule)), "")
    count = None if backward else moved(plan.graph, runs, item)
    if count is not None:
        row |= {"moved_mib": round(count / 2**20), "compulsory_mib": round(compulsory(plan.graph, item) / 2**20)}
    bench.write({"case": case.name, "causal": case.causal, "backward": backward, **row})
    return training_of(plan, tensors) if backward else forward_of(plan, tensors)


def peers(bench: Bench, case: Case, *, backward: bool) -> dict[str, Callable[[], Call]]:
    """Return the code that users write, plain and compiled, and the published package for grouped heads.

    Hand-written code calls flash attention by torch's operator, whose LSE has no gradient: its backward leaves the
    mixing weights out, and does less than a plan's. The published class normalises each group of heads by itself, and
    divides by the number of groups: another function, of the same cost.
    """
    tensors = bench.tensors(case, 4)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not bench.gpu:
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, case.causal)
        else:
            found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, case.causal, False)
        return found[0], found[1]

    def hand(*, compiled: bool) -> Call:
        function = eager_longnet(case, bench.device)(kernel)
        function = torch.compile(function) if compiled else function
        return training_of(function, tensors) if backward else partial(function, *tensors[:3])

    def package() -> Call:
        function = published(case)
        return training_of(function, tensors) if backward else partial(function, *tensors[:3])

    made: dict[str, Callable[[], Call]] = {}
    if not (bench.gpu and backward):
        made["hand-written eager"] = partial(hand, compiled=False)
    if bench.gpu and not backward and not case.causal and case.name in _COMPILED:
        made["hand-written compiled"] = partial(hand, compiled=True)
    if bench.gpu and case.kind == "grouped":
        made["published on xformers"] = package
    return made


def dense(bench: Bench, case: Case) -> dict[str, Callable[[], Call]]:
    """Return dense attention over all tokens, for scale."""
    rows = [x.transpose(1, 2) for x in bench.tensors(case)]
    return {
        f"dense {s.runs}": partial(
            lambda name: partial(attend, *rows, None, name, case.causal, case.head_dim**-0.5), s.runs
        )
        for _, s in bench.schedules
    }


def flex(bench: Bench, case: Case) -> dict[str, Callable[[], Call]]:
    """Return FlexAttention with a mask of the same pairs, for scale."""
    rows = [x.transpose(1, 2) for x in bench.tensors(case)]
    return {"flex with a dilated mask": partial(flex_longnet, case, rows, compiled=bench.gpu)}


def flex_apart(bench: Bench, case: Case) -> None:
    """Race :func:`flex` in a process of its own: where a kernel reads what it may not, the process is lost with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.longnet", "--flex", "--cases", case.name, "--json", str(path)]
        command.append("--gpu" if bench.gpu else "--tiny")
        ended = subprocess.run(command, capture_output=True, text=True, timeout=max(bench.left, 10.0), check=False)
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for row in rows or [{"case": case.name, "failed": f"ended with {ended.returncode}: {ended.stderr[-300:]}"}]:
        bench.write(row)


# ------------------------------------------------------------------------------------------------ what is beside time


def check(bench: Bench, case: Case) -> None:
    """Compare sampled rows of every variant with float64, and gradients of the variants with one another."""
    tensors = bench.tensors(case, 4)
    generator = torch.Generator().manual_seed(1)
    heads = torch.randint(case.heads, (64,), generator=generator).tolist()
    rows = torch.randint(case.tokens, (64,), generator=generator).tolist()
    want = rows_in_float64(case, *tensors[:3], list(zip(heads, rows, strict=True)))
    first: list[Tensor] = []
    for backend, schedule in bench.schedules:
        for variant in variants("bshd", 1):
            row = {"case": case.name, "causal": case.causal, "name": f"check {variant} {schedule.runs}"}
            try:
                plan = plan_of(bench, case, variant, backend, schedule)
                got = plan(*tensors[:3])[0, rows, heads].double()
                gradients = training_of(plan, tensors)()
                first = first or [x.double() for x in gradients]
                apart = [_apart(x.double(), y) for x, y in zip(gradients, first, strict=True)]
                bench.write({**row, "error": _apart(got, want), "gradients_apart": apart})
            except Exception as error:  # as above
                bench.write({**row, "failed": f"{type(error).__name__}: {error}"[:300]})


def _apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def parts(bench: Bench, case: Case, runs: str) -> dict[str, Callable[[], Call]]:
    """Return each attend of the variant of views alone, on views and on copies of them: what strided rows cost."""
    from attnplan.backends.eager.places import place
    from attnplan.ir import Attend
    from attnplan.runtime.views import rows

    backend, schedule = next(x for x in bench.schedules if x[1].runs == runs)
    plan = plan_of(bench, case, "views", backend, schedule)
    whole = [x.transpose(1, 2) for x in bench.tensors(case)]
    made: dict[str, Callable[[], Call]] = {}
    for node, op in plan.graph.of(Attend):
        views = [rows(x, *place(plan.graph[a].type.rows)) for x, a in zip(whole, node.args, strict=True)]
        label = f"%{node.id} {'x'.join(map(str, node.type.rows.sizes))} step {node.type.rows.axes[-1].row} {runs}"
        rest = (None, runs, case.causal, op.scale)
        made[f"{label} views"] = partial(lambda given, rest: partial(attend, *given, *rest), views, rest)
        made[f"{label} copies"] = partial(
            lambda given, rest: partial(attend, *(x.contiguous() for x in given), *rest), views, rest
        )
    return made


# ------------------------------------------------------------------------------------------------------------- script


def sections(
    bench: Bench, cases: list[Case], *, halves: list[bool], timelines: bool, more: tuple[str, ...] = ()
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Iterate over what is measured, the most telling first.

    Parameters
    ----------
    halves
        Without and with the backward.
    timelines
        Only where the time goes.
    more
        ``"parts"`` (each attend alone), ``"check"`` (numbers in float64).
    """
    causals = [attrs.evolve(c, causal=True) for c in cases]
    if timelines:
        for backward, case, variant in product(halves, (*cases, *causals), ("kernels", "views")):
            yield f"timeline {case.name}", partial(_timeline, bench, case, variant, backward=backward)
    elif more:
        yield from _extras(bench, cases, causals, more)
    else:
        for backward in halves:
            for case in (*cases, *causals):
                where = {"case": case.name, "causal": case.causal, "backward": backward}
                run = partial(_race, bench, where, [contest, peers], case, backward=backward)
                yield f"contest {case.name}", run
        for case in cases if bench.gpu and False in halves else ():
            if case.kind == "longnet":
                where = {"case": case.name, "causal": False, "backward": False}
                yield f"dense {case.name}", partial(_race, bench, where, [dense], case)
        if cases[0].name == "A" and False in halves:
            yield "flex with a dilated mask", partial(flex_apart, bench, cases[0])


def _extras(
    bench: Bench, cases: list[Case], causals: list[Case], more: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    for case in cases if "parts" in more else ():
        where = {"case": case.name, "causal": False}
        yield "parts", partial(_race, bench, where, [parts], case, best(bench)[1].runs)
    for case in causals if "check" in more else ():
        yield "check", partial(check, bench, case)


def best(bench: Bench) -> tuple[Any, Any]:
    """Return the backend and the schedule that is looked into: flash-attn 4 where it is."""
    return next((x for x in bench.schedules if x[1].runs == "fa4"), bench.schedules[0])


def _race(
    bench: Bench, where: dict[str, Any], makers: list[Callable[..., Any]], case: Case, *args: Any, **options: Any
) -> None:
    contestants: dict[str, Callable[[], Call]] = {}
    for make in makers:
        contestants |= make(bench, case, *args, **options)
    if bench.names:
        contestants = {n: x for n, x in contestants.items() if n.startswith(bench.names)}
    bench.race(where, contestants, replay=not where.get("backward"))


def _timeline(bench: Bench, case: Case, variant: str, *, backward: bool) -> None:
    tensors, (backend, schedule) = bench.tensors(case, 4), best(bench)
    if variant == "kernels":
        run = kernels_alone(case, schedule.runs, bench.device, bench.dtype, batched=False, backward=backward)
    else:
        plan = plan_of(bench, case, variant, backend, schedule)
        run = training_of(plan, tensors) if backward else forward_of(plan, tensors)
    where = {"case": case.name, "causal": case.causal, "backward": backward}
    bench.write({**where, "name": f"timeline {variant} {schedule.runs}", **timeline(run, gpu=bench.gpu)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="run on CUDA")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--half", choices=("forward", "training", "both"), default="both", help="which calls")
    parser.add_argument("--timeline", action="store_true", help="only where the time of plans goes")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which no contestant begins")
    parser.add_argument("--cases", default="", help="which specs, separated by commas; all without")
    parser.add_argument("--more", default="", help="'parts' or 'check' instead of times")
    parser.add_argument("--flex", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant, at most")
    parser.add_argument("--names", default="", help="contestants whose names begin so, separated by commas")
    parser.add_argument("--kernels", default="cudnn,fa4", help="kernels of plans; flash-cuda is the third")
    options = parser.parse_args()
    bench = Bench(options.json, options.budget, options.kernels, gpu=options.gpu, rounds=options.rounds)
    bench.names = tuple(filter(None, options.names.split(",")))
    known = TINY if options.tiny else CASES if options.gpu else ON_CPU
    cases = [c for c in known if c.name in options.cases.split(",")] or known
    halves = {"forward": [False], "training": [True], "both": [False, True]}[options.half]
    more = tuple(filter(None, options.more.split(",")))
    found_sections = sections(bench, cases, halves=halves, timelines=options.timeline, more=more)
    if options.flex:
        where = {"case": cases[0].name, "causal": False, "backward": False}
        found_sections = iter([("flex", partial(_race, bench, where, [flex], cases[0]))])
    for name, run in found_sections:
        if bench.left < 0:
            bench.write({"name": name, "failed": "no time left"})
            continue
        try:
            run()
        except Exception as error:  # one failing section must not lose the others
            traceback.print_exc()
            bench.write({"name": name, "failed": f"{type(error).__name__}: {error}"[:300]})
        if bench.gpu:
            torch.cuda.empty_cache()
    table(bench.rows)
    found = targets(bench.rows, on_cpu=not bench.gpu)
    if found:
        bench.write({"targets": found})
        for one in found:
            met = "met   " if one["met"] else "MISSED"
            print(f"{met} {one['value']:>8.3f} {one['sign']} {one['limit']:<6} {one['what']}")


if __name__ == "__main__":
    main()
