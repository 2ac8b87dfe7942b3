"""Measures rings over NCCL, beside a plain ring, an all-gather and the ideal; or tries the script over gloo on the CPU.

    python -m bench.ring --gpu --ranks 2 --json OUT.json --budget 500     one process for each GPU of this machine
    python -m bench.ring --ranks 2 --json OUT.json                        tiny, on the CPU: tries the script only

The ideal is the time of one GPU's kernel on the whole problem divided by the number of ranks. Each row is one
contest; times are medians over rounds of the slowest rank, between CUDA events. Sampled rows of the output are compared
with float64 in the same run. A row that fails says so, and the others go on.
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
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import AttnPlanError
from attnplan.runtime.ring.groups import group_of
from attnplan.runtime.ring.shards import cut
from attnplan.verify import sampled_attention

STRATEGIES = (
    "auto", "zigzag > ring", "zigzag > rows", "zigzag > all-gather", "contiguous > ulysses", "contiguous > ring",
    "striped > ring",
)  # fmt: skip
LONGNET_STRATEGIES = ("auto", "contiguous > rows", "zigzag > rows", "contiguous > all-gather", "contiguous > ulysses")


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

    def timed(self, call: Callable[[], Any]) -> float:
        """Return the median seconds of a call on the slowest rank."""
        for _ in range(2):
            call()
        found = []
        for _ in range(self.setting.rounds):
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
    held = plan.positions().to(bench.device)
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
    held = plan._held(spec.shape.seq_len)[bench.rank]
    q, k, v, grad = (cut(x, 2, held).contiguous() for x in whole)
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
        **{f"efficiency_{n}": ideal[f"{n}_s"] / times[f"{n}_s"] for n in ("forward", "training") if ideal},
        "layout": plan.layout,
        "transport": plan.transport,
        "backend": f"{plan.backend} ({plan.schedule})",
        "predicted_s": plan.predicted.seconds,
        "error": error,
        "right": error <= (8e-3 if spec.dtype == "bfloat16" else 1e-5),
        "peak_bytes": int(bench.slowest(peak(bench))),
    }


def peak(bench: Bench) -> float:
    return float(torch.cuda.max_memory_allocated()) if bench.setting.kind == "cuda" else 0.0


def single(bench: Bench, spec: AttentionSpec) -> dict[str, float]:
    """Return the time of the plan on one device for the whole problem, over the number of ranks."""
    plan = attnplan.compile(spec, device=bench.setting.kind)
    q, k, v, grad = tensors_of(bench, spec)
    times = bench.both(plan, [q, k, v], grad)
    return {name: seconds / bench.ranks for name, seconds in times.items()}


def plain_ring(bench: Bench, spec: AttentionSpec) -> dict[str, Any]:
    """Time a plain causal ring over contiguous shards: whole shards handed on, every hop waits for its keys."""
    n = spec.shape.seq_len // bench.ranks
    shards = [x[:, :, bench.rank * n : (bench.rank + 1) * n].contiguous() for x in tensors_of(bench, spec)[:3]]
    group, grouped = group_of(bench.mesh), spec.heads != spec.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor | None = None
        for hop in range(bench.ranks):
            if hop == 0:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            elif hop <= bench.rank:
                out = out + F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)  # a merge costs as much
            if hop < bench.ranks - 1:
                k, v = _passed_on(bench, group, (k, v))
        assert out is not None
        return out

    with torch.no_grad():
        return {"forward_s": bench.timed(lambda: call(*shards)), "note": "time only: parts are added, not merged"}


def _passed_on(bench: Bench, group: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    after, before = (bench.rank + 1) % bench.ranks, (bench.rank - 1) % bench.ranks
    received = [torch.empty_like(x) for x in tensors]
    operations = [dist.P2POp(dist.isend, x, group=group, group_peer=after) for x in tensors]
    operations += [dist.P2POp(dist.irecv, x, group=group, group_peer=before) for x in received]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def all_gathered(bench: Bench, spec: AttentionSpec) -> dict[str, Any]:
    """Time an all-gather of the keys, then attention of contiguous shards over them."""
    n = spec.shape.seq_len // bench.ranks
    q, k, v = (x[:, :, bench.rank * n : (bench.rank + 1) * n].contiguous() for x in tensors_of(bench, spec)[:3])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    grouped = spec.heads != spec.kv_heads

    def call() -> Tensor:
        found = []
        for x in (k, v):
            flat = x.new_empty(bench.ranks * x.numel())
            gather(flat, x.reshape(-1), group=group_of(bench.mesh))
            every = flat.view(bench.ranks, *x.shape)
            found.append(every.permute(1, 2, 0, 3, 4).flatten(2, 3))
        past = (bench.rank + 1) * n
        keys, values = (x[:, :, :past] for x in found)
        if bench.rank:
            F.scaled_dot_product_attention(q, keys[:, :, : past - n], values[:, :, : past - n], enable_gqa=grouped)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    with torch.no_grad():
        return {"forward_s": bench.timed(call), "note": "time only: the two parts are not merged"}


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
    for name, spec, strategies in contests(bench):
        fields = {"spec": spec.to_dict(), "ranks": bench.ranks}
        bench.add(f"{name}: one device / {bench.ranks}", fields, lambda spec=spec: single(bench, spec))
        ideal = {n: bench.rows[-1][n] for n in ("forward_s", "training_s") if n in bench.rows[-1]}
        write()
        for strategy in strategies:
            bench.add(f"{name}: {strategy}", fields, lambda s=spec, x=strategy, i=ideal: ours(bench, s, x, i))
            write()
        if not _by_head(spec):
            bench.add(f"{name}: a plain ring", fields, lambda spec=spec: plain_ring(bench, spec))
            bench.add(f"{name}: an all-gather", fields, lambda spec=spec: all_gathered(bench, spec))
            write()


def shown(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    for word in ("skipped", "refused", "failed"):
        if word in row:
            return f"{row['name']:<44} {word}: {str(row[word])[:150]}"
    line = f"{row['name']:<44} forward {row['forward_s'] * 1e3:9.3f} ms"
    if "training_s" in row:
        line += f"   training {row['training_s'] * 1e3:9.3f} ms"
    if "efficiency_forward" in row:
        line += f"   {100 * row['efficiency_forward']:5.1f} % / {100 * row['efficiency_training']:5.1f} %"
    if "error" in row:
        line += f"   sends {row['bytes_sent_forward'] / 2**20:.4g} MiB   error {row['error']:.1e}"
        line += "" if row["right"] else "   WRONG"
        line += f"   {row['layout']} > {row['transport']} > {row['backend']}"
    return line


def work(rank: int, ranks: int, meeting: str, gpu: bool, budget: float, file: str | None) -> None:
    setting = GPU if gpu else CPU
    if gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if gpu else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    bench = Bench(setting, rank, ranks, init_device_mesh(setting.kind, (ranks,)), time.monotonic() + budget)

    def write() -> None:
        if rank == 0 and file:
            Path(file).write_text(json.dumps({"environment": environment(gpu), "rows": bench.rows}, indent=1) + "\n")

    run(bench, write)
    if rank == 0:
        print("\n" + "\n".join(map(shown, bench.rows)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def environment(gpu: bool) -> dict[str, Any]:
    """Return what the figures depend on."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "attnplan": attnplan.__version__}
    if gpu:
        version = torch.cuda.nccl.version()
        found |= {"device": torch.cuda.get_device_name(0), "nccl": ".".join(map(str, version))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="NCCL on this machine's GPUs")
    parser.add_argument("--ranks", type=int, help="number of processes; the default is that of GPUs, or 2")
    parser.add_argument("--json", help="write the rows here, after every row")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds after which no row begins")
    args = parser.parse_args()
    ranks = args.ranks or (torch.cuda.device_count() if args.gpu else 2)
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        mp.spawn(work, (ranks, meeting, args.gpu, args.budget, args.json), nprocs=ranks)


if __name__ == "__main__":
    main()
