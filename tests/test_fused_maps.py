"""Row maps as our kernels read them: walked forwards and backwards, as views and as buffers, against brute force."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.backends.eager.launches import launch_of
from attnplan.ir import Axis, RowMap
from attnplan.runtime.fused.gather import Gather
from attnplan.runtime.fused.maps import FIELDS, Packing, Source, can_pull, division, pull_table
from attnplan.runtime.fused.pull import view_of
from attnplan.runtime.fused.strided import Strided
from tests.fused_cases import SPECS, graph_of, spec_of


@given(st.integers(1, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
def test_divisions_by_multiplication_are_exact(divisor, numbers):
    factor, shift = division(divisor)
    multiples = [n // divisor * divisor for n in numbers]
    for n in (*numbers, *multiples, *(max(0, m - 1) for m in multiples), 2**31 - 1):
        assert factor < 2**32, "the kernel multiplies 32 by 32 bits"
        assert 2 * n * factor >> 32 >> shift == n // divisor


def walk_back(table, head, row):
    """Do what the kernel does: return (tensor, offset in units) of each part that holds a (head, row)."""
    for e in range(table.entries):
        numbers = table.numbers[(head * table.entries + e) * FIELDS :][:FIELDS]
        tensor, first, n1, w, f1, h1, n2, r, f2, h2, offset, _, s1, s2 = numbers[:14]
        beyond = row - first
        ahead = max(beyond, 0)
        outer = 2 * ahead * f1 >> 32 >> h1
        rest = ahead - outer * w
        inner = 2 * rest * f2 >> 32 >> h2
        if beyond >= 0 and outer < n1 and inner < n2 and rest == inner * r:
            assert table.tensors[2 * e] <= tensor < table.tensors[2 * e + 1]
            yield tensor, offset + outer * s1 + inner * s2


PLACES = {
    "whole": (0, 0, ((3, 1, 0), (24, 0, 1))),
    "segments": (0, 0, ((3, 1, 0), (3, 0, 8), (8, 0, 1))),
    "dilated": (0, 0, ((3, 1, 1), (3, 0, 8), (2, 0, 3))),
    "some heads": (1, 2, ((2, 1, 1), (2, 0, 12), (3, 0, 4))),
    "one row": (2, 23, ((1, 0, 0),)),
    "ends early": (0, 1, ((2, 2, 0), (5, 0, 2))),
    "three axes of rows": (0, 0, ((3, 1, 0), (2, 0, 1), (2, 0, 12), (3, 0, 4))),
}


@pytest.mark.parametrize("name", PLACES)
def test_maps_are_walked_back_to_where_they_come_from(name):
    place = PLACES[name]
    rows = RowMap(place[0], place[1], tuple(Axis(n, h, r) for n, h, r in place[2]))
    assert can_pull(place)
    other = (0, 3, ((3, 1, 0), (5, 0, 4)))
    made = [torch.zeros(1, *rows.sizes, 8), torch.zeros(1, 3, 5, 8)]
    sources = [Source(0, place), Source(1, other)]
    table = pull_table(sources, [(x.stride(), x.stride()[:-1]) for x in made], 3, 24)
    found = {}
    for head in range(3):
        for row in range(24):
            for tensor, at in walk_back(table, head, row):
                if tensor == 0:
                    found[at * table.unit // 8] = (head, row)
                else:
                    assert at * table.unit // 8 == head * 5 + (row - 3) // 4
    assert table.unit == 8
    assert not table.wide
    assert [found[i] for i in range(len(found))] == list(rows.elements())


def test_offsets_beyond_32_bits_make_a_wide_table():
    place = (0, 0, ((3, 1, 0), (24, 0, 1)))
    for stride, wide in ((2**26 * 16, False), (2**27 * 16, True)):
        table = pull_table([Source(0, place)], [((0, 0, stride, 1), (1, 1, 1))], 3, 24)
        assert table.wide == wide, stride


def test_maps_that_show_a_row_twice_are_not_walked_back():
    assert not can_pull((0, 0, ((4, 0, 4), (8, 0, 1))))
    assert not can_pull((0, 0, ((4, 0, 0), (8, 0, 1))))
    assert can_pull((0, 0, ((2, 0, 16), (2, 0, 8), (2, 0, 1))))


def test_a_row_of_the_buffer_is_the_row_that_the_table_says():
    graph = graph_of(SPECS["unlike offsets in a group"], "batch")
    for launch in set(launch_of(graph).values()):
        x = torch.randn(2, 6, 75, 4)
        for packing in (launch.q, launch.k):
            (made,) = Gather((packing,))(x)
            table = packing.table()
            assert len(table) * 2 == made.shape[0] * made.shape[1]
            for i, (head, first, step) in enumerate(table):
                cell, shared = divmod(i, packing.group)
                rows = torch.arange(made.shape[2]) * step + first
                for batch in range(2):
                    assert torch.equal(made[batch * len(table) // packing.group + cell, shared], x[batch, head, rows])


def views_of(spec):
    """Return the launches of a spec that run on views."""
    found = launch_of(graph_of(spec, "views"), spec.layout, spec.batch)
    return [launch for launch in found.values() if launch.views]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", SPECS)
def test_rows_of_an_attend_in_four_dimensions(name, layout):
    """Each row of the view is the row that the table says; a view where strides allow, a copy where they do not."""
    spec = attrs.evolve(SPECS[name], layout=layout)
    shape = spec.shape
    for launch in views_of(spec):
        for packing, heads, length in ((launch.q, spec.heads, shape.seq_len), (launch.k, spec.kv_heads, shape.kv_len)):
            whole = torch.randn(3, length, heads, 5) if layout == "bshd" else torch.randn(3, heads, length, 5)
            whole = whole[1:]  # with an offset in its storage
            x = whole.transpose(1, 2) if layout == "bshd" else whole
            apart = torch.randn(2, heads, length + 3, 5)[:, :, :length]  # batch and heads do not nest
            for source in (x, apart):
                rows, none, flat = Strided((packing,) * 3)(source, None, source[..., 0])
                assert none is None
                assert torch.equal(flat, rows[..., 0])
                table = packing.table()
                assert rows.shape[0] * rows.shape[1] == 2 * len(table)
                for i, (head, first, step) in enumerate(table):
                    cell, inner = divmod(i, packing.group)
                    at = torch.arange(rows.shape[2]) * step + first
                    for batch in range(2):
                        got = rows[batch * len(table) // packing.group + cell, inner]
                        assert torch.equal(got, source[batch, head, at])


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_segments_of_whole_sequences_are_views_without_a_copy(layout):
    """Those of a first rate also for more batch elements than the plan was priced for."""
    spec = spec_of(P.longnet([16, 32, 64], [1, 2, 4]), layout=layout, batch=1)
    launches = views_of(spec)
    assert len(launches) > 3
    for batch in (1, 2):
        x = torch.randn(batch, 4, 64, 5) if layout == "bhsd" else torch.randn(batch, 64, 4, 5).transpose(1, 2)
        for launch in launches[: 1 if batch > 1 else None]:
            (rows,) = Strided((launch.q,))(x)
            assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_a_view_of_a_part_is_what_the_kernel_wrote_for_it():
    packing = Packing(((0, 0, ((2, 1, 0), (3, 0, 2))), (1, 1, ((1, 1, 0), (3, 0, 2)))), ((0,), (0,)), ((), ()))
    made = torch.arange(2 * 3 * 3.0).reshape(6, 1, 3)  # two batch elements of three cells
    second = view_of(made, Source(0, packing.places[1], packing, 1))
    assert torch.equal(second, made.reshape(2, 3, 3)[:, 2:])
