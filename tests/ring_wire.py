"""Bytes of a ring as the operating system counts them, socket by socket. Free of pytest: see ring_workers."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import attnplan
from attnplan import AttentionSpec

TCP_INFO, SIZE, RECEIVED = 11, 136, 128
"""``getsockopt``'s number, the bytes of ``struct tcp_info`` up to ``tcpi_bytes_received``, and where that stands."""


def received() -> int:
    """Return the bytes that all TCP connections of this process have received.

    Raises
    ------
    OSError
        If the system does not say.
    """
    total, counted = 0, 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or no socket
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    info = one.getsockopt(socket.IPPROTO_TCP, TCP_INFO, SIZE)
                    if len(info) >= SIZE:
                        total, counted = total + struct.unpack_from("=Q", info, RECEIVED)[0], counted + 1
    if not counted:
        raise OSError("no TCP connection of this process says how much it has received")
    return total


def on_the_wire(rank: int, ranks: int, cases: list[tuple[AttentionSpec, str]]) -> list[tuple[Any, ...]]:
    """Return (name, planned, seen) of the forward and the backward of each case; (reason,) if nothing can be seen.

    No kernel runs: only the bytes are of interest.
    """
    found: list[tuple[Any, ...]] = []
    mesh = init_device_mesh("cpu", (ranks,))
    for spec, strategy in cases:
        plan = attnplan.compile(spec, mesh=mesh, strategy=strategy)
        for _, parts in plan.engine.rank.hops.values():
            parts[:] = [None] * len(parts)
        rows = plan.lengths[0]
        sizes = [(spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.head_dim)]
        q, k, v = (torch.zeros(1, heads, rows, features, requires_grad=True) for heads, features in sizes)
        plan(q, k, v).sum().backward()  # connections are made, and the ranks agree
        dist.barrier()
        try:
            start = received()
        except OSError as error:
            return [(str(error),)]
        out = plan(q, k, v)
        dist.barrier()
        middle = received()
        found.append((f"{strategy} forward", plan.traffic(rank).received, middle - start))
        out.sum().backward()
        dist.barrier()
        planned = plan.traffic(rank, backward=True).received
        found.append((f"{strategy} backward", planned, received() - middle))
        assert not any(x.grad is None for x in (q, k, v))
    return found
