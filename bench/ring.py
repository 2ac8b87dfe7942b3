"""Measures rings over NCCL, beside others and the ideal; or tries the script over gloo on the CPU.

    python -m bench.ring --gpu --json OUT.json --budget 280               one process for each GPU of this machine
    python -m bench.ring --gpu --only longnet30 --json OUT.json           LongNet over 2^30 tokens
    torchrun --nproc-per-node 4 -m bench.ring --gpu --json OUT.json       the same, started by torchrun
    python -m bench.ring --ranks 2 --json OUT.json                        tiny, on the CPU: tries the script only

The others are a plain ring and an all-gather written by hand, and torch's own context parallel. The ideal is the time
of one GPU's kernel on the whole problem divided by the number of ranks. Times are medians over rounds of the slowest
rank, between CUDA events. Sampled rows of each output are compared with float64 in the same run; in the end the bytes
of plans are compared with the messages that torch's profiler sees. A row that fails says so, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import AttnPlanError
from attnplan.ring import Layout
from attnplan.runtime.ring.groups import group_of
from attnplan.verify import sampled_attention
from bench.ring_others import Gathered, Ring, torch_sharded
from bench.ring_profile import profiled_bytes

PROGRAMS = 2
"""Counts what was changed in the programs of ranks, so that rows of older ones are not compared with newer prices."""
STRATEGIES = (
    "auto", "zigzag > ring", "contiguous > ulysses", "striped > all-gather", "zigzag > rows", "striped > ring",
    "contiguous > ring",
)  # fmt: skip
LONGNET_STRATEGIES = ("auto", "contiguous > rows", "zigzag > rows", "contiguous > ulysses")


@attrs.frozen
class Setting:
    """Sizes of a run."""

    kind: str
    dtype: str
    per_rank: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    segments: tuple[int, ...]
    longnet_rows: int
    rounds: int
    rows: int = 64
    """Rows that are compared with float64."""


GPU = Setting("cuda", "bfloat16", (8192, 32768), 32, 8, 128, (4096, 8192, 16384, 32768, 65536, 131072), 32768, rounds=7)
CPU = Setting("cpu", "float32", (128,), 4, 2, 16, (64, 128, 256), 128, rounds=2)


@attrs.define
class Bench:
    """One rank's run."""

    setting: Setting
    rank: int
    ranks: int
    mesh: Any
    end: float
    rows: list[dict[str, Any]] = attrs.field(factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device(self.setting.kind)

    def out_of_time(self) -> bool:
        """Return whether the budget is spent, by the clock of rank 0."""
        left = torch.tensor([self.end - time.monotonic()], device=self.device)
        dist.broadcast(left, 0)
        return bool(left.item() < 0)

    def slowest(self, seconds: float) -> float:
        """Return the largest of all ranks' numbers."""
        x = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return float(x.item())

    def timed(self, call: Callable[[], Any], warm: int = 2, rounds: int = 0) -> float:
        """Return the median seconds of a call on the slowest rank."""
        for _ in range(warm):
            call()
        found = []
        for _ in range(rounds or self.setting.rounds):
            dist.barrier()
            if self.setting.kind == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                call()
                stop.record()
                torch.cuda.synchronize()
                seconds = start.elapsed_time(stop) / 1e3
            else:
                begin = time.perf_counter()
                call()
                seconds = time.perf_counter() - begin
            found.append(self.slowest(seconds))
        return statistics.median(found)

    def peak(self) -> float:
        """Return the largest number of bytes that this rank's row has allocated."""
        return float(torch.cuda.max_memory_allocated()) if self.setting.kind == "cuda" else 0.0

    def both(self, call: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> dict[str, float]:
        """Return forward, and forward and backward seconds."""
        with torch.no_grad():
            forward = self.timed(lambda: call(*tensors))
        leaves = [x.detach().requires_grad_() for x in tensors]

        def train() -> None:
            torch.autograd.grad(call(*leaves), leaves, grad)

        return {"forward_s": forward, "training_s": self.timed(train)}

    def add(self, name: str, fields: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row; every rank fails or succeeds alike, or the run ends by the group's timeout."""
        if self.out_of_time():
            self.rows.append({"name": name, **fields, "skipped": "the budget is spent"})
            return
        if self.setting.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            row = {"name": name, **fields, **measure()}
        except AttnPlanError as error:
            row = {"name": name, **fields, "refused": f"{type(error).__name__}: {error}"[:600]}
        except Exception as error:  # a row that fails must not lose the others
            row = {"name": name, **fields, "failed": f"{type(error).__name__}: {error}"[:600]}
            if self.rank == 0:
                traceback.print_exc()
        if self.setting.kind == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row)
        if self.rank == 0:
            print(shown(row), flush=True)


def tensors_of(bench: Bench, spec: AttentionSpec, seed: int = 0) -> list[Tensor]:
    """Return the whole q, k, v and upstream gradient, the same on every rank."""
    generator = torch.Generator(bench.device).manual_seed(seed)
    n, dtype = spec.shape.seq_len, getattr(torch, spec.dtype)
    heads = (spec.heads, spec.kv_heads, spec.kv_heads, spec.heads)
    return [torch.randn(1, h, n, spec.head_dim, generator=generator, device=bench.device, dtype=dtype) for h in heads]


def sampled_error(bench: Bench, spec: AttentionSpec, plan: Any, out: Tensor, whole: list[Tensor]) -> float:
    """Return the largest relative error of sampled rows of the output, over all ranks."""
    return error_at(bench, spec, plan.positions().to(bench.device), out, whole)


def error_at(bench: Bench, spec: AttentionSpec, held: Tensor, out: Tensor, whole: list[Tensor]) -> float:
    """Return the same for rows whose positions in the whole sequence are given."""
    generator = torch.Generator().manual_seed(1 + bench.rank)
    where = torch.randint(0, len(held), (bench.setting.rows,), generator=generator).to(bench.device)
    heads = torch.sort(torch.randint(0, spec.heads, (bench.setting.rows,), generator=generator)).values
    heads = heads.to(bench.device)
    worst = 0.0
    for head in torch.unique(heads).tolist()[:4]:  # float64 keys of one head at a time
        kv = head // (spec.heads // spec.kv_heads)
        one = attrs.evolve(spec, heads=1, kv_heads=1) if not _by_head(spec) else None
        mine = where[heads == head]
        if one is None:
            wide = [x.double() for x in whole[:3]]
            want, _ = sampled_attention(spec, *wide, {}, torch.full_like(mine, head), held[mine])
        else:
            wide = [whole[0][:, head : head + 1].double(), *(x[:, kv : kv + 1].double() for x in whole[1:3])]
            want, _ = sampled_attention(one, *wide, {}, torch.zeros_like(mine), held[mine])
        got = out[:, head, mine].double()
        worst = max(worst, ((got - want).norm() / want.norm().clamp_min(1e-30)).item())
    return bench.slowest(worst)


def _by_head(spec: AttentionSpec) -> bool:
    """Return whether the pattern differs from head to head."""
    return "longnet" in repr(spec.pattern)


def ours(bench: Bench, spec: AttentionSpec, strategy: str, ideal: dict[str, float]) -> dict[str, Any]:
    plan = attnplan.compile(spec, mesh=bench.mesh, strategy=strategy)
    whole = tensors_of(bench, spec)
    q, k, v, grad = (plan.shard(x, 2).contiguous() for x in whole)
    with torch.no_grad():
        error = sampled_error(bench, spec, plan, plan(q, k, v), whole)
    del whole
    times = bench.both(plan, [q, k, v], grad)
    moved = {
        "bytes_sent_forward": int(bench.slowest(plan.traffic(bench.rank).sent)),
        "bytes_sent_backward": int(bench.slowest(plan.traffic(bench.rank, backward=True).sent)),
    }
    return {
        **times,
        **moved,
        **_efficiency(times, ideal),
        "layout": plan.layout,
        "transport": plan.transport,
        "backend": f"{plan.backend} ({plan.schedule})",
        "predicted_s": plan.predicted.seconds,
        "error": error,
        "right": error <= _tolerance(spec),
        "peak_bytes": int(bench.slowest(bench.peak())),
    }


def profiled(bench: Bench, spec: AttentionSpec, strategy: str) -> dict[str, Any]:
    """Compare the bytes of a forward pass with the messages that the profiler sees, on every rank."""
    plan = attnplan.compile(spec, mesh=bench.mesh, strategy=strategy)
    q, k, v = (plan.shard(x, 2).contiguous() for x in tensors_of(bench, spec)[:3])
    with torch.no_grad():
        plan(q, k, v)
        seen = profiled_bytes(lambda: plan(q, k, v), bench.ranks, bench.setting.kind)
    planned = plan.traffic(bench.rank).sent
    worst = bench.slowest(abs(seen["total"] - planned))
    return {**seen, "planned": planned, "equal": not worst if seen["messages"] else None, "strategy": plan.strategy}


def single(bench: Bench, spec: AttentionSpec) -> dict[str, float]:
    """Return the time of the plan on one device for the whole problem, over the number of ranks."""
    plan = attnplan.compile(spec, device=bench.setting.kind)
    q, k, v, grad = tensors_of(bench, spec)
    times = bench.both(plan, [q, k, v], grad)
    return {name: seconds / bench.ranks for name, seconds in times.items()}


def by_hand(bench: Bench, spec: AttentionSpec, kind: type[Ring], ideal: dict[str, float]) -> dict[str, Any]:
    """Time a ring or an all-gather that was written by hand, over contiguous shards."""
    whole = tensors_of(bench, spec)
    n = spec.shape.seq_len // bench.ranks
    rows = slice(bench.rank * n, (bench.rank + 1) * n)
    q, k, v, grad = (x[:, :, rows].contiguous() for x in whole)
    call = kind(group_of(bench.mesh), bench.rank, bench.ranks, spec, bench.setting.kind)
    with torch.no_grad():
        held = torch.arange(rows.start, rows.stop, device=bench.device)
        error = error_at(bench, spec, held, call(q, k, v), whole)
        del whole
        times = {"forward_s": bench.timed(lambda: call(q, k, v))}
    if kind is Ring:
        times = bench.both(call, [q, k, v], grad)
    return {**times, **_efficiency(times, ideal), "error": error, "right": error <= _tolerance(spec)}


def torch_context_parallel(bench: Bench, spec: AttentionSpec, method: str, ideal: dict[str, float]) -> dict[str, Any]:
    """Time torch's own context parallel, which shards head and tail, as zigzag does."""
    whole = tensors_of(bench, spec)
    wide = [x if x.shape[1] == spec.heads else x.repeat_interleave(spec.heads // spec.kv_heads, 1) for x in whole]
    tensors = [x.clone() for x in wide]  # they are sharded in place
    with torch_sharded(bench.mesh, tensors, method, bench.setting.kind) as call:
        q, k, v, grad = (x.contiguous() for x in tensors)
        with torch.no_grad():
            out = call(q, k, v)
        times = bench.both(call, [q, k, v], grad)
    held = torch.tensor(Layout("zigzag", bench.ranks, spec.shape.seq_len).positions(bench.rank), device=bench.device)
    error = error_at(bench, spec, held, out, whole)
    return {**times, **_efficiency(times, ideal), "error": error, "right": error <= _tolerance(spec)}


def _efficiency(times: dict[str, float], ideal: dict[str, float]) -> dict[str, float]:
    names = ("forward", "training") if ideal else ()
    return {f"efficiency_{n}": ideal[f"{n}_s"] / times[f"{n}_s"] for n in names if f"{n}_s" in times}


def _tolerance(spec: AttentionSpec) -> float:
    return 8e-3 if spec.dtype == "bfloat16" else 1e-5


def contests(bench: Bench) -> Iterator[tuple[str, AttentionSpec, tuple[str, ...]]]:
    s = bench.setting
    base = {"heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim, "dtype": s.dtype, "training": True}
    for rows in s.per_rank:
        yield f"causal {rows} a rank", AttentionSpec(seq_len=rows * bench.ranks, causal=True, **base), STRATEGIES
    rates = [w // s.segments[0] for w in s.segments]
    pattern = P.longnet([min(w, s.longnet_rows * bench.ranks) for w in s.segments], rates)
    name = f"longnet {s.longnet_rows} a rank"
    yield (
        name,
        AttentionSpec(seq_len=s.longnet_rows * bench.ranks, causal=True, pattern=pattern, **base),
        LONGNET_STRATEGIES,
    )


def run(bench: Bench, write: Callable[[], None]) -> None:
    """Measure every contest; what may hang, or slows what comes after it, comes last."""
    ideals: list[tuple[str, AttentionSpec, dict[str, Any], dict[str, float]]] = []
    for name, spec, strategies in contests(bench):
        fields = {"spec": spec.to_dict(), "ranks": bench.ranks}
        bench.add(f"{name}: one device / {bench.ranks}", fields, lambda spec=spec: single(bench, spec))
        ideal = {n: bench.rows[-1][n] for n in ("forward_s", "training_s") if n in bench.rows[-1]}
        ideals.append((name, spec, fields, ideal))
        write()
        for strategy in strategies:
            bench.add(f"{name}: {strategy}", fields, lambda s=spec, x=strategy, i=ideal: ours(bench, s, x, i))
            write()
        for other, kind in () if _by_head(spec) else (("a plain ring", Ring), ("an all-gather", Gathered)):
            bench.add(f"{name}: {other}", fields, lambda s=spec, k=kind, i=ideal: by_hand(bench, s, k, i))
            write()
    for name, spec, fields, ideal in ideals:
        for method in () if _by_head(spec) else ("allgather", "alltoall"):
            bench.add(
                f"{name}: torch context_parallel, {method}", fields,
                lambda s=spec, m=method, i=ideal: torch_context_parallel(bench, s, m, i),
            )  # fmt: skip
            write()
    for name, spec, fields, _ in ideals[1:]:
        for strategy in ("auto",) if _by_head(spec) else ("zigzag > ring", "zigzag > rows", "contiguous > ulysses"):
            bench.add(f"{name}: messages, {strategy}", fields, lambda s=spec, x=strategy: profiled(bench, s, x))
            write()


def shown(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    for word in ("skipped", "refused", "failed"):
        if word in row:
            return f"{row['name']:<44} {word}: {str(row[word])[:150]}"
    if "messages" in row:
        says = {True: "as planned", False: "NOT as planned", None: "the profiler recorded no messages"}[row["equal"]]
        return f"{row['name']:<44} {row['total']:,} bytes sent by rank 0, {row['planned']:,} in the plan: {says}"
    line = f"{row['name']:<44} forward {row['forward_s'] * 1e3:9.3f} ms"
    if "training_s" in row:
        line += f"   training {row['training_s'] * 1e3:9.3f} ms"
    if "efficiency_forward" in row:
        line += f"   {100 * row['efficiency_forward']:5.1f} %"
        line += f" / {100 * row['efficiency_training']:5.1f} %" if "efficiency_training" in row else ""
    if "error" in row:
        line += f"   error {row['error']:.1e}" + ("" if row["right"] else "   WRONG")
    if "layout" in row:
        line += f"   sends {row['bytes_sent_forward'] / 2**20:.4g} MiB"
        line += f"   {row['layout']} > {row['transport']} > {row['backend']}"
    return line


def work(rank: int, ranks: int, meeting: str, args: argparse.Namespace) -> None:
    """Run one rank; ``meeting`` is where ranks meet, empty under torchrun."""
    setting = GPU if args.gpu else CPU
    if args.gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if args.gpu else "gloo", init_method=meeting or "env://", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    bench = Bench(setting, rank, ranks, init_device_mesh(setting.kind, (ranks,)), time.monotonic() + args.budget)

    def write() -> None:
        if rank == 0 and args.json:
            found = {"environment": environment(gpu=args.gpu), "rows": bench.rows}
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")

    if args.only == "longnet30":
        from bench.ring_billion import run as run_billion

        run_billion(bench, write)
    else:
        run(bench, write)
    if rank == 0:
        print("\n" + "\n".join(map(shown, bench.rows)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def environment(*, gpu: bool) -> dict[str, Any]:
    """Return what the figures depend on."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    found |= {"attnplan": attnplan.__version__, "programs": PROGRAMS}
    if gpu:
        version = torch.cuda.nccl.version()
        found |= {"device": torch.cuda.get_device_name(0), "nccl": ".".join(map(str, version))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="NCCL on this machine's GPUs")
    parser.add_argument("--ranks", type=int, help="number of processes; the default is that of GPUs, or 2")
    parser.add_argument("--json", help="write the rows here, after every row")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds after which no row begins")
    parser.add_argument("--only", choices=["longnet30"], help="this alone: LongNet over 2^30 tokens")
    args = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "", args)
        return
    ranks = args.ranks or (torch.cuda.device_count() if args.gpu else 2)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, f"file://{Path(folder) / 'meeting'}", args), nprocs=ranks)


if __name__ == "__main__":
    main()
