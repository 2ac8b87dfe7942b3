from __future__ import annotations

import attrs
import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.errors import PassError
from attnplan.ir import (
    Attend,
    Axis,
    Builder,
    Graph,
    Input,
    Merge,
    Mix,
    Node,
    Output,
    RowMap,
    Take,
    parse_graph,
    print_graph,
    rewrite,
)
from attnplan.ir.ops import disjoint
from attnplan.lower import lower
from attnplan.spec import AttentionSpec
from tests import strategies as some
from tests.programs import planned, stages

SPEC = AttentionSpec(seq_len=8, heads=2, head_dim=4, dtype="float32", causal=True, scale=0.5)
INPUTS = """
%0 = input(tensor='q', heads=2, group=1, length=8, features=4, dtype='float32') : f32[B, 2, 8, 4]
%1 = input(tensor='k', heads=2, group=1, length=8, features=4, dtype='float32') : f32[B, 2, 8, 4]
%2 = input(tensor='v', heads=2, group=1, length=8, features=4, dtype='float32') : f32[B, 2, 8, 4]
"""


# Row maps


@st.composite
def row_maps(draw):
    axis = st.builds(Axis, st.integers(1, 4), st.integers(0, 3), st.integers(0, 5))
    rows = st.builds(Axis, st.integers(1, 5), st.just(0), st.integers(0, 3))
    return RowMap(draw(st.integers(0, 3)), draw(st.integers(0, 3)), (*draw(st.lists(axis, max_size=3)), draw(rows)))


@given(row_maps())
def test_row_map_properties_agree_with_its_elements(rows):
    elements = list(rows.elements())
    assert len(elements) == rows.elements_count == np.prod(rows.sizes)
    assert rows.last_head == max(h for h, _ in elements)
    assert rows.last_row == max(r for _, r in elements)
    extents = {h: [r for g, r in elements if g == h] for h, _ in elements}
    assert rows.head_extents() == {h: (min(r), max(r)) for h, r in extents.items()}
    blocks = [elements[i : i + rows.length] for i in range(0, len(elements), rows.length)]
    assert [head for _, head in rows.batch_heads()] == [block[0][0] for block in blocks]
    in_order = all([r for _, r in block] == list(range(rows.length)) for block in blocks)
    assert in_order or not rows.keeps_rows


@given(st.lists(row_maps(), max_size=3))
def test_maps_called_disjoint_share_no_element(maps):
    elements = [e for rows in maps for e in set(rows.elements())]
    assert len(set(elements)) == len(elements) or not disjoint(maps)


def test_disjoint_recognises_segments_and_heads():
    left, right = (RowMap(0, row, (Axis(2, head=1), Axis(4, row=1))) for row in (0, 4))
    other = RowMap(2, 0, (Axis(2, head=1), Axis(8, row=1)))
    assert disjoint([left, right, other])
    assert not disjoint([left, right, left])


def test_whole_maps_list_every_row_in_order():
    assert list(RowMap.whole(2, 3).elements()) == [(h, i) for h in range(2) for i in range(3)]
    grouped = RowMap.whole(6, 2, group=3)
    assert grouped.sizes == (2, 3, 2)
    assert [h for _, h in grouped.batch_heads()] == list(range(6))
    assert (Axis(3).repeats, Axis(1).repeats, Axis(3, row=1).repeats) == (True, False, False)


def test_grouped_keys_have_an_axis_that_broadcasts():
    inputs = lower(AttentionSpec(seq_len=4, heads=6, kv_heads=2, head_dim=4)).inputs
    assert (inputs["q"].type.rows.sizes, inputs["k"].type.rows.sizes) == ((2, 3, 4), (2, 1, 4))
    assert [inputs["k"].type.rows.head_at((i, j)) for i in range(2) for j in range(3)] == [0, 0, 0, 1, 1, 1]


# Text


@given(some.specs())
def test_text_reads_back_to_an_equal_graph_after_every_pass(spec):
    for _, graph in stages(spec):
        assert parse_graph(print_graph(graph)) == graph
        assert str(graph) == print_graph(graph)


def test_comments_and_blank_lines_are_skipped():
    text = print_graph(lower(SPEC))
    assert parse_graph("# a comment\n\n" + text.replace("\n", "\n  # more\n")) == lower(SPEC)


