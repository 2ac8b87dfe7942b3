"""Kernels of flash-attn 4 started again without its host code: windows, softcaps, tables of tiles, mask functions."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from dataclasses import dataclass
from types import ModuleType

import attrs
import numpy as np
import pytest
import torch

from attnplan import patterns as P
from attnplan.patterns import Shape
from attnplan.patterns.tiles import block_table
from attnplan.runtime import kernels_flash
from attnplan.runtime.fused import replay as replays
from attnplan.runtime.fused.replay import Replay
from attnplan.runtime.kernels import Request, softmax_attention
from attnplan.runtime.kernels_all import KERNELS
from attnplan.runtime.tables import RowBounds, TileMasks, block_lists
from attnplan.runtime.tile_masks import lookup_tables
from tests.fake_flash import AuxData, calls, entered
from tests.kernel_plans import SPECS, Counting, float32_call, packages, plan_by, spec_of
from tests.running import Call, assert_agree, error

__all__ = ["packages"]
pytestmark = [
    pytest.mark.usefixtures("packages"),
    pytest.mark.filterwarnings("error:.*this plan now runs.*:RuntimeWarning"),
]

ROWS, HEADS, FEATURES, TILE = 40, 2, 16, (8, 4)
KINDS = {
    "causal": ("fa4", SPECS["causal"]),
    "window": ("fa4", SPECS["window"]),
    "window to both sides": ("fa4", SPECS["window to both sides"]),
    "window, more queries": ("fa4", SPECS["window, more queries"]),
    "softcap": ("fa4", attrs.evolve(SPECS["causal"], softcap=0.7)),
    "softcap in a window": ("fa4", attrs.evolve(SPECS["window"], softcap=0.7)),
    "whole tiles": ("fa4", SPECS["whole tiles"]),
    "whole tiles, ragged": ("fa4", attrs.evolve(SPECS["whole tiles, ragged"], kv_heads=4)),
    "bounds of rows": ("fa4-masks", SPECS["longformer"]),
    "masks of tiles": ("fa4-masks", spec_of(P.strided(3))),
    "masks of tiles by head": ("fa4-masks", spec_of((P.heads(0, 2) & P.strided(3)) | (P.heads(2, 4) & P.full()))),
}


@pytest.mark.parametrize("name", KINDS)
def test_three_calls_enter_the_interface_once(name):
    schedule, spec = KINDS[name]
    plan = plan_by(spec, schedule)
    for seed in range(3):
        call = Call.of(spec, batch=2, seed=seed, through_lse=False)
        assert_agree(call.got(plan), call.expected(), 1e-11, f"{name}, call {seed}")
    assert entered == {"forward": 1, "backward": 1}
    assert calls["fa4 forward"] == calls["fa4 backward"] == 3


@pytest.mark.parametrize("name", ["window", "softcap in a window"])
def test_without_gradients_the_own_function_of_the_package_is_not_called(name):
    spec = KINDS[name][1]
    plan = plan_by(spec, "fa4")
    for seed in range(3):
        call = Call.of(spec, batch=2, seed=seed, through_lse=False)
        assert error(plan(*call.inputs), call.expected().out) < 1e-11
    assert entered == {"forward": 1}
    assert calls == {"fa4 forward": 3}


def test_grouped_heads_are_replayed_forward_only():
    """Their backward has two more kernels, and sums that begin at zero."""
    plan = plan_by(SPECS["one key head"], "fa4")
    for seed in range(3):
        call = Call.of(plan.spec, batch=2, seed=seed, through_lse=False)
        assert_agree(call.got(plan), call.expected(), 1e-11, f"call {seed}")
    assert entered == {"forward": 1, "backward": 3}


def test_windows_softcaps_and_scales_of_equal_sizes_are_kinds_of_their_own():
    """Window and scale are arguments of one compiled kernel; a kernel is compiled for each softcap."""
    q, k, v = drawn(0)
    asked = [Request(0.25, window=w, softcap=s) for w in ((3, 0), (5, 0), (3, 2), (None, 2)) for s in (0.0, 0.5, 2.0)]
    asked.append(Request(0.5, window=(3, 0)))
    for _ in range(2):
        for one in asked:
            left, right = one.window
            ahead = torch.arange(ROWS) - torch.arange(ROWS)[:, None]
            mask = (ahead <= right) & (ahead >= (-ROWS if left is None else -left))
            check(one, mask, q, k, v)
    assert entered == {"forward": len(asked), "backward": len(asked)}


def drawn(seed):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(2, HEADS, ROWS, FEATURES, dtype=torch.float64, generator=source) for _ in range(3)]


def tables(pattern, *, masked=False):
    """Return the lists of a pattern, and its mask ``[1, H, R, C]``."""
    table = block_table(pattern, Shape(ROWS, ROWS, HEADS, 1), TILE, masks=masked)
    lists = block_lists(table)
    if masked:
        at = np.arange(ROWS)
        mask = np.stack([np.broadcast_to(pattern.pairs({}, h, at[:, None], at), (ROWS, ROWS)) for h in range(HEADS)])
        return attrs.evolve(lists, masks=lookup_tables(table)), torch.from_numpy(mask).unsqueeze(0)
    states = lists.rows.states(table.grid.columns).bool().expand(1, HEADS, -1, -1)
    return lists, states.repeat_interleave(TILE[0], 2).repeat_interleave(TILE[1], 3)[:, :, :ROWS, :ROWS]


def check(asked, mask, q, k, v, *, backward=True):
    """Call the kernel, and compare with plain torch."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = softmax_attention(*leaves, mask=mask, scale=asked.scale, softcap=asked.softcap or None)
    out, lse = KERNELS["fa4"].forward(q, k, v, asked)
    assert error(out, want) < 1e-12
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    if not backward:
        return
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(9))
    found = KERNELS["fa4"].backward(grad, q, k, v, out, lse, asked)
    for x, y in zip(found, torch.autograd.grad(want, leaves, grad), strict=True):
        assert error(x, y) < 1e-12


