"""Tables that follow runtime operands on the device, against exact ones built from the same data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.patterns.tiles import Grid, block_table
from attnplan.runtime.device_tables import DeviceTable, TableTensors
from tests import strategies as some

STATIC = (P.full(), P.causal(), P.window(5), P.window(7, 2), P.window(4) | P.global_tokens(3), P.segments(9))


def dense(found: TableTensors, columns: int) -> torch.Tensor:
    """States [B, classes, rows, columns]."""
    shape = (*found.partial_count.shape, columns)
    states = torch.zeros(shape, dtype=torch.int64)
    for state, (count, index) in enumerate(
        [(found.partial_count, found.partial_columns), (found.full_count, found.full_columns)], start=1
    ):
        for place in torch.cartesian_prod(*(torch.arange(n) for n in count.shape)).tolist():
            kept = index[tuple(place)][: count[tuple(place)]].long()
            assert (kept.diff() > 0).all(), "columns rise"
            states[tuple(place)][kept] = state
    return states


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_tables_follow_documents_and_padding(data):
    n = data.draw(st.integers(1, 40))
    seq_len = data.draw(st.integers(1, n))
    shape = P.Shape(seq_len, n, heads=1, batch=2)
    tile = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    static = data.draw(st.sampled_from(STATIC))
    where, operands, exact = static, {}, {}
    if data.draw(st.booleans()):
        where = where & P.documents()
        ends = [torch.tensor([0, *torch.tensor(data.draw(some.cuts(n))).cumsum(0).tolist()]) for _ in range(2)]
        operands["documents"] = ends[0]
        exact["documents"] = torch.searchsorted(ends[0][1:], torch.arange(n), right=True)[None].numpy()
    if data.draw(st.booleans()):
        where = where & P.padding()
        operands["key_padding"] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * n, max_size=2 * n))).view(
            2, n
        )
        exact["key_padding"] = operands["key_padding"].long().numpy()
    table = DeviceTable(where, shape, tile)
    states = dense(table(operands), table.grid.columns)
    want = block_table(where, shape, tile, exact)
    for b in range(states.shape[0]):
        exactly = torch.from_numpy(want.states(int(want.classes[min(b, len(want.classes) - 1), 0]))).long()
        got = states[b, 0]
        assert ((got == 2) == (exactly == 2)).all(), "full tiles are exact"
        assert (got >= exactly).all(), "nothing that is kept is lost"
        if static == P.full() and len(operands) <= 1:  # one condition: nothing to be careful about
            assert torch.equal(got, exactly)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_tables_follow_the_query_offset(data):
    n = data.draw(st.integers(2, 40))
    seq_len = data.draw(st.integers(1, n))
    shape = P.Shape(seq_len, n, heads=1)
    where = data.draw(st.sampled_from([P.causal(), P.window(5), P.causal() & P.window(6, 3)]))
    offset = data.draw(st.integers(0, n - seq_len))
    table = DeviceTable(where, shape, (4, 3), q_offset=True)
    states = dense(table({"q_offset": torch.tensor(offset)}), table.grid.columns)[0, 0]
    grid = Grid(offset, seq_len, 0, n, (4, 3))
    assert torch.equal(states, torch.from_numpy(block_table(where, shape, grid=grid).states()).long())


def test_no_shape_depends_on_data_and_nothing_is_read_back():
    """Meta tensors have no values to read: what runs on them can make no host wait."""
    table = DeviceTable(P.causal() & P.documents() & P.padding(), P.Shape(64, 64, heads=1, batch=2), (8, 8))
    meta = {
        "documents": torch.empty((2, 5), dtype=torch.int64, device="meta"),
        "key_padding": torch.empty((2, 64), dtype=torch.bool, device="meta"),
    }
    found = table.to("meta")(meta)
    assert found.full_columns.shape == (2, 1, 8, 8)


def test_what_the_device_cannot_judge_is_refused():
    shape = P.Shape(64, 64, heads=1)
    with pytest.raises(SpecError, match=r"mixes data of the call into a union"):
        DeviceTable(P.causal() | P.documents(), shape, (8, 8))
    with pytest.raises(SpecError, match=r"with q_offset the tiles of global_tokens\(3\)"):
        DeviceTable(P.causal() & P.global_tokens(3), shape, (8, 8), q_offset=True)
