"""The public functions: :func:`compile` plans a spec, :func:`attention` plans and runs one call."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from attnplan import patterns as P
from attnplan.calls import check_operand_names
from attnplan.cost import Target, resolve
from attnplan.cost.calibration import calibrated_at
from attnplan.errors import SpecError
from attnplan.packages import installed
from attnplan.patterns import Mixture, Pattern
from attnplan.plan import Plan
from attnplan.search import CALLS, Found, search
from attnplan.spec import OPERANDS, AttentionSpec
from attnplan.units import parse_bytes

if TYPE_CHECKING:
    from torch import Tensor


_KEPT_PLANS = 256
CALLS_OF_A_SHAPE = 1_000
"""Calls over which :func:`attention` and modules spread compiling: nobody says that a shape returns."""
_UNPINNED: Mapping[str, Any] = {"backend": "auto", "strategy": "auto", "max_memory": None}
_REMEMBERING = tuple(f"attnplan.{layer}." for layer in ("patterns", "ir", "passes", "cost", "ring", "backends"))
"""Modules whose functions remember what planning found."""


@attrs.frozen
class _Key:
    """What makes two compilations the same."""

    spec: AttentionSpec
    device: str
    backend: str
    strategy: str
    max_memory: int | None
    deterministic: bool
    strict: bool
    tune: bool
    calls: int
    """Calls over which compiling is spread."""
    calibrated: int
    """When the calibration was written that plans are priced with."""
    fingerprint: str


class _Cache:
    """A bounded map, least recently used out first."""

    def __init__(self, size: int) -> None:
        self._size, self._items, self._lock = size, OrderedDict[Any, Any](), threading.Lock()

    def get(self, key: Any) -> Any:
        item = self._items.get(key)
        if item is not None:
            with self._lock:
                if key in self._items:
                    self._items.move_to_end(key)
        return item

    def put(self, key: Any, item: Any) -> Any:
        with self._lock:
            kept = self._items.setdefault(key, item)
            if len(self._items) > self._size:
                self._items.popitem(last=False)
        return kept

    def clear(self) -> None:
        with self._lock:
            self._items.clear()

    def __len__(self) -> int:
        return len(self._items)


_plans = _Cache(_KEPT_PLANS)
_calls = _Cache(4 * _KEPT_PLANS)
_fingerprint: str | None = None


def fingerprint() -> str:
    """Return the versions on which a plan depends."""
    global _fingerprint
    if _fingerprint is None:
        _fingerprint = ", ".join(f"{name} {version}" for name, version in installed().items())
    return _fingerprint


def compile(  # noqa: A001  # the public name: attnplan.compile
    spec: AttentionSpec,
    device: object = "auto",
    backend: str = "auto",
    strategy: str = "auto",
    max_memory: int | str | None = None,
    mesh: object = None,
    tune: bool = False,
    deterministic: bool = False,
    strict: bool = False,
) -> Plan:
    """Plan a spec for a device: lower it, prove every rewrite, price every way to run it, choose the cheapest.

    What compiles at its first call, as FlexAttention does on a GPU, has to gain those seconds within 100,000 calls.

    Parameters
    ----------
    spec
        What to compute.
    device
        ``"auto"``, a torch device or its name, or a name of the catalogue such as ``"h100"``: a plan for hardware
        that is not here can be inspected and compared, and refuses to be called.
    backend, strategy
        Pin a choice; ``"auto"`` is the cost model.
    max_memory
        Bytes, or text such as ``"2 GiB"``: a limit on everything but inputs and output.
    mesh
        A ``DeviceMesh`` of one dimension, or of two: groups of a ring, and ranks that spread heads. The plan is then
        called with each rank's shards; see :class:`~attnplan.plan_ring.RingPlan`. Without a mesh, a spec with
        ``ring_size`` above 1 runs all ranks on one device. A strategy is then a layout, a transport, or both:
        ``"zigzag > ring"``.
    tune
        Measure the best few candidates on this machine, take the fastest, and remember it in the user's cache with
        the fingerprint of the machine. ``plan.tuning`` says what was measured and how far off the model was.
        Programs that compile at their first call are candidates here wherever they have been run on such a device.
    deterministic
        Choose only what repeats bit for bit.
    strict
        Raise :class:`~attnplan.errors.KernelError` when a kernel of another package fails in a call. Otherwise a plan
        whose backend was not pinned warns, and moves to the next candidate.

    Returns
    -------
    Plan
        Equal arguments return the same object, from a bounded cache.

    Raises
    ------
    SpecError
        If an argument is unknown or impossible.
    NoBackendError
        If every backend refuses; the message lists each with its reasons.
    MemoryBudgetError
        If no plan fits ``max_memory``.
    RingError
        If no layout and transport can carry the spec over the ranks.

    Examples
    --------
    >>> import attnplan
    >>> from attnplan import AttentionSpec, patterns as P
    >>> spec = AttentionSpec(seq_len=4096, heads=8, head_dim=64, pattern=P.longnet([512, 1024], [1, 2]))
    >>> plan = attnplan.compile(spec, device="cpu-2core")
    >>> plan.strategy, plan.backend
    ('lattice', 'eager')
    >>> attnplan.compile(spec, device="cpu-2core") is plan
    True
    """
    if not isinstance(spec, AttentionSpec):
        raise SpecError(
            f"compile needs an AttentionSpec, got {type(spec).__name__}; for one call use attnplan.attention"
        )
    budget = None if max_memory is None else parse_bytes(max_memory)
    pins = {"backend": backend, "strategy": strategy, "max_memory": budget}
    if mesh is not None or spec.ring_size > 1:
        return _compile_ring(spec, device, mesh, pins, tune=tune, deterministic=deterministic)
    return planned(spec, resolve(device), pins, deterministic=deterministic, strict=strict, tune=tune)


def planned(
    spec: AttentionSpec,
    target: Target,
    pins: Mapping[str, Any] = _UNPINNED,
    *,
    deterministic: bool = False,
    strict: bool = False,
    tune: bool = False,
    calls: int = CALLS,
) -> Plan:
    """Return the plan on one device, from the cache if there is one."""
    name = target.torch_device or target.device.name
    spread = calls if target.device.kind == "cuda" else CALLS  # nothing that compiles is chosen elsewhere
    options = (deterministic, strict, tune, spread, calibrated_at(target), fingerprint())
    key = _Key(spec, name, pins["backend"], pins["strategy"], pins["max_memory"], *options)
    plan = _plans.get(key)
    if plan is None:
        found, tuning = _found(spec, target, pins, deterministic=deterministic, tune=tune, calls=calls)
        made = Plan(spec, target, found, pins, strict=strict, deterministic=deterministic)
        made.tuning = tuning
        plan = _plans.put(key, made)
    assert isinstance(plan, Plan)
    return plan


def _found(
    spec: AttentionSpec, target: Target, pins: Mapping[str, Any], *, deterministic: bool, tune: bool, calls: int
) -> tuple[Found, Any]:
    """Return the choice by price, or by measurement and what was measured."""
    if not tune:
        return search(spec, target, **pins, deterministic=deterministic, calls=calls), None
    from attnplan.tune import tuned

    return tuned(spec, target, pins, deterministic=deterministic)


def _compile_ring(
    spec: AttentionSpec, device: object, mesh: Any, pins: Mapping[str, Any], *, tune: bool, deterministic: bool
) -> Plan:
    """Return the plan over several ranks, on a mesh or on one device."""
    from attnplan.plan_ring import RingPlan  # most processes have one rank, and start faster without
    from attnplan.search_ring import place_of, search_ring, sizes_of

    if tune:
        raise SpecError("tune=True measures plans on one device; a ring is measured by python -m bench.ring")
    sizes = (spec.ring_size,) if mesh is None else sizes_of(mesh, spec.ring_size)
    target, place = place_of(mesh, device)
    name = target.torch_device or target.device.name
    key = ("ring", spec, sizes, name, tuple(pins.items()), place, deterministic, fingerprint())
    plan = _plans.get(key)
    if plan is None:
        ranks = sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])
        found = search_ring(spec, target, ranks, pins, deterministic=deterministic, virtual=mesh is None)
        plan = _plans.put(key, RingPlan(spec, target, found, mesh, pins, fingerprint()))
    assert isinstance(plan, RingPlan)
    return plan


def cache_clear() -> None:
    """Forget every plan, and every graph and proof that planning remembers."""
    _plans.clear()
    _calls.clear()
    for name, module in [*sys.modules.items()]:
        if name == "attnplan.search" or name.startswith(_REMEMBERING):
            for function in [*vars(module).values()]:
                if hasattr(function, "cache_parameters"):
                    function.cache_clear()


def load(path: str | Path, stale: str = "error") -> Plan:
    """Read a plan that :meth:`Plan.save <attnplan.plan.Plan.save>` wrote.

    The file is data. It is parsed, type-checked and proved against the spec that it holds; nothing in it is executed.

    Parameters
    ----------
    path
        The file.
    stale
        What to do with a plan that other versions of attnplan, torch or a kernel's package made: ``"error"`` refuses
        it and says what differs, ``"keep"`` takes it as it is.

    Raises
    ------
    SpecError
        If the file is unreadable, cut off, altered or stale, or names a backend or device that does not exist.
    VerifyError
        If its graph does not compute its spec.

    Examples
    --------
    >>> import attnplan, tempfile
    >>> plan = attnplan.compile(attnplan.AttentionSpec(seq_len=64, heads=2, head_dim=8, causal=True), device="h100")
    >>> path = tempfile.mktemp()
    >>> plan.save(path)
    >>> attnplan.load(path).graph == plan.graph
    True
    """
    from attnplan.store import parse, read

    found = parse(read(path), str(path), fingerprint(), stale)
    plan = Plan(found.spec, found.target, found.found, found.pins)
    plan.saved = found.record
    return plan


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Mixture | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    layout: str = "bhsd",
    return_lse: bool = False,
    backend: str = "auto",
    strategy: str = "auto",
    max_memory: int | str | None = None,
    **operands: Any,
) -> Any:
    """Compute attention in one call: infer the spec, find its plan in a bounded cache, run it.

    Parameters
    ----------
    q, k, v
        ``[B, H, S, D]``, ``[B, H_kv, K, D]``, ``[B, H_kv, K, Dv]`` (``"bshd"``: heads and rows swapped).
    pattern
        Which pairs may meet; the default is all.
    causal, scale, softcap, dropout, layout
        As in :class:`AttentionSpec`.
    return_lse
        Return the log-sum-exp too.
    backend, strategy, max_memory
        As in :func:`attnplan.compile`.
    **operands
        ``documents``, ``key_padding``, ``q_offset``, ``dropout_seed``, ``bias``, ``alibi_slopes`` and ``sink_logits``,
        as a plan takes them. A pattern that does not mention documents or padding gets them added.

    Returns
    -------
    Tensor or tuple of Tensor
        The output, or a pair of output and LSE.

    Examples
    --------
    >>> import torch, attnplan
    >>> from attnplan import patterns as P
    >>> q = k = v = torch.randn(1, 2, 16, 8)
    >>> attnplan.attention(q, k, v, pattern=P.window(4), causal=True).shape
    torch.Size([1, 2, 16, 8])
    """
    from torch.compiler import is_compiling

    options: dict[str, Any] = {
        "causal": causal, "scale": scale, "softcap": softcap, "dropout": dropout, "layout": layout, "backend": backend,
        "strategy": strategy, "max_memory": max_memory,
    }  # fmt: skip
    if is_compiling():
        return _traced(q, k, v, _FULL if pattern is None else pattern, options, return_lse, operands)
    plan: Any = plan_for(q, k, v, operands, pattern, **options)
    return plan(q, k, v, return_lse=return_lse, **operands)


_FULL = P.full()


def _traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Mixture,
    options: Mapping[str, Any],
    return_lse: bool,
    operands: Mapping[str, Any],
) -> Any:
    """Return the nodes of a call in a traced program: one operator, which finds the plan when it runs."""
    from attnplan.deferred import handle_for, run_deferred

    id(pattern)  # a trace guards on which object it is; nothing else that it does here would
    flat = [x for pair in options.items() for x in pair]
    handle = pattern.in_trace(handle_for, return_lse, *flat)
    out, lse = run_deferred(q, k, v, operands, handle, options["layout"])
    return (out, lse) if return_lse else out


def plan_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, Any],
    pattern: Pattern | Mixture | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    layout: str = "bhsd",
    backend: str = "auto",
    strategy: str = "auto",
    max_memory: int | str | None = None,
) -> Plan:
    """Return the plan that :func:`attention` calls with these arguments."""
    try:
        key = (
            q.shape, k.shape, v.shape, q.dtype, q.device, pattern, causal, scale, softcap, dropout, layout, backend,
            strategy, max_memory, tuple(operands),
        )  # fmt: skip
    except AttributeError:  # not a tensor
        _check_dimensions(q, k, v)
        raise
    plan: Plan | None = _calls.get(key)
    if plan is None:
        spec = _inferred(q, k, v, pattern, causal, scale, softcap, dropout, layout, operands)
        budget = None if max_memory is None else parse_bytes(max_memory)
        pins = {"backend": backend, "strategy": strategy, "max_memory": budget}
        plan = _calls.put(key, planned(spec, resolve(q.device), pins, calls=CALLS_OF_A_SHAPE))
        assert plan is not None
    return plan


def _inferred(
    q: Any,
    k: Any,
    v: Any,
    pattern: Any,
    causal: bool,
    scale: Any,
    softcap: Any,
    dropout: float,
    layout: str,
    operands: Mapping[str, Any],
) -> AttentionSpec:
    _check_dimensions(q, k, v)
    check_operand_names(operands, frozenset(OPERANDS))
    pattern = P.full() if pattern is None else pattern
    wanted: frozenset[str] = getattr(pattern, "operands", frozenset())
    for name, condition in (("documents", P.documents()), ("key_padding", P.padding())):
        if name in operands and name not in wanted:
            pattern = pattern & condition
    heads, rows = (1, 2) if layout == "bhsd" else (2, 1)
    return AttentionSpec(
        seq_len=q.shape[rows],
        kv_len=k.shape[rows],
        heads=q.shape[heads],
        kv_heads=k.shape[heads],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        batch=max(1, q.shape[0]),
        pattern=pattern,
        causal=causal,
        dtype=str(q.dtype),
        layout=layout,
        scale=scale,
        softcap=softcap,
        dropout=dropout,
        q_offset="q_offset" in operands,
        bias="bias" in operands,
        alibi_slopes="alibi_slopes" in operands,
        sink_logits="sink_logits" in operands,
    )


def _check_dimensions(q: Any, k: Any, v: Any) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if getattr(tensor, "ndim", None) != 4:
            raise SpecError(f"{name} must be a tensor of 4 dimensions, got {_described(tensor)}")


def _described(tensor: Any) -> str:
    return f"shape {list(tensor.shape)}" if hasattr(tensor, "shape") else type(tensor).__name__
