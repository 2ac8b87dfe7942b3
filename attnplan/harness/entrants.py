"""One spec, every way to run it: all contestants share inputs, are checked against float64, and take turns."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.cost import Target
from attnplan.ir import Graph
from attnplan.plan import Plan
from attnplan.runtime.clock import Call, Plenty, Times, race
from attnplan.search import every_way
from attnplan.spec import AttentionSpec
from attnplan.verify import GRADIENT_TOLERANCES, TOLERANCES, random_operands, relative_error, sampled_attention

ROWS = 12
"""Sampled (head, row) pairs whose output and gradients are compared with float64."""
HEADS = 3
Row = dict[str, Any]


@attrs.frozen
class Asked:
    """What to measure, and what to leave out."""

    plenty: Plenty = attrs.field(factory=Plenty)
    backends: frozenset[str] = frozenset()
    """Backends whose candidates take part; empty for all."""
    without: frozenset[tuple[str, str]] = frozenset({("reference", "float64")})
    """(backend, schedule) that never take part."""
    hopeless: float = 30.0
    """Candidates that are predicted to take this many times as long as the fastest that may take part do not."""
    least: int = 0
    """So many of the fastest take part all the same, and with them the fastest of each backend, unless this is 0."""
    memory: int = 1 << 62
    """Candidates that are predicted to need more bytes do not take part."""
    until: float = float("inf")
    """When to stop, by :func:`time.monotonic`."""
    seed: int = 0
    watch: Callable[[str], None] = lambda name: None
    """Called with the name of a contestant before its first call, and with ``"the race"`` before that."""
    clock: Callable[[], float] = time.perf_counter
    """By which first calls are timed: one that others may interrupt brings a clock that stands still meanwhile."""


@attrs.frozen
class Contestant:
    """One way to compute a spec."""

    name: str
    run: Callable[..., Tensor] = attrs.field(repr=False)
    """Takes q, k, v in the spec's layout, and the operands by name."""
    facts: Row = attrs.field(factory=dict, repr=False)
    """What its row says beside the measurements."""


