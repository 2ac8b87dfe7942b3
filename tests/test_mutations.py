from __future__ import annotations

import attrs
import pytest

from attnplan import patterns as P
from attnplan.errors import PassError, VerifyError
from attnplan.ir import Attend, Axis, Merge, Mix, RowMap, Take
from attnplan.lower import lower
from attnplan.spec import AttentionSpec
from tests.programs import planned, prove, replaced, with_op

N = 1_000_003


LONGNET = AttentionSpec(
    seq_len=N, heads=8, kv_heads=4, head_dim=64, pattern=P.longnet([4096, 16384], [1, 4]), causal=True, softcap=30.0
)
DETACHED = attrs.evolve(LONGNET, pattern=P.longnet([4096, 16384], [1, 4], mix="lse-detached"))
MEAN = attrs.evolve(LONGNET, pattern=P.grouped([4096, 16384], [1, 4], mix="mean"))
WEIGHTED = attrs.evolve(LONGNET, pattern=P.mix([P.window(100), P.segments(4096)], rule="sum", weights=[0.25, 0.75]))
SPLIT = attrs.evolve(
    LONGNET, kv_heads=8, pattern=P.mix([P.heads(0, 4) & P.segments(4096), P.heads(4, 8) & P.segments(4096)])
)
PACKED = AttentionSpec(
    seq_len=N - 500, kv_len=N, heads=8, head_dim=64, pattern=P.documents() & P.segments(4096), causal=True, dropout=0.1
)


def takes(graph, tensor, axes=None):
    """Return the takes of one input, those of a given number of axes."""
    found = [n for n, _ in graph.of(Take) if graph[n.args[0]].op.tensor == tensor]
    return [n for n in found if axes is None or len(n.type.rows.axes) == axes]


def move_rows(graph, which, change):
    """Change the row map of takes, k and v together."""
    ops = {n.op for n in which}
    tensors = {graph[n.args[0]].op.tensor for n in which}
    tensors |= {"v"} if "k" in tensors else set()

    def visit(builder, node, args):
        if node.op in ops and graph[node.args[0]].op.tensor in tensors:
            return builder.add(Take(change(node.op.rows)), *args)
        return None

    return replaced(graph, visit)


def change_attends(graph, only=lambda op: True, **changes):
    return replaced(
        graph,
        lambda builder, node, args: (
            builder.add(attrs.evolve(node.op, **changes), *args)
            if isinstance(node.op, Attend) and only(node.op)
            else None
        ),
    )


def join_operands(graph, choose):
    """Change the operands of the last join."""
    join = graph[graph.output.args[0]]

    def visit(builder, node, args):
        if node.id != join.id:
            return None
        kept = choose(list(range(len(args))))
        op = node.op
        if isinstance(op, Mix):
            op = attrs.evolve(op, branches=tuple(op.branches[i] for i in kept))
        return builder.add(op, *(args[i] for i in kept))

    return replaced(graph, visit)


def stepped(rows, place, **changes):
    axes = list(rows.axes)
    axes[place] = attrs.evolve(axes[place], **changes)
    return attrs.evolve(rows, axes=tuple(axes))


def last(rows, **changes):
    return stepped(rows, len(rows.axes) - 1, **changes)


def repeated_axis(rows):
    """Return the place of the axis that steps from segment to segment."""
    return len(rows.axes) - 2


def longest_segments(graph, tensor):
    return max(takes(graph, tensor), key=lambda n: n.type.rows.axes[repeated_axis(n.type.rows)].row)


def swap_heads(graph):
    """Exchange the heads of the first two takes of q that differ in the head only."""
    first = takes(graph, "q")[0]
    same = [n for n in takes(graph, "q") if attrs.evolve(n.op.rows, head=first.op.rows.head) == first.op.rows]
    heads = {first.op: same[1].op.rows.head, same[1].op: first.op.rows.head}
    return replaced(
        graph,
        lambda b, n, args: (
            b.add(Take(attrs.evolve(n.op.rows, head=heads[n.op])), *args)
            if n.op in heads and graph[n.args[0]].op.tensor == "q"
            else None
        ),
    )


