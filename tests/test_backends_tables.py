"""Block tables as index lists, ``BlockMask`` and block-sparse rows: there and back, and FlexAttention on them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnplan import patterns as P
from attnplan.patterns import Shape
from attnplan.patterns.tiles import block_table
from attnplan.runtime import kernels_flash
from attnplan.runtime.tables import block_lists, from_block_mask, from_bsr, to_block_mask, to_bsr
from tests import fake_kernels

PATTERNS = {
    "causal": P.causal(),
    "window": P.window(19, 4),
    "blocks": P.random_blocks(0.3, 16, 0),
    "union": (P.window(9) | P.sinks(3)) & P.causal(),
    "nothing": ~P.full(),
    "everything": P.full(),
    "heads differ": (P.heads(0, 1) & P.window(7)) | (P.heads(1, 3) & P.random_blocks(0.5, 16, 1)),
    "batch": P.padding([70, 33]) & P.causal(),
}
SHAPE = Shape(77, 77, 3, 2)
TILE = (32, 16)


def table_of(name, **options):
    return block_table(PATTERNS[name], SHAPE, TILE, **options)


def states_of(table):
    dense = np.stack([table.states(n) for n in range(int(table.classes.max()) + 1)])
    return torch.from_numpy(dense[table.classes])


def same(got, want):
    assert torch.equal(got.expand(want.shape), want)


@pytest.mark.parametrize("name", PATTERNS)
def test_index_lists_and_back(name):
    table = table_of(name)
    found = block_lists(table)
    same(found.rows.states(table.grid.columns), states_of(table))
    same(found.columns.states(table.grid.rows).transpose(-1, -2), states_of(table))
    for one in (found.rows, found.columns):
        for count, index in ((one.partial_count, one.partial_index), (one.full_count, one.full_index)):
            assert count.dtype == index.dtype == torch.int32
            assert index.shape[-1] == max(1, int(count.max())), "as wide as the fullest row"
            for row, n in zip(index.flatten(0, -2), count.flatten(), strict=True):
                assert (row[:n].diff() > 0).all()
                assert (row[n:] == 0).all()


def test_heads_of_one_class_share_their_lists():
    assert block_lists(table_of("window")).rows.full_count.shape == (1, 1, 3)
    assert block_lists(table_of("heads differ")).rows.full_count.shape == (1, 3, 3)


@pytest.mark.parametrize("name", [n for n in PATTERNS if n != "batch"])
def test_block_masks_and_back(name):
    table = table_of(name)
    mask = to_block_mask(table, lambda b, h, q, k: q >= k)
    assert mask.BLOCK_SIZE == TILE
    assert mask.seq_lengths == (77, 77)
    same(from_block_mask(mask), states_of(table))


def test_block_masks_of_torch_are_read_too():
    made = create_block_mask(
        lambda b, h, q, k: (q >= k) & (q - k <= 19), None, None, 77, 77, device="cpu", BLOCK_SIZE=TILE
    )
    want = block_table(P.window(19) & P.causal(), Shape(77, 77, 1, 1), TILE)
    # A ragged last tile that is full as far as it goes is partial to torch, which evaluates its function there.
    assert torch.equal(from_block_mask(made).bool(), states_of(want).bool())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_runs_a_converted_table():
    table = table_of("union")
    mask = to_block_mask(table, lambda b, h, q, k: ((q - k <= 9) | (k < 3)) & (q >= k))
    q, k, v = (torch.randn(1, 3, 77, 16) for _ in range(3))
    got = flex_attention(q, k, v, block_mask=mask)
    at = torch.arange(77)
    pairs = (((at[:, None] - at) <= 9) | (at < 3)) & (at[:, None] >= at)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=pairs)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", PATTERNS)
def test_block_sparse_rows_and_back(name):
    table = table_of(name)
    for number in range(int(table.classes.max()) + 1):
        pointers, columns, full = to_bsr(table, number)
        assert pointers.dtype == columns.dtype == torch.int32
        assert int(pointers[-1]) == len(columns) == len(full)
        assert torch.equal(
            from_bsr(pointers, columns, full, table.grid.columns), torch.from_numpy(table.states(number))
        )


@pytest.mark.parametrize("name", PATTERNS)
def test_tensors_of_flash_attn_4_and_back(name, monkeypatch):
    monkeypatch.setattr(kernels_flash, "module", lambda _: SimpleNamespace(
        BlockSparseTensorsTorch=fake_kernels.BlockSparseTensorsTorch))  # fmt: skip
    table = table_of(name)
    found = block_lists(table)
    forward = kernels_flash.block_tensors(found, found.rows)
    assert forward.block_size == TILE
    same(kernels_flash.states_of_block_tensors(forward, table.grid.columns), states_of(table))
    backward = kernels_flash.block_tensors(found, found.columns)
    same(kernels_flash.states_of_block_tensors(backward, table.grid.rows).transpose(-1, -2), states_of(table))