UNREADABLE_LINES = {
    "%3 = attend(%0, %1, %2)": "line 5: expected '%id = op",
    "3 = attend(%0, %1, %2) : f32": "line 5: expected '%id = op",
    "%3 = atend(%0, %1, %2) : f32": "line 5: unknown op 'atend'; did you mean 'attend'",
    "%3 = attend(%0, %1, %9) : f32": "line 5: %9 is not defined above",
    "%3 = attend(%0, %1, 5) : f32": "line 5: 5 is not defined above",
    "%3 = attend(%0, %1, %2, wear=full()) : f32": "line 5: .*unexpected keyword argument 'wear'",
    "%3 = attend(%0, %1, %2) : f32[B, 2, 8, 4]": r"line 5: %3 is stated as .*, its operands make it .* \+ lse",
    "%3 = attend(%0, %1, %2, where=longnet([8], [1])) : f32": "line 5: .* is no pattern",
    "%3 = attend(%0, %1, %2, where=windw(2)) : f32": "line 5: unknown pattern 'windw'",
    "%3 = attend(%0, %1, %2, where=__import__('os')) : f32": "line 5: unknown pattern '__import__'",
    "%3 = attend(%0, %1, %2, branch=exit()) : f32": "line 5: unknown pattern 'exit'",
    "%3 = attend(%0, %1, %2, branch=(lambda: 1)) : f32": "line 5: malformed node",
    "%3 = attend(%0, %1, %2, branch=[1]) : f32": "line 5: unhashable type",
    "%3 = 5 : f32": r"line 5: expected op\(...\), got '5'",
    "%3 = x.take(%0) : f32": r"line 5: expected op\(...\)",
    "%3 = take(%0 : f32": "line 5: .* was never closed",
    "%3 = take(%0, rows=5) : f32": "line 5: .*has no attribute 'axes'",
    "%3 = take(%0, rows=rows(1)) : f32": "line 5: not enough values to unpack",
    "%3 = take(%0, rows=rows(0, 0, [(9, 1, 0), (8, 0, 1)])) : f32": "line 5: take: reaches head 8, row 7 of an input",
    "%3 = input(tensor='q', heads=2, group=0, length=8, features=4, dtype='float32') : f32": "line 5: integer division",
    "%3 = input(tensor='x', heads=2, group=1, length=8, features=4, dtype='float32') : f32": "there is no operand 'x'",
    "%3 = input(tensor='q', heads=2, group=1, length=8, features=4, dtype='int7') : f32": "there is no dtype 'int7'",
}


@pytest.mark.parametrize("line", UNREADABLE_LINES)
def test_an_unreadable_line_says_which_and_why(line):
    with pytest.raises(PassError, match=UNREADABLE_LINES[line]):
        parse_graph(INPUTS + line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text holds no node"),
        ("# nothing", "the text holds no node"),
        (INPUTS, "a graph has one output, and it is the last node"),
        (INPUTS + "%3 = attend(%0, %1, %2) : f32[B, 2, 8, 4] + lse", "a graph has one output"),
    ],
)
def test_text_without_an_output_is_refused(text, message):
    with pytest.raises(PassError, match=message):
        parse_graph(text)


@given(st.lists(st.sampled_from([*"%0123=(),:[] ", "attend", "take", "rows", "full()", "output", "f32"]), max_size=30))
def test_parse_graph_raises_pass_errors_only(pieces):
    with pytest.raises(PassError):
        parse_graph(INPUTS + "%3 = " + "".join(pieces) + " : f32")


# Types


def small_builder():
    """Return a builder that holds q, k, v (2 heads, 8 rows, 4 features) as %0, %1, %2."""
    builder = Builder()
    for tensor in "qkv":
        builder.add(Input(tensor, 2, 1, 8, 4, "float32"))
    return builder


