"""Plans: what :func:`compile` returns, called like a function."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from attnplan.backends import Backend, Program, Schedule
from attnplan.calls import check_call
from attnplan.cost import Prediction, Target
from attnplan.errors import RingError, SpecError
from attnplan.ir import Graph
from attnplan.passes import Step
from attnplan.search import Candidate, Found, lowerings
from attnplan.spec import AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_PROGRAMS = 64


class Plan:
    """A chosen way to run a spec. Made by :func:`attnplan.compile`; call it with q, k and v.

    Attributes
    ----------
    spec : AttentionSpec
        What it computes.
    device : attnplan.cost.Device
        The device that it was planned for.
    backend, schedule, strategy : str
        The choice.
    graph : attnplan.ir.Graph
        The program after all passes; for a spec with open lengths, at their maximum.
    steps : tuple of attnplan.passes.Step
        The passes that ran, each verified.
    candidates : tuple of attnplan.search.Candidate
        Every way to run it: priced, or refused with reasons.
    predicted : attnplan.cost.Prediction
        ``seconds`` and ``peak_bytes`` of one call.
    """

    def __init__(self, spec: AttentionSpec, target: Target, found: Found, pins: Mapping[str, Any]) -> None:
        self.spec = spec
        self.target = target
        self.device = target.device
        self.backend: str = found.backend.name
        self.schedule: str = found.schedule.name
        self.strategy: str = found.lowered.strategy
        self.graph: Graph = found.lowered.graph
        self.steps: tuple[Step, ...] = found.lowered.steps
        self.candidates: tuple[Candidate, ...] = found.candidates
        assert found.candidate.prediction is not None
        self.predicted: Prediction = found.candidate.prediction
        self.pins = dict(pins)
        self._backend: Backend = found.backend
        self._schedule: Schedule = found.schedule
        self._programs: OrderedDict[tuple[int, int], Program] = OrderedDict()
        self._program: Program | None = None
        self._lock = threading.Lock()
        self._seen: tuple[Any, ...] = (None,) * 5
        self._always_check = bool(spec.operands)
        self._swapped = spec.layout == "bshd"

    @property
    def program(self) -> Program:
        """The emitted program; where every length has its own, the one for the maximum."""
        shape = self.spec.shape
        return self._program_at(shape.seq_len, shape.kv_len)

    def _program_at(self, seq_len: int, kv_len: int) -> Program:
        """Return the program that runs calls of these lengths, emitted on first use."""
        with self._lock:
            if self._program is None and (self.spec.is_static or not _takes(self.graph)):
                program = self._emit(self.spec, self.graph)
                if self.spec.is_static or program.follows_lengths:
                    self._program = program
            if self._program is not None:
                return self._program
            key = (seq_len, kv_len)
            if key not in self._programs:
                self._programs[key] = self._specialised(seq_len, kv_len)
            self._programs.move_to_end(key)
            if len(self._programs) > _KEPT_PROGRAMS:
                self._programs.popitem(last=False)
            return self._programs[key]

    def _specialised(self, seq_len: int, kv_len: int) -> Program:
        """Emit the program for the lengths of one call of a spec with open lengths."""
        here = self.spec.at(seq_len, kv_len)
        lowered = {x.strategy: x for x in lowerings(here)}
        # a strategy that changes nothing at these lengths is listed once, under the first name
        return self._emit(here, lowered.get(self.strategy, lowered["dense"]).graph)

    def _emit(self, spec: AttentionSpec, graph: Graph) -> Program:
        device = self.target.torch_device or self.device.kind
        return self._backend.emit(graph, spec, self._schedule, device)

    @property
    def source(self) -> str:
        """The emitted program as readable Python."""
        return self.program.source

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **operands: Any
    ) -> Tensor: ...

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **operands: Any
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **operands: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the attention.

        Parameters
        ----------
        q, k, v
            ``[B, H, S, D]``, ``[B, H_kv, K, D]``, ``[B, H_kv, K, Dv]`` for ``layout="bhsd"``, or with heads and rows
            swapped for ``"bshd"``. Any strides; K/V heads are never repeated.
        return_lse
            Return the log-sum-exp of each row too: natural logarithm, ``[B, H, S]``, float32 (float64 for float64),
            -inf for a row that sees no key.
        documents
            For ``P.documents()``: cumulative lengths, int ``[n + 1]`` or ``[B, n + 1]``.
        key_padding
            For ``P.padding()``: bool ``[B, K]``, True where the key is real.
        q_offset
            For ``q_offset=True``: the position of query row 0, an int or an int tensor ``[]`` or ``[B]``.
        dropout_seed
            For ``dropout`` above 0: an int or an int64 tensor ``[]``; equal seeds drop equal pairs under every plan.

        Returns
        -------
        Tensor
            ``[B, H, S, Dv]`` in the layout and dtype of q; with ``return_lse`` a pair of it and the LSE.

        Raises
        ------
        SpecError
            If a tensor or operand does not fit the spec: the message says which, what it got and what it needs.
        NoBackendError
            If the plan is for hardware that is not here.
        """
        if self._always_check or operands or return_lse or not self._seen_before(q, k, v):
            self._check_call(q, k, v, return_lse, operands)
        swapped = self._swapped
        if swapped:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        program = self._program or self._program_at(q.shape[2], k.shape[2])
        out, lse = program(q, k, v, operands, return_lse)
        if swapped:
            out = out.transpose(1, 2)
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    def _seen_before(self, q: Any, k: Any, v: Any) -> bool:
        """Return whether these tensors are like those of the last call that was checked."""
        seen = self._seen
        try:
            return (
                q.shape == seen[0]
                and k.shape == seen[1]
                and v.shape == seen[2]
                and q.dtype is k.dtype is v.dtype is seen[3]
                and q.device == k.device == v.device == seen[4]
            )
        except AttributeError:  # not a tensor: the full check says so in words
            return False

    def _check_call(self, q: Any, k: Any, v: Any, return_lse: bool, operands: Mapping[str, Any]) -> None:
        check_call(self.spec, self.target, q, k, v, return_lse, operands)
        self._seen = (q.shape, k.shape, v.shape, q.dtype, q.device)  # one assignment: threads see all of it or none

    def explain(self, format: str = "text") -> Any:  # noqa: A002  # the public name
        """Return what was chosen, why, and what everything costs.

        Parameters
        ----------
        format
            ``"text"`` for the page that people read, ``"json"`` for the same facts as a dict.

        Examples
        --------
        >>> import attnplan
        >>> spec = attnplan.AttentionSpec(seq_len=4096, heads=8, head_dim=64, causal=True)
        >>> attnplan.compile(spec, device="h100").explain("json")["choice"]["strategy"]
        'dense'
        """
        from attnplan.explain import facts, render

        if format not in ("text", "json"):
            raise SpecError(f'unknown format {format!r}; use "text" or "json"')
        found = facts(self)
        return found if format == "json" else render(found)

    def verify(self, rows: int = 64, seed: int = 0) -> Any:
        """Prove the coverage again, and compare the plan's numbers with float64 on sampled rows.

        Parameters
        ----------
        rows
            Number of sampled (head, row) pairs.
        seed
            Seed of the random inputs and of the sample.

        Returns
        -------
        attnplan.verify.Report
            Errors and tolerances of output, LSE and gradients.

        Raises
        ------
        VerifyError
            If the graph does not cover the spec, or a number is outside its tolerance.
        """
        from attnplan.verify import verify_plan

        return verify_plan(self, rows, seed)

    def shard(self, tensor: Tensor) -> Tensor:
        """Raise: plans run on one device in this version."""
        raise RingError("this plan has no mesh: ring execution is not in this version")

    def unshard(self, tensor: Tensor) -> Tensor:
        """Raise: plans run on one device in this version."""
        raise RingError("this plan has no mesh: ring execution is not in this version")

    def positions(self, rank: int) -> Any:
        """Raise: plans run on one device in this version."""
        raise RingError("this plan has no mesh: ring execution is not in this version")

    def shard_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raise: plans run on one device in this version."""
        raise RingError("this plan has no mesh: ring execution is not in this version")

    def __repr__(self) -> str:
        choice = f"{self.strategy} > {self.backend} ({self.schedule})"
        return f"<Plan {self.spec.pattern!r}{' causal' if self.spec.causal else ''} on {self.device.name}: {choice}>"


def _takes(graph: Graph) -> bool:
    return any(node.op.name == "take" for node in graph)
