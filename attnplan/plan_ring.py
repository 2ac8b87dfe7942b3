"""Plans over several ranks: on a mesh of processes, or as a virtual ring on one device."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from attnplan.backends.base import import_failure
from attnplan.calls import check_operand_names, require_here
from attnplan.cost import Target
from attnplan.errors import RingError, SpecError, did_you_mean
from attnplan.ir import Attend, Graph
from attnplan.passes import PullMerge
from attnplan.plan import Plan
from attnplan.ring.build import programs, rank_graph
from attnplan.ring.program import ITEM_BYTES, RankProgram, Traffic, traffic
from attnplan.search_ring import FoundRing, RingPrediction, Runner, runner_of, whole_peak, without_sinks
from attnplan.sharding import Sharded
from attnplan.spec import AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor

VALIDATE = ("always", "first", "off")


class RingPlan(Sharded, Plan):
    """A chosen way to run a spec over several ranks. Made by :func:`attnplan.compile` with ``mesh=`` or ``ring_size``.

    On a mesh it is called with this rank's shards ``[B, H, s, D]``, or with DTensors whose sequence is sharded, and
    returns this rank's rows of the output; :meth:`shard` and :meth:`shard_batch` say which rows those are. Without a
    mesh it is a virtual ring: called with whole tensors, every rank's part runs on this device, in the same order, and
    in float32 the numbers are those of the real ring bit for bit.

    Attributes
    ----------
    spec : AttentionSpec
        What it computes, over the whole sequence.
    device : attnplan.cost.Device
        The device of each rank.
    ranks : int
        Number of ranks.
    layout, transport : str
        The choice: which rows a rank holds, and how those that it lacks get to it.
    strategy, backend, schedule : str
        Layout and transport in one, and what runs most of the graphs.
    candidates : tuple of attnplan.ring.choose.RingCandidate
        Every layout and transport: priced, or refused with the reason.
    predicted : RingPrediction
        ``seconds`` of one call on the slowest rank; ``peak_bytes`` of this process, which for a virtual ring holds what
        all ranks do; ``rank_peak_bytes`` of the rank that needs the most.
    mesh : torch.distributed.DeviceMesh or None
        The processes; None for a virtual ring.

    References
    ----------
    Liu et al., Ring Attention with Blockwise Transformers for Near-Infinite Context, arXiv 2310.01889.
    """

    def __init__(
        self, spec: AttentionSpec, target: Target, found: FoundRing, mesh: Any, pins: Mapping[str, Any], version: str
    ) -> None:
        self.spec, self.target, self.device, self.mesh = spec, target, target.device, mesh
        self.core = without_sinks(spec)
        self.candidates: tuple[Any, ...] = found.candidates
        self.pins, self.steps = dict(pins), ()
        self.candidate = found.candidates[0]
        self.layout, self.transport = self.candidate.layout, self.candidate.transport
        self.strategy = self.candidate.name
        self.ranks = self.candidate.ring * self.candidate.ulysses
        self.predicted = RingPrediction(  # type: ignore[assignment]  # no figures for each op
            self.candidate.seconds,
            self.candidate.peak_bytes,
            found.runners[0].schedule.compiles_for(spec.training),
            self._whole_peak if mesh is None else None,
        )
        self.runners, self.refused = found.runners, found.refused
        self.backend, self.schedule = found.runners[0].backend.name, found.runners[0].schedule.name
        self.validate, self.timeout = "first", 300.0
        self._version = version
        self._engine: Any = None
        self._lengths: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._swapped, self._has_lse, self._untraced = spec.layout == "bshd", spec.has_lse, ""
        self._expose()

    def _expose(self) -> None:
        """Make the plan known to traced programs."""
        if self.target.torch_device is None or "torch" not in sys.modules:
            return
        from attnplan.runtime.planned import handle_of
        from attnplan.runtime.ring.calls import untraced

        self._handle = handle_of(self)
        sizes = () if self.mesh is None else self._layout(self.spec.shape.seq_len).shard_sizes
        self._untraced = untraced(self.spec.rule, self.transport, sizes)

    @property
    def shape(self) -> int | tuple[int, int]:
        """Number of ranks; for ``hybrid``, (groups of the ring, ranks of a group)."""
        return self.candidate.shape

    @property
    def programs(self) -> tuple[RankProgram, ...]:
        """What each rank does."""
        return programs(self.core, self.shape, self.layout, self.transport)

    def __getattr__(self, name: str) -> Any:
        if name == "graph":  # of this rank, with what it receives; made when it is asked for
            self.graph = rank_graph(self.core, self.shape, self.layout, self.transport, self.rank)
            return self.graph
        raise AttributeError(f"a plan over several ranks has no {name!r}")

    @property
    def rank(self) -> int:
        """The rank that this process is; 0 for a virtual ring, which is all of them."""
        if self.mesh is None:
            return 0
        from attnplan.runtime.ring.groups import rank_in

        return rank_in(self.mesh)

    def traffic(self, rank: int, *, backward: bool = False, batch: int | None = None) -> Traffic:
        """Return the bytes that a rank sends and receives in one pass, exactly.

        Parameters
        ----------
        rank
            Which rank.
        backward
            The backward pass instead of the forward pass.
        batch
            Batch size; the default is the spec's.
        """
        spec = self.spec
        features = {"q": spec.head_dim, "k": spec.head_dim, "v": spec.value_dim, "o": spec.value_dim}
        program, times = self.programs[rank], batch or spec.batch
        one = traffic(program, features, spec.dtype, backward=backward)
        if program.last is not None and not backward and not spec.has_lse:  # where there is no LSE, none travels
            item = max(4, ITEM_BYTES[spec.dtype])
            one += Traffic(-item * program.last.sent, -item * program.last.received)
        if program.first is not None and backward and spec.sink_logits:  # sinks ask for the gradient of the LSE
            item = max(4, ITEM_BYTES[spec.dtype])
            one += Traffic(item * program.first.sent, item * program.first.received)
        return Traffic(one.sent * times, one.received * times)

    def configure(self, *, validate: str | None = None, timeout: float | None = None) -> RingPlan:
        """Set how ranks agree on a call and how long they wait; return the plan.

        Parameters
        ----------
        validate
            When ranks compare what they are about to do, before the first byte: ``"always"``; ``"first"``, at the first
            call and whenever this rank's batch size, dtype or operands change; or ``"off"``, which moves garbage if
            ranks disagree.
        timeout
            Seconds for which a rank waits for another before it raises. On CUDA, where transfers run behind the host,
            a hang is found by the timeout of the process group.

        Raises
        ------
        SpecError
            If a value is unknown or not positive.
        """
        if validate is not None and validate not in VALIDATE:
            raise SpecError(f"unknown validate={validate!r}{did_you_mean(str(validate), VALIDATE)}")
        if timeout is not None and not timeout > 0:
            raise SpecError(f"timeout must be a positive number of seconds, got {timeout!r}")
        self.validate, self.timeout = validate or self.validate, timeout or self.timeout
        if self.mesh is not None and self._engine is not None:
            self._engine.configure(self.validate, self.timeout)
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **operands: Any) -> Any:
        """Compute the attention.

        Parameters
        ----------
        q, k, v
            On a mesh this rank's shards ``[B, H, s, D]``, ``[B, H_kv, t, D]``, ``[B, H_kv, t, Dv]``, or DTensors
            sharded along the sequence; for a virtual ring the whole tensors. Layout and dtype are the spec's.
        return_lse
            Return the log-sum-exp of each row too.
        **operands
            ``documents``, ``key_padding``, ``dropout_seed``, ``alibi_slopes`` and ``sink_logits``, as
            :meth:`attnplan.Plan.__call__` takes them: of the whole sequence, and the same on every rank. On a mesh the
            gradient of slopes and sinks is that of this rank's rows, as it is for every weight: sum it over the ranks.

        Returns
        -------
        Tensor or tuple of Tensor
            Output, of the rows of q; with ``return_lse`` a pair of it and the LSE.

        Raises
        ------
        SpecError
            If a tensor or operand does not fit.
        RingError
            If another rank is gone, hangs, raised, or does something else: it names the rank, hop and step.
        NoBackendError
            If the plan is for hardware that is not here.
        """
        from torch.compiler import is_compiling

        from attnplan.runtime.ring.calls import run_call

        if is_compiling():
            return self._traced(q, k, v, return_lse, operands)
        require_here(self.target)
        self._check_operands(operands, self.spec)
        return run_call(self, q, k, v, return_lse, operands)

    @staticmethod
    def _check_operands(operands: Mapping[str, Any], spec: AttentionSpec) -> None:
        check_operand_names(operands, spec.operands)
        missing = sorted(spec.operands - set(operands))
        if missing:
            raise SpecError(f"the spec needs {', '.join(missing)} with each call: plan(q, k, v, {missing[0]}=...)")

    def _traced(
        self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool, operands: Mapping[str, Any]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the nodes of a call in a traced program: one operator, or a break where it cannot be one."""
        from torch import compiler

        from attnplan.runtime.ring.calls import SINKS, broken_out, is_dtensor, with_sinks

        if compiler._is_exporting_flag:
            raise SpecError(f"a plan over {self.ranks} ranks is no part of an exported program: its processes are gone")
        why = "tensors" if self.mesh is not None and is_dtensor(q) else self._untraced
        if why:
            broken: Tensor | tuple[Tensor, Tensor] = broken_out[why](self, q, k, v, return_lse, operands)
            return broken
        if not self.spec.sink_logits:
            return super()._traced(q, k, v, return_lse, operands)
        if SINKS not in operands:
            raise SpecError("the spec needs sink_logits with each call: plan(q, k, v, sink_logits=...)")
        inner = {name: x for name, x in operands.items() if name != SINKS}
        out, lse = super()._traced(q, k, v, True, inner)
        swapped = out.transpose(1, 2) if self._swapped else out
        out, lse = with_sinks(swapped, lse, operands)
        out = out.transpose(1, 2) if self._swapped else out
        return (out, lse) if return_lse else out

    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Check a call and run it, on q, k, v in ``[B, H, S, D]`` whatever the layout; for traced programs."""
        from attnplan.runtime.ring.calls import answer

        self._check_operands(operands, self.core)
        return answer(self, q, k, v, operands)

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``; for traced programs."""
        from attnplan.runtime.ring.calls import gradients

        return gradients(self, flow, given, operands, names)

    @property
    def lengths(self) -> tuple[int, int]:
        """Rows of q and of k that a call brings: those of this rank's shard, or all of them."""
        if self._lengths is None:
            shape = self.spec.shape
            whole = (shape.seq_len, shape.kv_len)
            queries, keys = whole if self.mesh is None else (self._layout(n).shard_sizes[self.rank] for n in whole)
            self._lengths = queries, keys
        return self._lengths

    @property
    def engine(self) -> Any:
        """Who runs the ranks, with graphs emitted at the first call."""
        with self._lock:
            if self._engine is None:
                self._engine = self._made()
            return self._engine

    def _made(self) -> Any:
        from attnplan.runtime.ring.engines import RealEngine, VirtualEngine
        from attnplan.runtime.ring.executor import Rank

        spec, every = self.core, self.programs
        if self.mesh is None:
            shape = spec.shape
            ranks = [Rank(p, spec, list(self._parts(p))) for p in every]
            return VirtualEngine(ranks, (spec.heads, spec.kv_heads), (shape.seq_len, shape.kv_len))
        from attnplan.runtime.ring.groups import device_of, group_of, store_of
        from attnplan.runtime.ring.handshake import digest

        group, one = group_of(self.mesh), every[self.rank]
        text = self._identity()
        made = RealEngine(
            Rank(one, spec, list(self._parts(one))), group, device_of(self.target), digest(text), *store_of(group, text)
        )
        made.configure(self.validate, self.timeout)
        return made

    def _identity(self) -> str:
        """Return what must be the same on every rank, as text without addresses in memory."""
        facts = (self.spec, self.strategy, self.ranks, self.backend, self.schedule, self._version)
        return re.sub(r"0x[0-9a-fA-F]+", "0x", repr(facts))

    def _parts(self, program: RankProgram) -> Iterator[list[Any]]:
        """Emit the graphs of a rank."""
        from attnplan.runtime.ring.parts import part

        device = str(self.target.torch_device)
        for hop in program.hops:
            made: list[Any] = []
            for graph in hop.graphs:
                if graph is None:
                    made.append(None)
                    continue
                made.append(part(self._emitted(graph, device)[1], graph))
            yield made

    def _emitted(self, graph: Graph, device: str) -> tuple[Runner, Any]:
        """Return who runs a graph, and its program; where our own kernels run, its parts are joined by one of them."""
        runner = self._runner(graph)
        several = len(graph.of(Attend)) > 1  # the pieces of one attend are taken as they are
        pulls = several and runner.schedule.fused and import_failure("triton") is None
        pulled = PullMerge()(graph) if pulls else graph
        if pulled != graph and not runner.backend.refuse(pulled, self.core, runner.schedule, self.device):
            graph = pulled
        return runner, runner.backend.emit(graph, self.core, runner.schedule, device)

    def _whole_peak(self) -> int:
        return whole_peak(self.core, self.candidate, self.runners, self.device)

    def _runner(self, graph: Graph) -> Runner:
        return runner_of(graph, self.core, self.runners, self.device)

    @property
    def source(self) -> str:
        """The emitted programs of this rank as readable Python, hop by hop."""
        found = []
        for hop in self.programs[self.rank].hops:
            for graph in hop.graphs:
                if graph is not None:
                    runner, program = self._emitted(graph, self.target.torch_device or self.device.kind)
                    found.append(f"# hop {hop.index}, {runner.name}\n{program.source}")
        return "\n".join(found)

    def warmup(self, batch: int | None = None, **options: Any) -> RingPlan:
        """Emit this rank's graphs now; the ranks connect at the first call. Options of other plans have no effect."""
        require_here(self.target)
        assert self.engine is not None
        return self

    def explain(self, format: str = "text", *, measure: bool = False) -> Any:  # noqa: A002  # the public name
        """Return what was chosen, why, what moves at each hop, and what everything costs.

        Parameters
        ----------
        format
            ``"text"`` for the page that people read, ``"json"`` for the same facts as a dict.
        measure
            Must be False: a ring is measured by ``python -m bench.ring``.
        """
        from attnplan.explain_ring import facts, render

        if measure:
            raise RingError("measure=True is for plans on one device; measure a ring by python -m bench.ring")
        if format not in ("text", "json"):
            raise SpecError(f'unknown format {format!r}; use "text" or "json"')
        found = facts(self)
        return found if format == "json" else render(found)

    def verify(self, rows: int = 64, seed: int = 0) -> Any:
        """Prove that the ranks together compute the spec, and compare numbers with float64 on sampled rows.

        On a mesh every rank must call it, and checks the sampled rows that it holds.

        Returns
        -------
        attnplan.verify.Report
            Errors and tolerances of output, LSE and gradients.

        Raises
        ------
        VerifyError
            If a pair is missing, doubled or wrong, or a number is outside its tolerance.
        """
        from attnplan.verify_ring import verify_ring

        return verify_ring(self, rows, seed)

    def save(self, path: str | Path) -> NoReturn:
        """Raise: a ring is planned anew in each process, in milliseconds; save the spec instead."""
        raise SpecError(f"a plan over {self.ranks} ranks is not saved to {str(path)!r}: save its spec, by to_toml()")

    def __deepcopy__(self, memo: Any) -> RingPlan:
        """Return the plan itself: copies of a model share its plans, which hold no parameters."""
        return self

    def __repr__(self) -> str:
        where = "virtual ring" if self.mesh is None else "mesh"
        choice = f"{self.strategy} > {self.backend} ({self.schedule})"
        causal = " causal" if self.spec.causal else ""
        return f"<RingPlan {self.spec.pattern!r}{causal} on a {where} of {self.ranks} x {self.device.name}: {choice}>"
