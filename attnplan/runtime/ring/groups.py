"""Process groups of a mesh."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from attnplan.errors import RingError

_numbers: dict[str, Any] = {}


def group_of(mesh: Any) -> Any:
    """Return the process group of all ranks of a mesh, in the order of the mesh.

    Raises
    ------
    RingError
        If this process is not in the mesh.
    """
    if mesh.get_coordinate() is None:
        raise RingError(f"this process, rank {dist.get_rank()}, is not in the mesh {mesh}")
    if mesh.ndim == 1:
        return mesh.get_group()
    order = mesh.mesh.flatten().tolist()
    if order == list(range(dist.get_world_size())):
        return dist.group.WORLD
    return mesh._flatten().get_group()


def rank_in(mesh: Any) -> int:
    """Return this process's rank in the mesh."""
    return dist.get_rank(group_of(mesh))


def device_of(target: Any) -> torch.device:
    """Return the device on which this process's messages live."""
    name = str(target.torch_device)
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def store_of(group: Any, identity: str) -> tuple[Any, str]:
    """Return the store of a group, and a name in it that no other ring of this process has.

    Every rank makes its rings in the same order, as it makes its calls.
    """
    ranks = ",".join(map(str, dist.get_process_group_ranks(group)))
    key = f"{ranks}/{identity}"
    number = next(_numbers.setdefault(key, count()))
    from attnplan.runtime.ring.handshake import digest

    return dist.distributed_c10d._get_default_store(), f"{digest(key):016x}/{number}"
