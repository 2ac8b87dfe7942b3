"""What a ring takes from its kernels as it is: pieces of some rows, merged a few at a time, and sums of gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.runtime.ring import parts
from attnplan.runtime.ring.merge_parts import MOST, Piece, merge_parts
from attnplan.runtime.ring.merging import Total
from attnplan.runtime.ring.sums import Sum
from tests.running import Call, assert_agree


def fused_plan(monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec, strategy: str, *, cut: bool = True) -> Any:
    """Return a plan of its own whose graphs run by the fused kernel, in pieces or as whole programs."""
    attnplan.cache_clear()
    plan: Any = attnplan.compile(spec, device="cpu", strategy=strategy)
    plan.runners = tuple(r for r in plan.runners if r.schedule.name == "flash")
    if not cut:
        monkeypatch.setattr(parts, "forward_piece", lambda *args: None)
    assert plan.engine is not None
    monkeypatch.undo()
    return plan


def pieces_of(plan: Any) -> list[parts.Part]:
    return [p for rank in plan.engine.ranks for hop in rank.parts for p in hop if p is not None and p.rows is not None]


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(
    ("strategy", "pattern", "causal"),
    [
        ("zigzag > ring", P.full(), True),
        ("contiguous > ring", P.window(40), True),
        ("contiguous > halo", P.window(40), True),
        ("striped > ring", P.full(), True),
        ("zigzag > ulysses", P.full(), True),
    ],
    ids=str,
)
def test_pieces_are_what_whole_programs_are(
    monkeypatch: pytest.MonkeyPatch, strategy: str, pattern: P.Pattern, causal: bool, kv_heads: int
) -> None:
    spec = AttentionSpec(
        seq_len=187, heads=4, kv_heads=kv_heads, head_dim=8, causal=causal, dtype="float64", ring_size=4,
        pattern=pattern,
    )  # fmt: skip
    call = Call.of(attrs.evolve(spec, ring_size=1), batch=2)
    whole = fused_plan(monkeypatch, spec, strategy, cut=False)
    assert not pieces_of(whole)
    plan = fused_plan(monkeypatch, spec, strategy)
    found = pieces_of(plan)
    assert len(found) >= (3 if strategy == "zigzag > ring" else 0)
    assert_agree(call.got(whole), call.expected(), 1e-12, f"whole, {plan}")
    assert_agree(call.got(plan), call.expected(), 1e-12, f"pieces, {plan}")


def test_a_piece_at_other_rows_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttentionSpec(seq_len=96, heads=2, head_dim=8, causal=True, dtype="float64", ring_size=2)
    call = Call.of(attrs.evolve(spec, ring_size=1))
    plan = fused_plan(monkeypatch, spec, "zigzag > ring")
    (one,) = pieces_of(plan)
    (start, count), want = one.rows, call.expected()
    assert (start, count) == (24, 24)
    assert one.into[0] == one.rows
    for rows, into in (((0, count), one.into), (one.rows, ((0, count), *one.into[1:]))):
        for rank in plan.engine.ranks:
            rank.parts = [[attrs.evolve(p, rows=rows, into=into) if p and p.rows else p for p in h] for h in rank.parts]
            rank.hops = {i: (hop, rank.parts[n]) for n, (i, (hop, _)) in enumerate(rank.hops.items())}
        with pytest.raises(AssertionError):
            assert_agree(call.got(plan), want, 1e-12, "")


def drawn(rows: list[Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Piece]]:
    torch.manual_seed(0)
    q, found = torch.zeros(2, 3, 16, 8, dtype=dtype), []
    for where in rows:
        count = 16 if where is None else where[1]
        lse = torch.randn(2, 3, count, dtype=torch.promote_types(dtype, torch.float32)) * 3
        lse[:, 1, : count // 2] = -torch.inf
        found.append(Piece(torch.randn(2, 3, count, 8, dtype=dtype), lse, where))
    return q, found


def by_hand(q: Tensor, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
    """Merge in float64, each piece spread over all rows."""
    outs, lses = [], []
    for p in pieces:
        start, count = p.rows or (0, 16)
        lse, out = torch.full(q.shape[:3], -torch.inf).double(), torch.zeros(*q.shape[:3], 8).double()
        lse[:, :, start : start + count], out[:, :, start : start + count] = p.lse.double(), p.out.double()
        outs.append(out)
        lses.append(lse)
    total = torch.stack(lses).logsumexp(0)
    weights = (torch.stack(lses) - total).exp().nan_to_num(0)
    return (torch.stack(outs) * weights.unsqueeze(-1)).sum(0), total


PLACES: list[list[Any]] = [[None, None], [None, (8, 8)], [(0, 8), (4, 8)], [None, (2, 3), None, (0, 16), (15, 1), None]]


@pytest.mark.parametrize("places", [*PLACES, [(3, 4)], [None] * (2 * MOST + 1)], ids=str)
def test_parts_merge_in_any_number(places: list[Any]) -> None:
    q, pieces = drawn(places)
    total = Total(q, 8)
    for p in pieces:
        total.add(p.out, p.lse, p.rows)
    out, lse = total.result()
    want, want_lse = by_hand(q, pieces)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    assert bool((lse[:, 1, 0] == -torch.inf).all()) == bool((want_lse[:, 1, 0] == -torch.inf).all())
    assert not out.isnan().any()


def test_rows_that_no_part_has_are_nothing() -> None:
    q, _ = drawn([])
    out, lse = Total(q, 5).result()
    assert out.shape == (2, 3, 16, 5)
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    empty = Piece(torch.ones(2, 3, 16, 8).double(), torch.full((2, 3, 16), -torch.inf).double())
    out, lse = merge_parts([empty, empty], q, q.dtype)
    assert not out.any()
    assert bool((lse == -torch.inf).all())


def test_sums_of_gradients() -> None:
    like = torch.zeros(1, 2, 6, 3, dtype=torch.bfloat16)
    first, half, last = torch.randn(1, 2, 6, 3).bfloat16(), torch.randn(1, 2, 1, 2, 3), torch.randn(1, 2, 6, 3)
    alone = Sum(like)
    assert alone.found() is None
    assert not alone.result().any()
    alone.add(first)
    assert alone.found() is first
    assert alone.result() is first
    total = Sum(like)
    total.add(half, (4, 2))  # heads that are taken apart come as they are
    total.add(first)
    total.add(last, (0, 6))
    want = first.float() + last
    want[:, :, 4:] += half.flatten(1, 2)
    torch.testing.assert_close(total.dense(), want)
    assert total.dense().dtype == torch.float32
    spread = torch.ones(1, 2, 1, 1).expand(1, 2, 6, 3)
    broad = Sum(like.float())
    broad.add(spread)
    broad.add(last)
    torch.testing.assert_close(broad.result(), last + 1)
    assert float(spread.max()) == 1
    slopes = Sum(torch.zeros(4))
    slopes.add(torch.ones(4))
    slopes.add(torch.ones(4))
    assert slopes.result().tolist() == [2.0] * 4


INTERPRETED = """
import torch
from attnplan.runtime.ring import merge_parts as module
from tests.test_ring_pieces import PLACES, drawn
for dtype in (torch.float32, torch.bfloat16):
    for places in PLACES:
        q, pieces = drawn(places[:4], dtype)
        last = pieces[-1]
        pieces[-1] = module.Piece(last.out.transpose(1, 2).contiguous().transpose(1, 2), last.lse, last.rows)
        kept = [p.out.clone() for p in pieces]
        out, lse = module._by_kernel(pieces, q, dtype, False)
        assert all(torch.equal(p.out, x) for p, x in zip(pieces, kept))
        module._has_triton = lambda: False
        want, want_lse = module.merge_parts(pieces, q, dtype)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)
        if pieces[0].rows is None:
            running = module.Piece(pieces[0].out.float().clone(), pieces[0].lse)
            again, _ = module._by_kernel([running, *pieces[1:]], q, torch.float32, True)
            assert again is running.out
            torch.testing.assert_close(again.to(dtype), want)
"""


@pytest.mark.slow
def test_the_merge_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment)
