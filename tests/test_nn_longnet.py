"""LongNet as in the paper and in torchscale: parity with tests/published.py, and its rows of zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from attnplan.errors import SpecError
from attnplan.nn import LongNetAttention
from tests import published
from tests.test_nn_dilated import LADDER, assert_same, grid, inputs


@grid
@settings(max_examples=20)
def test_longnet_has_torchscales_mathematics(
    ladder: tuple[list[int], list[int]], n: int, heads: int, causal: bool
) -> None:
    module = LongNetAttention(*ladder)
    assert_same(
        lambda *x: module(*x, is_causal=causal),
        lambda *x: published.longnet(*x, *ladder, causal),
        *inputs(n, heads, 4, 1),
    )


@grid
@settings(max_examples=20)
def test_zero_key_padding_is_torchscales(ladder: tuple[list[int], list[int]], n: int, heads: int, causal: bool) -> None:
    module = LongNetAttention(*ladder, zero_key_padding=True)
    assert_same(
        lambda *x: module(*x, is_causal=causal),
        lambda *x: published.longnet_zero_keys(*x, *ladder, causal),
        *inputs(n, heads, 4, 1),
    )


def test_the_papers_longnet_differentiates_the_weights() -> None:
    module = LongNetAttention(*LADDER, offset="interleave", mix="lse")
    theirs = lambda *x: published.longnet(*x, *LADDER, True, offset="interleave", detach=False)  # noqa: E731
    assert_same(lambda *x: module(*x, is_causal=True), theirs, *inputs(21))


def test_the_zeros_change_only_ragged_lengths() -> None:
    plain, zeros = LongNetAttention(*LADDER), LongNetAttention(*LADDER, zero_key_padding=True)
    whole, ragged = inputs(32), inputs(27)
    assert torch.equal(plain(*whole), zeros(*whole))
    assert not torch.allclose(plain(*ragged), zeros(*ragged))
    torch.testing.assert_close(plain(*ragged, is_causal=True), zeros(*ragged, is_causal=True), rtol=1e-12, atol=1e-12)


def test_zero_key_padding_with_a_padding_mask_leaves_the_zeros_in() -> None:
    module, (q, k, v) = LongNetAttention([8], [1], zero_key_padding=True), inputs(13)
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[:, 12] = True
    got = module(q, k, v, key_padding_mask=mask)[:, 8:]
    zero = torch.zeros(2, 3, 4, 8, dtype=torch.float64)
    keys, values = torch.cat([k[:, 8:12], zero], 1), torch.cat([v[:, 8:12], zero], 1)
    torch.testing.assert_close(got, published.dense(q[:, 8:], keys, values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mix": "mean"}, "needs mix=\"lse-detached\", got 'mean'"),
        ({"mix": "lse"}, "needs mix=\"lse-detached\", got 'lse'"),
        ({"offset": "blocks"}, "unknown longnet offset 'blocks'; did you mean 'block'"),
    ],
)
def test_bad_longnet_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        LongNetAttention(*LADDER, zero_key_padding=True, **options)


def test_zero_key_padding_refuses_what_has_no_meaning() -> None:
    q, k, v = inputs(27)
    with pytest.raises(SpecError, match="as many queries as keys, got 5 and 27"):
        LongNetAttention(*LADDER, zero_key_padding=True)(q[:, :5], k, v)
    with pytest.raises(SpecError, match="dropout is defined on positions"):
        LongNetAttention(*LADDER, dropout=0.1, zero_key_padding=True)(q, k, v)