HALF = RowMap(0, 0, (Axis(2, head=1), Axis(4, row=1)))
WHOLE = RowMap.whole(2, 8)
OTHER_FEATURES, OTHER_DTYPE = Input("k", 2, 1, 8, 5, "float32"), Input("v", 2, 1, 8, 4, "float64")
FAULTS = {
    "input: takes no operands": lambda b: b.add(Input("q", 2, 1, 8, 4, "float32"), 0),
    "take: takes one whole input": lambda b: b.add(Take(HALF), 0, 1),
    "take: takes one whole .*input": lambda b: b.add(Take(HALF), b.add(Take(RowMap(0, 4, HALF.axes)), 0)),
    "take: takes no rows at all": lambda b: b.add(Take(RowMap(0, 0, (Axis(2, head=1), Axis(0, row=1)))), 0),
    "take: steps backwards": lambda b: b.add(Take(RowMap(1, 0, (Axis(2, head=-1), Axis(8, row=1)))), 0),
    "take: steps backwards.*": lambda b: b.add(Take(RowMap(0, -1, WHOLE.axes)), 0),
    "take: reaches head 2": lambda b: b.add(Take(RowMap(1, 0, WHOLE.axes)), 0),
    "take: reaches head 1, row 8 of an input whose last are 1, 7": lambda b: b.add(Take(RowMap(0, 1, WHOLE.axes)), 0),
    "take: changes the head along the rows": lambda b: b.add(Take(RowMap(0, 0, (Axis(1), Axis(2, 1, 1)))), 0),
    "attend: takes q, k and v, got 2 operands": lambda b: b.add(Attend(), 0, 1),
    "attend: got q, v, k": lambda b: b.add(Attend(), 0, 2, 1),
    "attend: the rows of k and of v differ": lambda b: b.add(Attend(), 0, b.add(Take(HALF), 1), 2),
    "attend: q has 4 features, k has 5": lambda b: b.add(Attend(), 0, b.add(OTHER_FEATURES), 2),
    "attend: q and k have different numbers of axes": lambda b: b.add(
        Attend(), 0, *(b.add(Take(RowMap(0, 0, (Axis(8, row=1),))), t) for t in (1, 2))
    ),
    "attend: batch axes do not broadcast": lambda b: b.add(
        Attend(), b.add(Take(RowMap(0, 0, (Axis(1), Axis(8, row=1)))), 0), 1, 2
    ),
    "merge: needs at least one part": lambda b: b.add(Merge(WHOLE)),
    "merge: takes attention outputs with LSE": lambda b: b.add(Merge(WHOLE), 0),
    "merge: takes attention outputs with LSE, got": lambda b: b.add(
        Merge(WHOLE), b.add(Mix(WHOLE, "mean", (0,), 1), b.add(Attend(), 0, 1, 2))
    ),
    "mix: 1 operands, 2 branch labels": lambda b: b.add(Mix(WHOLE, "sum", (0, 1), 2), b.add(Attend(), 0, 1, 2)),
    r"mix: labels \(2,\) of 2 branches": lambda b: b.add(Mix(WHOLE, "sum", (2,), 2), b.add(Attend(), 0, 1, 2)),
    "mix: needs one weight per branch": lambda b: b.add(Mix(WHOLE, "sum", (0,), 2, (1.0,)), b.add(Attend(), 0, 1, 2)),
    "mix: two parts of branch 1 write the same row": lambda b: b.add(
        Mix(WHOLE, "sum", (1, 1), 2), b.add(Attend(), 0, 1, 2), b.add(Attend(), b.add(Take(HALF), 0), 1, 2)
    ),
    "output: takes one attention output": lambda b: b.add(Output(), 0),
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_an_op_refuses_operands_that_do_not_fit(message):
    with pytest.raises(PassError, match=message):
        FAULTS[message](small_builder())


def test_parts_of_unlike_dtype_do_not_merge():
    builder = small_builder()
    wide = builder.add(Attend(), 0, 1, builder.add(Input("v", 2, 1, 8, 5, "float32")))
    with pytest.raises(PassError, match=r"merge: f32\[B, 2, 8, 5\] \+ lse does not fit f32\[B, 2, 8, 4\] \+ lse"):
        builder.add(Merge(WHOLE), builder.add(Attend(), 0, 1, 2), wide)


# Graphs


def with_nodes(graph, changes):
    """Return ``graph`` with the nodes at some places replaced, nothing inferred again."""
    return Graph(tuple(attrs.evolve(n, **changes.get(n.id, {})) for n in graph.nodes))


def broken_graphs():
    graph = lower(SPEC)
    q, k, v, attend, output = graph.nodes
    half = attrs.evolve(attend.type, rows=HALF)
    reused = Node(4, attrs.evolve(attend.op, branch=1), attend.args, attend.type)
    return {
        "%3 attend has type .*, its operands make it": with_nodes(graph, {3: {"type": half}}),
        "%4 output has type": with_nodes(graph, {4: {"type": attrs.evolve(output.type, lse=False)}}),
        "%4 stands at place 3 and takes .3.: nodes are out of order": Graph((q, k, v, output, attend)),
        r"%3 stands at place 3 and takes \[0, 1, 3\]": with_nodes(graph, {3: {"args": (0, 1, 3)}}),
        r"%3 stands at place 3 and takes \[-1, 1, 2\]": with_nodes(graph, {3: {"args": (-1, 1, 2)}}),
        "nothing uses %4 attend": Graph((q, k, v, attend, reused, attrs.evolve(output, id=5))),
        "nothing uses %4 output": Graph((*graph.nodes, attrs.evolve(output, id=5))),
        "a graph has one output, and it is the last node": Graph((*graph.nodes, attrs.evolve(output, id=5, args=(4,)))),
        "a graph has one output, and it is .* last": Graph(graph.nodes[:-1]),
        "a graph has one output, and": Graph(()),
        "a graph has the inputs q, k and v, once each": Graph((*graph.nodes[:3], *doubled_input(graph))),
    }


def doubled_input(graph):
    """Return the rest of a graph after a second input q."""
    return (
        attrs.evolve(graph[0], id=3),
        attrs.evolve(graph[3], id=4),
        attrs.evolve(graph[4], id=5, args=(4,)),
    )


BROKEN = broken_graphs()


@pytest.mark.parametrize("message", BROKEN)
def test_verify_refuses_a_broken_graph(message):
    with pytest.raises(PassError, match=message):
        BROKEN[message].verify()


def test_verify_wants_every_row_of_q_in_order():
    builder = small_builder()
    part = builder.add(Attend(), builder.add(Take(HALF), 0), 1, 2)
    with pytest.raises(PassError, match="the output does not hold every row of q once, in order"):
        builder.build(builder.add(Output(), part)).verify()
    inner = builder.add(Merge(HALF), part)
    with pytest.raises(PassError, match="merge does not write every row of q once, in order"):
        builder.build(builder.add(Output(), builder.add(Merge(WHOLE), inner))).verify()
    builder.build(builder.add(Output(), builder.add(Merge(WHOLE), part))).verify()


def test_verify_wants_takes_to_read_inputs():
    builder = small_builder()
    inner = builder.add(Take(RowMap(1, 0, (Axis(1), Axis(8, row=1)))), 0)
    twice = builder.add(Take(RowMap(0, 0, (Axis(1), Axis(8, row=1)))), inner)
    keys = [builder.add(Take(RowMap(0, 0, (Axis(1), Axis(8, row=1)))), t) for t in (1, 2)]
    graph = builder.build(builder.add(Output(), builder.add(Merge(WHOLE), builder.add(Attend(), twice, *keys))))
    with pytest.raises(PassError, match="takes rows of rows: a take reads an input"):
        graph.verify()


def test_the_builder_builds_equal_nodes_once_and_drops_what_is_unused():
    builder = small_builder()
    first, second = builder.add(Attend(), 0, 1, 2), builder.add(Attend(), 0, 1, 2)
    assert first == second
    builder.add(Attend(branch=1), 0, 1, 2)
    graph = builder.build(builder.add(Output(), first))
    assert [n.op.name for n in graph] == ["input", "input", "input", "attend", "output"]
    graph.verify()


def test_rewrite_without_a_change_returns_the_same_object():
    graph = planned(AttentionSpec(seq_len=23, heads=6, kv_heads=2, head_dim=4, pattern=P.longnet([8, 16], [1, 3])))
    assert rewrite(graph, lambda builder, node, args: None) is graph


# The networkx view


def test_the_view_is_a_frozen_multigraph_in_schedule_order():
    graph = lower(SPEC)
    view = graph.as_networkx()
    assert isinstance(view, nx.MultiDiGraph)
    assert nx.is_frozen(view)
    assert nx.is_directed_acyclic_graph(view)
    assert [view.nodes[i]["node"] for i in view] == list(graph)
    with pytest.raises(nx.NetworkXError):
        view.add_edge(0, 4)


def test_the_view_keeps_repeated_operands_and_their_positions():
    builder = small_builder()
    a, b = builder.add(Attend(), 0, 1, 2), builder.add(Attend(branch=1), 0, 1, 2)
    merge = builder.add(Merge(WHOLE), b, a, b)
    view = builder.build(builder.add(Output(), merge)).as_networkx()
    assert view.number_of_edges(b, merge) == 2
    assert sorted((view.edges[e]["operand"], e[0]) for e in view.in_edges(merge, keys=True)) == [(0, b), (1, a), (2, b)]


@given(some.specs(longest=9))
def test_the_view_has_an_edge_per_operand(spec):
    graph = planned(spec)
    view = graph.as_networkx()
    assert view.number_of_nodes() == len(graph)
    assert view.number_of_edges() == sum(len(n.args) for n in graph)
    for node in graph:
        edges = sorted((d["operand"], a) for a, _, d in view.in_edges(node.id, data=True))
        assert [a for _, a in edges] == list(node.args)
