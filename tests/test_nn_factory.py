"""The factories: the seed's snippets, every kind, and what is refused."""

from __future__ import annotations

import pytest
import torch

from attnplan.errors import RingError, SpecError
from attnplan.nn import (
    BlockSparseRingDilatedAttention,
    BlockSparseRingMultiheadDilatedAttention,
    DilatedAttention,
    ImprovedDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    MultiheadDilatedAttention,
    RingDilatedAttentionV2,
    create_dilated_attention,
    create_multihead_dilated_attention,
)


def test_snippet_of_the_multihead_factory() -> None:
    attention = create_multihead_dilated_attention("auto",
        embed_dim=768,
        num_heads=12,
        segment_lengths=[2048, 4096, 8192],
        dilation_rates=[1, 2, 4]
    )  # fmt: skip
    x = torch.randn(1, 512, 768)
    output, _ = attention(x, x, x, is_causal=True)
    assert output.shape == x.shape
    assert "plan at 512" in repr(attention)


def test_snippet_of_the_plain_factory() -> None:
    dilated_attention = create_dilated_attention("improved",
        segment_lengths=[2048, 4096, 8192],
        dilation_rates=[1, 2, 4],
    )  # fmt: skip
    query = key = value = torch.randn(1, 512, 8, 64)
    out = dilated_attention(query, key, value, is_causal=False)
    assert out.shape == query.shape


def test_auto_with_no_other_argument() -> None:
    attention = create_multihead_dilated_attention("auto")
    assert isinstance(attention, ImprovedMultiheadDilatedAttention)
    assert (attention.embed_dim, attention.num_heads) == (768, 12)
    assert list(attention.attention.segment_lengths) == [2048, 4096, 8192]
    assert list(attention.attention.dilation_rates) == [1, 2, 4]
    assert "8192" in attention.explain(8192)
    here, there = (attention.plan(8192, device=d) for d in ("cpu-2core", "h100"))
    assert here.spec == there.spec  # the same attention; only the plan differs
    assert isinstance(create_dilated_attention(), ImprovedDilatedAttention)


@pytest.mark.parametrize(
    ("kind", "plain", "multihead"),
    [
        ("auto", ImprovedDilatedAttention, ImprovedMultiheadDilatedAttention),
        ("standard", DilatedAttention, MultiheadDilatedAttention),
        ("improved", ImprovedDilatedAttention, ImprovedMultiheadDilatedAttention),
        ("ring", RingDilatedAttentionV2, MultiheadDilatedAttention),
        ("block_sparse_ring", BlockSparseRingDilatedAttention, BlockSparseRingMultiheadDilatedAttention),
        ("block_sparse", BlockSparseRingDilatedAttention, BlockSparseRingMultiheadDilatedAttention),
        ("multihead_standard", DilatedAttention, MultiheadDilatedAttention),
        ("improved_dilated_attention", ImprovedDilatedAttention, ImprovedMultiheadDilatedAttention),
        ("ring_dilated_attention", RingDilatedAttentionV2, MultiheadDilatedAttention),
    ],
)
def test_every_kind_and_spelling_runs(kind: str, plain: type, multihead: type) -> None:
    lists = {"segment_lengths": [8, 16], "dilation_rates": [1, 2], "dropout": 0.1}
    q = torch.randn(1, 16, 2, 8)
    module = create_dilated_attention(kind, **lists)
    assert type(module) is plain
    assert module(q, q, q).shape == q.shape
    x = torch.randn(1, 16, 16)
    projected = create_multihead_dilated_attention(kind, 16, 2, **lists)
    assert isinstance(projected, multihead)
    out = projected(x, x, x)
    assert (out[0] if isinstance(out, tuple) else out).shape == x.shape


def test_ring_multihead_runs_the_ring_class() -> None:
    module = create_multihead_dilated_attention("ring", 16, 2, [8, 16], [1, 2])
    assert type(module.attention) is RingDilatedAttentionV2
    with pytest.raises(SpecError, match='the ring class divides by nothing: mix must be "none"'):
        create_multihead_dilated_attention("ring", 16, 2, [8, 16], [1, 2], mix="mean")


def test_standard_has_the_forks_parameters_unless_told() -> None:
    assert "q_ln.weight" in create_multihead_dilated_attention("standard", 16, 2, [8], [1]).state_dict()
    pypi = create_multihead_dilated_attention("standard", 16, 2, [8], [1], variant="pypi")
    assert "norm.weight" in pypi.state_dict()


@pytest.mark.parametrize(
    "kind", ["distributed", "improved_distributed", "ring_distributed", "block_sparse_ring_distributed"]
)
def test_distributed_kinds_need_a_mesh(kind: str) -> None:
    for create in (create_dilated_attention, create_multihead_dilated_attention):
        with pytest.raises(RingError, match=f"'{kind}' runs on a mesh of processes: pass mesh="):
            create(kind)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (("improve",), {}, "unknown kind of attention 'improve'; did you mean 'improved'"),
        ((None,), {}, "the kind of attention is a name such as 'auto', got None"),
        (("auto", [8], [1]), {"softmaxscale": 1.0}, "no option 'softmaxscale'; did you mean 'softmax_scale'"),
        (("auto", [1, 2], [8, 16]), {}, "are the two swapped"),
        (("auto", [8]), {}, "must pair up"),
        (("block_sparse_ring", [8], [1]), {"sparsity_ratio": 0.5}, "no published pattern read it"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], options: dict[str, object], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        create_dilated_attention(*arguments, **options)


def test_bad_multihead_input() -> None:
    with pytest.raises(SpecError, match="no option 'gamma'; did you mean 'gamma_init'"):
        create_multihead_dilated_attention("standard", gamma=1.0)
    with pytest.raises(SpecError, match="num_heads=7 does not divide embed_dim=768"):
        create_multihead_dilated_attention("auto", num_heads=7)
    with pytest.raises(SpecError, match="no published pattern read it"):
        create_multihead_dilated_attention("block_sparse_ring", 16, 2, [8], [1], sparsity_ratio=0.5)
    with pytest.raises(SpecError, match="ring_size must be a positive int or None, got 0"):
        create_multihead_dilated_attention("block_sparse_ring", 16, 2, [8], [1], ring_size=0)