def test_other_tables_of_equal_sizes_are_another_kind():
    made = [tables(P.random_blocks(0.5, 8, seed)) for seed in (1, 2, 3)]
    for seed in range(2):
        for lists, mask in made:
            check(Request(0.25, blocks=lists), mask, *drawn(seed))
    assert entered == {"forward": 3, "backward": 3}


@pytest.mark.parametrize(
    ("pattern", "what"), [(P.window(5) | P.sinks(3), RowBounds), (P.strided(3), TileMasks)], ids=["bounds", "masks"]
)
def test_the_masks_of_partial_tiles_count_as_well_as_their_lists(pattern, what):
    """The same lists with other masks are another kind."""
    lists, mask = tables(pattern, masked=True)
    assert isinstance(lists.masks, what)
    if what is RowBounds:
        none = RowBounds(torch.zeros_like(lists.masks.bounds))
    else:
        none = TileMasks(torch.zeros_like(lists.masks.places), torch.zeros_like(lists.masks.masks))
    states = lists.rows.whole.states(-(-ROWS // TILE[1])).bool().expand(1, HEADS, -1, -1)
    full = states.repeat_interleave(TILE[0], 2).repeat_interleave(TILE[1], 3)[:, :, :ROWS, :ROWS]
    for seed in range(2):
        check(Request(0.25, blocks=lists), mask, *drawn(seed), backward=False)
        check(Request(0.25, blocks=attrs.evolve(lists, masks=none)), full, *drawn(seed), backward=False)
    assert entered == {"forward": 2}


def test_the_same_lists_of_tiles_of_another_size_are_another_kind():
    lists, _ = tables(P.random_blocks(0.5, 8, 1))
    kept = lists.rows.states(-(-ROWS // TILE[1])).bool().expand(1, HEADS, -1, -1)
    for seed in range(2):
        for tall in (8, 9):
            mask = kept.repeat_interleave(tall, 2).repeat_interleave(TILE[1], 3)[:, :, :ROWS, :ROWS]
            check(Request(0.25, blocks=attrs.evolve(lists, tile=(tall, TILE[1]))), mask, *drawn(seed))
    assert entered == {"forward": 2, "backward": 2}


def test_tables_live_as_long_as_the_kernels_that_read_them_and_no_longer(monkeypatch):
    """So identities of tables that are gone cannot be those of others."""
    monkeypatch.setattr(replays, "_KEPT", 3)
    seen = []
    for seed in range(12):
        lists, mask = tables(P.random_blocks(0.5, 8, seed))
        check(Request(0.25, blocks=lists), mask, *drawn(seed))
        seen.append([weakref.ref(x) for x in (lists.rows.partial_count, lists.columns.full_index)])
        del lists
    gc.collect()
    assert entered == {"forward": 12, "backward": 12}
    assert [ref() is not None for pair in seen for ref in pair] == 18 * [False] + 6 * [True]


def test_a_dispatch_mode_is_served_by_the_same_kernel():
    """The registered operator makes its request anew in each call, of the same tensors."""
    call = float32_call(SPECS["whole tiles"])
    plan = plan_by(call.spec, "fa4")
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    want = plan(*leaves)
    grads = torch.autograd.grad(want, leaves, call.grad)
    for _ in range(2):
        with Counting() as mode:
            got = plan(*leaves)
            found = torch.autograd.grad(got, leaves, call.grad)
        assert all(map(torch.equal, (got, *found), (want, *grads)))
        assert {f"attnplan.flash_{way}.default" for way in ("forward", "backward")} <= set(mode.seen)
    assert entered == {"forward": 1, "backward": 1}


def test_what_comes_with_each_call_stays_with_the_interface():
    spec = spec_of(P.documents() & P.window(7), causal=True)
    plan = plan_by(spec, "fa4")
    for ends in ([0, 11, 48], [0, 30, 48]):
        call = Call.of(spec, {"documents": torch.tensor(ends)}, batch=2, through_lse=False)
        assert_agree(call.got(plan), call.expected(), 1e-11, "documents")
    asked = Request(0.25, window=(5, 0))
    for turn in range(2):
        KERNELS["fa4"].forward(*drawn(turn), asked._replace(sinks=torch.full((HEADS,), float(turn))))
    assert entered == {"forward": 4, "backward": 2}


@dataclass
class Held:
    inside: object


@dataclass(slots=True)
class Slotted:
    inside: object


class Mixed(Held):
    """Has attributes, and a slot, which they do not show."""

    __slots__ = ("slot",)


def mixed(x):
    made = Mixed(OWN)
    made.slot = x
    return made


def closed_over(x):
    return lambda: x


LISTS, _ = tables(P.random_blocks(0.5, 8, 0))
OWN = LISTS.rows.full_index
ADDED = {
    "nothing": (lambda: None, True),
    "a number": (lambda: (1, 0.5, "x", True, (None, [])), True),
    "a table": (lambda: OWN, True),
    "a view of a table": (lambda: OWN.expand(3, *OWN.shape[1:])[..., :1], True),
    "a table in a list in a tuple": (lambda: AuxData([OWN], None), True),
    "a table as an attribute": (lambda: Held((OWN,)), True),
    "another tensor": (lambda: OWN.clone(), False),
    "another tensor in a list": (lambda: [OWN, OWN.clone()], False),
    "another tensor in a tuple": (lambda: (OWN, OWN.clone()), False),
    "another tensor as auxiliary data": (lambda: AuxData([OWN, OWN.clone()], None), False),
    "another tensor as an attribute": (lambda: Held([OWN.clone()]), False),
    "another tensor in a slot": (lambda: Slotted(OWN.clone()), False),
    "another tensor in a slot beside attributes": (lambda: mixed(OWN.clone()), False),
    "another tensor in a function": (lambda: closed_over(OWN.clone()), False),
    "another tensor in a dictionary": (lambda: {"inside": OWN.clone()}, False),
    "the other direction's table": (lambda: LISTS.columns.full_index, False),
    "an object that holds itself": (lambda: (x := Held(None), setattr(x, "inside", x))[0], False),
}


@pytest.mark.parametrize("name", ADDED)
def test_a_tensor_that_is_no_table_keeps_the_interface_in_each_call(name):
    added, replayed = ADDED[name]
    ran, host = [], []

    def forward(q, k, v, *, out, lse, return_lse):
        host.append(return_lse)
        forward.compile_cache[0](q, k, v, out, lse, added())

    forward.compile_cache = {0: lambda q, k, v, out, lse, more: ran.append(more)}
    built = []
    replay = Replay(forward, lambda asked: built.append(asked) or {})
    q = torch.zeros(1, 8, 1, 4)
    for _ in range(3):
        replay(q, q, q, Request(1.0, blocks=LISTS))
    assert len(ran) == 3
    assert len(host) == len(built) == (1 if replayed else 3), "options are made for the interface only"


@pytest.mark.parametrize("replayed", [True, False])
def test_results_go_where_the_request_says(replayed, monkeypatch):
    """To other places in each call, of which only the strides count."""
    if not replayed:
        without_kernels(monkeypatch)
    for turn in range(2):
        for asked in (Request(0.25, window=(3, 0)), Request(0.25, blocks=LISTS)):
            q, k, v = drawn(turn)
            out, lse = KERNELS["fa4"].forward(q, k, v, asked)
            want = KERNELS["fa4"].backward(out, q, k, v, out, lse, asked)
            whole = [torch.full((2, HEADS, 2 * ROWS, FEATURES), torch.nan, dtype=q.dtype) for _ in range(3)]
            places = [x[:, :, turn::2] for x in whole]
            found, _ = KERNELS["fa4"].forward(q, k, v, asked._replace(into=(places[0],)))
            assert found.data_ptr() == places[0].data_ptr()
            assert torch.equal(places[0], out)
            told = (places[1], None, places[2])
            got = KERNELS["fa4"].backward(out, q, k, v, out, lse, asked._replace(into=told))
            for x, y, place in zip(got, want, told, strict=True):
                assert torch.equal(x, y)
                assert place is None or x.data_ptr() == place.data_ptr()
    assert entered["forward"] == entered["backward"] == (4 if replayed else 8)


def test_a_kernel_that_raises_while_it_is_recorded_leaves_nothing_behind():
    def forward(q, k, v, *, out, lse, return_lse):
        forward.compile_cache[0](q, k, v, out, lse)

    def fails(*args):
        raise RuntimeError("no")

    forward.compile_cache = table = {0: fails}
    replay, q = Replay(forward, lambda asked: {}), torch.zeros(1, 8, 1, 4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            replay(q, q, q, Request(1.0))
        assert forward.compile_cache is table
    table[0] = lambda q, k, v, out, lse: out.fill_(7)
    assert replay(q, q, q, Request(1.0))[0].unique().tolist() == [7]


def test_calls_of_other_threads_are_not_recorded():
    """One that enters the interface meanwhile is none of the recorded call's."""
    host = []

    def forward(q, k, v, *, out, lse, return_lse, other=True):
        host.append(other)
        if other:
            beside = threading.Thread(target=forward, args=(q, k, v),
                                      kwargs={"out": out, "lse": lse, "return_lse": True, "other": False})  # fmt: skip
            beside.start()
            beside.join()
        forward.compile_cache[0](q, k, v, out, lse)

    forward.compile_cache = {0: lambda *tensors: None}
    replay, q = Replay(forward, lambda asked: {}), torch.zeros(1, 8, 1, 4)
    for _ in range(3):
        replay(q, q, q, Request(1.0))
    assert host == [True, False]


def without_kernels(monkeypatch):
    """Let the interface keep no table of compiled kernels, as other versions."""
    interface, plain, found = sys.modules["flash_attn.cute.interface"], ModuleType("plain"), kernels_flash.module
    plain._flash_attn_fwd = lambda *args, **options: interface._flash_attn_fwd(*args, **options)
    plain._flash_attn_bwd = lambda *args, **options: interface._flash_attn_bwd(*args, **options)
    monkeypatch.setattr(kernels_flash, "module", lambda n: plain if n == "flash_attn.cute.interface" else found(n))


def test_an_interface_without_a_table_of_kernels_is_called_each_time(monkeypatch):
    without_kernels(monkeypatch)
    lists, mask = tables(P.random_blocks(0.5, 8, 1))
    for seed in range(2):
        check(Request(0.25, blocks=lists), mask, *drawn(seed))
    assert entered == {"forward": 2, "backward": 2}


def test_windows_that_hold_the_diagonal_leave_the_lse_as_it_is(monkeypatch):
    """The correction of rows without a key would be two more kernels, forward and backward."""
    corrected = []
    for name in ("empty_rows_below", "empty_rows_above"):
        function = getattr(kernels_flash, name)
        monkeypatch.setattr(kernels_flash, name, lambda x, f=function: corrected.append(1) or f(x))
    for rows, keys, none in ((40, 40, 0), (30, 40, 0), (40, 30, 10), (40, 39, 1)):
        q, k, v = (x[:, :, :n] for x, n in zip(drawn(rows), (rows, keys, keys), strict=True))
        ahead = torch.arange(keys) - torch.arange(rows)[:, None] - (keys - rows)
        mask = ((ahead <= 0) & (ahead >= -3)).expand(2, HEADS, rows, keys)
        assert (~mask.any(-1)).sum(-1).unique().tolist() == [none]
        corrected.clear()
        check(Request(0.25, window=(3, 0)), mask, q, k, v)
        assert len(corrected) == (2 if none else 0)
