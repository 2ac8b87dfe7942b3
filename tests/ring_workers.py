"""What the processes of the tests of rings do. Imported once, before they are forked: keep it free of pytest."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from attnplan import AttentionSpec
from attnplan.errors import RingError, SpecError
from attnplan.runtime.ring import engines, handshake
from attnplan.runtime.ring.engines import RealEngine, call
from attnplan.runtime.ring.exchanges import Start
from tests.ring_group import Clock
from tests.ring_programs import extent, prepared, program

RANKS, CULPRIT, TIMEOUT = 4, 2, 2.0
SPEC = AttentionSpec(seq_len=37, heads=2, head_dim=8, dtype="float32")


def engine(rank: int, validate: str, collective: str = "p2p") -> RealEngine:
    made = prepared(program(SPEC, RANKS, rank), SPEC)
    store = dist.distributed_c10d._get_default_store()
    ring = RealEngine(made, dist.group.WORLD, torch.device("cpu"), 7, store, "test")
    ring.configure(validate, TIMEOUT)
    if collective != "p2p":
        original = ring.transport.start

        def start(request: Start) -> Any:
            return original(Start(request.name, request.hop, collective, request.sends, request.receives))

        ring.transport.start = start
    return ring


def inputs(rank: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    rows = extent(SPEC.seq_len, RANKS, rank)[1]
    return [torch.randn(batch, SPEC.heads, rows, SPEC.head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]


def at_hop(ring: RealEngine, hop: int, phase: str, action: Any) -> None:
    """Do something to this rank when it starts the exchange of a hop of its second call."""
    original = ring.transport.start

    def start(request: Start) -> Any:
        if (ring.step, request.hop, request.name) == (2, hop, phase):
            action()
        return original(request)

    ring.transport.start = start


def die() -> None:
    os._exit(9)


def hang() -> None:
    time.sleep(3600)


def fail() -> None:
    raise ValueError("the user's own")


def step(ring: RealEngine, rank: int, **options: Any) -> None:
    out, _ = call(ring, *inputs(rank, **options), {})
    out.backward(torch.ones_like(out))


def misbehave(rank: int, action: Any, phase: str, collective: str, validate: str) -> None:
    ring = engine(rank, validate, collective)
    step(ring, rank)
    dist.barrier()
    Clock.begin()
    if rank == CULPRIT:
        at_hop(ring, 1, phase, action)
    step(ring, rank)


def mismatch(rank: int, how: str, validate: str) -> Any:
    ring = engine(rank, validate)
    step(ring, rank)
    if rank == CULPRIT and how == "plan":
        ring.plan += 1
        ring._agreed = None
    if rank == CULPRIT and how == "call":
        ring.step += 1
    options: dict[str, Any] = {}
    if rank == CULPRIT and how in ("longer", "shorter"):
        options["batch"] = 3
    if rank != CULPRIT and how in ("shorter", "unchanged"):
        options["batch"] = 5
    if rank == CULPRIT and how == "dtype":
        options["dtype"] = torch.bfloat16
    if rank == CULPRIT and how == "gradients":
        with torch.no_grad():
            return call(ring, *inputs(rank), {})
    step(ring, rank, **options)
    return None


def wrong_tensors(rank: int) -> None:
    ring = engine(rank, "always")
    if rank == CULPRIT:
        ring.refuse(inputs(rank)[0], {}, SpecError("q is too short"))
    else:
        ring.agree(inputs(rank)[0], {}, gradients=True)


def again(rank: int) -> str:
    ring = engine(rank, "first")
    if rank == CULPRIT:
        die()
    try:
        step(ring, rank)
    except RingError:
        step(ring, rank)
    return "the first call passed"


def nothing(rank: int, validate: str) -> int:
    ring = engine(rank, validate)
    shaken = []

    def counted(original: Any) -> Any:
        return lambda *args: (shaken.append(1), original(*args))[1]

    engines.shake_hands = counted(handshake.shake_hands)
    ring.cards.meet = counted(ring.cards.meet)
    for batch in (1, 1, 2, 2):
        step(ring, rank, batch=batch)
    return len(shaken)


def mesh_of(sizes: tuple[int, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    names = ("ring", "heads")[: len(sizes)]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def beside_virtual(rank: int, sizes: tuple[int, ...], cases: list[tuple[AttentionSpec, str, dict[str, Any]]]) -> int:
    """Run every case on the mesh and as a virtual ring: output, LSE and gradients must be equal bit for bit."""
    import attrs

    import attnplan
    from tests.running import Call

    mesh, ran = mesh_of(sizes), 0
    for spec, strategy, operands in cases:
        plan = attnplan.compile(spec, mesh=mesh, strategy=strategy)
        plan.configure(timeout=20.0)
        asked = Call.of(spec, operands, batch=2)
        if rank == 0:  # which compares for all
            here = attrs.evolve(spec, ring_size=mesh.size())
            alone = attnplan.compile(here, device="cpu", strategy=plan.strategy)
            want = asked.got(alone)
        rows = 2 if spec.layout == "bhsd" else 1
        given = [x.transpose(1, 2) if rows == 1 else x for x in asked.inputs]
        leaves = [plan.shard(x).clone().requires_grad_() for x in given]
        before = plan.engine.transport.bytes_sent
        if spec.has_lse:
            out, lse = plan(*leaves, return_lse=True, **operands)
        else:
            out, lse = plan(*leaves, **operands), None
        moved = plan.engine.transport.bytes_sent - before
        assert moved == plan.traffic(plan.rank, batch=2).sent, (spec, plan, moved)
        grad = plan.shard(asked.grad.transpose(1, 2) if rows == 1 else asked.grad)
        loss = (out * grad).sum()
        if lse is not None and asked.grad_lse is not None:
            grad_lse = plan.shard(asked.grad_lse, 2)
            loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * grad_lse).sum()
        before = plan.engine.transport.bytes_sent
        got = [out.detach(), *torch.autograd.grad(loss, leaves)]
        first, extra = plan.programs[plan.rank].first, 0
        if first is not None and lse is not None:  # the LSE's gradient, of a call that asked for it
            extra = first.sent * 2 * lse.element_size()
        moved = plan.engine.transport.bytes_sent - before
        assert moved == plan.traffic(plan.rank, backward=True, batch=2).sent + extra, (spec, plan, moved)
        whole = [plan.unshard(x) for x in got] + ([] if lse is None else [plan.unshard(lse, 2)])
        if rank == 0:
            expected = [want.out, want.dq, want.dk, want.dv, *([] if lse is None else [want.lse])]
            for name, a, b in zip(("out", "dq", "dk", "dv", "lse"), whole, expected, strict=False):
                a = a.transpose(1, 2) if rows == 1 and name != "lse" else a
                assert torch.equal(a, b), f"{spec}, {plan}: {name} is off by {(a - b).abs().max():.2e}"
        ran += 1
    return ran


def refused(action: Any, words: str) -> None:
    message = ""
    try:
        action()
    except SpecError as error:
        message = str(error)
    assert words in message


def surface(rank: int) -> None:
    """Use everything that a plan on a mesh offers."""
    import attnplan
    from attnplan import patterns as P

    mesh = mesh_of((2,))
    spec = AttentionSpec(seq_len=13, heads=2, head_dim=8, causal=True, dtype="float32", pattern=P.documents())
    plan = attnplan.compile(spec, mesh=mesh, strategy="zigzag > ring").configure(validate="always", timeout=20)
    assert attnplan.compile(spec, mesh=mesh, strategy="zigzag > ring") is plan
    held = plan.positions()
    tokens = torch.arange(26).reshape(2, 13)
    documents = torch.tensor([0, 5, 13], dtype=torch.int32)
    given = {"tokens": tokens, "labels": tokens + 1, "weights": torch.arange(13.0), "documents": documents, "name": "x"}
    batch = plan.shard_batch(given)
    assert torch.equal(batch["positions"], held)
    assert torch.equal(batch["tokens"], tokens[:, held])
    assert torch.equal(batch["labels"], tokens[:, held] + 1)
    assert torch.equal(batch["weights"], held.float())
    assert batch["documents"] is documents
    assert torch.equal(plan.unshard(batch["tokens"]), tokens)
    assert sorted([*plan.positions(0).tolist(), *plan.positions(1).tolist()]) == list(range(13))
    for wrong, words in (({"tokens": tokens[:, :5]}, "tokens has shape"), ({"x": torch.zeros(3)}, "shard_batch needs")):
        refused(lambda wrong=wrong: plan.shard_batch(wrong), words)
    report = plan.verify(rows=16)
    assert all(check.passed for check in report.checks)
    assert "a mesh of 2 processes" in plan.explain()
    q = torch.zeros(1, 2, len(held), 8)
    refused(lambda: plan(q, q, q), "the spec needs documents with each call")
    _through_dtensors(mesh)
    _through_modules(mesh)


def _through_modules(mesh: Any) -> None:
    """Train projected modules on shards: their summed gradients are those of one process."""
    from attnplan.nn import create_dilated_attention, create_multihead_dilated_attention

    for kind, length in (("distributed", 32), ("ring_distributed", 29), ("block_sparse_ring", 32)):
        made = []
        for options in ({"mesh": mesh, "seq_len": length, "strategy": "zigzag"}, {}):
            torch.manual_seed(0)
            name = kind if options else kind.replace("ring_distributed", "ring").replace("distributed", "improved")
            made.append(create_multihead_dilated_attention(name, 16, 2, [8, 16], [1, 2], **options))
        ring, alone = made
        x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1))
        grad = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(2))
        plan = ring.plan(length)
        out, want = (m(*[y] * 3, is_causal=True) for m, y in ((ring, plan.shard(x)), (alone, x)))
        out, want = (y[0] if isinstance(y, tuple) else y for y in (out, want))
        torch.testing.assert_close(plan.unshard(out), want, rtol=1e-4, atol=1e-5)
        (out * plan.shard(grad)).sum().backward()
        (want * grad).sum().backward()
        for a, b in zip(ring.parameters(), alone.parameters(), strict=True):
            if a.grad is not None:
                dist.all_reduce(a.grad)
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    assert create_dilated_attention("distributed", [8], [1], mesh=mesh).is_ring


def _through_dtensors(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    import attnplan

    torch.manual_seed(0)
    for length in (13, 16):
        spec = AttentionSpec(seq_len=length, heads=2, head_dim=8, causal=True, dtype="float32")
        plan = attnplan.compile(spec, mesh=mesh, strategy="contiguous > ring")
        alone = attnplan.compile(spec, device="cpu")
        q, k, v, grad = torch.randn(4, 1, 2, length, 8).unbind()
        leaves = [distribute_tensor(x, mesh, [Shard(2)]).requires_grad_() for x in (q, k, v)]
        out = plan(*leaves)
        assert isinstance(out, DTensor)
        assert out.shape == (1, 2, length, 8)
        (out.to_local() * plan.shard(grad)).sum().backward()
        wide = [x.clone().requires_grad_() for x in (q, k, v)]
        want = alone(*wide)
        (want * grad).sum().backward()
        torch.testing.assert_close(out.full_tensor(), want, rtol=1e-5, atol=1e-6)
        for a, b in zip(leaves, wide, strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-5, atol=1e-6)
    plan.configure(validate="off")
    for wrong, words in (
        ((leaves[0], k, v), "k is a plain tensor beside DTensors"),
        (tuple(distribute_tensor(x, mesh, [Replicate()]) for x in (q, k, v)), "the plan needs"),
    ):
        refused(lambda wrong=wrong: plan(*wrong), words)


def wrong_shape(rank: int) -> None:
    """Call with a shard of a wrong length on one rank only."""
    import attnplan

    spec = AttentionSpec(seq_len=16, heads=2, head_dim=8, causal=True, dtype="float32")
    plan = attnplan.compile(spec, mesh=mesh_of((RANKS,)), strategy="contiguous > ring").configure(timeout=TIMEOUT)
    q = torch.zeros(1, 2, 5 if rank == CULPRIT else 4, 8)
    plan(q, q, q)


def counted_on_the_wire(rank: int, strategy: str) -> tuple[int, int]:
    """Return the bytes that the loopback interface counted while all ranks called, and what they counted."""
    from pathlib import Path

    import attnplan

    spec = AttentionSpec(seq_len=1 << 15, heads=4, head_dim=64, dtype="float32", causal=True)
    plan = attnplan.compile(spec, mesh=mesh_of((RANKS,)), strategy=strategy)
    # No kernel runs: only the bytes are of interest here.
    for _, parts in plan.engine.rank.hops.values():
        parts[:] = [None] * len(parts)
    rows = plan.lengths[0]
    q = torch.zeros(4, 4, rows, 64)
    plan(q[:1], q[:1], q[:1])
    dist.barrier()

    def wire() -> int:
        (line,) = (x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
        return int(line.split(":")[1].split()[0])

    before, ours = wire(), plan.engine.transport.bytes_sent
    dist.barrier()
    plan(q, q, q)
    dist.barrier()
    return wire() - before, plan.engine.transport.bytes_sent - ours


LENGTH = 48
"""Rows of the rings of plans: equal shards, so that an all-gather is one."""


def planned(rank: int, strategy: str, validate: str) -> Any:
    """Return a plan on a mesh, and a function that makes one training step with it."""
    import attnplan

    spec = AttentionSpec(seq_len=LENGTH, heads=4, head_dim=8, causal=True, dtype="float32")
    plan = attnplan.compile(spec, mesh=mesh_of((RANKS,)), strategy=strategy)
    plan.configure(validate=validate, timeout=30.0)
    torch.manual_seed(rank)
    q, k, v = (torch.randn(1, 4, plan.lengths[0], 8, requires_grad=True) for _ in range(3))

    def train() -> None:
        out = plan(q, k, v)
        out.backward(torch.ones_like(out))

    return plan, train


def started(plan: Any, train: Any) -> None:
    """Make the first step, in which ranks emit and connect; what comes is timed."""
    train()
    plan.configure(timeout=TIMEOUT)
    dist.barrier()
    Clock.begin()


def broken_plan(rank: int, strategy: str, fault: str, when: str) -> None:
    """Make one good step; in the second one rank dies, hangs or raises when it starts what ``when`` names.

    ``"between"`` is the user's own code between two calls.
    """
    plan, train = planned(rank, strategy, "first")
    started(plan, train)
    action = {"death": die, "hang": hang, "exception": fail}[fault]
    if rank == CULPRIT and when == "between":
        action()
    if rank == CULPRIT:
        original = plan.engine.transport.start

        def start(request: Start) -> Any:
            if request.name.startswith(when):
                action()
            return original(request)

        plan.engine.transport.start = start
    train()


def off_by(rank: int, strategy: str, how: str, validate: str) -> None:
    """Make one good step; in the second one rank brings another shape, dtype or plan, or asks for no gradients."""
    plan, train = planned(rank, strategy, validate)
    started(plan, train)
    if rank != CULPRIT:
        train()
        return
    if how == "plan":
        plan.engine.plan += 1
        plan.engine._agreed = None
        train()
    elif how == "call":
        plan.engine.step += 1
        train()
    rows, dtype = plan.lengths[0], torch.bfloat16 if how == "dtype" else torch.float32
    batch, cut = (3 if how == "batch" else 1), (1 if how in ("shorter", "longer") else 0)
    rows = rows + cut if how == "longer" else rows - cut
    x = torch.zeros(batch, 4, rows, 8, dtype=dtype, requires_grad=how != "gradients")
    plan(x, x, x)