def change_input(graph, tensor, **changes):
    op = graph.inputs[tensor].op
    return with_op(graph, op, attrs.evolve(op, **changes))


def relabel_mix(graph, labels):
    (_, op), *_ = graph.of(Mix)
    return with_op(graph, op, attrs.evolve(op, branches=tuple(labels[b] for b in op.branches)))


def change_mix(graph, **changes):
    (_, op), *_ = graph.of(Mix)
    return with_op(graph, op, attrs.evolve(op, **changes))


def mix_apart(graph):
    """Mix each branch by itself and merge the results: the same numbers, another gradient."""

    def visit(builder, node, args):
        if not isinstance(node.op, Mix):
            return None
        parts = [
            builder.add(attrs.evolve(node.op, branches=tuple(b for b in node.op.branches if b == label)), *chosen)
            for label in sorted(set(node.op.branches))
            for chosen in [[a for a, b in zip(args, node.op.branches, strict=True) if b == label]]
        ]
        return builder.add(Merge(node.op.rows), *parts)

    return replaced(graph, visit)


def shorten_first_key_rows(graph):
    node = takes(graph, "k")[0]
    return move_rows(graph, [node], lambda r: last(r, size=r.length - 1))


MUTATIONS = {
    "query offset": (LONGNET, lambda g: move_rows(g, takes(g, "q")[:1], lambda r: attrs.evolve(r, row=r.row + 1))),
    "key offset": (LONGNET, lambda g: move_rows(g, takes(g, "k")[:1], lambda r: attrs.evolve(r, row=r.row + 1))),
    "offset of every row": (
        LONGNET,
        lambda g: move_rows(
            g,
            [*takes(g, "q")[-1:], *takes(g, "k")[-1:]],
            lambda r: last(attrs.evolve(r, row=r.row + 1), size=r.length - 1),
        ),
    ),
    "segment length": (
        LONGNET,
        lambda g: move_rows(
            g,
            [longest_segments(g, "q"), longest_segments(g, "k")],
            lambda r: stepped(r, repeated_axis(r), row=r.axes[repeated_axis(r)].row - 4),
        ),
    ),
    "one segment fewer": (
        LONGNET,
        lambda g: move_rows(
            g,
            [longest_segments(g, "q"), longest_segments(g, "k")],
            lambda r: stepped(r, repeated_axis(r), size=r.axes[repeated_axis(r)].size - 1),
        ),
    ),
    "dilation rate": (
        LONGNET,
        lambda g: move_rows(
            g, [longest_segments(g, "q"), longest_segments(g, "k")], lambda r: last(r, row=r.axes[-1].row - 1)
        ),
    ),
    "one key row fewer": (LONGNET, shorten_first_key_rows),
    "dropped cell": (LONGNET, lambda g: join_operands(g, lambda places: places[:-1])),
    "dropped branch": (
        LONGNET,
        lambda g: join_operands(
            g, lambda places: [p for p in places if g[g[g.output.args[0]].args[p]].op.branch != 1]
        ),
    ),
    "duplicated cell": (LONGNET, lambda g: join_operands(g, lambda places: [*places, places[0]])),
    "exchanged cell": (LONGNET, lambda g: join_operands(g, lambda places: [*places[:-1], places[0]])),
    "wrong key head": (
        LONGNET,
        lambda g: move_rows(
            g, [n for n in takes(g, "k") if n.op.rows.last_head < 3][:1], lambda r: attrs.evolve(r, head=r.head + 1)
        ),
    ),
    "key heads without a step": (
        LONGNET,
        lambda g: move_rows(
            g, [n for n in takes(g, "k") if n.op.rows.axes[0].head][:1], lambda r: stepped(r, 0, head=0)
        ),
    ),
    "swapped query heads": (SPLIT, swap_heads),
    "dropped causality": (LONGNET, lambda g: change_attends(g, lambda op: op.branch == 1, where=P.full())),
    "causality off by one": (LONGNET, lambda g: change_attends(g, lambda op: op.branch == 0, where=P.band(None, 1))),
    "wrong shift": (LONGNET, lambda g: change_attends(g, lambda op: op.branch == 0, shift=1)),
    "scale": (LONGNET, lambda g: change_attends(g, lambda op: op.branch == 0, scale=0.1250001)),
    "softcap": (LONGNET, lambda g: change_attends(g, lambda op: op.branch == 1, softcap=None)),
    "precision": (LONGNET, lambda g: change_attends(g, precision="tf32")),
    "branch label": (LONGNET, lambda g: change_attends(g, lambda op: op.branch == 1, branch=0)),
    "detached as merge": (
        DETACHED,
        lambda g: replaced(g, lambda b, n, a: b.add(Merge(n.op.rows), *a) if isinstance(n.op, Mix) else None),
    ),
    "detached as mean": (DETACHED, lambda g: change_mix(g, rule="mean")),
    "detached one by one": (DETACHED, mix_apart),
    "features of the values": (LONGNET, lambda g: change_input(g, "v", features=63)),
    "dtype of the queries": (LONGNET, lambda g: change_input(g, "q", dtype="float16")),
    "dropped part of a mix": (MEAN, lambda g: join_operands(g, lambda places: places[1:])),
    "mean over another number of branches": (MEAN, lambda g: change_mix(g, count=3)),
    "mean as sum": (MEAN, lambda g: change_mix(g, rule="sum")),
    "swapped labels": (WEIGHTED, lambda g: relabel_mix(g, {0: 1, 1: 0})),
    "weight": (WEIGHTED, lambda g: change_mix(g, weights=(0.25, 0.76))),
    "dropped opaque conjunct": (PACKED, lambda g: change_attends(g, where=P.causal())),
    "complemented opaque conjunct": (PACKED, lambda g: change_attends(g, where=P.causal() & ~P.documents())),
    "added opaque conjunct": (PACKED, lambda g: change_attends(g, where=P.causal() & P.documents() & P.padding())),
    "dropout": (PACKED, lambda g: change_attends(g, dropout=0.0)),
    "shift under opaque conjuncts": (
        attrs.evolve(PACKED, pattern=P.documents(), causal=False),
        lambda g: change_attends(g, shift=501),
    ),
    "positions of the call": (
        attrs.evolve(PACKED, pattern=P.full(), causal=False),
        lambda g: change_attends(g, shift=None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_at_full_size_is_caught(name):
    spec, mutate = MUTATIONS[name]
    graph = planned(spec)
    prove(spec, graph)
    with pytest.raises((VerifyError, PassError)):
        prove(spec, mutate(graph))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.5}, "lost causal.. & documents.. at scale 0.125.*|lost documents.. at scale 0.125, row 0 at 500"),
        ({"where": P.causal()}, "lost documents.. at scale 0.125, row 0 at 500, dropout 0.1, gained plain pairs"),
        ({"softcap": 3.0}, "gained documents.. at scale 0.125, softcap 3"),
    ],
)
def test_a_refutation_says_what_was_lost_and_gained(changes, message):
    with pytest.raises(VerifyError, match=f"the test changed what is computed: .*({message})"):
        prove(PACKED, change_attends(planned(PACKED), **changes))


def test_splitting_cells_by_keys_queries_and_heads_keeps_the_proof():
    spec = AttentionSpec(seq_len=N, heads=8, head_dim=64, causal=True)

    def visit(builder, node, args):
        if not isinstance(node.op, Attend):
            return None
        parts = []
        for head, size in ((0, 3), (3, 5)):
            heads = Axis(size, head=1)
            for q_low, q_high, k_low, k_high in ((0, 7, 0, N), (7, N, 0, 1000), (7, N, 1000, N)):
                q = RowMap(head, q_low, (heads, Axis(q_high - q_low, row=1)))
                k = RowMap(head, k_low, (heads, Axis(k_high - k_low, row=1)))
                taken = [builder.add(Take(r), a) for r, a in zip((q, k, k), args, strict=True)]
                parts.append(builder.add(node.op, *taken))
        return builder.add(Merge(builder.type(args[0]).rows), *parts)

    prove(spec, replaced(lower(spec), visit))
