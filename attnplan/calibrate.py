"""Calibration: what this machine really reaches, in at most two minutes on a GPU and five on a small CPU.

A small grid of specs runs through the plans themselves, every candidate of each, and the numbers of the cost model are
fitted to what they took: rates of kernels by the features of a head, overheads of the host, shares of the bandwidth.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from attnplan import patterns as P
from attnplan.cost import Device, Target
from attnplan.cost import calibration as calibrations
from attnplan.cost.fit import Sample, alone, fitted
from attnplan.cost.model import loads
from attnplan.cost.parameters import Parameters, defaults
from attnplan.cost.setting import Setting
from attnplan.errors import NoBackendError
from attnplan.harness.entrants import Asked, Contestant, contest, contestants
from attnplan.plan import Plan
from attnplan.runtime.clock import Plenty, once, race
from attnplan.spec import AttentionSpec

Raw = dict[str, Any]
BUDGET = {"cpu": 240.0, "cuda": 90.0}
"""Seconds after which no further spec is measured."""


@attrs.frozen
class Calibration:
    """What was measured and fitted."""

    device: Device
    numbers: dict[str, float]
    """The numbers that differ from the published ones, by path."""
    table: Parameters = attrs.field(repr=False)
    measurements: int
    error: float
    """Mean relative error of the fitted model on what was measured."""
    error_before: float
    """The same with the published numbers."""
    spread: float
    """Median spread of the measurements: the share by which rounds differ."""
    seconds: float
    path: Path | None = None
    """Where it was written."""


def calibrate(
    target: Target,
    budget: float | None = None,
    advance: Callable[[str], None] = lambda name: None,
    *,
    keep: bool = True,
) -> Calibration:
    """Measure the device that is here, fit the cost model, and keep the numbers for every later plan.

    Nothing is written before everything is measured: an interruption leaves things as they were.

    Parameters
    ----------
    target
        A device that is here.
    budget
        Seconds; by default :data:`BUDGET`.
    advance
        Called with the name of each spec before it is measured.
    keep
        Whether the numbers are written to the user's cache.

    Raises
    ------
    NoBackendError
        If the device is not here, or nothing could be measured in the time.
    SpecError
        If the numbers cannot be written.
    """
    if target.torch_device is None:
        raise NoBackendError(f"{target.device.title} is not here to be measured")
    start = time.monotonic()
    limit = BUDGET[target.device.kind] if budget is None else budget
    samples: list[Sample] = []
    spreads: list[float] = []
    for name, spec in grid(target.device.kind):
        if time.monotonic() - start > limit:
            break
        advance(name)
        for sample, spread in measured(spec, target, start + 1.2 * limit):
            samples.append(sample)
            spreads.append(spread)
    if not samples:
        raise NoBackendError(f"nothing could be measured on {target.device.title} in {limit:.0f} seconds")
    published = defaults(target.device.kind)
    table, numbers = fitted(samples, target.device, published)
    found = Calibration(
        target.device,
        numbers,
        table,
        len(samples),
        mean_error(samples, target.device, table),
        mean_error(samples, target.device, published),
        statistics.median(spreads),
        time.monotonic() - start,
    )
    if not keep:
        return found
    more = {"measurements": found.measurements, "error": found.error, "spread": found.spread}
    return attrs.evolve(found, path=calibrations.save(target.device, numbers, more))


def mean_error(samples: Sequence[Sample], device: Device, table: Parameters) -> float:
    """Return the mean relative error of predicted times."""
    first = (next(iter(s.errors(device, table)))[0] for s in samples)
    return statistics.mean(abs(math.exp(e) - 1) for e in first)


def measured(spec: AttentionSpec, target: Target, until: float = math.inf) -> Iterator[tuple[Sample, float]]:
    """Run every candidate of a spec in turns, and iterate over (measurement, spread)."""
    on_gpu = target.device.kind == "cuda"
    asked = Asked(
        plenty=Plenty(rounds=7, seconds=0.04) if on_gpu else Plenty(warm_ups=1, rounds=5, seconds=0.4, slow=0.8),
        without=frozenset({("reference", "float64"), ("compiled", "flex"), ("compiled", "inductor")}),
        hopeless=12.0,
        memory=target.device.memory // 4,
        until=until,
    )
    entrants, _ = contestants(spec, target, asked)
    plans = {one.name: one for one in entrants}
    for row in contest(spec, target, entrants, asked):
        if "seconds" in row:
            yield sample_of(plans[row["candidate"]], row, on_gpu=on_gpu), row["spread"]


def sample_of(one: Contestant, row: Raw, *, on_gpu: bool) -> Sample:
    """Return a row of a plan as a measurement that a table can be fitted to."""
    plan = one.run
    assert isinstance(plan, Plan)
    kernel = plan._schedule.priced
    on_device = host = None
    if on_gpu:
        host = row["host"]
        on_device = alone(row["seconds"], row["device"], host)
    found = loads(Setting.of(plan.graph, plan.spec, kernel))
    return Sample.of(found, plan.spec, kernel, row["seconds"], on_device, host)


def grid(kind: str) -> list[tuple[str, AttentionSpec]]:
    """Return the specs that a calibration measures, those that say most first."""
    return list(_gpu_grid() if kind == "cuda" else _cpu_grid())


def _both(name: str, **options: Any) -> Iterator[tuple[str, AttentionSpec]]:
    for training in (False, True):
        yield f"{name}{', training' if training else ''}", AttentionSpec(**options, training=training)


def _gpu_grid() -> Iterator[tuple[str, AttentionSpec]]:
    dtype = "bfloat16"
    for dim, heads, rows, batch, causal in (
        (128, 16, 8192, 1, False), (64, 16, 8192, 1, True), (128, 16, 2048, 4, True), (64, 8, 2048, 8, False),
        (128, 8, 512, 4, False), (64, 8, 256, 4, True), (256, 8, 4096, 1, True), (64, 2, 8192, 1, False),
        (128, 4, 1024, 1, True), (256, 4, 1024, 2, False),
    ):  # fmt: skip
        yield from _both(f"dense {rows} x {dim}", seq_len=rows, heads=heads, head_dim=dim, batch=batch, causal=causal,
                         dtype=dtype)  # fmt: skip
    for name, heads, rows, pattern, causal in (
        ("longnet", 12, 32_768, P.longnet([2048, 4096, 8192], [1, 2, 4]), True),
        ("grouped", 12, 16_384, P.grouped([1024, 2048, 4096], [1, 2, 4]), False),
        ("window", 8, 16_384, P.window(1023), True),
        ("blocks", 8, 8192, P.random_blocks(0.1, 128, 0), False),
        ("union", 8, 8192, P.window(256) | P.global_tokens(64), False),
        ("documents", 8, 8192, P.documents([1024] * 8), True),
    ):
        yield from _both(name, seq_len=rows, heads=heads, head_dim=64, pattern=pattern, causal=causal, dtype=dtype)


def _cpu_grid() -> Iterator[tuple[str, AttentionSpec]]:
    dtype = "float32"
    for dim, heads, rows, causal in (
        (64, 4, 1024, False), (64, 8, 256, True), (128, 2, 1024, True), (32, 4, 1024, False), (64, 4, 128, False),
    ):  # fmt: skip
        yield from _both(f"dense {rows} x {dim}", seq_len=rows, heads=heads, head_dim=dim, causal=causal, dtype=dtype)
    for name, heads, rows, pattern, causal in (
        ("longnet", 4, 2048, P.longnet([256, 512, 1024], [1, 2, 4]), True),
        ("grouped", 6, 2048, P.grouped([256, 512, 1024], [1, 2, 4]), False),
        ("window", 4, 4096, P.window(127), True),
        ("blocks", 4, 1024, P.random_blocks(0.2, 128, 0), False),
        ("union", 4, 2048, P.window(128) | P.global_tokens(16), False),
        ("documents", 4, 1024, P.documents([128] * 8), True),
    ):
        yield from _both(name, seq_len=rows, heads=heads, head_dim=64, pattern=pattern, causal=causal, dtype=dtype)


def ceilings(device: str, budget: float = 30.0) -> Raw:
    """Measure what the device's parts reach: matrix products, copies, gathers, and starting operators.

    Parameters
    ----------
    device
        A torch device that is here.
    budget
        Seconds; what is left when they are over is left out.

    Returns
    -------
    dict
        ``matmul`` and ``copy``, ``gather``: rows with ``seconds``; ``overheads``: seconds by what.
    """
    until = time.monotonic() + budget
    on_gpu = device.startswith("cuda")
    found: Raw = {"matmul": [], "copy": [], "gather": [], "overheads": {}}
    parts: tuple[tuple[str, Callable[[str, bool], Iterator[Raw]]], ...] = (
        ("overheads", _overheads),
        ("copy", _copies),
        ("matmul", _matmuls),
        ("gather", _gathers),
    )
    for name, part in parts:
        for row in part(device, on_gpu):
            if name == "overheads":
                found[name] |= row
            else:
                found[name].append(row)
            if time.monotonic() > until:
                return found
    return found


def _timed(call: Callable[[], Any], on_gpu: bool, seconds: float = 0.05) -> Raw:
    times = race({"it": call}, on_gpu, Plenty(rounds=9, seconds=seconds))["it"]
    return {"seconds": times.median, "spread": times.spread, "host": times.host}


def _matmuls(device: str, on_gpu: bool) -> Iterator[Raw]:
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        sizes = (8192, 4096, 2048, 1024) if on_gpu else (2048, 1024, 512, 256)
        for size in sizes[1 if dtype == "float64" and on_gpu else 0 :]:
            a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in "ab")
            yield {"dtype": dtype, "size": size, **_timed(lambda a=a, b=b: a @ b, on_gpu)}  # type: ignore[misc]


def _copies(device: str, on_gpu: bool) -> Iterator[Raw]:
    for mebibytes in (1, 4, 16, 64, 256, 1024) if on_gpu else (1, 4, 16, 64, 256):
        source = torch.randn(mebibytes * 2**18, device=device)
        target = torch.empty_like(source)
        moved = 2 * source.numel() * 4
        yield {"bytes": moved, **_timed(lambda s=source, t=target: t.copy_(s), on_gpu)}  # type: ignore[misc]


def _gathers(device: str, on_gpu: bool) -> Iterator[Raw]:
    """Copy every n-th row, as dilated branches do, and sum it back."""
    rows = 32_768 if on_gpu else 8192
    for features in (64, 128):
        for rate in (2, 4, 16):
            x = torch.randn(1, 16, rows, features, device=device).to(torch.bfloat16 if on_gpu else torch.float32)
            view = x.as_strided((16, rows // rate, features), (x.stride(1), rate * features, 1))
            moved = 2 * view.numel() * x.element_size()
            yield {"features": features, "rate": rate, "bytes": moved, "what": "gather",
                   **_timed(lambda v=view: v.contiguous(), on_gpu)}  # type: ignore[misc]  # fmt: skip
            total = torch.zeros(16, rows, features, device=device)
            into = total.as_strided((16, rows // rate, features), (total.stride(0), rate * features, 1))
            part = view.float().contiguous()
            weight = torch.rand(16, rows // rate, 1, device=device)
            yield {"features": features, "rate": rate, "bytes": 3 * part.numel() * 4, "what": "addcmul",
                   **_timed(lambda i=into, p=part, w=weight: i.addcmul_(p, w), on_gpu)}  # type: ignore[misc]  # fmt: skip


def _overheads(device: str, on_gpu: bool) -> Iterator[Raw]:
    """Time operators on tensors so small that nothing else counts."""
    import torch.nn.functional as F

    x = torch.randn(1, 2, 32, 64, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    y = x.clone().requires_grad_()
    small = torch.zeros(8, device=device)

    def both() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(y, y, y), y, x)

    calls: dict[str, Callable[[], Any]] = {
        "add": lambda: small.add_(1),
        "view": lambda: x.as_strided((2, 16, 64), (2048, 128, 1)),
        "sdpa": lambda: F.scaled_dot_product_attention(x, x, x),
        "sdpa and backward": both,
    }
    for name, call in calls.items():
        for _ in range(5):
            call()
        bursts = [once(call, on_gpu, 100) for _ in range(7)]
        yield {
            name: {
                "seconds": statistics.median(b[0] for b in bursts),
                "host": statistics.median(b[1] for b in bursts),
            }
        }
