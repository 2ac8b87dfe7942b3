"""The public functions: :func:`compile` plans a spec, :func:`attention` plans and runs one call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from attnplan import patterns as P
from attnplan.calls import check_operand_names
from attnplan.cost import resolve
from attnplan.cost.tiles import attend_tiles
from attnplan.errors import RingError, SpecError
from attnplan.ir.coverage import attend_coverage
from attnplan.patterns import Mixture, Pattern
from attnplan.patterns.indicators import indicator
from attnplan.plan import Plan
from attnplan.search import lowerings_clear, search
from attnplan.spec import OPERANDS, AttentionSpec
from attnplan.units import parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_PLANS = 256


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
        names = ("attnplan", "torch", "triton", "xformers", "mslk", "flash-attn", "flash-attn-3", "flash-attn-4")
        found = []
        for name in names:
            try:
                found.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                continue
        _fingerprint = ", ".join(found)
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
        A ``DeviceMesh`` to run on; not in this version.
    tune
        Measure the best candidates; not in this version.
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
        If distributed execution is asked for.

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
    _refuse_what_is_missing(spec, mesh, tune)
    target = resolve(device)
    budget = None if max_memory is None else parse_bytes(max_memory)
    name = target.torch_device or target.device.name
    key = _Key(spec, name, backend, strategy, budget, deterministic, strict, fingerprint())
    plan = _plans.get(key)
    if plan is None:
        found = search(spec, target, backend, strategy, budget, deterministic=deterministic)
        pins = {"backend": backend, "strategy": strategy, "max_memory": budget}
        plan = _plans.put(key, Plan(spec, target, found, pins, strict=strict, deterministic=deterministic))
    assert isinstance(plan, Plan)
    return plan


def _refuse_what_is_missing(spec: AttentionSpec, mesh: object, tune: bool) -> None:
    if mesh is not None:
        raise RingError("mesh= needs ring execution, which is not in this version; leave it out to run on one device")
    if spec.ring_size > 1:
        raise RingError(
            f"ring_size={spec.ring_size} needs the ring pass, which is not in this version; use ring_size=1"
        )
    if tune:
        raise SpecError("tune=True needs the measuring search, which is not in this version; leave it out")


def cache_clear() -> None:
    """Forget every plan, and every graph and proof that planning remembers."""
    _plans.clear()
    _calls.clear()
    lowerings_clear()
    attend_coverage.cache_clear()
    indicator.cache_clear()
    attend_tiles.cache_clear()


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
    return Plan(found.spec, found.target, found.found, found.pins)


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
        ``documents``, ``key_padding``, ``q_offset`` and ``dropout_seed``, as a plan takes them. A pattern that does
        not mention documents or padding gets them added.

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
    try:
        key = (
            q.shape, k.shape, v.shape, q.dtype, q.device, pattern, causal, scale, softcap, dropout, layout, backend,
            strategy, max_memory, tuple(operands),
        )  # fmt: skip
    except AttributeError:  # not a tensor
        _check_dimensions(q, k, v)
        raise
    plan = _calls.get(key)
    if plan is None:
        spec = _inferred(q, k, v, pattern, causal, scale, softcap, dropout, layout, operands)
        plan = _calls.put(key, compile(spec, q.device, backend, strategy, max_memory))
    return plan(q, k, v, return_lse=return_lse, **operands)


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
    )


def _check_dimensions(q: Any, k: Any, v: Any) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if getattr(tensor, "ndim", None) != 4:
            raise SpecError(f"{name} must be a tensor of 4 dimensions, got {_described(tensor)}")


def _described(tensor: Any) -> str:
    return f"shape {list(tensor.shape)}" if hasattr(tensor, "shape") else type(tensor).__name__
