"""Programs of ranks compute the spec: their graphs, run one by one and merged, are the attention over the whole."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.backends import registry
from attnplan.cost import resolve
from attnplan.errors import PassError, RingError
from attnplan.ir import Attend, Axis, Builder, Graph, Input, Output, Receive, RowMap, Take, parse_graph
from attnplan.ir.buffers import Buffer
from attnplan.lower import lower
from attnplan.ring import programs, rank_graph
from attnplan.ring.program import RankProgram, traffic
from attnplan.runtime.interpreter import interpret

LAYOUTS = ("contiguous", "zigzag", "striped")
TRANSPORTS = ("local", "halo", "ring", "all-gather", "rows", "ulysses", "hybrid")
LONGNET = P.longnet(segment_lengths=[8, 16, 32], dilation_rates=[1, 2, 4])
PATTERNS = {
    "causal": (P.full(), True),
    "window": (P.window(5), True),
    "window both ways": (P.window(4, 2), False),
    "documents": (P.documents([5, 9, 20, 13]), True),
    "documents of the call": (P.documents(), True),
    "sinks": (P.sinks(3) | P.window(4), True),
    "longnet": (LONGNET, True),
    "longnet mean": (P.longnet(segment_lengths=[8, 16, 32], dilation_rates=[1, 2, 4], mix="mean"), False),
    "grouped": (P.grouped(segment_lengths=[8, 32], dilation_rates=[1, 2]), True),
    "random blocks": (P.random_blocks(0.3, 8, 1), True),
    "window or dilated": (P.window(3) | P.dilated(16, 4), True),
}


def gathered(x: Tensor, buffer: Buffer) -> Tensor:
    """The rows of a buffer, taken from the whole tensor by index."""
    elements = torch.tensor([e for m in buffer.maps for e in m.elements()])
    if buffer.heads > 1:
        order = torch.argsort(elements[:, 0], stable=True)
        elements = elements[order]
    return x[:, elements[:, 0], elements[:, 1]].reshape(x.shape[0], buffer.heads, -1, x.shape[-1])


def parts_of_rank(program: RankProgram, i: int, qkv: tuple[Tensor, ...], operands: Any, spec: AttentionSpec) -> Any:
    q, k, v = qkv
    queries = gathered(q, Buffer(program.queries))
    for hop in program.hops:
        graph = hop.graphs[i]
        if graph is not None:
            store = Buffer(program.keys if hop.store is None else hop.store)
            yield interpret(graph, queries, gathered(k, store), gathered(v, store), operands, spec.shape)


def attended(spec: AttentionSpec, ranks: tuple[RankProgram, ...], qkv: tuple[Tensor, ...], operands: Any) -> Tensor:
    """The output of all ranks, put together by the definition of each softmax."""
    q, v = qkv[0], qkv[2]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for program in ranks:
        each = []
        for i in range(len(program.softmaxes)):
            found = list(parts_of_rank(program, i, qkv, operands, spec))
            if found:
                lses = torch.stack([lse for _, lse in found])
                total = torch.logsumexp(lses, 0).nan_to_num(neginf=0.0)
                each.append(sum(torch.exp(lse - total)[..., None] * o for o, lse in found))
        if each:
            rule = spec.rule
            mixed = each[0] if rule == "lse" else sum(each) / (len(spec.branches) if rule == "mean" else 1)
            buffer = Buffer(program.queries)
            elements = torch.tensor([e for m in buffer.maps for e in m.elements()])
            if buffer.heads > 1:
                elements = elements[torch.argsort(elements[:, 0], stable=True)]
            flat = mixed.reshape(mixed.shape[0], -1, mixed.shape[-1])
            out = out.index_put((torch.arange(out.shape[0])[:, None], elements[:, 0], elements[:, 1]), flat)
    return out


@lru_cache(maxsize=64)
def inputs(heads: int, kv_heads: int, length: int) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = tuple(
        torch.randn(2, h, length, 8, dtype=torch.float64, generator=generator) for h in (heads, kv_heads, kv_heads)
    )
    return qkv, torch.randn(2, heads, length, 8, dtype=torch.float64, generator=generator)


def ranks_of(transport: str, ranks: int = 4) -> int | tuple[int, int]:
    return (2, ranks // 2) if transport == "hybrid" else ranks


def accepted(spec: AttentionSpec, layout: str, transport: str, ranks: int = 4) -> tuple[RankProgram, ...] | None:
    try:
        return programs(spec, ranks_of(transport, ranks), layout, transport)
    except RingError:
        return None


def spec_of(name: str, heads: int = 4, kv_heads: int = 2, length: int = 47) -> AttentionSpec:
    pattern, causal = PATTERNS[name]
    return AttentionSpec(
        seq_len=length, heads=heads, kv_heads=kv_heads, head_dim=8, pattern=pattern, causal=causal, dtype="float64"
    )


def compare(spec: AttentionSpec, ranks: tuple[RankProgram, ...]) -> None:
    qkv, upstream = inputs(spec.heads, spec.kv_heads, spec.shape.seq_len)
    operands = {"documents": torch.tensor([0, 5, 14, 34, spec.shape.kv_len])} if "documents" in spec.operands else {}
    want_in, got_in = ([x.clone().requires_grad_() for x in qkv] for _ in range(2))
    want, _ = interpret(lower(spec), *want_in, operands)
    got = attended(spec, ranks, tuple(got_in), operands)
    wanted = torch.autograd.grad(want, want_in, upstream)
    found = torch.autograd.grad(got, got_in, upstream)
    for a, b in ((want, got), *zip(wanted, found, strict=True)):
        assert (a - b).detach().norm() <= 1e-12 * max(a.detach().norm().item(), 1.0)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ["causal", "documents of the call", "longnet", "random blocks"])
def test_ranks_compute_the_attention_over_the_whole(name: str, transport: str) -> None:
    spec = spec_of(name)
    ran = [compare(spec, ranks) for layout in LAYOUTS if (ranks := accepted(spec, layout, transport))]
    assert ran or transport in ("local", "halo")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_layout_and_transport(name: str, kv_heads: int, ranks: int) -> None:
    spec = spec_of(name, heads=8, kv_heads=kv_heads)
    for layout in LAYOUTS:
        for transport in TRANSPORTS:
            if transport == "hybrid" and ranks in (2, 3):
                continue
            found = accepted(spec, layout, transport, ranks)
            if found is not None:
                compare(spec, found)


def with_gradients(run: Any, given: list[Tensor], upstream: tuple[Tensor, Tensor]) -> list[Tensor]:
    given = [x.clone().requires_grad_() for x in given]
    out, lse = run(*given)
    held = lse.masked_fill(lse == -torch.inf, 0.0)
    gradients = torch.autograd.grad((out, held), given, upstream)
    return [out.detach(), held.detach(), *gradients]


@pytest.mark.parametrize("transport", ["ring", "rows"])
@pytest.mark.parametrize("name", ["causal", "documents of the call", "longnet", "random blocks"])
def test_backends_run_graphs_over_some_rows(name: str, transport: str) -> None:
    """Conditions are read at positions in the whole sequence, forward and backward, by every schedule that accepts."""
    spec = spec_of(name)
    target, ran = resolve("cpu"), set()
    qkv, _ = inputs(4, 2, 47)
    operands = {"documents": torch.tensor([0, 5, 14, 34, 47])} if "documents" in spec.operands else {}
    for layout in ("zigzag", "striped"):
        program = programs(spec, ranks_of(transport), layout, transport)[1]
        for hop in program.hops:
            graph = hop.graphs[0]
            if graph is None:
                continue
            store = Buffer(program.keys if hop.store is None else hop.store)
            given = [gathered(qkv[0], Buffer(program.queries)), *(gathered(x, store) for x in qkv[1:])]
            generator = torch.Generator().manual_seed(1)
            rows = given[0].shape[:3]
            upstream = tuple(torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((*rows, 8), rows))
            want = with_gradients(lambda q, k, v, g=graph: interpret(g, q, k, v, operands, spec.shape), given, upstream)
            for backend in registry().backends.values():
                for schedule in backend.schedules(target.device):
                    if backend.naive or backend.refuse(graph, spec, schedule, target.device):
                        continue
                    emitted = backend.emit(graph, spec, schedule, "cpu")
                    got = with_gradients(lambda q, k, v, p=emitted: p(q, k, v, operands, True), given, upstream)
                    for a, b in zip(want, got, strict=True):
                        assert (a - b).norm() <= 1e-12 * max(a.norm().item(), 1.0)
                    ran.add(f"{backend.name} ({schedule.name})")
    assert len(ran) > 1


def test_an_attend_over_some_rows_masks_at_their_positions() -> None:
    """Without ``at`` the same inputs would be read as the first rows of the sequence."""
    spec = AttentionSpec(seq_len=37, heads=4, kv_heads=2, head_dim=8, dtype="float64", pattern=P.window(5) | P.sinks(3))
    qkv, _ = inputs(4, 2, 37)
    local = [qkv[0][:, :, 20:30], *(x[:, :, 14:26] for x in qkv[1:])]
    at = (
        RowMap(0, 20, (Axis(2, head=2), Axis(2, head=1), Axis(10, row=1))),
        RowMap(0, 14, (Axis(2, head=1), Axis(1), Axis(12, row=1))),
    )

    def graph(where: RowMap | None) -> Graph:
        builder = Builder()
        rows = {"q": (4, 10), "k": (2, 12), "v": (2, 12)}
        args = [builder.add(Input(t, h, 2, n, 8, "float64")) for t, (h, n) in rows.items()]
        attend = Attend(where=spec.branches[0], scale=spec.softmax_scale, at=None if where is None else at)
        return builder.build(builder.add(Output(), builder.add(attend, *args)))

    sharded = graph(at[0])
    assert parse_graph(str(sharded)) == sharded
    out, _ = interpret(sharded, *local, shape=spec.shape)
    rows, keys = torch.arange(20, 30)[:, None], torch.arange(14, 26)
    mask = ((rows - keys).abs() <= 5) | (keys < 3)
    scores = spec.softmax_scale * local[0] @ local[1].repeat_interleave(2, 1).mT
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    assert torch.allclose(out, weights @ local[2].repeat_interleave(2, 1), atol=1e-12)
    plain, _ = interpret(graph(None), *local, shape=attrs.evolve(spec, seq_len=10, kv_len=12).shape)
    assert not torch.allclose(out, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda op, q, k: attrs.evolve(op, at=(q, k), tile=(4, 4)), "tiles are cut over whole sequences"),
        (lambda op, q, k: attrs.evolve(op, at=(k, q)), "q has sizes"),
        (lambda op, q, k: attrs.evolve(op, at=(RowMap(0, 0, (Axis(2, head=2), q.axes[1])), k)), "q stands at heads"),
        (
            lambda op, q, k: attrs.evolve(op, at=(q, RowMap(0, 0, (k.axes[0], Axis(6, head=1, row=1))))),
            "k changes the head",
        ),
    ],
)
def test_positions_that_fit_no_operand_are_refused(change: Any, match: str) -> None:
    builder = Builder()
    q, k, v = (builder.add(Input(t, 2, 1, n, 8, "float32")) for t, n in (("q", 4), ("k", 6), ("v", 6)))
    rows = [builder.type(x).rows for x in (q, k)]
    with pytest.raises(PassError, match=match):
        builder.add(change(Attend(), *rows), q, k, v)


def test_the_compiled_backend_refuses_rows_of_a_shard() -> None:
    spec = spec_of("causal")
    backend, device = registry().get("compiled"), resolve("cpu").device
    for layout in ("contiguous", "zigzag"):
        graph = programs(spec, 4, layout, "rows")[1].hops[1].graphs[0]
        assert graph is not None
        for schedule in backend.schedules(device):
            reasons = backend.refuse(graph, spec, schedule, device)
            known = ("some rows of the sequence only", "whole inputs", "takes none apart")
            assert any(words in reason for reason in reasons for words in known), schedule.name


def test_a_take_reads_an_input_or_what_was_received() -> None:
    spec = spec_of("longnet")
    graph = rank_graph(spec, 4, "contiguous", "rows", 1)
    graph.verify()
    sources = {type(graph[node.args[0]].op) for node, _ in graph.of(Take)}
    assert sources == {Input, Receive}


def test_programs_are_made_once() -> None:
    spec = spec_of("causal")
    assert programs(spec, 4, "contiguous", "ring") is programs(spec_of("causal"), 4, "contiguous", "ring")
    features = {"q": 8, "k": 8, "v": 8, "o": 8}
    assert traffic(programs(spec, 1, "contiguous", "ring")[0], features, spec.dtype).sent == 0
