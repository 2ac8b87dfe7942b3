"""Plans: what :func:`compile` returns, called like a function."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from attnplan.backends import Backend, Program, Schedule
from attnplan.calls import check_call
from attnplan.cost import Prediction, Target
from attnplan.errors import AttnPlanError, KernelError, MemoryBudgetError, NoBackendError, RingError, SpecError
from attnplan.ir import Attend, Graph, Output, Take
from attnplan.passes import Chunk, Recompute, Step
from attnplan.search import Candidate, Choice, Found, failing, lowerings, search
from attnplan.spec import AttentionSpec
from attnplan.tracing import Traced

if TYPE_CHECKING:
    from torch import Tensor

    from attnplan.store import Record

_KEPT_PROGRAMS = 64


class Plan(Traced):
    """A chosen way to run a spec. Made by :func:`attnplan.compile`; call it with q, k and v.

    Attributes
    ----------
    spec : AttentionSpec
        What it computes.
    device : attnplan.cost.Device
        The device that it was planned for.
    backend, schedule, strategy, choice : str
        The choice; ``choice`` is all of it as reports write it, with what it is looped over to fit a budget.
    graph : attnplan.ir.Graph
        The program after all passes; for a spec with open lengths, at their maximum.
    steps : tuple of attnplan.passes.Step
        The passes that ran, each verified.
    candidates : tuple of attnplan.search.Candidate
        Every way to run it: priced, or refused with reasons.
    predicted : attnplan.cost.Prediction
        ``seconds`` and ``peak_bytes`` of one call.
    tuning : attnplan.tune.Tuning or None
        What was measured to choose it; None for a choice by price.
    saved : attnplan.store.Record or None
        Of a plan that was read from a file: what was predicted when it was saved.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        target: Target,
        found: Found,
        pins: Mapping[str, Any],
        *,
        strict: bool = False,
        deterministic: bool = False,
    ) -> None:
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
        self.choice: str = found.candidate.name
        self.pins = dict(pins)
        self.strict, self.deterministic = strict, deterministic
        self._searched: dict[str, Any] = {"deterministic": deterministic, "calls": found.calls}
        self.tuning: Any = None
        self.saved: Record | None = None
        self._backend: Backend = found.backend
        self._schedule: Schedule = found.schedule
        self._programs: OrderedDict[tuple[int, int], Program] = OrderedDict()
        self._program: Program | None = None
        self._lock = threading.Lock()
        self._seen: tuple[Any, ...] = (None,) * 5
        self._always_check = bool(spec.operands)
        self._swapped, self._has_lse = spec.layout == "bshd", spec.has_lse
        self._follows: bool | None = None
        self._next: Plan | None = None
        self._failed: dict[Choice, str] = {}
        self._expose()

    @property
    def program(self) -> Program:
        """The emitted program; where every length has its own, the one for the maximum."""
        shape = self.spec.shape
        return self._program_at(shape.seq_len, shape.kv_len)

    def _program_at(self, seq_len: int, kv_len: int) -> Program:
        """Return the program that runs calls of these lengths, emitted on first use."""
        with self._lock:
            if self._program is None and self._follows is None:
                program = self._emit(self.spec, self.graph) if self.spec.is_static or not _takes(self.graph) else None
                self._follows = program is not None and (self.spec.is_static or program.follows_lengths)
                if self._follows:
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
        found = lowerings(here, self._schedule.tiling(here.training), fused=self._schedule.fused)
        lowered = {name: x for x in found for name in (x.strategy, *x.also)}
        graph = lowered[self.strategy].graph
        for step in self.steps:  # what the search looped over to fit a budget, at these lengths
            if isinstance(step.rewrite, Chunk | Recompute):
                graph = step.rewrite(graph)
        return self._emit(here, graph)

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
        bias
            For ``bias=True``: what is added to the scores, ``[H, S, K]`` or ``[B, H, S, K]`` with sizes of 1 where it
            broadcasts. Query rows are counted as in q. Gradients flow back to it, and to the next two.
        alibi_slopes
            For ``alibi_slopes=True``: ``[H]`` or ``[B, H]``; ``-slope * |i - j|`` is added to scores.
        sink_logits
            For ``sink_logits=True``: ``[H]``, the score of one more key of value 0.

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
        KernelError
            If a kernel of another package fails and no other candidate may take over: the backend was pinned, the plan
            is ``strict``, or nothing else can run. Otherwise a ``RuntimeWarning`` names both.
        """
        if self._is_compiling():
            return self._traced(q, k, v, return_lse, operands)
        if self._always_check or operands or return_lse or not self._seen_before(q, k, v):
            self._check_call(q, k, v, return_lse, operands)
        swapped = self._swapped
        if swapped:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self._next is None:
            program = self._program or self._program_at(q.shape[2], k.shape[2])
            try:
                out, lse = program(q, k, v, operands, return_lse)
            except RuntimeError as error:
                out, lse = self._instead(self._reported(error, q, k, v))._run(q, k, v, operands, return_lse)
        else:
            out, lse = self._next._run(q, k, v, operands, return_lse)
        if swapped:
            out = out.transpose(1, 2)
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``, by the next candidate again if this one fails too."""
        try:
            return self._program_at(q.shape[2], k.shape[2])(q, k, v, operands, return_lse)
        except RuntimeError as error:
            return self._instead(self._reported(error, q, k, v))._run(q, k, v, operands, return_lse)

    def _reported(self, error: RuntimeError, q: Tensor, k: Tensor, v: Tensor) -> KernelError:
        """Return what a kernel raised with backend, schedule and shapes; raise what is no kernel's fault."""
        if isinstance(error, KernelError):
            return error
        if self.device.kind == "cpu" or isinstance(error, AttnPlanError) or type(error).__name__ == "OutOfMemoryError":
            raise error
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip("qkv", (q, k, v), strict=True))
        made = KernelError(
            f"{self.backend} ({self.schedule}) failed on {shapes} {q.dtype} {q.device}: {type(error).__name__}: {error}"
        )
        made.__cause__ = error
        return made

    def _instead(self, error: KernelError) -> Plan:
        """Return the plan of the next candidate, with a warning that names both; raise ``error`` if there is none.

        It stays: a kernel that failed once is not tried again by this plan.
        """
        if self._next is not None:
            return self._next
        if self.strict or self.pins.get("backend", "auto") != "auto":
            raise error
        choice, why = (self.strategy, self.backend, self.schedule), f"failed in a call: {error}"
        failed = {**self._failed, **failing(self.candidates, choice, self._schedule, why)}
        try:
            found = search(self.spec, self.target, **self.pins, **self._searched, failed=failed)
        except (NoBackendError, MemoryBudgetError):
            raise error from None
        warnings.warn(
            f"{self.strategy} > {self.backend} ({self.schedule}) failed: {error}; this plan now runs "
            f"{found.candidate.name}. strict=True raises instead",
            RuntimeWarning,
            stacklevel=3,
        )
        following = Plan(self.spec, self.target, found, self.pins, deterministic=self.deterministic)
        following._failed = failed
        self._next = following
        return following

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

    def explain(self, format: str = "text", *, measure: bool = False) -> Any:  # noqa: A002  # the public name
        """Return what was chosen, why, and what everything costs.

        Parameters
        ----------
        format
            ``"text"`` for the page that people read, ``"json"`` for the same facts as a dict.
        measure
            Run the plan for about two seconds, on random inputs, and show what every op took beside what was
            predicted.

        Raises
        ------
        NoBackendError
            If ``measure`` is asked for on hardware that is not here.

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
        measured = None
        if measure:
            from attnplan import measure as measuring

            measured = measuring.measure(self)
        found = facts(self, measured)
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

    def save(self, path: str | Path) -> None:
        """Write the plan to a file that :func:`attnplan.load` reads back: spec, choice and graph, as data.

        Raises
        ------
        SpecError
            If the pattern holds a Python function, or the file cannot be written.
        """
        text = self._text(recorded=True)
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise SpecError(f"cannot write the plan file {str(path)!r}: {error.strerror}") from None

    def stream(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        out: Any = None,
        max_memory: int | str | None = None,
        progress: Any = None,
        resume: bool = False,
        journal: str | Path | None = None,
        **operands: Any,
    ) -> Any:
        """Compute attention over tensors that stay in host memory or in files, of which the device holds a few pieces.

        Parameters
        ----------
        q, k, v
            Tensors on the CPU (pinned memory is copied while the device computes), numpy arrays or memory maps, or
            paths of files that hold the elements in order, without a header. Shapes as in a call.
        out
            The same for the output; a file is made if it does not exist. The default is a new tensor on the CPU.
        max_memory
            Bytes, or text such as ``"8 GiB"``: a limit on what the device holds, the pieces of q, k, v and the output
            included. The default is the device's memory.
        progress
            True shows a bar; a function is called with the number of pieces that are done, and of all.
        resume
            Go on where an interrupted stream of the same plan, files and budget ended: its journal lies beside ``out``.
        journal
            Path of the journal, where ``out`` is a tensor.
        **operands
            Runtime operands, as in a call.

        Returns
        -------
        Tensor, array or path
            ``out``.

        Raises
        ------
        SpecError
            If a tensor does not fit the spec, a file is too short, or a journal is that of another stream.
        MemoryBudgetError
            If no pieces fit the budget.
        StreamError
            If a file fails in the middle; the message says where.

        Examples
        --------
        >>> import attnplan, torch
        >>> plan = attnplan.compile(attnplan.AttentionSpec(seq_len=512, heads=2, head_dim=8, dtype="float32"))
        >>> q, k, v = (torch.randn(1, 2, 512, 8) for _ in "qkv")
        >>> torch.allclose(plan.stream(q, k, v, max_memory="256 KiB"), plan(q, k, v), atol=1e-6)
        True
        """
        from attnplan.streams import stream

        return stream(self, q, k, v, out, max_memory, progress, resume, journal, **operands)

    def shard(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Raise: a plan on one device has no shards; see :class:`~attnplan.plan_ring.RingPlan`."""
        raise RingError("this plan has no mesh: compile with mesh= to run over several ranks")

    def unshard(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Raise: a plan on one device has no shards; see :class:`~attnplan.plan_ring.RingPlan`."""
        raise RingError("this plan has no mesh: compile with mesh= to run over several ranks")

    def positions(self, rank: int | None = None) -> Any:
        """Raise: a plan on one device has no shards; see :class:`~attnplan.plan_ring.RingPlan`."""
        raise RingError("this plan has no mesh: compile with mesh= to run over several ranks")

    def shard_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raise: a plan on one device has no shards; see :class:`~attnplan.plan_ring.RingPlan`."""
        raise RingError("this plan has no mesh: compile with mesh= to run over several ranks")

    def _text(self, *, recorded: bool = False) -> str:
        """Return the text of the plan's file, which an exported program carries."""
        from attnplan.api import fingerprint
        from attnplan.store import dump

        return dump(self, fingerprint(), recorded=recorded)

    # What torch.compiler.assume_constant_result sets: a trace calls this, and does not look inside.
    _text._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        choice = f"{self.strategy} > {self.backend} ({self.schedule})"
        return f"<Plan {self.spec.pattern!r}{' causal' if self.spec.causal else ''} on {self.device.name}: {choice}>"


def _takes(graph: Graph) -> bool:
    """Return whether a graph depends on its lengths, because it takes rows or tiles apart or is run in pieces."""
    looped = any(op.loop is not None or op.recompute for _, op in graph.of(Output))
    return looped or bool(graph.of(Take)) or any(op.tile or op.loop for _, op in graph.of(Attend))
