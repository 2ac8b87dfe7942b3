"""Train the example LongNet on text whose sequence is sharded over processes.

    torchrun --nproc-per-node 2 examples/ring_torchrun.py
    torchrun --nproc-per-node 4 examples/ring_torchrun.py --layout zigzag --steps 20 --check

Each rank holds its rows of every sequence; only attention talks, and moves only the rows that other ranks' queries
need. With ``--check`` rank 0 trains the same model alone beside it: the losses are the same to rounding.
"""

from __future__ import annotations

import argparse
import math
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from longnet_lm.data import read_text, text_batches
from longnet_lm.model import ByteLM, Settings
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P

PATTERN = P.longnet([64, 256], [1, 2])


class OnRing(nn.Module):
    """A plan as a module, in the place of the model's attention."""

    def __init__(self, plan: attnplan.Plan) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.plan(q, k, v)


def sharded(model: ByteLM, plan: attnplan.Plan) -> ByteLM:
    """Return the model on a rank's rows: its attention is the ring, its rotary positions are those of its rows."""
    for block in model.blocks:
        block.attention.attend = OnRing(plan)
    model.turns = model.turns[:, plan.positions().to(model.turns.device)]
    return model


def made(settings: Settings, device: torch.device) -> tuple[ByteLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ByteLM(settings, PATTERN).to(device)
    return model, torch.optim.AdamW(model.parameters(), settings.learning_rate)


def train_step(model: ByteLM, optimizer: Any, tokens: Tensor, labels: Tensor, count: int, group: Any = None) -> float:
    """Return the mean loss over all ``count`` tokens, in bits, after one step; gradients are summed over a group."""
    loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum") / count
    optimizer.zero_grad()
    loss.backward()
    total = loss.detach().clone()
    if group is not None:
        for weight in model.parameters():
            dist.all_reduce(weight.grad, group=group)
        dist.all_reduce(total, group=group)
    optimizer.step()
    return total.item() / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layout", default="auto", choices=["auto", "contiguous", "zigzag", "striped"])
    parser.add_argument("--check", action="store_true", help="train the same model alone on rank 0, and compare")
    args = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=5))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    mesh, device = init_device_mesh(kind, (ranks,)), torch.device(kind)
    settings = Settings(length=args.length, batch=4, steps=args.steps, layers=2)
    spec = AttentionSpec(
        seq_len=settings.length,
        heads=settings.heads,
        head_dim=settings.dim // settings.heads,
        batch=settings.batch,
        pattern=PATTERN,
        causal=True,
        dtype="float32",
        layout="bshd",
        training=True,
    )
    plan = attnplan.compile(spec, mesh=mesh, strategy=args.layout).configure(timeout=60.0)
    if rank == 0:
        print(plan.explain())
    model, optimizer = made(settings, device)
    model = sharded(model, plan)
    alone = made(settings, device) if args.check and rank == 0 else None
    text, _ = read_text()
    batches = text_batches(text, settings.batch, settings.length, 0)  # the same on every rank
    count = settings.batch * settings.length
    for step in range(args.steps):
        tokens, labels = (x.to(device) for x in next(batches))
        part = plan.shard_batch({"tokens": tokens, "labels": labels})
        bits = train_step(model, optimizer, part["tokens"], part["labels"], count, mesh.get_group())
        line = f"step {step}  {bits:.6f} bits a byte over {ranks} ranks"
        if alone is not None:
            single = train_step(*alone, tokens, labels, count)
            assert abs(bits - single) < 1e-4 * single, f"{bits} is not {single}"
            line += f", {single:.6f} alone"
        if rank == 0:
            print(line, flush=True)
    moved = plan.traffic(rank).sent + plan.traffic(rank, backward=True).sent
    print(f"rank {rank} sent {moved:,} bytes a layer and step, forward and backward", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
