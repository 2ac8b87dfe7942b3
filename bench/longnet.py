"""LongNet plans beside their own attention kernels, and beside the code that users write. Rows are written as JSON.

    python -m bench.longnet --gpu --json bench/results/longnet-h100.json --budget 150
    python -m bench.longnet --tiny                          on the CPU: tries the script, measures nothing

All contestants of a group take turns in one process, five calls a turn; medians of the time between two events.
``kernels`` is attention alone on rows that lie gathered, one call a branch, or all of equal length in one call.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan import AttentionSpec
from attnplan import compile as compile_spec
from attnplan import patterns as P
from attnplan.backends import registry
from attnplan.cost import Prediction, Target, resolve
from attnplan.passes import BatchBranches, Canonicalize, FuseMerge, Lattice, Pipeline, PullMerge, SplitHeads, Views
from attnplan.plan import Plan
from attnplan.runtime.attend import attend
from attnplan.search import Candidate, Found, Lowered, _start
from bench.longnet_peers import Case, eager_longnet, kernels_alone, published, rows_in_float64
from bench.longnet_table import table

A = Case("A", "longnet", 65_536, 12, 64, (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
B = Case("B", "longnet", 131_072, 16, 128, (4096, 16384, 65536, 131072), (1, 4, 16, 16))
CASES = [A, B, attrs.evolve(A, name="gA", kind="grouped"), attrs.evolve(B, name="gB", kind="grouped")]
ON_CPU = [Case("C", "longnet", 8192, 8, 64, (1024, 2048, 4096), (1, 2, 4))]
ON_CPU.append(attrs.evolve(ON_CPU[0], name="gC", kind="grouped"))
TINY = [
    Case("A", "longnet", 256, 6, 16, (32, 64, 128), (1, 2, 4)),
    Case("gA", "grouped", 256, 6, 16, (32, 64, 128), (1, 2, 4)),
]
_FRONT = (Canonicalize(), SplitHeads(), Lattice())
_IN_A_ROW = 5  # calls that are started without waiting for one another, as in a model; the first is not counted
Call = Callable[[], Any]


def variants(layout: str, batch: int) -> dict[str, Pipeline]:
    """Return the pipelines that are raced: which rows are views, and which are copied into one launch."""
    batched = BatchBranches(layout, batch)
    return {
        "eager-merge": Pipeline((*_FRONT, FuseMerge())),
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


class Bench:
    """What runs, on what, and the rows so far."""

    def __init__(self, path: Path | None, budget: float, kernels: str, *, gpu: bool, rounds: int) -> None:
        self.kernels = kernels.split(",") if gpu else ["flash-cpu"]
        self.path, self.end, self.gpu, self.rounds = path, time.monotonic() + budget, gpu, rounds
        self.target: Target = resolve("cuda" if gpu else "cpu")
        self.device = torch.device("cuda" if gpu else "cpu")
        self.dtype = "bfloat16" if gpu else "float32"
        self.rows: list[dict[str, Any]] = []
        self.schedules = list(self._schedules())

    def _schedules(self) -> Iterator[tuple[Any, Any]]:
        for name in ("eager", "flash"):
            backend = registry().get(name)
            for schedule in backend.schedules(self.target.device):
                if schedule.runs in self.kernels and not backend.missing(schedule, self.target):
                    yield backend, schedule

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, and write all of them."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.path is not None:
            here = {"device": torch.cuda.get_device_name() if self.gpu else platform.processor(), "rows": self.rows}
            names = ("torch", "triton", "flash-attn-4", "xformers", "dilated-attention-pytorch")
            self.path.write_text(json.dumps({**here, "versions": {n: _version(n) for n in names}}, indent=1) + "\n")

    def race(self, where: dict[str, Any], contestants: dict[str, Callable[[], Call]]) -> None:
        """Warm contestants up, time them in turns, and write a row for each, failures too."""
        ready: dict[str, tuple[Call, dict[str, Any]]] = {}
        for name, make in contestants.items():
            if self.left < 0:
                self.write({**where, "name": name, "failed": "no time left"})
                continue
            try:
                run = make()
                start = time.perf_counter()
                run()
                self._wait()
                extra = {"first_call_s": round(time.perf_counter() - start, 2), **self._peak(run)}
                run()
                ready[name] = run, extra | (self._replayed(run) if not where.get("backward") else {})
            except Exception as error:  # one failing row must not lose the others
                traceback.print_exc()
                self.write({**where, "name": name, "failed": f"{type(error).__name__}: {error}"[:300]})
        device: dict[str, list[float]] = {name: [] for name in ready}
        host: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(self.rounds):
            for name, (run, _) in ready.items():
                seconds, busy = self._once(run)
                device[name].append(seconds)
                host[name].append(busy)
        for name, (_, extra) in ready.items():
            times = sorted(device[name])
            row = {"ms": round(statistics.median(times) * 1e3, 4), "fastest_ms": round(times[0] * 1e3, 4)}
            self.write(
                {**where, "name": name, **row, "host_ms": round(statistics.median(host[name]) * 1e3, 4), **extra}
            )

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def _peak(self, run: Call) -> dict[str, Any]:
        if not self.gpu:
            return {}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20)}

    def _replayed(self, run: Call) -> dict[str, Any]:
        """Return the time of a call replayed from a CUDA graph: what the device needs, whatever the host does."""
        if not self.gpu:
            return {}
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = run()
            times = sorted(self._once(graph.replay)[0] for _ in range(5))
            del kept
        except Exception as error:  # what cannot be captured has no such time
            torch.cuda.synchronize()
            return {"graph_failed": f"{type(error).__name__}: {error}"[:200]}
        return {"graph_ms": round(times[2] * 1e3, 4)}

    def _once(self, run: Call) -> tuple[float, float]:
        if not self.gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start,) * 2
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(_IN_A_ROW + 1)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        for mark in marks[:-1]:
            mark.record()
            run()
        host = (time.perf_counter() - start) / _IN_A_ROW
        marks[-1].record()
        torch.cuda.synchronize()
        times = sorted(a.elapsed_time(b) for a, b in pairwise(marks[1:]))
        return times[len(times) // 2] / 1e3, host

    def tensors(self, case: Case, count: int = 3) -> list[Tensor]:
        """Return q, k, v, ... ``[1, S, H, D]``."""
        torch.manual_seed(0)
        sizes = (1, case.tokens, case.heads, case.head_dim)
        return [torch.randn(sizes, device=self.device, dtype=getattr(torch, self.dtype)) for _ in range(count)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
    """Return the contestants of a case: plans of each variant and kernel, and the kernels alone."""
    made: dict[str, Callable[[], Call]] = {}
    tensors = bench.tensors(case, 4)
    for backend, schedule in bench.schedules:
        name = schedule.runs
        for batched in (False, True):
            label = f"kernels {name}{' batched' if batched else ''}"
            made[label] = partial(
                kernels_alone, case, name, bench.device, bench.dtype, batched=batched, backward=backward
            )
        for variant in variants("bshd", 1):
            if variant == "eager-merge" and (backward or name == "fa4"):
                continue

            def make(variant: str = variant, backend: Any = backend, schedule: Any = schedule) -> Call:
                plan = plan_of(bench, case, variant, backend, schedule)
                return training_of(plan, tensors) if backward else forward_of(plan, tensors)

            made[f"plan {variant} {name}"] = make
    made["plan auto"] = partial(automatic, bench, case, tensors, backward=backward)
    return made


def automatic(bench: Bench, case: Case, tensors: list[Tensor], *, backward: bool) -> Call:
    """Return the plan that the planner chooses."""
    spec = attrs.evolve(spec_of(case, bench.dtype), training=backward)
    plan = compile_spec(spec, device="cuda" if bench.gpu else "cpu")
    chosen = f"{plan.strategy} > {plan.backend} ({plan.schedule})"
    bench.write(
        {"case": case.name, "causal": case.causal, "auto": chosen, "predicted_ms": plan.predicted.seconds * 1e3}
    )
    return training_of(plan, tensors) if backward else forward_of(plan, tensors)


def peers(bench: Bench, case: Case, *, backward: bool) -> dict[str, Callable[[], Call]]:
    """Return the code that users write, on the kernel that SDPA would choose, plain and compiled."""
    tensors = bench.tensors(case, 4)
    runs = "cudnn" if bench.gpu else "flash-cpu"

    def hand(*, compiled: bool) -> Call:
        def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if runs == "flash-cpu":
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
            found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, case.causal, False)
            return found[0], found[1]

        function = eager_longnet(case, bench.device)(kernel)
        function = torch.compile(function) if compiled else function
        return training_of(function, tensors) if backward else partial(function, *tensors[:3])

    made: dict[str, Callable[[], Call]] = {"hand-written eager": partial(hand, compiled=False)}
    if bench.gpu:
        made["hand-written compiled"] = partial(hand, compiled=True)
        if case.kind == "grouped":
            made["published on xformers"] = lambda: (
                training_of(published(case), tensors) if backward else partial(published(case), *tensors[:3])
            )
    return made


def dense(bench: Bench, case: Case) -> dict[str, Callable[[], Call]]:
    """Return dense attention over all tokens, for scale."""
    rows = [x.transpose(1, 2) for x in bench.tensors(case)]
    return {
        f"dense {s.runs}": partial(
            lambda name: partial(attend, *rows, None, name, case.causal, case.head_dim**-0.5), s.runs
        )
        for _, s in bench.schedules
        if s.runs != "flash-cuda"
    }


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


def timeline(bench: Bench, case: Case, variant: str, runs: str, *, backward: bool) -> None:
    """Write which device kernels a plan spends its time in."""
    from torch.profiler import ProfilerActivity, profile

    backend, schedule = next(x for x in bench.schedules if x[1].runs == runs)
    tensors = bench.tensors(case, 4)
    plan = plan_of(bench, case, variant, backend, schedule)
    run = training_of(plan, tensors) if backward else forward_of(plan, tensors)
    for _ in range(3):
        run()
    bench._wait()
    with profile(activities=[ProfilerActivity.CUDA if bench.gpu else ProfilerActivity.CPU]) as found:
        for _ in range(5):
            run()
        bench._wait()
    where = {"case": case.name, "causal": case.causal, "backward": backward, "name": f"timeline {variant} {runs}"}
    events = sorted(found.key_averages(), key=lambda e: -e.device_time_total if bench.gpu else -e.cpu_time_total)
    kernels = [
        {
            "kernel": e.key[:90],
            "calls": e.count / 5,
            "us": round((e.device_time_total if bench.gpu else e.cpu_time_total) / 5, 1),
        }
        for e in events[:14]
    ]
    bench.write({**where, "kernels": kernels})


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


def sections(bench: Bench, cases: list[Case], *, parted: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Iterate over what is measured, the most telling first."""
    known = [s.runs for _, s in bench.schedules]
    best = "fa4" if "fa4" in known else known[0]
    for backward in (False, True):
        for case in cases:
            where = {"case": case.name, "causal": case.causal, "backward": backward}
            yield f"contest {case.name}", partial(_race, bench, where, contest, case, backward=backward)
            if backward == (case.name in ("A", "B")) or not backward:
                yield "timeline", partial(timeline, bench, case, "views", best, backward=backward)
                yield "timeline", partial(timeline, bench, case, "batch", best, backward=backward)
    for case in cases if parted else ():
        yield "parts", partial(_race, bench, {"case": case.name, "causal": False}, parts, case, best)
    for case in cases:
        yield "check", partial(check, bench, attrs.evolve(case, causal=True))
        yield (
            "peers",
            partial(_race, bench, {"case": case.name, "causal": False, "backward": False}, peers, case, backward=False),
        )
    for backward in (False, True):
        for case in (attrs.evolve(c, causal=True) for c in cases):
            where = {"case": case.name, "causal": True, "backward": backward}
            yield f"contest {case.name} causal", partial(_race, bench, where, contest, case, backward=backward)
    for case in cases:
        where = {"case": case.name, "causal": False, "backward": True}
        yield "peers", partial(_race, bench, where, peers, case, backward=True)
        yield "dense", partial(_race, bench, where | {"backward": False}, dense, case)


def _race(
    bench: Bench, where: dict[str, Any], make: Callable[..., Any], case: Case, *args: Any, **options: Any
) -> None:
    bench.race(where, make(bench, case, *args, **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="run on CUDA")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which no contest begins")
    parser.add_argument("--cases", default="A,gA,B,gB", help="which specs")
    parser.add_argument("--only", default="", help="sections whose names begin so, separated by commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernels", default="cudnn,fa4", help="kernels of plans; flash-cuda is the third")
    options = parser.parse_args()
    bench = Bench(options.json, options.budget, options.kernels, gpu=options.gpu, rounds=options.rounds)
    names = options.cases.split(",")
    known = TINY if options.tiny else CASES if options.gpu else ON_CPU
    cases = sorted((c for c in known if c.name in names), key=lambda c: names.index(c.name)) or known
    for name, run in sections(bench, cases, parted="parts" in options.only):
        if options.only and not name.startswith(tuple(options.only.split(","))):
            continue
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


if __name__ == "__main__":
    main()
