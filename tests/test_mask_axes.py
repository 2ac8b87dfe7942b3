"""Along which axes a mask changes: what is derived equals what arrays say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.cost.along import _asked, mask_axes
from attnplan.patterns import Shape
from tests import strategies

SHAPE = Shape(12, 12, 4)


@pytest.mark.parametrize(
    ("pattern", "axes"),
    [
        (P.causal(), (False, True, True)),
        (P.full(), (False, True, True)),
        (P.heads(0, 2) & P.window(3), (True, True, True)),
        (P.dilated(4, 2), (False, True, True)),
        (~P.segments(4) | P.strided(3), (False, True, True)),
        (P.columns([1, 5, 7]), (False, True, True)),
    ],
    ids=str,
)
def test_axes(pattern, axes):
    assert mask_axes(pattern.bind(SHAPE.heads), SHAPE) == axes == _asked(pattern.bind(SHAPE.heads), SHAPE)


def test_one_head_has_no_axis():
    assert mask_axes(P.dilated(4, 2), Shape(12, 12, 1)) == (False, True, True)


@given(st.data())
def test_what_is_derived_is_what_arrays_say(data):
    shape = data.draw(strategies.shapes())
    pattern = data.draw(strategies.patterns(shape, runtime=True, masks=True)).bind(shape.heads)
    assert mask_axes(pattern, shape) == _asked(pattern, shape)
