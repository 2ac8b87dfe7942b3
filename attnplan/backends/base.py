"""What a backend is: a torch-free declaration of what it can run, and an emitter that is imported on first use."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import attrs

from attnplan.cost import Device, KernelModel, Target
from attnplan.ir import Graph, Output
from attnplan.spec import AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor


class Program(Protocol):
    """An emitted plan: a callable, and the source that a person can read."""

    @property
    def source(self) -> str:
        """The program as readable Python."""
        ...

    @property
    def differentiable_lse(self) -> bool:
        """Whether gradients flow through the returned LSE."""
        ...

    @property
    def follows_lengths(self) -> bool:
        """Whether the program reads its lengths off the tensors, so that one program serves every length."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]`` and return output and, if asked for, LSE."""
        ...


@attrs.frozen(cache_hash=True)
class Schedule:
    """One way in which a backend can run a graph."""

    name: str
    kernel: KernelModel = attrs.field(eq=False)
    title: str = ""
    tile: tuple[int, int] | None = None
    """(queries, keys) of the tiles in which it runs sparse masks; None if it runs whole masks only."""
    chunk: int | None = 128
    """Queries of the chunks in which it runs bands; None if it leaves them whole."""
    forward_chunk: int | None = None
    """The same for a spec that is not trained, where fewer are faster: a backward adds up the keys of every chunk."""
    runs: str = ""
    """Its kernel: a key of :data:`attnplan.runtime.kernels.KERNELS`; empty for plain torch."""
    deterministic: bool = False
    """Whether forward and backward repeat bit for bit, as a test has shown."""
    tested: str = ""
    """Where it has been run; empty if it never has."""
    automatic: bool = True
    """Whether ``backend="auto"`` may choose it."""
    trains_by_name: bool = False
    """Whether ``backend="auto"`` may choose it only where nothing is trained."""
    packages: tuple[str, ...] = ()
    """The package that it needs beside those of its backend: any one of these, each the only thing it needs."""
    modules: tuple[str, ...] = ()
    """Modules that hold its kernel: the first that can be imported is used."""
    compile_seconds: tuple[float, float] = (0.0, 0.0)
    """Seconds for which its first call compiles, forward and with a backward, as measured; 0 if that is not known."""

    def compiles_for(self, training: bool) -> float:
        """Return the seconds for which its first call compiles."""
        return self.compile_seconds[training]

    def is_automatic(self, training: bool) -> bool:
        """Return whether ``backend="auto"`` may choose it."""
        return self.automatic and not (training and self.trains_by_name)

    def tiling(self, training: bool) -> tuple[tuple[int, int], int | None] | None:
        """Return tile and chunk, None if it has no tiles."""
        chunk = self.chunk if training or self.forward_chunk is None else self.forward_chunk
        return None if self.tile is None else (self.tile, chunk)

    @property
    def fused(self) -> bool:
        """Whether our own kernels may gather before its kernel and join after it, which takes a CUDA device."""
        return self.runs not in ("", "flash-cpu")

    @property
    def priced(self) -> KernelModel:
        """Its kernel under the name by which calibrations know it: what it runs, or its own name."""
        return self.kernel if self.kernel.key else attrs.evolve(self.kernel, key=self.runs or self.name)

    @property
    def native(self) -> frozenset[str]:
        """What its kernel does by itself: see :mod:`attnplan.ir.native`."""
        return self.kernel.native


@attrs.frozen(cache_hash=True)
class Backend:
    """A torch-free declaration: schedules, limits, versions.

    Subclasses are registered in :mod:`attnplan.backends.registry`, or by other packages under the entry-point group
    ``attnplan.backends``.
    """

    name: ClassVar[str]
    emitter: ClassVar[str]
    """Module with ``emit(graph, spec, schedule, device) -> Program``."""
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    optional: ClassVar[tuple[str, ...]] = ()
    """Packages of which it needs at least one, by schedule."""
    automatic: ClassVar[bool] = True
    """Whether ``backend="auto"`` may choose it."""
    compiles: ClassVar[bool] = False
    """Whether its first call compiles for seconds: ``tune=True`` measures what of it has been run on such a device."""

    naive: ClassVar[bool] = False
    """Whether it runs the naive graph, and no strategy."""

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        """Return the schedules for a kind of device, best known first; empty if there is none."""
        raise NotImplementedError

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        """Return every reason why ``schedule`` cannot run ``graph``, in words; empty if it can."""
        raise NotImplementedError

    def is_automatic(self, schedule: Schedule) -> bool:
        """Return whether ``backend="auto"`` may choose a schedule for some specs."""
        return self.automatic and schedule.automatic

    def by_name_only(self, spec: AttentionSpec, schedule: Schedule, *, measured: bool = False) -> str:
        """Return why ``backend="auto"`` leaves a schedule to those who ask for it; empty if it may choose it.

        Where candidates will be ``measured``, tested schedules that compile may be chosen, too.
        """
        known = self.automatic or (measured and self.compiles and bool(schedule.tested))
        free = known and schedule.is_automatic(spec.training)
        return "" if free else f"runs only when asked for by backend={self.name!r}"

    def availability(self, target: Target) -> tuple[str, ...]:
        """Return every reason why this backend cannot run on this machine; empty for hardware that is elsewhere."""
        if target.torch_device is None:
            return ()
        return tuple(f"package {name!r} is not installed" for name in self.packages if _version(name) is None)

    def missing(self, schedule: Schedule, target: Target) -> tuple[str, ...]:
        """Return :meth:`availability`, and why the package of one schedule is not usable on this machine.

        The modules are imported, because a package that is installed may still not load: whatever it raises is the
        reason.
        """
        reasons = self.availability(target)
        if target.torch_device is None or reasons:
            return reasons
        if schedule.packages and all(_version(name) is None for name in schedule.packages):
            return (f"package {' or '.join(map(repr, schedule.packages))} is not installed",)
        failures = []
        for module in schedule.modules:
            failure = import_failure(module)
            if failure is None:
                return ()
            failures.append(f"import of {module} failed: {failure}")
        return tuple(failures)

    def versions(self) -> dict[str, str | None]:
        """Return the installed version of each package that the backend needs, None where it is missing."""
        return {name: _version(name) for name in (*self.packages, *self.optional)}

    def emit(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: str) -> Program:
        """Return the program that runs ``graph`` on a torch device."""
        output = graph.output.op
        emitter = import_module(self.emitter)
        emit = emitter.emit
        program: Program
        if isinstance(output, Output) and (output.loop is not None or output.recompute):
            looped = import_module("attnplan.runtime.loops").LoopedProgram
            emit_piece = getattr(emitter, "emit_piece", emit)
            program = looped(graph, lambda body: emit_piece(body, spec, schedule, device))
        else:
            program = emit(graph, spec, schedule, device)
        return program


@lru_cache(maxsize=64)
def import_failure(module: str) -> str | None:
    """Return why a module cannot be imported, None if it can.

    Examples
    --------
    >>> import_failure("json")
    >>> import_failure("no_such_module")
    "ModuleNotFoundError: No module named 'no_such_module'"
    """
    try:
        import_module(module)
    except Exception as error:  # a package may raise anything while it loads
        return f"{type(error).__name__}: {error}"
    return None


@lru_cache(maxsize=64)
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
