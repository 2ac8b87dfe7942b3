"""Folding axes into a kernel's two batch dimensions: what is remembered of it lies as what is made."""

from __future__ import annotations

import pytest
import torch

from attnplan.runtime import attend, views

AXES = {
    "segments": ((4, 1, 0), (4, 0, 16), (16, 0, 1)),
    "three axes": ((4, 1, 0), (2, 0, 32), (2, 0, 1), (16, 0, 2)),
    "every other head": ((2, 2, 0), (4, 0, 16), (16, 0, 1)),
}


def folding_of(q, k, groups):
    lies = [(x.shape, x.stride()) for x in (q, k, k)]
    return attend._folding_of(*lies, groups)


def assert_lies_alike(got, want, base):
    assert (got.shape, got.stride()) == (want.shape, want.stride())
    assert torch.equal(got, want)
    assert (got.data_ptr() == base.data_ptr()) == (want.data_ptr() == base.data_ptr()), "a copy where that is one"


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", AXES)
def test_what_is_remembered_lies_as_what_is_made(name, groups):
    attend._folding_of.cache_clear()
    x = torch.randn(2, 4, 64, 8, dtype=torch.float64)
    rows_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    made = []
    for whole in (x, rows_first, x):  # tensors of one shape that lie otherwise
        q = views.rows(whole, 0, 0, AXES[name])
        shared = views.rows(whole, 0, 0, ((1, 0, 0), *AXES[name][1:]))
        for k in (q, shared):
            folding = folding_of(q, k, groups)
            made.append(folding)
            for _ in range(2):
                assert_lies_alike(folding.pack(q), folding._pack(q), q)
                assert_lies_alike(folding.pack(k), folding._pack(k), k)
                result = torch.randn(*folding.pack(q).shape[:3], 5, dtype=torch.float64)
                assert_lies_alike(folding.unpack(result), folding._unpack(result), result)
                assert folding.unpack(result).shape == (*q.shape[:-1], 5)
    assert made[:2] == made[4:], "of one way to lie there is one folding"
    assert made[0] is not made[2]


def test_what_no_strides_express_is_copied_each_time():
    x = torch.randn(2, 4, 9, 6, 16, 8)
    for _ in range(2):
        q = x[:, ::2, ::4, ::5]
        folding = folding_of(q, q, False)
        got = folding.pack(q)
        assert torch.equal(got, folding._pack(q))
        assert got.data_ptr() != q.data_ptr()
        x += 1


def test_what_is_remembered_has_bounds():
    q = torch.randn(2, 4, 4, 16, 8)
    folding = folding_of(q, q, False)
    for features in range(1, 3 * attend._KEPT_VIEWS):
        folding.pack(torch.empty(2, 4, 4, 16, features))
    assert len(folding._packed) <= attend._KEPT_VIEWS
