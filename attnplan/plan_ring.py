"""Plans over several ranks: on a mesh of processes, or as a virtual ring on one device."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from attnplan.backends.base import import_failure
from attnplan.calls import check_operand_names, require_here
from attnplan.cost import Target
from attnplan.errors import NoBackendError, RingError, SpecError, did_you_mean
from attnplan.ir import Graph
from attnplan.passes import PullMerge
from attnplan.plan import Plan
from attnplan.ring.build import programs, rank_graph
from attnplan.ring.layouts import Layout
from attnplan.ring.program import ITEM_BYTES, RankProgram, Traffic, traffic
from attnplan.search_ring import FoundRing, RingPrediction, Runner
from attnplan.spec import AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor

VALIDATE = ("always", "first", "off")


class RingPlan(Plan):
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
        ``seconds`` and ``peak_bytes`` of one call, on the slowest rank.
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
        self.candidates: tuple[Any, ...] = found.candidates
        self.pins, self.steps = dict(pins), ()
        self.candidate = found.candidates[0]
        self.layout, self.transport = self.candidate.layout, self.candidate.transport
        self.strategy = self.candidate.name
        self.ranks = self.candidate.ring * self.candidate.ulysses
        self.predicted = RingPrediction(  # type: ignore[assignment]  # no figures for each op
            self.candidate.seconds, self.candidate.peak_bytes
        )
        self.runners, self.refused = found.runners, found.refused
        self.backend, self.schedule = found.runners[0].backend.name, found.runners[0].schedule.name
        self.validate, self.timeout = "first", 300.0
        self._version = version
        self._engine: Any = None
        self._lock = threading.Lock()

    @property
    def shape(self) -> int | tuple[int, int]:
        """Number of ranks; for ``hybrid``, (groups of the ring, ranks of a group)."""
        return (self.candidate.ring, self.candidate.ulysses) if self.transport == "hybrid" else self.ranks

    @property
    def programs(self) -> tuple[RankProgram, ...]:
        """What each rank does."""
        return programs(self.spec, self.shape, self.layout, self.transport)

    def __getattr__(self, name: str) -> Any:
        if name == "graph":  # of this rank, with what it receives; made when it is asked for
            self.graph = rank_graph(self.spec, self.shape, self.layout, self.transport, self.rank)
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
            ``documents``, ``key_padding`` and ``dropout_seed``, as :meth:`attnplan.Plan.__call__` takes them: of the
            whole sequence, and the same on every rank.

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
        require_here(self.target)
        from attnplan.runtime.ring.calls import run_call

        check_operand_names(operands, self.spec.operands)
        missing = sorted(self.spec.operands - set(operands))
        if missing:
            raise SpecError(f"the spec needs {', '.join(missing)} with each call: plan(q, k, v, {missing[0]}=...)")
        return run_call(self, q, k, v, return_lse, operands)

    @property
    def lengths(self) -> tuple[int, int]:
        """Rows of q and of k that a call brings: those of this rank's shard, or all of them."""
        shape = self.spec.shape
        if self.mesh is None:
            return shape.seq_len, shape.kv_len
        sizes = (self._layout(n).shard_sizes[self.rank] for n in (shape.seq_len, shape.kv_len))
        return next(sizes), next(sizes)

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

        spec, every = self.spec, self.programs
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
                made.append(part(self._emitted(graph, device)[1]))
            yield made

    def _emitted(self, graph: Graph, device: str) -> tuple[Runner, Any]:
        """Return who runs a graph, and its program; where our own kernels run, its parts are joined by one of them."""
        runner = self._runner(graph)
        pulled = PullMerge()(graph) if runner.schedule.fused and import_failure("triton") is None else graph
        if pulled != graph and not runner.backend.refuse(pulled, self.spec, runner.schedule, self.device):
            graph = pulled
        return runner, runner.backend.emit(graph, self.spec, runner.schedule, device)

    def _runner(self, graph: Graph) -> Runner:
        reasons = []
        for runner in self.runners:
            why = runner.backend.refuse(graph, self.spec, runner.schedule, self.device)
            if not why:
                return runner
            reasons.append(f"  {runner.name}: {'; '.join(why)}")
        raise NoBackendError(f"no backend runs this graph of {self.strategy}:\n" + "\n".join(reasons) + f"\n{graph}")

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

    def _layout(self, length: int) -> Layout:
        return Layout(self.layout, self.ranks, length)  # type: ignore[arg-type]  # one of the known kinds

    def _held(self, length: int) -> list[Any]:
        """Return the rows of every rank."""
        from attnplan.runtime.ring.rows import Span

        layout = self._layout(length)
        return [[Span(0, 1, p.start, p.step, p.count) for p in layout.rows(r)] for r in range(self.ranks)]

    def positions(self, rank: int | None = None) -> Any:
        """Return the positions in the whole sequence of a rank's rows, in the order of its shard: int64 ``[s]``.

        Parameters
        ----------
        rank
            Which rank; the default is that of this process.

        Examples
        --------
        >>> import attnplan
        >>> spec = attnplan.AttentionSpec(seq_len=8, heads=2, head_dim=8, dtype="float32", ring_size=2)
        >>> attnplan.compile(spec, device="cpu", strategy="zigzag > ring").positions(0)
        tensor([0, 1, 6, 7])
        """
        from attnplan.runtime.ring.shards import positions

        rank = self.rank if rank is None else rank
        if not 0 <= rank < self.ranks:
            raise RingError(f"there is no rank {rank}: the plan has ranks 0 to {self.ranks - 1}")
        return positions(self._held(self.spec.shape.seq_len)[rank])

    def shard(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Return this rank's rows of a whole tensor. Differentiable.

        Parameters
        ----------
        tensor
            A tensor with a dimension of the sequence.
        dim
            That dimension; the default is the spec's for four dimensions, else 1.

        Raises
        ------
        RingError
            If the plan has no mesh.
        SpecError
            If the dimension is not as long as the sequence.
        """
        from attnplan.runtime.ring.shards import cut

        self._need_mesh("shard")
        dim = self._dimension(tensor, dim)
        shape, length = self.spec.shape, tensor.shape[dim]
        if length not in (shape.seq_len, shape.kv_len):
            raise SpecError(f"dimension {dim} of {list(tensor.shape)} is no sequence of {shape.seq_len} rows")
        return cut(tensor, dim, self._held(length)[self.rank])

    def unshard(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Return the whole tensor, on every rank, from the ranks' shards. Every rank must call it; not differentiable.

        Parameters
        ----------
        tensor
            This rank's rows.
        dim
            The dimension of the sequence; the default is the spec's for four dimensions, else 1.

        Raises
        ------
        RingError
            If the plan has no mesh, or the tensor is not as long as this rank's shard.
        """
        self._need_mesh("unshard")
        from attnplan.runtime.ring.groups import group_of
        from attnplan.runtime.ring.shards import gather

        dim, shape = self._dimension(tensor, dim), self.spec.shape
        fits = [n for n in (shape.seq_len, shape.kv_len) if self._layout(n).shard_sizes[self.rank] == tensor.shape[dim]]
        return gather(tensor, dim, self._held(fits[0] if fits else shape.seq_len), group_of(self.mesh))

    def shard_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a batch: its rows of tokens, labels and the like, and their ``positions``.

        Parameters
        ----------
        batch
            Tensors ``[B, S, ...]`` or ``[S]``, sharded alike; ``documents`` and ``key_padding`` describe the whole
            sequence and stay whole. Labels must have been shifted before: the next token may be on another rank.

        Returns
        -------
        dict
            The same names, and ``positions``, int64 ``[s]``, unless the batch has them already.

        Raises
        ------
        RingError
            If the plan has no mesh.
        SpecError
            If a tensor has no dimension of the sequence.
        """
        from attnplan.runtime.ring.shards import cut_batch

        self._need_mesh("shard_batch")
        length = self.spec.shape.seq_len
        return cut_batch(batch, length, self._held(length)[self.rank])

    def _dimension(self, tensor: Tensor, dim: int | None) -> int:
        if dim is None:
            return (2 if self.spec.layout == "bhsd" else 1) if tensor.dim() == 4 else min(1, tensor.dim() - 1)
        return dim % tensor.dim()

    def _need_mesh(self, what: str) -> None:
        if self.mesh is None:
            raise RingError(f"{what} is for a ring of processes: this plan has no mesh, call it with whole tensors")

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
