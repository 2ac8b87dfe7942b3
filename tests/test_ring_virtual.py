"""The virtual ring: every rank's program on one device, against the float64 oracle, forward and backward."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import MemoryBudgetError, NoBackendError, RingError, SpecError
from attnplan.ir import Axis, RowMap
from attnplan.ring.layouts import LAYOUTS
from attnplan.ring.program import Hop
from attnplan.ring.transports import TRANSPORTS
from attnplan.runtime.ring import executor, merge_parts, merging
from attnplan.runtime.ring import virtual as virtual_module
from attnplan.runtime.ring.dry import dry_run
from attnplan.runtime.ring.exchanges import Start, Wait
from attnplan.runtime.ring.rows import Assembly, Holding, assembly
from attnplan.runtime.ring.stores import Stores
from attnplan.runtime.ring.virtual import VirtualRing
from tests.ring_programs import virtual
from tests.running import TOLERANCES, Call, assert_agree

PATTERNS: dict[str, tuple[Any, bool]] = {
    "full": (P.full(), False),
    "causal": (P.full(), True),
    "window": (P.window(5), True),
    "two-sided": (P.window(4, 3), False),
    "documents": (P.documents([9, 1, 17, 10]), True),
    "blocks": (P.random_blocks(0.4, 4, 1), True),
    "sinks": (P.sinks(3) | P.window(4), True),
    "longnet": (P.longnet([8, 16, 40], [1, 2, 4]), True),
    "detached": (P.longnet([8, 20], [1, 2], mix="lse-detached"), True),
    "grouped": (P.grouped([8, 16], [1, 2], mix="none"), True),
    "grouped mean": (P.grouped([8, 16], [1, 2], mix="mean"), False),
    "weighted": (P.mix([P.window(3), P.full()], rule="sum", weights=[0.25, 2.0]), True),
}
LENGTH = 37


def spec_of(name: str, kv_heads: int = 4, dtype: str = "float64", ranks: int = 4, **fields: Any) -> AttentionSpec:
    pattern, causal = PATTERNS[name]
    sizes = {"seq_len": LENGTH, "heads": 4, "head_dim": 8, **fields}
    return AttentionSpec(
        kv_heads=kv_heads, dtype=dtype, ring_size=ranks, pattern=pattern, causal=causal, **sizes
    )  # fmt: skip


def compiled(spec: AttentionSpec, strategy: str) -> attnplan.Plan | None:
    """Return the plan of a layout and a transport, None if the transport refuses the pattern."""
    try:
        return attnplan.compile(spec, device="cpu", strategy=strategy)
    except RingError:  # the slow tests say which transports must not refuse
        return None


def check(name: str, layout: str, transport: str, kv_heads: int, dtype: str = "float64", ranks: int = 4) -> bool:
    spec = spec_of(name, kv_heads, dtype, ranks)
    plan = compiled(spec, f"{layout} > {transport}")
    if plan is None:
        return False
    call = Call.of(attrs.evolve(spec, ring_size=1), batch=2)
    assert_agree(call.got(plan), call.expected(), TOLERANCES[dtype], f"{name}, {plan}, {kv_heads} k/v heads")
    batch = call.inputs[0].shape[0]
    assert plan.engine.bytes_sent == tuple(
        sum(plan.traffic(r, backward=True, batch=batch).sent for _ in range(1)) + _lse_bytes(plan, r, call)
        for r in range(ranks)
    )
    return True


def _lse_bytes(plan: Any, rank: int, call: Call) -> int:
    """Return the bytes of the LSE's gradient, where it goes the way of the output's: only calls that ask pay for it."""
    first = plan.programs[rank].first
    if first is None or call.grad_lse is None:
        return 0
    return first.sent * call.inputs[0].shape[0] * max(4, call.grad_lse.element_size())


QUICK = [
    (name, layout, transport, (1, 4)[i % 2])
    for i, (name, layout, transport) in enumerate(itertools.product(PATTERNS, LAYOUTS, TRANSPORTS))
    if (i * 7 + i // 7) % 5 == 0
]


@pytest.mark.parametrize("name", PATTERNS)
def test_parity_sampled(name: str) -> None:
    ran = [check(*one) for one in QUICK if one[0] == name]
    assert any(ran)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PATTERNS)
def test_parity(name: str, layout: str, transport: str, kv_heads: int, ranks: int) -> None:
    for dtype in ("float64", "float32"):
        ran = check(name, layout, transport, kv_heads, dtype, ranks)
    if transport in ("ring", "all-gather", "rows") or (transport == "ulysses" and ranks <= 4):  # of 4 heads
        assert ran, "these carry every pattern"


@pytest.mark.parametrize(
    ("ranks", "length"),
    [(3, 5), (7, 16), *(pytest.param(r, n, marks=pytest.mark.slow) for r in (2, 8) for n in (5, 16))],
)
def test_any_number_of_ranks_and_rows(ranks: int, length: int) -> None:
    for strategy in ("contiguous > ring", "zigzag > ring", "striped > rows"):
        spec = AttentionSpec(
            seq_len=length, heads=2, head_dim=8, causal=True, dtype="float64", ring_size=ranks
        )  # fmt: skip
        plan = attnplan.compile(spec, device="cpu", strategy=strategy)
        call = Call.of(attrs.evolve(spec, ring_size=1))
        assert_agree(call.got(plan), call.expected(), 1e-12, f"{plan}, {length} rows")


@pytest.mark.parametrize("strategy", ["contiguous > rows", "zigzag > ring", "contiguous > ulysses"])
def test_layout_and_value_dim(strategy: str) -> None:
    spec = spec_of("longnet", 1, layout="bshd", value_dim=16)
    plan = attnplan.compile(spec, device="cpu", strategy=strategy)
    call = Call.of(attrs.evolve(spec, ring_size=1), batch=2)
    assert_agree(call.got(plan), call.expected(), 1e-12, repr(plan))


@pytest.mark.parametrize("strategy", ["zigzag > ring", "contiguous > ulysses", "striped > all-gather"])
@pytest.mark.parametrize("ranks", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_operands_of_the_whole_sequence(strategy: str, ranks: int) -> None:
    """Packed documents cross ranks: the boundaries at 9 and 10 fall inside a shard, 18 and 30 inside others."""
    if "ulysses" in strategy and ranks > 4:
        pytest.skip("4 heads do not spread over 8 ranks")
    spec = AttentionSpec(
        seq_len=LENGTH, heads=4, kv_heads=2, head_dim=8, causal=True, dtype="float64", ring_size=ranks,
        pattern=P.documents() & P.padding(),
    )  # fmt: skip
    operands = {
        "documents": torch.tensor([[0, 9, 10, 30, 37], [0, 0, 18, 18, 37]], dtype=torch.int32),
        "key_padding": torch.arange(LENGTH) < torch.tensor([[37], [29]]),
    }
    plan = attnplan.compile(spec, device="cpu", strategy=strategy)
    call = Call.of(attrs.evolve(spec, ring_size=1), operands, batch=2)
    assert_agree(call.got(plan), call.expected(), 1e-12, repr(plan))


def test_dropout_does_not_depend_on_the_ranks() -> None:
    spec = spec_of("causal", dropout=0.3)
    alone = attnplan.compile(attrs.evolve(spec, ring_size=1), device="cpu")
    plan = attnplan.compile(spec, device="cpu", strategy="zigzag > ring")
    call = Call.of(attrs.evolve(spec, ring_size=1), {"dropout_seed": torch.tensor(3)}, batch=2)
    assert_agree(call.got(plan), call.got(alone), 1e-12, "dropout")


@pytest.mark.parametrize("name", ["causal", *(pytest.param(n, marks=pytest.mark.slow) for n in ("longnet", "sinks"))])
def test_half_precision_keeps_its_accumulators(name: str) -> None:
    """Parts are rounded to bfloat16, sums are not: a ring of 8 is at most a little worse than one device."""
    spec = spec_of(name, 1, "bfloat16", ranks=8)
    call = Call.of(attrs.evolve(spec, ring_size=1), batch=2)
    want = call.expected()

    def errors(plan: attnplan.Plan) -> list[float]:
        return [
            ((a.double() - b).norm() / b.norm()).item()
            for (_, a), (_, b) in zip(call.got(plan).items(), want.items(), strict=True)
        ]

    ring = errors(attnplan.compile(spec, device="cpu", strategy="zigzag > ring"))
    alone = errors(attnplan.compile(attrs.evolve(spec, ring_size=1), device="cpu"))
    assert ring[0] <= 4e-3
    assert all(r <= 1.5 * a + 1e-3 for r, a in zip(ring, alone, strict=True)), (ring, alone)


def test_verify_and_explain() -> None:
    plan = attnplan.compile(spec_of("longnet", 2, "float32"), device="cpu")
    report = plan.verify()
    assert {c.name for c in report.checks} == {"output", "lse", "grad q", "grad k", "grad v"}
    page, facts = plan.explain(), plan.explain("json")
    assert "4 x " in page
    assert "a virtual ring on one device" in page
    assert facts["choice"]["transport"] == plan.transport
    assert [h["hop"] for h in facts["hops"]] == sorted(h["hop"] for h in facts["hops"])
    assert "# hop 0" in plan.source


@pytest.mark.parametrize("shape", ["4x2", "2x4"])
def test_the_shape_of_a_hybrid_can_be_pinned_by_the_name_that_plans_show(shape: str) -> None:
    plan = attnplan.compile(spec_of("causal", ranks=8), device="cpu", strategy=f"contiguous > hybrid {shape}")
    assert plan.strategy == f"contiguous > hybrid {shape}"
    assert "x".join(map(str, plan.shape)) == shape
    assert attnplan.compile(plan.spec, device="cpu", strategy=plan.strategy) is plan
    call = Call.of(attrs.evolve(plan.spec, ring_size=1), batch=2)
    assert_agree(call.got(plan), call.expected(), 1e-12, plan.strategy)
    with pytest.raises(RingError, match=r"'hybrid 4x4' is for 16 ranks, there are 8"):
        attnplan.compile(plan.spec, device="cpu", strategy="hybrid 4x4")
    with pytest.raises(SpecError, match="unknown strategy 'ring 4x2' for a ring"):
        attnplan.compile(plan.spec, device="cpu", strategy="ring 4x2")


def test_equal_arguments_give_one_plan() -> None:
    spec = spec_of("window", 4, "float32")
    assert attnplan.compile(spec, device="cpu") is attnplan.compile(spec, device="cpu")
    assert attnplan.compile(spec, device="cpu") is not attnplan.compile(spec, device="cpu", strategy="zigzag")


def test_a_ring_of_hardware_that_is_not_here_is_planned_only() -> None:
    plan = attnplan.compile(spec_of("causal", 4, "bfloat16", seq_len=32768, head_dim=128), device="h100")
    assert plan.predicted.seconds > 0
    q = torch.zeros(1, 4, 32768, 128, dtype=torch.bfloat16)
    with pytest.raises(NoBackendError, match="not here"):
        plan(q, q, q)


def test_refusals() -> None:
    spec = spec_of("causal", 4, "float32")
    with pytest.raises(SpecError, match=r"unknown strategy 'zigzag > rign' for a ring; did you mean 'ring'"):
        attnplan.compile(spec, device="cpu", strategy="zigzag > rign")
    with pytest.raises(SpecError, match="tune=True measures plans on one device"):
        attnplan.compile(spec, device="cpu", tune=True)
    with pytest.raises(MemoryBudgetError, match=r"the smallest ring, .*try more ranks, or max_memory='\d+ KiB'"):
        attnplan.compile(spec, device="cpu", max_memory=64)
    with pytest.raises(SpecError, match=r"mesh must be a torch\.distributed DeviceMesh, got str"):
        attnplan.compile(spec, mesh="4")
    with pytest.raises(RingError, match="carry this over 4 ranks"):
        attnplan.compile(spec, device="cpu", strategy="local")
    plan = attnplan.compile(spec, device="cpu", strategy="zigzag > ring")
    q, k, v = torch.zeros(3, 1, 4, LENGTH, 8).unbind()
    with pytest.raises(SpecError, match=r"k has shape \[1, 4, 3, 8\], the spec needs \[B, 4, 37, 8\]"):
        plan(q, k[:, :, :3], v)
    with pytest.raises(SpecError, match=r"dtype torch\.float64, the spec has float32"):
        plan(q.double(), k, v)
    with pytest.raises(SpecError, match="takes no documents"):
        plan(q, k, v, documents=torch.tensor([0, 37]))
    with pytest.raises(RingError, match="shard is for a ring of processes"):
        plan.shard(q)
    with pytest.raises(RingError, match="there is no rank 4"):
        plan.positions(4)
    with pytest.raises(SpecError, match="is not saved"):
        plan.save("plan.json")
    with pytest.raises(SpecError, match="unknown validate='sometimes'"):
        plan.configure(validate="sometimes")
    with pytest.raises(SpecError, match="timeout must be a positive number"):
        plan.configure(timeout=0)


def test_second_derivatives_are_refused() -> None:
    plan = attnplan.compile(spec_of("causal", 4, "float64"), device="cpu", strategy="zigzag > ring")
    q, k, v = (torch.randn(1, 4, LENGTH, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(plan(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="a ring cannot be differentiated twice"):
        dq.sum().backward()


@pytest.mark.parametrize("name", ["causal", "longnet", "sinks", "grouped mean"])
@pytest.mark.parametrize("strategy", ["contiguous > rows", "zigzag > ring", "striped > all-gather", "zigzag > ulysses"])
def test_a_dry_run_moves_the_same_bytes(name: str, strategy: str) -> None:
    spec = spec_of(name, 2, "bfloat16", ranks=4, batch=3)
    plan = attnplan.compile(spec, device="cpu", strategy=strategy)
    for rank, program in enumerate(plan.programs):
        for backward in (False, True):
            dry, planned = dry_run(program, spec, backward=backward), plan.traffic(rank, backward=backward)
            assert (dry.bytes_sent, dry.bytes_received) == (planned.sent, planned.received)


# What breaks an execution must break a test: the mutations of published rings.


def ring_is_right(ranks: int = 4) -> bool:
    spec = AttentionSpec(seq_len=24, heads=2, head_dim=8, causal=True, dtype="float64")
    call = Call.of(spec)
    try:
        assert_agree(call.got(virtual(spec, ranks)), call.expected(), 1e-12, "")
    except AssertionError:
        return False
    return True


def test_mutations_of_the_backward_are_caught() -> None:
    assert ring_is_right()
    original = merging.Mixing.backward

    def per_part(self: Any, grad: Any, grad_lse: Any, lse: Any, parts: Any) -> Any:
        return [attrs.evolve(flow, lse=flow.lse + 1e-6) for flow in original(self, grad, grad_lse, lse, parts)]

    with mock.patch.object(merging.Mixing, "backward", per_part):
        assert not ring_is_right()

    backward = executor.Part.backward

    def with_own_lse(self: Any, flow: Any, q: Any, k: Any, v: Any, operands: Any, names: Any = ()) -> Any:
        out, lse = self.forward(q, k, v, operands)  # of this hop's keys alone (tt-metal #53205)
        return backward(self, attrs.evolve(flow, out=out, lse=lse), q, k, v, operands)

    with mock.patch.object(executor.Part, "backward", with_own_lse):
        assert not ring_is_right()

    hop_backward = executor.Rank._hop_backward

    def with_stale_keys(
        self: Any, hop: Hop, parts: Any, flows: Any, q: Any, own: Any, received: Any, *rest: Any
    ) -> Any:
        stale = dict.fromkeys(received, own)  # of hop 0 (diffusers #14265)
        return hop_backward(self, hop, parts, flows, q, own, stale, *rest)

    with mock.patch.object(executor.Rank, "_hop_backward", with_stale_keys):
        assert not ring_is_right()
    with mock.patch.object(executor.Rank, "_add_arrived", return_value=None):  # gradients that never come home
        assert not ring_is_right()


def test_mutations_of_the_merge_are_caught() -> None:
    def forgets(self: Any, out: Any, lse: Any, rows: Any = None) -> None:
        self._pieces = [merge_parts.Piece(out, lse, rows)]

    with mock.patch.object(merging.Total, "add", forgets):
        assert not ring_is_right()

    original = merging.merge_parts

    def by_halves(pieces: Any, q: Any, dtype: Any, **options: Any) -> Any:
        out, lse = original(pieces, q, dtype, **options)
        return out, lse - 1e-6

    with mock.patch.object(merging, "merge_parts", by_halves):
        assert not ring_is_right()


def test_rows_without_a_key_are_no_numbers_that_spread() -> None:
    spec = AttentionSpec(
        seq_len=24, heads=2, head_dim=8, dtype="float64", ring_size=4, pattern=P.window(2, 0) & P.band(3, -1)
    )
    plan = attnplan.compile(spec, device="cpu", strategy="contiguous > all-gather")
    q, k, v = (torch.randn(1, 2, 24, 8, dtype=torch.float64) for _ in range(3))
    out, lse = plan(q, k, v, return_lse=True)
    assert lse[0, 0, 0] == -torch.inf
    assert not out.isnan().any()


# What ranks of one process share.


def stores_made(plan: Any, call: Call) -> int:
    """Return how many copies of all keys, or all values, a call puts together."""
    found: list[Assembly] = []
    original = Assembly.gather

    def gather(self: Assembly, sources: Any, like: Any) -> Any:
        if self.same is None and not self.slice and self.wanted.length == LENGTH:
            found.append(self)
        return original(self, sources, like)

    with mock.patch.object(Assembly, "gather", gather):
        call.got(plan)
    return len(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_store_that_all_ranks_need_is_put_together_once(layout: str) -> None:
    """Keys and values, forward and backward: each of the ranks copied all of them."""
    plan = compiled(spec_of("causal", 2, "float32"), f"{layout} > all-gather")
    assert plan is not None
    call = Call.of(attrs.evolve(plan.spec, ring_size=1), batch=2)
    assert stores_made(plan, call) == 4


@pytest.mark.parametrize("name", ["causal", "longnet", "documents"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_stores_change_no_bit(name: str, layout: str) -> None:
    for strategy in (f"{layout} > all-gather", f"{layout} > rows"):
        plan = compiled(spec_of(name, 2, "float32", layout="bshd"), strategy)
        assert plan is not None
        call = Call.of(attrs.evolve(plan.spec, ring_size=1), batch=2)
        shared = call.got(plan)
        with mock.patch.object(Stores, "take", lambda self, asked, i, make: make()):  # as on a mesh
            alone = call.got(plan)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(shared.items(), alone.items(), strict=True)), strategy


def test_a_shared_store_goes_with_the_last_rank_that_takes_it() -> None:
    asked = (0, Holding((RowMap.whole(1, 4),), 1))
    stores = Stores([asked, (1, asked[1]), asked])
    made = [stores.take(asked, 0, lambda: torch.zeros(4)) for _ in range(2)]
    assert made[0] is made[1]
    assert stores.take((1, asked[1]), 0, lambda: torch.ones(4)) is not made[0], "that of another hop"
    assert not stores._made


def test_a_message_to_many_is_measured_once() -> None:
    plan = compiled(spec_of("causal", 2, "float32"), "contiguous > all-gather")
    assert plan is not None
    q, k, v = (torch.randn(1, h, LENGTH, 8) for h in (4, 2, 2))
    with mock.patch.object(virtual_module, "size_of", wraps=virtual_module.size_of) as measured:
        plan(q, k, v)
    assert measured.call_count == 4  # of 12 messages: each rank sends its shard to three
    assert plan.engine.bytes_sent == tuple(plan.traffic(r, batch=1).sent for r in range(4))


# The lockstep itself.


def test_lockstep_errors_name_who_waits_for_whom() -> None:
    x = torch.zeros(2)
    shape = ((tuple(x.shape), x.dtype),)

    def asks(peer: int, sizes: Any = shape) -> Any:
        handle = yield Start("keys and values", 3, "p2p", {}, {peer: sizes})
        return (yield Wait(handle))

    def gives(peer: int, times: int = 1) -> Any:
        for _ in range(times):
            handle = yield Start("keys and values", 3, "p2p", {peer: (x,)}, {})
        return (yield Wait(handle))

    with pytest.raises(RingError, match="rank 0 waits for the keys and values of rank 1 at hop 3: never sent"):
        VirtualRing(2).run([asks(1), asks(0)])
    with pytest.raises(RingError, match="rank 1 never received the keys and values that rank 0 sent it at hop 3"):
        VirtualRing(2).run([gives(1), iter_nothing()])
    with pytest.raises(RingError, match="rank 0 sends rank 1 its keys and values twice at hop 3"):
        VirtualRing(2).run([gives(1, 2), asks(0)])
    longer = (((3,), x.dtype),)
    with pytest.raises(RingError, match=r"rank 0 sent rank 1 torch.float32 \[2\] .* torch.float32 \[3\] was expected"):
        VirtualRing(2).run([gives(1), asks(0, longer)])


def iter_nothing() -> Any:
    return
    yield


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["causal", "longnet", "sinks", "grouped mean"])
@pytest.mark.parametrize("strategy", ["zigzag > ring", "contiguous > rows", "contiguous > ulysses"])
def test_a_virtual_ring_on_a_gpu(name: str, strategy: str) -> None:
    for dtype in ("float32", "bfloat16"):
        spec = spec_of(name, 2, dtype, seq_len=1024, head_dim=64)
        plan = attnplan.compile(spec, device="cuda", strategy=strategy)
        assert all(c.passed for c in plan.verify().checks)


def test_shards_are_put_together_as_views_where_each_is_a_box():
    """A sequence lies shard by shard in messages, and outputs come home head by head."""
    own = Holding((RowMap(0, 0, (Axis(4, head=1), Axis(8, row=1))),), 4)
    rows = Holding((RowMap(2, 8, (Axis(2, head=1), Axis(8, row=1))),), 2)
    heads = Holding((RowMap(4, 0, (Axis(2, head=1), Axis(16, row=1))),), 2)
    values = [torch.randn(1, h.heads, h.length, 3) for h in (own, rows, heads)]
    longer = Holding((RowMap(2, 0, (Axis(2, head=1), Axis(16, row=1))),), 2)
    wider = Holding((RowMap(1, 2, (Axis(5, head=1), Axis(6, row=1))),), 5)
    expected = (
        torch.cat([values[0][:, 2:], values[1]], 2),
        torch.cat([values[0][:, 1:, 2:8], values[2][:, :, 2:8]], 1),
    )
    for wanted, right in zip((longer, wider), expected, strict=True):
        plan = assembly(wanted, (own, rows, heads))
        assert [type(m.here) for m in plan.moves] == [RowMap, RowMap]
        assert torch.equal(plan.gather(values, values[0]), right)
