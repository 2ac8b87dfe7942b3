"""The published factories: a module by the name of its kind."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from attnplan.errors import RingError, SpecError, did_you_mean
from attnplan.nn.base import PatternAttention, ProjectedAttention
from attnplan.nn.blocksparse import BlockSparseRingDilatedAttention, BlockSparseRingMultiheadDilatedAttention
from attnplan.nn.dilated import DilatedAttention, ImprovedDilatedAttention
from attnplan.nn.multihead import ImprovedMultiheadDilatedAttention, MultiheadDilatedAttention
from attnplan.nn.ring import RingDilatedAttentionV2, RingMultiheadDilatedAttention, check_ring

SEGMENT_LENGTHS = (2048, 4096, 8192)
DILATION_RATES = (1, 2, 4)

_PLAIN: dict[str, type[PatternAttention]] = {
    "auto": ImprovedDilatedAttention,
    "standard": DilatedAttention,
    "improved": ImprovedDilatedAttention,
    "ring": RingDilatedAttentionV2,
    "block_sparse_ring": BlockSparseRingDilatedAttention,
}
_MULTIHEAD: dict[str, type[ProjectedAttention]] = {
    "auto": ImprovedMultiheadDilatedAttention,
    "standard": MultiheadDilatedAttention,
    "improved": ImprovedMultiheadDilatedAttention,
    "ring": RingMultiheadDilatedAttention,
    "block_sparse_ring": BlockSparseRingMultiheadDilatedAttention,
}
_SPELLINGS = {
    "block_sparse": "block_sparse_ring",
    "dilated": "standard",
    "improved_dilated": "improved",
    "ring_dilated": "ring",
    "ring_v2": "ring",
}
_DISTRIBUTED = {
    "distributed": "improved",
    "improved_distributed": "improved",
    "ring_distributed": "ring",
    "block_sparse_ring_distributed": "block_sparse_ring",
}
"""Kinds that need a mesh, and what they run on it."""


def _kind(name: str, mesh: Any) -> str:
    """Return the kind that ``name`` spells."""
    kinds = (*_PLAIN, *_SPELLINGS, *_DISTRIBUTED)
    if not isinstance(name, str):
        raise SpecError(f"the kind of attention is a name such as 'auto', got {name!r}")
    short = name.removeprefix("multihead_").removesuffix("_dilated_attention").removesuffix("_attention")
    if short in _DISTRIBUTED:
        if mesh is None:
            raise RingError(
                f"{name!r} runs on a mesh of processes: pass mesh=init_device_mesh(...), or ring_size= to 'ring' "
                "for a virtual ring on one device"
            )
        return _DISTRIBUTED[short]
    short = _SPELLINGS.get(short, short)
    if short not in _PLAIN:
        raise SpecError(f"unknown kind of attention {name!r}{did_you_mean(name, kinds)}")
    return short


def _build(kind: type[Any], arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """Call the class, with a hint where an option is unknown to it."""
    known = [p for p in inspect.signature(kind).parameters if p not in ("kwargs", "args", "options")]
    if kind is RingMultiheadDilatedAttention:
        known = [*inspect.signature(MultiheadDilatedAttention).parameters]
    if kind is BlockSparseRingMultiheadDilatedAttention:
        known += inspect.signature(BlockSparseRingDilatedAttention).parameters
    if kind is DilatedAttention and "dropout" in options:
        options = {"attention_dropout": options["dropout"], **{k: v for k, v in options.items() if k != "dropout"}}
    known += [name for name in _RING if name not in known]
    for name in options:
        if name not in known:
            raise SpecError(f"{kind.__name__} has no option {name!r}{did_you_mean(name, known)}")
    ring = {name: options[name] for name in _RING if name in options}
    module = kind(**arguments, **{name: x for name, x in options.items() if name not in ring})
    return _over_ranks(module, **ring)


_RING = ("mesh", "ring_size", "seq_len", "strategy")
"""Options of every kind: those of :meth:`PatternAttention.distribute`, and the ranks of a virtual ring."""


def _over_ranks(
    module: Any, mesh: Any = None, ring_size: int | None = None, seq_len: int | None = None, strategy: str = "auto"
) -> Any:
    """Return a module that runs over several ranks, if that is asked for."""
    inner = getattr(module, "attention", module)
    inner.ring_size = check_ring(ring_size)
    return module if mesh is None else module.distribute(mesh, seq_len, strategy)


def create_dilated_attention(
    attention_type: str = "auto",
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    **options: Any,
) -> PatternAttention:
    """Return a module without projections, ``[B, S, H, D]`` in and out.

    *Published* (fork): ``"auto"`` asked for the GPU's name and took ``"improved"`` nearly everywhere; options that a
    kind does not know were dropped. *Ours*: ``"auto"`` is ``"improved"``, whose plan the planner chooses for the shapes
    and the device of each call; see ``module.explain()``. Unknown options raise.

    Parameters
    ----------
    attention_type
        ``"auto"``, ``"standard"``, ``"improved"``, ``"ring"``, ``"block_sparse_ring"``, or a longer spelling such as
        ``"improved_dilated_attention"``. ``"distributed"`` and its relatives are those on a ``mesh``.
    segment_lengths, dilation_rates
        The defaults are [2048, 4096, 8192] and [1, 2, 4].
    **options
        Further arguments of the class, and for every kind ``mesh`` (with ``seq_len`` and ``strategy``, as in
        :meth:`PatternAttention.distribute`) or ``ring_size``, a virtual ring on one device.

    Raises
    ------
    SpecError
        If the kind or an option is unknown, or the class refuses.
    RingError
        If the kind is distributed and there is no mesh.

    Examples
    --------
    >>> create_dilated_attention("auto", [8, 16], [1, 2])
    ImprovedDilatedAttention(grouped(segment_lengths=[8, 16], dilation_rates=[1, 2], mix="mean"))
    """
    lists = _lists(segment_lengths, dilation_rates)
    module: PatternAttention = _build(_PLAIN[_kind(attention_type, options.get("mesh"))], lists, options)
    return module


def create_multihead_dilated_attention(
    attention_type: str = "auto",
    embed_dim: int = 768,
    num_heads: int = 12,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    **options: Any,
) -> ProjectedAttention:
    """Return a module with projections, ``[B, S, E]`` in and out.

    *Published* (fork): ``"standard"``, ``"ring"`` and ``"distributed"`` raised a TypeError, the others computed what
    their classes' pages say. *Ours*: every kind works, or says why not.

    Parameters
    ----------
    attention_type, segment_lengths, dilation_rates
        As in :func:`create_dilated_attention`. ``"auto"`` is
        :class:`~attnplan.nn.ImprovedMultiheadDilatedAttention`, so that checkpoints of the published one load.
    embed_dim, num_heads
        E and H; H must divide E.
    **options
        Further arguments of the class. ``"standard"`` has the fork's parameters, ``variant="pypi"`` for the others.

    Raises
    ------
    SpecError, RingError
        As for :func:`create_dilated_attention`.

    Examples
    --------
    >>> attend = create_multihead_dilated_attention("auto")
    >>> attend.embed_dim, attend.num_heads
    (768, 12)
    """
    kind = _MULTIHEAD[_kind(attention_type, options.get("mesh"))]
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, **_lists(segment_lengths, dilation_rates)}
    if issubclass(kind, MultiheadDilatedAttention):
        options.setdefault("variant", "fork")
    module: ProjectedAttention = _build(kind, sizes, options)
    return module


def _lists(segment_lengths: Sequence[int] | None, dilation_rates: Sequence[int] | None) -> dict[str, Any]:
    return {
        "segment_lengths": SEGMENT_LENGTHS if segment_lengths is None else segment_lengths,
        "dilation_rates": DILATION_RATES if dilation_rates is None else dilation_rates,
    }
