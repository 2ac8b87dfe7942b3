"""Models over ranks, as their processes train them: DDP, FSDP, a mesh of data and sequence, compiled graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.nn import MultiheadDilatedAttention, create_multihead_dilated_attention
from tests.ring_group import Clock

LENGTH, DIM, HEADS, BATCH = 32, 16, 2, 2


class Block(nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.attend, self.norm = attend, nn.LayerNorm(DIM)
        self.feed = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        found = self.attend(y, y, y, is_causal=True)
        x = x + (found[0] if isinstance(found, tuple) else found)
        return x + self.feed(x)


class Projected(nn.Module):
    """A plan between projections, as a model that is compiled calls it."""

    def __init__(self, plan: attnplan.Plan) -> None:
        super().__init__()
        self.plan, self.project, self.out = plan, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, *rest: Tensor, is_causal: bool = True) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, DIM // HEADS)).unbind(2)
        return self.out(self.plan(q, k, v).flatten(2))


def modules(mesh: Any, strategy: str) -> nn.Module:
    """Return a model of two blocks of ``attnplan.nn``, the same on every rank; alone without a mesh."""
    torch.manual_seed(0)
    dilated = MultiheadDilatedAttention(DIM, HEADS, [1, 2], [8, 16])
    dense = create_multihead_dilated_attention("improved", DIM, HEADS, [8, 32], [1, 4])
    if mesh is not None:
        for one in (dilated, dense):
            one.distribute(mesh, seq_len=LENGTH, strategy=strategy)
    return nn.Sequential(Block(dilated), Block(dense)).double()


def compiled_ones(mesh: Any, strategy: str) -> nn.Module:
    """Return a model whose attention is a plan."""
    torch.manual_seed(0)
    spec = AttentionSpec(
        seq_len=LENGTH, heads=HEADS, head_dim=DIM // HEADS, causal=True, dtype="float64", layout="bshd",
        pattern=P.longnet([8, 32], [1, 2]),
    )  # fmt: skip
    options = {"device": "cpu"} if mesh is None else {"mesh": mesh, "strategy": strategy}
    return nn.Sequential(*(Block(Projected(attnplan.compile(spec, **options))) for _ in range(2))).double()


def drawn(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, batch, LENGTH, DIM, generator=source, dtype=torch.float64).unbind()
    return x, grad


def plan_of(model: nn.Module) -> Any:
    """Return the plan of a model's first attention, which says what its ranks hold."""
    attend = model[0].attend
    return attend.plan if isinstance(attend, Projected) else attend.plan(LENGTH, dtype="float64")


def same(name: str, got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda text: f"{name}: {text}")


def trained(rank: int, wrapper: str, make: str, strategy: str, backend: str = "") -> int:
    """Take one step of a sharded model under a wrapper; weights and gradients are those of one process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ring",))
    factory = {"modules": modules, "plans": compiled_ones}[make]
    alone, model = factory(None, strategy), factory(mesh, strategy)
    plan = plan_of(model).configure(timeout=60.0)
    (x, grad), ranks = drawn(), mesh.size()
    running: Any = model
    if backend:
        running = torch.compile(model, backend=backend, fullgraph=make == "plans")
    if wrapper == "ddp":
        running = DistributedDataParallel(running, process_group=mesh.get_group())
    elif wrapper == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    single = torch.optim.SGD(alone.parameters(), lr=0.01)
    for step in range(2):
        out, want = running(plan.shard(x)), alone(x)
        same(f"output of step {step}", plan.unshard(out.detach()), want.detach())
        (out * plan.shard(grad)).sum().mul(ranks).backward()  # both wrappers take the mean over ranks
        (want * grad).sum().backward()
        pairs = list(zip(model.named_parameters(), alone.parameters(), strict=True))
        for (name, a), b in pairs:
            if b.grad is not None:
                same(f"gradient of {name}", whole(a.grad), b.grad)
        optimizer.step()
        single.step()
        for (name, a), b in pairs:
            same(name, whole(a.detach()), b.detach())
        optimizer.zero_grad()
        single.zero_grad()
    return len(pairs)


def whole(x: Any) -> Tensor:
    """Return a parameter or gradient that FSDP has spread."""
    made: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return made


def data_beside_sequence(rank: int) -> int:
    """Two rings of two ranks, each with its own half of the batch; DDP sums over all four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ring"))
    ring = mesh["ring"]
    alone, model = modules(None, "auto"), modules(ring, "zigzag")
    plan = plan_of(model).configure(timeout=60.0)
    x, grad = drawn(4)
    here = slice(2 * mesh.get_coordinate()[0], 2 * mesh.get_coordinate()[0] + 2)
    running = DistributedDataParallel(model)
    out, want = running(plan.shard(x[here])), alone(x)
    same("output", plan.unshard(out.detach()), want[here].detach())
    (out * plan.shard(grad[here])).sum().mul(4).backward()
    (want * grad).sum().backward()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        if b.grad is not None:
            same(name, a.grad, b.grad)
    return plan.ranks


