"""The ring and block-sparse names: parity where the published numbers are sound, and refusals of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnplan import nn as an
from attnplan.errors import SpecError
from attnplan.nn import (
    BlockSparseRingDilatedAttention,
    BlockSparseRingMultiheadDilatedAttention,
    RingAttentionCorrectV2,
    RingDilatedAttentionV2,
    SparsePatternConfig,
)
from tests import published
from tests.test_nn_dilated import assert_causal, assert_same, inputs


@pytest.mark.parametrize("causal", [False, True])
def test_correct_v2_is_dense(causal: bool) -> None:
    module = RingAttentionCorrectV2()
    assert_same(lambda *x: module(*x, is_causal=causal), lambda *x: published.dense(*x, causal), *inputs(19))


def test_correct_v2_converts_only_when_asked() -> None:
    q, k, v = inputs(8)
    assert RingAttentionCorrectV2()(q, k, v).dtype == torch.float64
    assert RingAttentionCorrectV2(dtype=torch.float32)(q, k, v).dtype == torch.float32


@pytest.mark.parametrize("n", [32, 35, 16, 5])
@pytest.mark.parametrize("heads", [2, 3, 5])
def test_ring_v2_where_the_published_numbers_are_sound(n: int, heads: int) -> None:
    ladder = ([8, 16], [1, 2])
    module = RingDilatedAttentionV2(*ladder, ring_size=1)
    assert_same(module, lambda *x: published.ring_v2(*x, *ladder), *inputs(n, heads, 4, 1))


def test_ring_v2_counts_every_key_once() -> None:
    """With w=8 and r=3 the published class repeats 3 keys to fill 8 slots, and weighs two of them more."""
    q, k, v = inputs(8, 1, 4, 1)
    got = RingDilatedAttentionV2([8], [3])(q, k, v)
    torch.testing.assert_close(got, published.dense(q, k[:, ::3], v[:, ::3]), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got, published.ring_v2(q, k, v, [8], [3]))


@pytest.mark.parametrize(
    "module",
    [
        RingAttentionCorrectV2(),
        RingDilatedAttentionV2([8, 16], [1, 2]),
        BlockSparseRingDilatedAttention([8], [2], {"block_size": 4}),
        BlockSparseRingDilatedAttention([8], [2], {"block_size": 4, "pattern_type": "local_window"}),
    ],
)
def test_the_future_changes_nothing_bit_for_bit(module: torch.nn.Module) -> None:
    assert_causal(module, torch.float64)


def test_ring_v2_key_padding() -> None:
    q, k, v = inputs(32)
    mask = torch.arange(32) >= torch.tensor([[32], [16]])
    module = RingDilatedAttentionV2([8, 16], [1, 2])
    got = module(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(got[1:, :16], module(q[1:, :16], k[1:, :16], v[1:, :16]), rtol=1e-12, atol=1e-12)
    assert not bool(got[1, 16:].any())


def test_ring_v2_keeps_few_patterns_and_one_object_for_each() -> None:
    module = RingDilatedAttentionV2([8, 16], [1, 2])
    assert module.pattern(32, 4) is module.pattern(32, 4)
    for n in range(1, 64):
        module.pattern(n, 4)
    assert len(module._patterns) == 16


CONFIGS = [
    {"pattern_type": "local_window", "block_size": 4, "local_window_size": 4},
    {"pattern_type": "local_window", "block_size": 4, "local_window_size": 8},
    {"pattern_type": "local_window", "block_size": 4, "local_window_size": 20},
    {"pattern_type": "global_local", "block_size": 4, "local_window_size": 8, "global_tokens": 8},
    {"pattern_type": "global_local", "block_size": 4, "local_window_size": 8, "global_tokens": 3},
    {"pattern_type": "dilated_sparse", "block_size": 4},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("n", [32, 31, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_block_sparse_is_one_softmax_over_the_active_blocks(config: dict[str, object], n: int, causal: bool) -> None:
    rates = [1, 2, 4]
    module = BlockSparseRingDilatedAttention([8, 16, 32], rates, config)
    blocks = published.active_blocks(config, rates, -(-n // 4))
    assert_same(
        lambda *x: module(*x, is_causal=causal),
        lambda *x: published.block_sparse(*x, blocks, 4, causal),
        *inputs(n, 2, 4, 1),
    )


def test_block_sparse_rates_apart() -> None:
    module = BlockSparseRingDilatedAttention([8, 16], [3, 6], {"block_size": 2})
    blocks = published.active_blocks({"pattern_type": "dilated_sparse", "block_size": 2}, [3, 6], 20)
    assert_same(module, lambda *x: published.block_sparse(*x, blocks, 2), *inputs(40, 1, 4, 1))


def test_block_sparse_weights_add_up_to_one_where_the_published_summed() -> None:
    q, k, _ = inputs(32, 2, 4, 1)
    ones = torch.ones_like(k)
    config = CONFIGS[1]
    blocks = published.active_blocks(config, [1], 8)
    got = BlockSparseRingDilatedAttention([8], [1], config)(q, k, ones)
    torch.testing.assert_close(got, ones, rtol=1e-12, atol=0)
    assert float(published.block_sparse(q, k, ones, blocks, 4, summed=True).detach().max()) == pytest.approx(3)


def test_block_sparse_equals_the_published_where_one_block_is_active() -> None:
    config = CONFIGS[0]
    blocks = published.active_blocks(config, [1], 8)
    module = BlockSparseRingDilatedAttention([8], [1], config)
    assert_same(module, lambda *x: published.block_sparse(*x, blocks, 4, summed=True), *inputs(32))


def test_block_sparse_time_first() -> None:
    module = BlockSparseRingMultiheadDilatedAttention(16, 2, [8], [2], sparse_config=SparsePatternConfig(block_size=4))
    x = torch.randn(2, 16, 16)
    first = BlockSparseRingMultiheadDilatedAttention(
        16, 2, [8], [2], sparse_config={"block_size": 4}, batch_first=False
    )
    first.load_state_dict(module.state_dict())
    torch.testing.assert_close(first(x.transpose(0, 1)).transpose(0, 1), module(x))


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "made",
    [
        lambda ranks: RingDilatedAttentionV2([8, 16], [1, 2], ring_size=ranks),
        lambda ranks: BlockSparseRingDilatedAttention([8], [2], {"block_size": 4}, ring_size=ranks),
        lambda ranks: an.create_dilated_attention("auto", [8, 16], [1, 2], ring_size=ranks),
        lambda ranks: lambda *x, is_causal: RingAttentionCorrectV2()(*x, ranks, is_causal),
    ],
)
def test_a_virtual_ring_computes_what_one_rank_does(made: Any, causal: bool, ranks: int) -> None:
    assert_same(lambda *x: made(ranks)(*x, is_causal=causal), lambda *x: made(1)(*x, is_causal=causal), *inputs(35))


def test_a_module_over_ranks_says_so() -> None:
    module = RingDilatedAttentionV2([8, 16], [1, 2], ring_size=4)
    module(*inputs(32))
    assert "virtual ring" in module.explain()
    projected = BlockSparseRingMultiheadDilatedAttention(16, 2, [8], [1], sparse_config={"block_size": 4}, ring_size=2)
    alone = BlockSparseRingMultiheadDilatedAttention(16, 2, [8], [1], sparse_config={"block_size": 4})
    alone.load_state_dict(projected.state_dict())
    x = torch.randn(1, 24, 16)
    torch.testing.assert_close(projected(x), alone(x))
    assert "virtual ring" in projected.explain()
    with pytest.raises(SpecError, match=r"mesh must be a torch\.distributed DeviceMesh, got int"):
        projected.distribute(4)
    with pytest.raises(SpecError, match=r"query has 8 rows, key has 16: over several ranks they are as many"):
        module(inputs(8)[0], *inputs(16)[1:])


def test_the_deleted_name_points_to_its_successors() -> None:
    with pytest.raises(AttributeError, match=r"use RingDilatedAttentionV2 .*or RingAttentionCorrectV2"):
        _ = an.RingDilatedAttention
    with pytest.raises(ImportError, match="RingDilatedAttention"):
        from attnplan.nn import RingDilatedAttention  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = an.Nothing


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"sparsity_ratio": 0.1}, "sparsity_ratio=0.1: no published pattern read it"),
        ({"pattern_type": "random"}, r"pattern_type='random': it needs random_blocks\(keep, block_size, seed\)"),
        ({"pattern_type": "learned"}, "a pattern is data and cannot be learned"),
        ({"pattern_type": "content_adaptive"}, "cannot depend on the content"),
        ({"pattern_type": "hierarchical"}, r"needs a blocks\(\) pattern"),
        ({"pattern_type": "local"}, "unknown pattern_type 'local'"),
        ({"block_size": 0}, "block_size must be an int of at least 1, got 0"),
        ({"global_tokens": -1}, "global_tokens must be an int of at least 0, got -1"),
        ({"block": 4}, "unknown sparse_config key 'block'; did you mean 'block_size'"),
        (7, "sparse_config must be a SparsePatternConfig or a dict, got int"),
    ],
)
def test_bad_sparse_configs(config: object, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        BlockSparseRingDilatedAttention([8], [1], config)


def test_other_refusals() -> None:
    with pytest.raises(SpecError, match=r"sparsity_ratio=0\.9: no published pattern read it"):
        BlockSparseRingDilatedAttention([8], [1], SparsePatternConfig(), sparsity_ratio=0.9)
    with pytest.raises(SpecError, match=r"return_memory_stats=True: use \.explain\(\)"):
        RingAttentionCorrectV2()(*inputs(8), return_memory_stats=True)
    with pytest.raises(SpecError, match="ring_size must be a positive int or None, got 0"):
        RingDilatedAttentionV2([8], [1], ring_size=0)
    with pytest.raises(SpecError, match="device='cuda': the published class computed where its inputs were"):
        RingDilatedAttentionV2([8], [1], device="cuda")
    with pytest.raises(SpecError, match=r"dtype=torch.float16: .*convert the inputs"):
        RingDilatedAttentionV2([8], [1], dtype=torch.float16)
    with pytest.raises(SpecError, match=r"attention_mask=.*an arbitrary mask"):
        RingDilatedAttentionV2([8], [1])(*inputs(8), attention_mask=torch.zeros(8, 8))
    for kind in (RingDilatedAttentionV2, BlockSparseRingDilatedAttention):
        with pytest.raises(SpecError, match="are the two swapped"):
            kind([1, 2], [8, 16])
        with pytest.raises(SpecError, match="enable_memory_pool=True: there is no pool"):
            kind([8], [1], enable_memory_pool=True)
