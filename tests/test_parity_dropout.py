"""Dropout: the mask depends on the seed and on (batch, head, query, key), and on nothing else."""

from __future__ import annotations

import attrs
import pytest
import torch

from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from attnplan.errors import SpecError
from tests.running import Call, assert_agree, every_plan, way

SPECS = {
    "causal": {"causal": True},
    "longnet": {"pattern": P.longnet([8, 16], [1, 2]), "causal": True},
    "unlike offsets in a group": {"pattern": P.longnet([8, 24], [2, 3]), "heads": 6, "kv_heads": 2},
    "mean": {"pattern": P.longnet([8, 16], [1, 2], mix="mean"), "kv_heads": 1},
    "detached": {"pattern": P.longnet([8, 16], [1, 2], mix="lse-detached")},
    "more keys": {"seq_len": 11, "kv_len": 29, "causal": True},
    "rows without a key": {"seq_len": 29, "kv_len": 11, "causal": True, "pattern": P.segments(8)},
    "softcap": {"pattern": P.window(5), "softcap": 2.0},
}


def spec_of(name="causal", **options):
    sizes = {"seq_len": 29, "heads": 4, "head_dim": 8, "dtype": "float64", "dropout": 0.4}
    return AttentionSpec(**{**sizes, **SPECS[name], **options})


@pytest.mark.parametrize("name", SPECS)
def test_every_way_drops_the_same_pairs(name):
    call = Call.of(spec_of(name), {"dropout_seed": 7}, batch=2)
    plans = list(every_plan(call.spec))
    assert len(plans) > 1
    want = call.got(plans[-1])
    assert plans[-1].backend == "reference"
    for plan in plans:
        assert_agree(call.got(plan), want, 1e-12, way(plan))


def test_an_open_length_drops_what_a_fixed_one_drops():
    lengths = {"seq_len": Dim("s", max=32), "kv_len": Dim("s", max=32)}
    for length in (5, 29):
        fixed = spec_of(seq_len=length)
        call = Call.of(fixed, {"dropout_seed": 7}, batch=2)
        want = call.got(next(every_plan(fixed)))
        for plan in every_plan(spec_of(**lengths)):
            assert_agree(call.got(plan), want, 1e-12, way(plan))


def weights(spec, seed, batch=2):
    """Return the attention weights ``[B, H, S, K]`` of even scores, read off values that are an identity matrix."""
    q = torch.zeros(batch, spec.heads, spec.seq_len, spec.head_dim, dtype=torch.float64)
    k = torch.zeros(batch, spec.kv_heads, spec.kv_len, spec.head_dim, dtype=torch.float64)
    v = torch.eye(spec.kv_len, dtype=torch.float64).expand(batch, spec.kv_heads, -1, -1)
    return next(every_plan(spec))(q, k, v, return_lse=True, dropout_seed=seed)


EVEN = spec_of("causal", causal=False, value_dim=29)


def test_kept_weights_are_scaled_and_the_lse_is_that_of_all():
    found, lse = weights(EVEN, 3)
    kept = found > 0
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / 29 / 0.6))
    torch.testing.assert_close(lse, torch.full_like(lse, 29.0).log())
    assert abs(kept.double().mean() - 0.6) < 0.02


def test_every_batch_element_head_query_key_and_seed_draws_anew():
    kept = weights(EVEN, 3)[0] > 0
    others = [weights(EVEN, seed)[0] > 0 for seed in (4, 3 + 2**32)]
    pairs = [(kept[0], kept[1]), (kept[:, 0], kept[:, 1]), (kept[:, :, 0], kept[:, :, 1]), (kept[..., 0], kept[..., 1])]
    for one, other in [*pairs, *((kept, x) for x in others)]:
        assert 0.35 < (one != other).double().mean() < 0.6, "independent draws differ in 48 % of pairs"
    assert torch.equal(kept, weights(EVEN, torch.tensor(3))[0] > 0)


def test_query_heads_of_one_key_head_drop_different_pairs():
    kept = weights(attrs.evolve(EVEN, kv_heads=1), 3)[0] > 0
    assert (kept[:, 0] != kept[:, 1]).any()


def test_a_seed_is_needed():
    with pytest.raises(SpecError, match=r"the spec needs dropout_seed with each call: plan\(q, k, v, dropout_seed="):
        next(every_plan(EVEN))(*Call.of(EVEN).inputs)
