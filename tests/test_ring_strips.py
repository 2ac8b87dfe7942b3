"""What ranks of one process hand over: views, put together as views of the tensors that the call brought."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnplan
from attnplan import AttentionSpec
from attnplan.ir import Axis, RowMap
from attnplan.runtime.ring.merge_parts import Piece, merge_parts
from attnplan.runtime.ring.rows import Assembly, Holding, assembly
from attnplan.runtime.ring.strips import Run, Strip, Strips

HEADS, ROWS, D = 4, 12, 3


def box(head: int, heads: int, row: int, rows: int, step: int = 1) -> Holding:
    return Holding((RowMap(head, row, (Axis(heads, head=1), Axis(rows, row=step))),), heads)


def of(whole: Tensor, held: Holding) -> Tensor:
    """Return what a holding of one box is of the whole tensor."""
    (one,) = held.maps
    step = one.axes[1].row
    return whole[:, one.head : one.head + held.heads, one.row : one.row + held.length * step : step]


def shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def cut(draw: st.DrawFn, size: int) -> list[int]:
    return [0, *sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))), size]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Holding], Holding, bool]:
    """Return shards along rows or heads, a box to be put together of them, and whether it reaches into several."""
    along_rows = draw(st.booleans())
    ends = cut(draw, ROWS if along_rows else HEADS)
    boxes = [box(0, HEADS, a, b - a) if along_rows else box(a, b - a, 0, ROWS) for a, b in pairwise(ends)]
    row, head = draw(st.integers(0, ROWS - 1)), draw(st.integers(0, HEADS - 1))
    wanted = box(head, draw(st.integers(1, HEADS - head)), row, draw(st.integers(1, ROWS - row)))
    return draw(st.permutations(boxes)), wanted, along_rows


@given(cases(), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_boxes_of_views_are_views(case: tuple[list[Holding], Holding, bool], apart: bool, swapped: bool) -> None:
    """Copies where the sources are tensors of their own, or where a head's rows are no rows of a new tensor."""
    held, wanted, _ = case
    whole = torch.randn(2, ROWS, HEADS, D).transpose(1, 2) if swapped else torch.randn(2, HEADS, ROWS, D)
    sources = [of(whole, one).clone() if apart else of(whole, one) for one in held]
    plan = assembly(wanted, tuple(held))
    found = plan.gather(sources, whole)
    assert torch.equal(found, of(whole, wanted))
    if not apart and plan.copies:
        assert shares(found, whole) == (not swapped or wanted.length == 1)
        assert (found.stride(2) == D) or wanted.length == 1
    if apart and len({m.source for m in plan.moves}) > 1:
        assert not any(shares(found, x) for x in sources)
    written = torch.full_like(found, torch.nan)
    if plan.moves:
        plan.fill(written, sources)
        assert torch.equal(written, found)


def test_what_lies_elsewhere_or_otherwise_is_copied() -> None:
    whole = torch.arange(2 * 8 * 2.0).view(1, 2, 8, 2)
    left, right = box(0, 2, 0, 4), box(0, 2, 4, 4)
    plan = assembly(box(0, 2, 0, 8), (left, right))
    first, second = of(whole, left), of(whole, right)
    assert shares(plan.gather([first, second], whole), whole)
    elsewhere = of(torch.zeros_like(whole), right)  # at the same place of another storage
    wider = of(whole.repeat(1, 1, 1, 2), Holding(right.maps, 2))[..., :2]
    for other in (elsewhere, second.clone(), wider, first):
        found = plan.gather([first, other], whole)
        assert not shares(found, whole)
        assert torch.equal(found, torch.cat([first, other], 2))


def test_rows_a_step_apart_are_no_view() -> None:
    """Two stripes of one tensor lie between one another: as rows in order they are neither side by side nor dense."""
    whole = torch.randn(1, 2, 8, D)
    even, odd = box(0, 2, 0, 4, 2), box(0, 2, 1, 4, 2)
    stripes = [of(whole, even), of(whole, odd)]
    plan = assembly(Holding((*even.maps, *odd.maps), 2), (even, odd))
    found = plan.gather(stripes, whole)
    assert not shares(found, whole)
    assert torch.equal(found, torch.cat(stripes, 2))


