"""What it costs to move bytes between devices: links inside a node and between nodes, and what compute hides."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from attnplan.cost.device import Device


@attrs.frozen(cache_hash=True)
class Link:
    """A link of one device, in one direction, while the other direction is as busy."""

    bandwidth: float
    """Bytes/s that messages between two devices reach; a short one takes the latency too."""
    latency: float
    """Seconds from the call to the first byte, of one exchange."""
    per_peer: float
    """Seconds that each peer of an exchange adds."""
    source: str
    collective: float = 1.0
    """Share of the bandwidth that collective calls reach."""


@attrs.frozen(cache_hash=True)
class Links:
    """How a device reaches others: those in its node, and those in other nodes."""

    inside: Link
    between: Link
    slows: float = 0.0
    """Share of a transfer's time by which it slows the kernels beside it: it takes multiprocessors and memory from
    them."""
    host: float = 0.0
    """Seconds for which the host is busy with starting one exchange; messages are prepared meanwhile."""


_NVLINK = {"a100": 300e9, "h100": 450e9, "h200": 450e9, "b200": 900e9, "v100": 150e9}
_NETWORK = {"a100": 25e9, "v100": 12.5e9}
_REACHED, _GATHERS = 0.69, 0.84
"""Shares of NVLink's data sheet that messages reach, and of that what an all-gather does. On two H200 (18 links, NCCL
2.28, both ways at once) 16 MiB took 88 us and 256 MiB 895 us, 312 GB/s after 34 us; all-gathers 92 and 1,057 us."""
_LATENCY = 34e-6
_SLOWS = 0.5
"""Fitted to the rows of ``bench/results/ring-h200-x2.json``, as is the host's time."""
_HOST = 1.5e-4
_HOST_OF_CPU = 1e-4
"""What a hop of a virtual ring takes beside its kernels, on one core: bench/results/seed-table-cpu.json."""


def links(device: Device) -> Links:
    """Return the links of a device: NVLink and one network port a GPU where it has them, else PCIe; loopback on a CPU.

    Examples
    --------
    >>> from attnplan.cost import catalogue
    >>> round(links(catalogue()["h200"]).inside.bandwidth / 1e9)
    310
    """
    if device.kind == "cpu":
        loopback = Link(1.5e9, 150e-6, 50e-6, "gloo over loopback, one core copying")
        return Links(loopback, Link(1.2e9, 200e-6, 50e-6, "10 Gbit/s Ethernet"), host=_HOST_OF_CPU)
    known = next((name for name in _NVLINK if device.name.startswith(name)), None)
    if known is None:
        inside = Link(25e9, 15e-6, 2e-6, "PCIe 4.0 x16")
        return Links(inside, Link(12.5e9, 30e-6, 2e-6, "100 Gbit/s network"), _SLOWS, _HOST)
    measured = f"NVLink, {100 * _REACHED:.0f} % of its data sheet as measured on two H200"
    inside = Link(_NVLINK[known] * _REACHED, _LATENCY, 1e-6, measured, _GATHERS)
    rate = _NETWORK.get(known, 50e9)
    between = Link(rate, _LATENCY + 10e-6, 1e-6, f"{rate * 8 / 1e9:.0f} Gbit/s network port per device")
    return Links(inside, between, _SLOWS, _HOST)


def exchange_seconds(
    inside: tuple[float, int], between: tuple[float, int], known: Links, *, collective: bool = False
) -> float:
    """Return the time of one exchange: (bytes, peers) inside the node, and in other nodes, at the same time.

    Examples
    --------
    >>> from attnplan.cost import catalogue
    >>> round(exchange_seconds((256 * 2**20, 1), (0, 0), links(catalogue()["h200"])) * 1e6)
    900
    """
    each = [
        link.latency + peers * link.per_peer + size / (link.bandwidth * (link.collective if collective else 1.0))
        for (size, peers), link in ((inside, known.inside), (between, known.between))
        if peers
    ]
    return max(each, default=0.0)


def pipelined_seconds(compute: Sequence[float], comm: Sequence[float], slows: float = 0.0) -> float:
    """Return the time of hops whose next exchange runs during their compute; the first exchange is waited for.

    Parameters
    ----------
    compute
        Seconds of each hop.
    comm
        Seconds until what each hop needs has arrived, counted from the start of the hop before.
    slows
        Share of the time of an exchange by which it slows the compute beside it.

    Examples
    --------
    >>> pipelined_seconds([3.0, 3.0], [1.0, 2.0]), pipelined_seconds([3.0, 3.0], [0.0, 5.0])
    (7.0, 8.0)
    >>> pipelined_seconds([3.0, 3.0], [0.0, 2.0], slows=0.5)
    7.0
    """
    total = comm[0] if comm else 0.0
    for i, seconds in enumerate(compute):
        beside = comm[i + 1] if i + 1 < len(comm) else 0.0
        total += max(seconds + slows * min(seconds, beside), beside)
    return total
