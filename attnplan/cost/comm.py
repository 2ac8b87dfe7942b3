"""What it costs to move bytes between devices: links inside a node and between nodes, and what compute hides."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from attnplan.cost.device import Device


@attrs.frozen(cache_hash=True)
class Link:
    """A link of one device, in one direction."""

    bandwidth: float
    """Bytes/s."""
    latency: float
    """Seconds from the call to the first byte, of one exchange."""
    per_peer: float
    """Seconds that each peer of an exchange adds."""
    source: str


@attrs.frozen(cache_hash=True)
class Links:
    """How a device reaches others: those in its node, and those in other nodes."""

    inside: Link
    between: Link


_NVLINK = {"a100": 300e9, "h100": 450e9, "h200": 450e9, "b200": 900e9, "v100": 150e9}
_NETWORK = {"a100": 25e9, "v100": 12.5e9}


def links(device: Device) -> Links:
    """Return the links of a device: NVLink and one network port a GPU where it has them, else PCIe; loopback on a CPU.

    Examples
    --------
    >>> from attnplan.cost import catalogue
    >>> links(catalogue()["h200"]).inside.bandwidth / 1e9
    450.0
    """
    if device.kind == "cpu":
        loopback = Link(1.5e9, 150e-6, 50e-6, "gloo over loopback, one core copying")
        return Links(loopback, Link(1.2e9, 200e-6, 50e-6, "10 Gbit/s Ethernet"))
    known = next((name for name in _NVLINK if device.name.startswith(name)), None)
    if known is None:
        inside = Link(25e9, 15e-6, 2e-6, "PCIe 4.0 x16")
        return Links(inside, Link(12.5e9, 30e-6, 2e-6, "100 Gbit/s network"))
    inside = Link(_NVLINK[known], 10e-6, 1e-6, "NVLink data sheet, one direction")
    rate = _NETWORK.get(known, 50e9)
    return Links(inside, Link(rate, 20e-6, 1e-6, f"{rate * 8 / 1e9:.0f} Gbit/s network port per device"))


def exchange_seconds(inside: tuple[float, int], between: tuple[float, int], known: Links) -> float:
    """Return the time of one exchange: (bytes, peers) inside the node, and in other nodes, at the same time.

    Examples
    --------
    >>> from attnplan.cost import catalogue
    >>> round(exchange_seconds((450e6, 1), (0, 0), links(catalogue()["h200"])) * 1e3, 2)
    1.01
    """
    each = [
        link.latency + peers * link.per_peer + size / link.bandwidth
        for (size, peers), link in ((inside, known.inside), (between, known.between))
        if peers
    ]
    return max(each, default=0.0)


def pipelined_seconds(compute: Sequence[float], comm: Sequence[float]) -> float:
    """Return the time of hops whose next exchange runs during their compute; the first exchange is waited for.

    Parameters
    ----------
    compute
        Seconds of each hop.
    comm
        Seconds until what each hop needs has arrived, counted from the start of the hop before.

    Examples
    --------
    >>> pipelined_seconds([3.0, 3.0], [1.0, 2.0]), pipelined_seconds([3.0, 3.0], [0.0, 5.0])
    (7.0, 8.0)
    """
    total = comm[0] if comm else 0.0
    for i, seconds in enumerate(compute):
        total += max(seconds, comm[i + 1] if i + 1 < len(comm) else 0.0)
    return total