def test_strips_that_go_on_with_other_steps_are_others() -> None:
    whole = torch.randn(1, 2, 8, D)
    even, rest = box(0, 2, 0, 2, 2), box(0, 2, 4, 4)  # rows 0 and 2, then 4 to 7: the next place, another step
    sources = [whole, whole]
    plan = Strips(2, (Strip(0, 0, 2, 0, 2, 2), Strip(1, 0, 2, 4, 1, 4)))
    made = torch.empty(1, 2, 6, D)
    plan.fill(made, sources)
    assert torch.equal(made, torch.cat([of(whole, even), of(whole, rest)], 2))
    flat = whole.as_strided((1, 2, 4, D), (0, 4 * D, D, 1), 4 * D)  # the next place, heads lie otherwise
    plan = Strips(2, (Strip(0, 0, 2, 0, 1, 4), Strip(1, 0, 2, 0, 1, 4)))
    assert plan.view([whole, flat]) is None
    made = torch.empty(1, 2, 8, D)
    plan.fill(made, [whole, flat])
    assert torch.equal(made, torch.cat([whole[:, :, :4], flat], 2))


def test_gradients_go_home_as_views_where_rows_of_a_message_lie_together() -> None:
    own, left, right = box(0, 2, 4, 4), box(0, 2, 0, 4), box(0, 2, 8, 4)
    plan = assembly(box(0, 2, 0, 12), (own, left, right))
    gradient = torch.randn(1, 2, 12, D)
    assert set(plan.whole) == {1, 2}, "not of the rank's own, which are added up"
    assert torch.equal(plan.whole[1].of(gradient), gradient[:, :, :4])
    assert torch.equal(plan.whole[2].of(gradient), gradient[:, :, 8:])
    total, home = torch.zeros(1, 2, 4, D), torch.zeros(1, 2, 4, D)
    plan.add(gradient, [total, home, home], but=plan.whole)
    assert torch.equal(total, gradient[:, :, 4:8])
    assert not home.any()
    some = assembly(box(0, 2, 2, 8), (own, left, right))
    assert not some.whole, "a message of which only some rows are in the store has zeros beside them"
    twice = assembly(Holding((*left.maps, *left.maps, *own.maps), 2), (own, left))
    assert not twice.whole, "gradients of rows that stand in the store twice add up"


class Computing(TorchDispatchMode):
    """Counts operators that are no views and allocate nothing."""

    VIEWS = ("as_strided", "view", "transpose", "slice", "empty", "squeeze", "detach", "select", "expand", "split")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(word in str(func) for word in self.VIEWS):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("strategy", "copies"), [("ulysses", 18), ("all-gather", 2), ("halo", 18)])
def test_ranks_of_one_process_copy_hardly_anything(strategy: str, copies: int) -> None:
    """Of 8 ranks: with ulysses each puts the outputs and LSEs of others together, with halo the keys on both sides."""
    spec = AttentionSpec(seq_len=64, heads=8, head_dim=8, dtype="float32", ring_size=8)
    plan = attnplan.compile(spec, device="cpu", backend="eager", strategy=f"contiguous > {strategy}")
    q, k, v = (torch.randn(1, 8, 64, 8) for _ in range(3))
    with torch.no_grad(), Computing() as seen:
        plan(q, k, v)
    moved = [name for name in seen.names if "cat" in name or "copy_" in name]
    assert len(moved) <= copies, moved


def test_a_gap_between_strips_is_seen() -> None:
    """Without the comparison of places, what lies between two strips would be taken for the second."""
    held, wanted = (box(0, 2, 0, 2), box(0, 2, 4, 2)), Holding((*box(0, 2, 0, 2).maps, *box(0, 2, 4, 2).maps), 2)
    whole = torch.randn(1, 2, 8, D)
    sources = [of(whole, one) for one in held]
    plan: Assembly = assembly(wanted, held)
    right = torch.cat(sources, 2)
    assert torch.equal(plan.gather(sources, whole), right)
    with mock.patch.object(Run, "end", return_value=sources[1].storage_offset()):
        assert not torch.equal(plan.gather(sources, whole), right)


def test_a_running_merge_is_written_over_and_parts_are_not() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 6, 4)
    pieces = [Piece(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6)) for _ in range(2)]
    pieces.append(Piece(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3), (2, 3)))
    kept = [(p.out.clone(), p.lse.clone()) for p in pieces]
    out, lse = merge_parts(pieces, q, q.dtype)
    assert all(torch.equal(p.out, a) and torch.equal(p.lse, b) for p, (a, b) in zip(pieces, kept, strict=True))
    again, total = merge_parts(pieces, q, q.dtype, over=True)
    assert again is pieces[0].out
    assert torch.equal(again, out)
    assert torch.equal(total, lse)
    assert all(torch.equal(p.lse, b) for p, (_, b) in zip(pieces, kept, strict=True))