@attrs.frozen
class Inputs:
    """Tensors that all contestants share, and what float64 makes of them on sampled rows."""

    spec: AttentionSpec
    tensors: tuple[Tensor, Tensor, Tensor]
    operands: dict[str, Tensor]
    upstream: Tensor | None
    """Random gradient of the output; None where only the forward is asked for."""
    sparse: Tensor | None
    """The same on sampled rows, 0 elsewhere."""
    at: tuple[Tensor, Tensor]
    """Heads and rows of the sample."""
    want: tuple[Tensor, ...]
    """Output rows and, with an upstream gradient, the gradients of q, k and v."""

    def call(self, run: Callable[..., Tensor]) -> Call:
        """Return the call that is timed: the forward alone without recording, or forward and backward."""
        q, k, v = self.tensors
        if self.upstream is None:

            def forward() -> None:
                with torch.no_grad():
                    run(q, k, v, **self.operands)

            return forward

        def both() -> None:
            torch.autograd.grad(run(q, k, v, **self.operands), (q, k, v), self.upstream)

        return both

    def errors(self, run: Callable[..., Tensor]) -> tuple[float, float | None]:
        """Return the relative error of the output, and the largest of the gradients, on the sampled rows."""
        out = run(*self.tensors, **self.operands) if self.upstream is not None else self._forward(run)
        rows = out.transpose(1, 2) if self.spec.layout == "bshd" else out
        error = relative_error(rows[:, self.at[0], self.at[1]], self.want[0])
        if self.upstream is None:
            return error, None
        grads = torch.autograd.grad(out, self.tensors, self.sparse)
        return error, max(relative_error(g, w) for g, w in zip(grads, self.want[1:], strict=True))

    def _forward(self, run: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return run(*self.tensors, **self.operands)


def contestants(spec: AttentionSpec, target: Target, asked: Asked) -> tuple[list[Contestant], list[Row]]:
    """Return a contestant for each candidate that accepts a spec, and a row for each that does not take part."""
    found, rows = [], []
    ways = [
        (c, way)
        for c, way in every_way(spec, target)
        if (not asked.backends or c.backend in asked.backends) and (c.backend, c.schedule) not in asked.without
    ]
    predicted = sorted((c.prediction.seconds, c.name, c.backend) for c, way in ways if way is not None and c.prediction)
    best = predicted[0][0] if predicted else 0.0
    kept = _kept([(name, backend) for _, name, backend in predicted], asked.least)
    for candidate, way in ways:
        facts: Row = {"kind": "candidate", "candidate": candidate.name, "backend": candidate.backend,
                      "strategy": candidate.strategy, "schedule": candidate.schedule}  # fmt: skip
        if way is None or candidate.prediction is None:
            rows.append({**facts, "refused": "; ".join(candidate.reasons)})
            continue
        facts |= {"predicted": candidate.prediction.seconds, "predicted_peak": candidate.prediction.peak_bytes,
                  "graph": digest(way.lowered.graph)}  # fmt: skip
        if candidate.prediction.seconds > asked.hopeless * best and candidate.name not in kept:
            rows.append({**facts, "skipped": f"predicted {candidate.prediction.seconds / best:.0f} x the fastest"})
        elif candidate.prediction.peak_bytes > asked.memory:
            rows.append({**facts, "skipped": f"needs {candidate.prediction.peak_bytes / 2**30:.1f} GiB"})
        else:
            plan = Plan(spec, target, way, {"backend": candidate.backend}, strict=True)
            found.append(Contestant(candidate.name, plan, facts))
    return found, rows


def _kept(fastest_first: list[tuple[str, str]], least: int) -> frozenset[str]:
    """Return the names of candidates that are compared whatever they are predicted to take."""
    if not least:
        return frozenset()
    of_backends = {backend: name for name, backend in reversed(fastest_first)}
    return frozenset([name for name, _ in fastest_first[:least]]) | frozenset(of_backends.values())


def digest(graph: Graph) -> str:
    """Return a short name of a graph: rows of a graph that a spec no longer has are of no use to a fit."""
    return hashlib.blake2b(str(graph).encode(), digest_size=6).hexdigest()


def contest(
    spec: AttentionSpec,
    target: Target,
    entrants: list[Contestant],
    asked: Asked,
    operands: Mapping[str, Tensor] | None = None,
) -> Iterator[Row]:
    """Check every contestant against float64, measure its memory, then let all take turns; a row for each.

    A contestant that raises, or is wrong, gets a row that says so and is not timed.

    Parameters
    ----------
    spec
        With ``training`` forward and backward are timed, else the forward alone.
    target
        A device that is here.
    entrants
        As :func:`contestants` returns them, and any others.
    asked
        How much to measure.
    operands
        Runtime operands; random ones by default.
    """
    device = str(target.torch_device)
    on_gpu = device.startswith("cuda")
    inputs = prepared(spec, device, asked.seed, operands)
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for one in entrants:
        rows[one.name] = dict(one.facts)
        if time.monotonic() > asked.until:
            rows[one.name]["skipped"] = "out of time"
            continue
        asked.watch(one.name)
        try:
            rows[one.name] |= _checked(one, inputs, on_gpu, asked.clock)
        except Exception as error:  # one contestant that fails must not cost the others
            rows[one.name]["failed"] = _said(error)
            _fatal(error)
            continue
        if rows[one.name]["ok"]:
            calls[one.name] = inputs.call(one.run)
    if calls:
        asked.watch("the race")
    times = _raced(calls, on_gpu, asked, rows)
    for name, found in times.items():
        rows[name] |= _measured(found)
    yield from rows.values()


def _raced(calls: dict[str, Call], on_gpu: bool, asked: Asked, rows: dict[str, Row]) -> dict[str, Times]:
    try:
        return race(calls, on_gpu, asked.plenty)
    except Exception as error:  # find out whose fault it is: each alone
        _fatal(error)
        found: dict[str, Times] = {}
        for name, call in calls.items():
            try:
                found |= race({name: call}, on_gpu, asked.plenty)
            except Exception as own:
                rows[name]["failed"] = _said(own)
                _fatal(own)
        return found


class PoisonedError(RuntimeError):
    """An error after which a CUDA context is of no use: the process has to start again."""


def poisons(error: Exception) -> bool:
    """Return whether a CUDA context is of no use after an error."""
    return any(
        part in str(error) for part in ("illegal memory access", "device-side assert", "unspecified launch failure")
    )


def _fatal(error: Exception) -> None:
    if poisons(error):
        raise PoisonedError(str(error)) from error


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def prepared(spec: AttentionSpec, device: str, seed: int = 0, operands: Mapping[str, Tensor] | None = None) -> Inputs:
    """Return random inputs for a spec on a device, and float64's results on sampled rows."""
    generator = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    shape = spec.shape
    q, k, v = (
        torch.randn(_laid_out(spec, *size), device=device, dtype=torch.float32, generator=on_device)
        .to(dtype)
        .requires_grad_(spec.training)
        for size in (
            (spec.heads, shape.seq_len, spec.head_dim),
            (spec.kv_heads, shape.kv_len, spec.head_dim),
            (spec.kv_heads, shape.kv_len, spec.value_dim),
        )
    )
    given = dict(operands) if operands is not None else random_operands(spec, generator)
    given = {name: x.to(device) for name, x in given.items()}
    heads = torch.randperm(spec.heads, generator=generator)[:HEADS].sort().values
    heads = heads.repeat_interleave(ROWS // len(heads))
    rows = torch.randint(0, shape.seq_len, heads.shape, generator=generator)
    at = (heads.to(device), rows.to(device))
    upstream = sparse = None
    if spec.training:
        size = _laid_out(spec, spec.heads, shape.seq_len, spec.value_dim)
        upstream = torch.randn(size, device=device, dtype=torch.float32, generator=on_device).to(dtype)
        sparse = _on_rows(upstream, at, spec)
    want = _wanted(spec, (q, k, v), given, at, sparse)
    return Inputs(spec, (q, k, v), given, upstream, sparse, at, want)


def _laid_out(spec: AttentionSpec, heads: int, rows: int, features: int) -> tuple[int, ...]:
    inner = (heads, rows) if spec.layout == "bhsd" else (rows, heads)
    return (spec.batch, *inner, features)


def _on_rows(upstream: Tensor, at: tuple[Tensor, Tensor], spec: AttentionSpec) -> Tensor:
    sparse = torch.zeros_like(upstream)
    inner = (sparse, upstream) if spec.layout == "bhsd" else (sparse.transpose(1, 2), upstream.transpose(1, 2))
    inner[0][:, at[0], at[1]] = inner[1][:, at[0], at[1]]
    return sparse


def _wanted(
    spec: AttentionSpec,
    tensors: tuple[Tensor, Tensor, Tensor],
    operands: dict[str, Tensor],
    at: tuple[Tensor, Tensor],
    sparse: Tensor | None,
) -> tuple[Tensor, ...]:
    wide = [x.detach().double().requires_grad_(sparse is not None) for x in tensors]
    swap = spec.layout == "bshd"
    inner = [x.transpose(1, 2) for x in wide] if swap else wide
    want, _ = sampled_attention(spec, inner[0], inner[1], inner[2], operands, *at)
    if sparse is None:
        return (want.detach(),)
    given = (sparse.transpose(1, 2) if swap else sparse)[:, at[0], at[1]].double()
    first = _first_of_each(at)
    if len(first) < len(at[0]):  # a row that was drawn twice has one gradient
        keep = torch.zeros(len(at[0]), dtype=torch.bool, device=given.device)
        keep[first] = True
        given = given * keep[None, :, None]
    return (want.detach(), *(g.detach() for g in torch.autograd.grad(want, wide, given)))


def _first_of_each(at: tuple[Tensor, Tensor]) -> list[int]:
    seen: dict[tuple[int, int], int] = {}
    for i, pair in enumerate(zip(at[0].tolist(), at[1].tolist(), strict=True)):
        seen.setdefault(pair, i)
    return list(seen.values())


def _checked(one: Contestant, inputs: Inputs, on_gpu: bool, clock: Callable[[], float]) -> Row:
    """Run a contestant twice: for its errors, and for its memory."""
    spec = inputs.spec
    if on_gpu:
        gc.collect(
            1
        )  # what a cycle of the contestant before holds, or it is gone at the peak and counts less than nothing
    start = clock()
    before = _allocated(on_gpu)
    error, gradient_error = inputs.errors(one.run)
    first = clock() - start
    limit = 2 * TOLERANCES[spec.dtype]
    gradient_limit = 2 * GRADIENT_TOLERANCES[spec.dtype]
    ok = error <= limit and (gradient_error is None or gradient_error <= gradient_limit)
    row: Row = {"error": error, "ok": ok, "first_seconds": first}
    if gradient_error is not None:
        row["gradient_error"] = gradient_error
    if not ok:
        row["failed"] = f"differs from float64: output {error:.1e}, gradients {gradient_error or 0:.1e}"
    elif on_gpu:
        row |= _memory(inputs.call(one.run), before)
    return row


def _allocated(on_gpu: bool) -> int:
    return torch.cuda.memory_allocated() if on_gpu else 0


def _memory(call: Call, before: int) -> Row:
    """Return the bytes that one more call needs: allocated and reserved at its peak, and what stays beside it.

    ``allocated`` holds the output, and with a backward the gradients; tables that a plan keeps count in both.
    """
    gc.collect(1)  # gradients of the first call that a cycle holds
    if _allocated(True) > before:  # tables that a plan keeps, or a cycle that is old by now
        gc.collect()
    kept = _allocated(True) - before
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"peak": {"allocated": peak, "kept": kept, "reserved": torch.cuda.max_memory_reserved() - reserved}}


def _measured(times: Times) -> Row:
    return {
        "seconds": times.median,
        "spread": times.spread,
        "rounds": [float(f"{x:.4g}") for x in times.seconds],
        "host": times.host,
        "device": [float(f"{x:.4g}") for x in times.device],
        "burst": times.burst,
        "led": True,
    }
