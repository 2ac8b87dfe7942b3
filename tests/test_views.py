"""Whether a kernel of CUDA can load the rows of a tensor where they lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnplan.runtime.views import _is_aligned

BUFFER = 4096


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    shape=st.tuples(*(st.integers(1, 3),) * 3),
    steps=st.tuples(*(st.sampled_from([0, 1, 2, 4, 8, 12, 16, 24, 48]),) * 3),
    start=st.sampled_from([0, 1, 2, 4, 8, 16, 17, 20, 32]),
)
def test_rows_are_aligned_where_each_begins_at_a_multiple_of_16_bytes(dtype, shape, steps, start):
    x = torch.zeros(BUFFER, dtype=dtype).as_strided((*shape, 4), (*steps, 1), start)
    begins = [x[i, j, k].storage_offset() for i in range(shape[0]) for j in range(shape[1]) for k in range(shape[2])]
    assert _is_aligned(x) == all(n * dtype.itemsize % 16 == 0 for n in begins)


@pytest.mark.parametrize(("start", "steps"), [(8, (16, 16, 16)), (16, (16, 8, 16)), (16, (16, 16, 1))])
def test_a_start_or_a_step_of_eight_elements_is_judged_by_the_dtype(start, steps):
    half, whole = (
        torch.zeros(BUFFER, dtype=t).as_strided((2, 2, 2, 4), (*steps, 1), start)
        for t in (torch.bfloat16, torch.float32)
    )
    assert _is_aligned(half) == (steps[-1] != 1)
    assert _is_aligned(whole) == (steps[-1] != 1)
    assert not _is_aligned(torch.zeros(BUFFER, dtype=torch.uint8).as_strided((2, 2, 2, 4), (*steps, 1), start))
