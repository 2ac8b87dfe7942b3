"""Who runs the ranks of a ring: all of them in one process, or this one's on a process group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from attnplan.errors import RingError
from attnplan.ir import RowMap
from attnplan.runtime.first_order import RING, first_order
from attnplan.runtime.ring.exchanges import Routine, run
from attnplan.runtime.ring.executor import Pair, Rank, Result
from attnplan.runtime.ring.faults import ANSWER, Board, LostError, Report, error_of, within
from attnplan.runtime.ring.handshake import CALL, VALIDATE, Cards, card, compare, shake_hands
from attnplan.runtime.ring.parts import Gradients
from attnplan.runtime.ring.real import RealTransport
from attnplan.runtime.ring.rows import Assembly, Holding, assembly
from attnplan.runtime.ring.stores import Asked, Stores
from attnplan.runtime.ring.virtual import VirtualRing
from attnplan.runtime.scores import learned
from attnplan.runtime.views import empty_like_rows

Flow = tuple[Tensor, Tensor | None]
T = TypeVar("T")


class Engine(Protocol):
    """Runs a ring on what one process is called with."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], keep: bool) -> Any:
        """Return (output, LSE or None, what the backward needs of each rank)."""
        ...

    def backward(
        self,
        flow: Flow,
        saved: Sequence[Result],
        k: Tensor,
        v: Tensor,
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> Gradients:
        """Return the gradients of q, k and v, then of the named operands, as far as this process's rows have any."""
        ...

    def kept(self, q: Tensor, out: Tensor, lse: Tensor) -> Sequence[Result]:
        """Return what the backward needs, where that is all in q, output and LSE: see :func:`calls.untraced`."""
        ...


class VirtualEngine:
    """All ranks of a ring on one device, called with whole tensors ``[B, H, S, D]``.

    Attributes
    ----------
    bytes_sent : tuple of int
        What each rank would have sent in the last forward, or backward.
    """

    def __init__(self, ranks: Sequence[Rank], heads: tuple[int, int], lengths: tuple[int, int]) -> None:
        self.ranks = ranks
        self._whole = [Holding((RowMap.whole(h, n),), h) for h, n in zip(heads, lengths, strict=True)]
        self.bytes_sent: tuple[int, ...] = (0,) * len(ranks)
        self._asked: tuple[Asked, ...] | None = None
        self._shards: dict[tuple[int, int], Assembly] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], keep: bool) -> Any:
        """Run every rank; see :meth:`Engine.forward`."""
        stores = self._stores()
        routines = [
            rank.forward(self._cut(i, 0, q), self._cut(i, 1, k), self._cut(i, 1, v), operands, stores)
            for i, rank in enumerate(self.ranks)
        ]
        results: list[Result] = self._run(routines)
        out = empty_like_rows(q, v.shape[-1], q.dtype)
        self._join(0, [r.out for r in results], out)
        lses = [r.lse.unsqueeze(-1) for r in results if r.lse is not None]
        if not lses:
            return out, None, results
        lse = q.new_empty((*q.shape[:3], 1), dtype=lses[0].dtype)
        self._join(0, lses, lse)
        return out, lse.squeeze(-1), results

    def backward(
        self,
        flow: Flow,
        saved: Sequence[Result],
        k: Tensor,
        v: Tensor,
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> Gradients:
        """Run every rank; see :meth:`Engine.backward`."""
        grad, grad_lse = flow[0], None if flow[1] is None else flow[1].unsqueeze(-1)
        routines, stores = [], self._stores()
        for i, (rank, result) in enumerate(zip(self.ranks, saved, strict=True)):
            to_lse = None if grad_lse is None else self._cut(i, 0, grad_lse).squeeze(-1)
            own = (self._cut(i, 1, k), self._cut(i, 1, v))
            routines.append(rank.backward(self._cut(i, 0, grad), to_lse, result, *own, operands, names, stores))
        found: list[Gradients] = self._run(routines)
        dq = empty_like_rows(grad, found[0][0].shape[-1], grad.dtype)
        totals = (dq, torch.empty_like(k), torch.empty_like(v))
        dq_parts, dk_parts, dv_parts, *more = zip(*found, strict=True)
        for side, total, parts in zip((0, 1, 1), totals, (dq_parts, dk_parts, dv_parts), strict=True):
            self._join(side, parts, total)
        return *totals, *(torch.stack(parts).sum(0) for parts in more)

    def kept(self, q: Tensor, out: Tensor, lse: Tensor) -> list[Result]:
        """Cut out what each rank attended for; see :meth:`Engine.kept`."""
        found = []
        for rank in self.ranks:
            plan = assembly(rank.attended, (self._whole[0],))
            queries, part, total = (plan.gather([x], x) for x in (q, out, lse.unsqueeze(-1)))
            found.append(_alone(queries, part, total.squeeze(-1)))
        return found

    def _run(self, routines: Sequence[Routine[T]]) -> list[T]:
        ring = VirtualRing(len(self.ranks))
        results = ring.run(routines)
        self.bytes_sent = tuple(ring.bytes_sent)
        return results

    def _stores(self) -> Stores:
        """Return what the ranks of one call share."""
        if self._asked is None:
            self._asked = tuple(one for rank in self.ranks for one in rank.assembled())
        return Stores(self._asked)

    def _shard(self, rank: int, side: int) -> Assembly:
        """Return where a rank's rows of q and out, or of k and v, lie in the whole tensor."""
        found = self._shards.get((rank, side))
        if found is None:
            held = self.ranks[rank].keys if side else self.ranks[rank].queries
            found = self._shards[rank, side] = assembly(held, (self._whole[side],))
        return found

    def _cut(self, rank: int, side: int, x: Tensor) -> Tensor:
        return self._shard(rank, side).gather([x], x)

    def _join(self, side: int, parts: Sequence[Tensor], whole: Tensor) -> None:
        held = tuple(rank.keys if side else rank.queries for rank in self.ranks)
        assembly(self._whole[side], held).fill(whole, parts)


class RealEngine:
    """The rank of a ring that this process is, called with its shards.

    Attributes
    ----------
    step : int
        Number of calls so far.
    """

    def __init__(self, rank: Rank, group: Any, device: torch.device, plan: int, store: Any, name: str) -> None:
        self.rank, self.plan, self.device = rank, plan, device
        self.validate, self.timeout = "first", 300.0
        self.transport = RealTransport(group, device, self.timeout)
        self.board = Board(store, self.transport.rank, self.transport.ranks, name)
        self.cards = Cards(store, self.transport.rank, self.transport.ranks, name)
        self.step = 0
        self._card: list[int] = []
        self._agreed: list[int] | None = None
        self._met = 0
        self._broken: RingError | None = None

    def configure(self, validate: str, timeout: float) -> None:
        """Set when ranks shake hands, and how long they wait for one another."""
        assert validate in VALIDATE
        self.validate, self.timeout, self.transport.timeout = validate, timeout, timeout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], keep: bool) -> Any:
        """Run this rank; see :meth:`Engine.forward`."""
        self.agree(q, operands, gradients=keep)
        result: Result = self._guarded(lambda: run(self.rank.forward(q, k, v, operands), self.transport), "forward")
        return result.out, result.lse, [result]

    def backward(
        self,
        flow: Flow,
        saved: Sequence[Result],
        k: Tensor,
        v: Tensor,
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> Gradients:
        """Run this rank; see :meth:`Engine.backward`."""
        (result,) = saved
        return self._guarded(
            lambda: run(self.rank.backward(*flow, result, k, v, operands, names), self.transport), "backward"
        )

    def kept(self, q: Tensor, out: Tensor, lse: Tensor) -> list[Result]:
        """Return what this rank's backward needs; see :meth:`Engine.kept`."""
        return [_alone(q, out, lse)]

    def agree(self, q: Tensor, operands: Mapping[str, Any], *, gradients: bool) -> None:
        """Count a call, and shake hands if this one asks for it.

        Raises
        ------
        RingError
            If another rank is about to do something else, or does not answer.
        """
        if self._broken is not None:
            raise self._again()
        self.step += 1
        own = self._card = card(self.plan, self.step, q, operands, gradients=gradients, wrong=False)
        lasting = [x for i, x in enumerate(own) if i != CALL]
        if self.validate == "first" and lasting != self._agreed:
            came = self._guarded(lambda: self._met_by(own), "handshake", quiet=True)
            self._compare([came.get(r, []) for r in range(self.transport.ranks)])
        connects = self._agreed is None and self.device.type == "cuda"  # NCCL needs all ranks in its first call
        if self.validate == "always" or connects:
            self._compare(self._guarded(lambda: self._gathered(own), "handshake", quiet=True))
        self._agreed = lasting

    def refuse(self, q: Tensor, operands: Mapping[str, Any], error: Exception) -> None:
        """Tell the other ranks that this one's call is wrong, so that they need not wait for it."""
        if self._broken is not None:
            return
        self.step += 1
        self._broken = self._report(error)
        own = card(self.plan, self.step, q, operands, gradients=False, wrong=True)
        with suppress(LostError):  # what this rank has to say is the error, not who does not listen
            if self.validate == "first":
                within(ANSWER, lambda: self.cards.leave(own))
            elif self.validate == "always":
                self._gathered(own)

    def _gathered(self, own: Sequence[int]) -> list[list[int]]:
        return shake_hands(own, self.transport.group, self.device, self.timeout)

    def _met_by(self, own: Sequence[int]) -> dict[int, list[int]]:
        """Return the cards of all ranks from the store.

        If most did not come, this rank's call changed alone: they go by what was agreed before.
        """
        self._met = self.step
        came = self.cards.meet(own, self.timeout)
        absent = [r for r in range(self.transport.ranks) if r not in came]
        if absent and (self._agreed is None or 2 * len(absent) <= self.transport.ranks):
            what = f"rank {', '.join(map(str, absent))} did not come to compare within {self.timeout:g} s"
            raise LostError(absent[0], -1, "handshake", TimeoutError(what))
        if absent:
            assert self._agreed is not None
            before = [*self._agreed[:CALL], self.step, *self._agreed[CALL:]]
            came |= dict.fromkeys(absent, before)
        return came

    def _compare(self, cards: Sequence[Sequence[int]], end: str = "nothing was sent") -> None:
        try:
            compare(self.transport.rank, cards, self.step, end)
        except RingError as error:
            self._broken = error
            raise

    def _compare_late(self, lost: LostError) -> None:
        """Raise if a message did not come because another rank's call changed, and this one's did not."""
        if self.validate != "first" or self._met == self.step:
            return
        came = {rank: one for rank, one in self.cards.at(self.step).items() if not one[0]}  # a wrong one left a report
        try:
            cards = [came.get(r, self._card) for r in range(self.transport.ranks)]
            self._compare(cards, "this rank waited for its message in vain")
        except RingError as error:
            raise error from lost.error

    def _report(self, error: Exception) -> RingError:
        """Tell the other ranks of an error of this one; return what later calls say."""
        what = f"{type(error).__name__}: {error}"[:400]
        self.board.post(Report(self.transport.rank, self.step, -1, "raised", -1, what))
        return RingError(f"rank {self.transport.rank} raised {what}")

    def _guarded(self, action: Callable[[], T], doing: str, *, quiet: bool = False) -> T:
        """Run one half of a call; whatever fails becomes a report, and names the rank that failed first."""
        if self._broken is not None:
            raise self._again()
        try:
            return action()
        except LostError as lost:
            self._compare_late(lost)
            what = f"{lost.doing}: {lost.error}" if not quiet else str(lost.error)
            own = Report(self.transport.rank, self.step, lost.hop, "lost", lost.peer, what[:400])
            self.board.post(own)
            reports = self.board.collect(own)
            self._broken = error_of(own, reports, self.transport.ranks, doing)
            raise self._broken from lost.error
        except Exception as error:
            self._broken = self._report(error)
            raise

    def _again(self) -> RingError:
        error = RingError(f"this ring broke at an earlier call: {self._broken}; start the process group anew")
        if self._broken is not None:
            error.rank, error.peer, error.hop, error.step = (
                self._broken.rank, self._broken.peer, self._broken.hop, self._broken.step,
            )  # fmt: skip
        return error


class _Ring(torch.autograd.Function):
    """A call of a ring as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, operands: Mapping[str, Any], names: tuple[str, ...], *given: Tensor) -> Any:
        q, k, v, *own = given
        out, lse, results = engine.forward(q, k, v, operands, True)
        ctx.engine, ctx.names = engine, names
        ctx.operands = {name: x for name, x in operands.items() if name not in names}
        ctx.shape = [(len(r.parts), r.total is not None) for r in results]
        ctx.save_for_backward(k, v, *own, *(x for r in results for x in _tensors(r)))
        ctx.set_materialize_grads(False)
        ctx.out_shape = out.shape
        if lse is None:
            return out, None
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        k, v, *rest = ctx.saved_tensors
        own, rest = rest[: len(ctx.names)], rest[len(ctx.names) :]
        operands = {**ctx.operands, **dict(zip(ctx.names, own, strict=True))}
        saved = []
        for parts, has_total in ctx.shape:
            queries, *more = rest[: 1 + 2 * parts + has_total]
            rest = rest[1 + 2 * parts + has_total :]
            pairs: tuple[Pair, ...] = tuple((more[2 * i], more[2 * i + 1]) for i in range(parts))
            saved.append(Result(pairs[0][0], None, queries, pairs, more[-1] if has_total else None))
        if grad is None:
            grad = saved[0].queries.new_zeros(ctx.out_shape)
        with torch.no_grad():
            gradients = ctx.engine.backward((grad, grad_lse), saved, k, v, operands, ctx.names)
        return None, None, None, *first_order(gradients, RING)


def _alone(queries: Tensor, out: Tensor, lse: Tensor) -> Result:
    """Return the result of one softmax."""
    return Result(out, lse, queries, ((out, lse),), lse)


def _tensors(result: Result) -> list[Tensor]:
    found = [result.queries, *(x for pair in result.parts for x in pair)]
    return found if result.total is None else [*found, result.total]


def call(engine: Engine, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Run a ring on what this process holds, differentiably: (output, LSE where there is one)."""
    names = learned(operands)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or names):
        given = (operands[name] for name in names)
        out, lse = _Ring.apply(engine, operands, names, q, k, v, *given)  # type: ignore[no-untyped-call]
        return out, lse
    with torch.no_grad():
        out, lse, _ = engine.forward(q, k, v, operands, False)
    return out, lse