def refused_whole(rank: int, strategy: str, length: int) -> str:
    """Return why a plan on a mesh is no part of a whole compiled graph; with a break it computes what it should."""
    mesh = init_device_mesh("cpu", (2,))
    spec = AttentionSpec(seq_len=length, heads=2, head_dim=8, causal=True, dtype="float32")
    plan = attnplan.compile(spec, mesh=mesh, strategy=strategy).configure(timeout=60.0)
    q = plan.shard(torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(0)))

    def model(q: Tensor) -> Tensor:
        return plan(q * 2, q, q) + 1

    assert torch.equal(torch.compile(model, backend="eager")(q), model(q))
    torch.compiler.reset()
    try:
        torch.compile(model, backend="eager", fullgraph=True)(q)
    except Exception as error:  # Dynamo's own kind
        return str(error)
    return ""


def dies_in_a_graph(rank: int) -> None:
    """Lose rank 1 between two steps of a compiled model: the others' error names it."""
    import os

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ring",))
    model = compiled_ones(mesh, "zigzag > ring")
    plan = plan_of(model).configure(timeout=60.0)
    running = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = plan.shard(drawn()[0])
    running(x).sum().backward()
    dist.barrier()
    Clock.begin()
    plan.configure(timeout=2.0)
    if rank == 1:
        os._exit(9)
    running(x).sum().backward()


def learned_on_a_mesh(rank: int, strategy: str) -> int:
    """Call with slopes and sinks: this rank's rows are those of a virtual ring, the sum of gradients is, too."""
    ranks = dist.get_world_size()
    spec = AttentionSpec(
        seq_len=37, heads=4, kv_heads=2, head_dim=8, causal=True, dtype="float64", alibi_slopes=True, sink_logits=True
    )
    plan = attnplan.compile(spec, mesh=init_device_mesh("cpu", (ranks,)), strategy=strategy).configure(timeout=60.0)
    alone = attnplan.compile(spec, device="cpu")
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, 37, 8, dtype=torch.float64) for heads in (4, 2, 2, 4)]
    slopes, sinks = torch.rand(2, 4, dtype=torch.float64).unbind()
    found = []
    for run, cut in ((plan, plan.shard), (alone, lambda x: x)):
        leaves = [cut(x).clone().requires_grad_() for x in tensors[:3]]
        own = {"alibi_slopes": slopes.clone().requires_grad_(), "sink_logits": sinks.clone().requires_grad_()}
        before = 0 if run is alone else plan.engine.transport.bytes_sent
        out = run(*leaves, **own)
        moved = 0 if run is alone else plan.engine.transport.bytes_sent - before
        assert run is alone or moved == plan.traffic(plan.rank, batch=2).sent
        out.backward(cut(tensors[3]))
        if run is plan:
            moved = plan.engine.transport.bytes_sent - before - moved
            assert moved == plan.traffic(plan.rank, backward=True, batch=2).sent
            for x in own.values():
                dist.all_reduce(x.grad)
        found.append([out.detach(), *(x.grad for x in leaves), *(x.grad for x in own.values())])
    got, want = found
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        same(str(i), a, b if i > 3 else plan.shard(b))
    return plan.ranks
