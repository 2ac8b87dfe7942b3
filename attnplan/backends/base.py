"""What a backend is: a torch-free declaration of what it can run, and an emitter that is imported on first use."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import attrs

from attnplan.cost import Device, KernelModel, Target
from attnplan.ir import Graph
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
    automatic: ClassVar[bool] = True
    """Whether ``backend="auto"`` may choose it."""

    naive: ClassVar[bool] = False
    """Whether it runs the naive graph, and no strategy."""

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        """Return the schedules for a kind of device, best known first; empty if there is none."""
        raise NotImplementedError

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        """Return every reason why ``schedule`` cannot run ``graph``, in words; empty if it can."""
        raise NotImplementedError

    def availability(self, target: Target) -> tuple[str, ...]:
        """Return every reason why this backend cannot run on this machine; empty for hardware that is elsewhere."""
        if target.torch_device is None:
            return ()
        return tuple(f"package {name!r} is not installed" for name in self.packages if _version(name) is None)

    def versions(self) -> dict[str, str | None]:
        """Return the installed version of each package that the backend needs, None where it is missing."""
        return {name: _version(name) for name in self.packages}

    def emit(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: str) -> Program:
        """Return the program that runs ``graph`` on a torch device."""
        program: Program = import_module(self.emitter).emit(graph, spec, schedule, device)
        return program


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
