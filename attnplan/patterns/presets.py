"""Published sparse patterns, built from the algebra, so that each is planned like anything written by hand.

A ``window`` counts keys as :func:`~attnplan.patterns.window` does: the query's own position is not among them. Patterns
that only make sense in decoders end in ``& causal()``, and ``causal=True`` in the spec changes nothing; the others are
bidirectional and become causal with it. ``neighborhood`` is an atom and needs no preset.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_

from attnplan.errors import SpecError, did_you_mean
from attnplan.patterns import bands, keys
from attnplan.patterns.base import Pattern, require, require_int
from attnplan.patterns.blocks import block_window, random_blocks
from attnplan.patterns.operands import documents
from attnplan.patterns.segments import heads as head_range
from attnplan.patterns.segments import segments
from attnplan.patterns.strides import columns, strided

KINDS = ("strided", "fixed")
_EXPRESSIVITY = 8
_RANDOM_BLOCKS = 3


def longformer(window: int, global_tokens: int | Sequence[int] = 0, dilation: int = 1) -> Pattern:
    """Return Longformer's sliding window, dilated if wanted, with tokens that see and are seen by all.

    Parameters
    ----------
    window
        Keys on each side of the query: half of the paper's window size.
    global_tokens
        The first n positions, or a list of positions.
    dilation
        Distance of neighbouring keys in the window, which then reaches ``window * dilation`` positions.

    Raises
    ------
    SpecError
        If a size is not a positive int, or a global token is negative or given twice.

    Notes
    -----
    Bidirectional; the paper's autoregressive model is ``causal=True`` without global tokens. The paper projects
    global tokens by weights of their own, which is a matter of the model, not of the pattern.

    Examples
    --------
    >>> longformer(256, global_tokens=[0])
    window(256) | global_tokens(1)
    >>> longformer(64, dilation=2)
    window(128) & strided(2)

    References
    ----------
    Beltagy et al., Longformer: The Long-Document Transformer, arXiv 2004.05150, section 3.1.
    """
    require_int(window, "longformer window", 1)
    require_int(dilation, "longformer dilation", 1)
    local = bands.window(window * dilation)
    if dilation > 1:
        local = local & strided(dilation)
    tokens = global_tokens if isinstance(global_tokens, int) else list(global_tokens)
    return local if tokens in (0, []) else local | keys.global_tokens(tokens)


def bigbird(
    block_size: int = 64,
    window_blocks: int = 3,
    global_blocks: int = 2,
    num_random_blocks: int | None = None,
    random_keep: float | None = None,
    seed: int = 0,
) -> Pattern:
    """Return BigBird: a window of blocks, the first blocks as global tokens, and random blocks.

    Parameters
    ----------
    block_size
        Positions per block.
    window_blocks
        Blocks of the window, the query's own in the middle: an odd number.
    global_blocks
        Number of blocks at the start whose positions are global; 0 for none.
    num_random_blocks
        Random key blocks for each block of queries; 0 for none. The default is 3, as in the paper.
    random_keep
        Instead of ``num_random_blocks``: the share of all key blocks.
    seed
        Of the random blocks.

    Raises
    ------
    SpecError
        If ``window_blocks`` is even, a number is negative, or both ways to count random blocks are given; in a spec,
        if there are fewer positions than global ones.

    Notes
    -----
    Bidirectional. This is the paper's internal construction (ITC). A random block may coincide with one of the window,
    as in the paper's random graph; published code draws until it does not, and makes the first and the last block
    global. With ``causal=True`` nothing is drawn again: the random blocks above the diagonal are gone.

    Examples
    --------
    >>> bigbird(32, window_blocks=3, global_blocks=1, num_random_blocks=2)
    block_window(32, 1) | global_tokens(32) | random_blocks(count=2, block_size=32)

    References
    ----------
    Zaheer et al., Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, section 2 and appendix D.
    """
    require_int(window_blocks, "bigbird window_blocks", 1)
    require_int(global_blocks, "bigbird global_blocks", 0)
    require(
        window_blocks % 2 == 1,
        f"bigbird window_blocks must be odd, with the query's own block in the middle; got {window_blocks}",
    )
    parts = [block_window(block_size, window_blocks // 2)]
    if global_blocks:
        parts.append(keys.global_tokens(global_blocks * block_size))
    if random_keep is not None:
        require(num_random_blocks is None, "bigbird takes num_random_blocks or random_keep, not both")
        parts.append(random_blocks(random_keep, block_size, seed))
    elif num_random_blocks != 0:
        count = _RANDOM_BLOCKS if num_random_blocks is None else num_random_blocks
        parts.append(random_blocks(block_size=block_size, seed=seed, count=count))
    return reduce(or_, parts)


def streaming(sinks: int, window: int) -> Pattern:
    """Return StreamingLLM's attention: the first keys, and the most recent ones.

    Parameters
    ----------
    sinks
        Number of keys at the start that every query keeps: 4 in the paper.
    window
        Keys before the query: one less than the paper's recent cache, which holds the query's own.

    Raises
    ------
    SpecError
        If ``sinks`` is not positive or ``window`` is negative; in a spec, if there are fewer keys than sinks.

    Notes
    -----
    Causal. The paper counts rotary positions inside the cache, which is a matter of the model, not of the pattern.

    Examples
    --------
    >>> streaming(sinks=4, window=1020)
    (window(1020, 0) | sinks(4)) & causal()

    References
    ----------
    Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, section 3.
    """
    return (bands.window(window, 0) | keys.sinks(sinks)) & bands.causal()


def a_shape(sinks: int, window: int) -> Pattern:
    """Return MInference's A-shape: the first keys and a local window, the same pairs as :func:`streaming`.

    Parameters
    ----------
    sinks
        Number of keys at the start.
    window
        Keys before the query.

    Raises
    ------
    SpecError
        If ``sinks`` is not positive or ``window`` is negative; in a spec, if there are fewer keys than sinks.

    Notes
    -----
    Causal. For some heads only, write ``heads(0, 4) & a_shape(128, 2048) | heads(4, 32)``.

    Examples
    --------
    >>> a_shape(sinks=128, window=2048)
    (window(2048, 0) | sinks(128)) & causal()

    References
    ----------
    Jiang et al., MInference 1.0: Accelerating Pre-filling for Long-Context LLMs, arXiv 2407.02490, section 3.
    """
    return streaming(sinks, window)


def vertical_slash(vertical: Sequence[int] = (), slash: Sequence[int] = ()) -> Pattern:
    """Return MInference's vertical-slash pattern: some keys for every query, and some distances.

    Parameters
    ----------
    vertical
        Positions of keys that every later query meets.
    slash
        Distances from query to key, 0 being the query's own position: diagonals of the mask.

    Raises
    ------
    SpecError
        If both are empty, or an entry is negative or given twice; in a spec, if a vertical key does not exist.

    Notes
    -----
    Causal. The paper estimates both lists for each head from the last queries; this takes them as they are. Distances
    that follow one another become one band.

    Examples
    --------
    >>> vertical_slash(vertical=[0, 1, 7], slash=[0, 1, 64])
    (columns([0, 1, 7]) | window(1, 0) | band(64, None) & ~band(63, None)) & causal()

    References
    ----------
    Jiang et al., MInference 1.0: Accelerating Pre-filling for Long-Context LLMs, arXiv 2407.02490, section 3.
    """
    parts = [columns(vertical)] if len(vertical) else []
    parts += [_diagonals(first, last) for first, last in _joined(slash)]
    require(bool(parts), "vertical_slash needs at least one vertical line or one slash")
    return reduce(or_, parts) & bands.causal()


def _joined(distances: Iterable[int]) -> list[tuple[int, int]]:
    """Return the runs of consecutive distances, first and last."""
    listed = [int(d) if hasattr(d, "__index__") and not isinstance(d, bool) else d for d in distances]
    for distance in listed:
        require_int(distance, "distance of a slash", 0)
    require(len(set(listed)) == len(listed), f"vertical_slash needs distinct distances, got {listed}")
    known = set(listed)
    starts = sorted(d for d in listed if d - 1 not in known)
    ends = sorted(d for d in listed if d + 1 not in known)
    return list(zip(starts, ends, strict=True))


def _diagonals(first: int, last: int) -> Pattern:
    """Return the pairs whose key is ``first`` to ``last`` positions before the query."""
    return bands.window(last, 0) if first == 0 else bands.band(last, None) & ~bands.band(first - 1, None)


def sparse_transformer(stride: int, kind: str = "strided", expressivity: int | None = None) -> Pattern:
    """Return the Sparse Transformer's strided or fixed attention, both of its heads in one softmax.

    Parameters
    ----------
    stride
        The paper's l, near the square root of the length.
    kind
        ``"strided"``: the last ``stride`` keys, and every ``stride``-th key before; for data of that period, such as
        images. ``"fixed"``: the query's own segment of ``stride`` positions, and the last ``expressivity`` positions of
        every segment before; for text.
    expressivity
        The paper's c, for the fixed kind only; the default is 8.

    Raises
    ------
    SpecError
        If the kind is unknown, or ``expressivity`` exceeds the stride or is given for the strided kind.

    Notes
    -----
    Causal. This is the paper's merged head, the union of both sets. For one head each, take the parts:
    ``heads(0, 4) & window(128, 0) | heads(4, 8) & strided(128)`` with ``causal=True``.

    Examples
    --------
    >>> sparse_transformer(128)
    (window(128, 0) | strided(128)) & causal()
    >>> sparse_transformer(4, kind="fixed", expressivity=1)
    (segments(4) | columns([3], every=4)) & causal()

    References
    ----------
    Child et al., Generating Long Sequences with Sparse Transformers, arXiv 1904.10509, section 4.3.
    """
    require_int(stride, "sparse_transformer stride", 1)
    if kind not in KINDS:
        raise SpecError(f"unknown sparse_transformer kind {kind!r}{did_you_mean(str(kind), KINDS)}")
    if kind == "strided":
        require(expressivity is None, "sparse_transformer expressivity belongs to the fixed kind; leave it out")
        return (bands.window(stride, 0) | strided(stride)) & bands.causal()
    width = _EXPRESSIVITY if expressivity is None else expressivity
    require_int(width, "sparse_transformer expressivity", 1)
    require(width <= stride, f"sparse_transformer expressivity {width} exceeds the stride {stride}")
    return (segments(stride) | columns(range(stride - width, stride), every=stride)) & bands.causal()


def chunked(size: int) -> Pattern:
    """Return chunked attention, as in Llama 4: query and key in one chunk of ``size`` positions.

    The same as :func:`~attnplan.patterns.segments`.

    Parameters
    ----------
    size
        Positions per chunk; the last chunk may be shorter.

    Raises
    ------
    SpecError
        If ``size`` is not a positive int.

    Notes
    -----
    Bidirectional; Llama 4 is ``causal=True`` with chunks of 8192.

    Examples
    --------
    >>> chunked(8192)
    segments(8192)

    References
    ----------
    Meta, The Llama 4 herd, 2025 (local layers with rotary positions).
    """
    return segments(size)


def prefix_lm(prefix: int) -> Pattern:
    """Return the mask of a prefix language model: every query meets the whole prefix and what precedes it.

    Parameters
    ----------
    prefix
        Number of positions at the start that see one another in both directions.

    Raises
    ------
    SpecError
        If ``prefix`` is not positive; in a spec, if it exceeds the keys.

    Notes
    -----
    Query i meets key k iff ``k <= i`` or ``k < prefix``. It contains its own causality: with ``causal=True`` in the
    spec the prefix would be causal too, and nothing but causal attention remain.

    Examples
    --------
    >>> prefix_lm(128)
    causal() | sinks(128)

    References
    ----------
    Raffel et al., Exploring the Limits of Transfer Learning (T5), arXiv 1910.10683, section 3.2.1.
    """
    require_int(prefix, "prefix of prefix_lm", 1)
    return bands.causal() | keys.sinks(prefix)


def longlora(group: int, heads: int, length: int) -> Pattern:
    """Return LongLoRA's shifted sparse attention: groups of positions, shifted by half a group in half of the heads.

    Parameters
    ----------
    group
        Positions per group: an even number.
    heads
        Number of query heads; the first ``heads // 2`` are not shifted.
    length
        Number of positions.

    Raises
    ------
    SpecError
        If ``group`` is odd or there are fewer than two heads; in a spec, if ``length`` is not the number of keys or
        ``heads`` exceeds that of the spec.

    Notes
    -----
    Bidirectional; LongLoRA trains with ``causal=True``. The published code shifts by rolling the sequence, so that in
    the shifted heads the last half group shares a group with the first one, and under a causal mask in rolled order
    the first tokens see the last ones. Here the two are groups of their own, of half the size, and nothing leaks. A
    length that is no multiple of the group, refused there, has a shorter last group.

    Examples
    --------
    >>> longlora(group=4, heads=8, length=10)
    heads(0, 4) & segments(4) | heads(4, 8) & documents([2, 4, 4])

    References
    ----------
    Chen et al., LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models, arXiv 2309.12307, section 3.2.
    """
    require_int(group, "longlora group", 2)
    require_int(heads, "longlora heads", 2)
    require_int(length, "longlora length", 1)
    require(group % 2 == 0, f"longlora group must be even, to be shifted by half of it; got {group}")
    ends = [*range(group // 2, length, group), length]
    shifted = documents([b - a for a, b in zip([0, *ends], ends, strict=False)])
    return head_range(0, heads // 2) & segments(group) | head_range(heads // 2, heads) & shifted
