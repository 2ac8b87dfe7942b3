"""The catalogue of cross-validation: specs that every backend runs, or refuses with a reason.

Each case is there for something that goes wrong in practice. Where a published library got it wrong without saying so,
the case names the fault and where it is described. Lengths come from one unit, so that the same cases are small on a
CPU and cross the tiles of a GPU's kernels; most of them are odd.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from attnplan import patterns as P
from attnplan.errors import SpecError, did_you_mean
from attnplan.patterns.base import Array
from attnplan.spec import DTYPES, AttentionSpec, Dim

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING: Mapping[str, Any] = {}


@attrs.frozen(eq=False)
class Case:
    """A named spec, and the operands of one call.

    Examples
    --------
    >>> case = catalogue()["window, causal"]
    >>> case.source
    'vllm-project/vllm#3385'
    >>> case.spec.pattern, case.spec.seq_len
    (window(20), 149)
    """

    name: str
    spec: AttentionSpec
    operands: Mapping[str, Any] = NOTHING
    """Runtime operands as plain numbers and lists."""
    lengths: tuple[int, int] | None = None
    """Queries and keys of the call, where the spec leaves a length open; its maximum if None."""
    fault: str = ""
    """What a published library does, or did, without an error."""
    source: str = ""
    """Where the fault is described: a GitHub issue or pull request, a repository, or a paper."""

    @property
    def called(self) -> AttentionSpec:
        """The spec with the lengths of the call."""
        shape = self.spec.shape
        return self.spec.at(*(self.lengths or (shape.seq_len, shape.kv_len)))


@attrs.frozen
class Sizes:
    """The unit in which lengths are counted, and the features of a head."""

    unit: int
    head_dim: int
    dtype: str = "float32"

    @property
    def length(self) -> int:
        """The usual length: odd, and no multiple of any tile."""
        return self.of(37) | 1

    def of(self, count: int) -> int:
        """Return ``count`` units."""
        return count * self.unit

    def ends(self, *counts: int) -> list[int]:
        """Return cumulative document lengths up to the usual length; equal neighbours are an empty document."""
        return [0, *(self.of(n) for n in counts), self.length]

    def case(
        self,
        name: str,
        pattern: P.Pattern | P.Mixture | None = None,
        *,
        operands: Mapping[str, Any] = NOTHING,
        lengths: tuple[int, int] | None = None,
        fault: str = "",
        source: str = "",
        **options: Any,
    ) -> Case:
        """Return a case of batch 2 with four heads, unless ``options`` say otherwise."""
        usual = {"seq_len": self.length, "heads": 4, "head_dim": self.head_dim, "batch": 2, "dtype": self.dtype}
        spec = AttentionSpec(pattern=P.full() if pattern is None else pattern, **{**usual, **options})
        return Case(name, spec, operands, lengths, fault, source)


SIZES: Mapping[str, Sizes] = {"small": Sizes(unit=4, head_dim=16), "large": Sizes(unit=16, head_dim=64)}
"""``small`` for a CPU; ``large`` has lengths near 600 and heads of 64 features, which GPU kernels take."""


# A case reads as one paragraph.
# fmt: off
def _plain(s: Sizes) -> Iterator[Case]:
    yield s.case("dense")
    yield s.case("causal", causal=True)
    yield s.case("causal, whole tiles", seq_len=s.of(32), causal=True)
    yield s.case("causal, heads last", causal=True, layout="bshd",
                 fault="gradients of inputs that are not contiguous are NaN", source="NVIDIA-NeMo/Automodel#2384")
    yield s.case("as many heads as rows", seq_len=8, heads=8, causal=True,
                 fault="keys and values are transposed twice in the backward pass",
                 source="huggingface/diffusers#14338")
    yield s.case("one row", seq_len=1, causal=True)
    yield s.case("one query, many keys", seq_len=1, kv_len=s.length, causal=True,
                 fault="is_causal aligns at the first key: one query sees one key",
                 source="torch.nn.functional.scaled_dot_product_attention, is_causal")
    yield s.case("more keys than queries, causal", seq_len=s.of(11), kv_len=s.length, causal=True,
                 fault="causality aligned at the first key instead of the last",
                 source="Dao-AILab/flash-attention, changes of 2.1")
    yield s.case("more keys than queries", seq_len=s.of(11) | 1, kv_len=s.length)
    yield s.case("more queries than keys, causal", seq_len=s.of(23) | 1, kv_len=s.of(9), causal=True,
                 fault="rows before the first key are NaN", source="pytorch/pytorch#103963")
    yield s.case("open length", seq_len=Dim("s", max=s.length), kv_len=Dim("s", max=s.length), causal=True,
                 lengths=(s.of(17) | 1,) * 2,
                 fault="returned LSE makes gradients NaN where the mask was built for a longer length",
                 source="pytorch/pytorch#136232")
    yield s.case("scale", scale=3 / s.head_dim**0.5, causal=True,
                 fault="softmax_scale is stored and never used", source="fkodom/dilated-attention-pytorch 0.2.0")
    yield s.case("narrow values", causal=True, value_dim=s.head_dim // 2)
    yield s.case("wide values", P.window(s.of(6)), value_dim=2 * s.head_dim, kv_heads=2)
    yield s.case("softcap", softcap=2.5, causal=True)
    yield s.case("softcap, window, grouped", P.window(s.of(9), 0), softcap=5.0, kv_heads=2, causal=True)
    yield s.case("dropout", P.window(s.of(9)), dropout=0.2, operands={"dropout_seed": 1234}, causal=True,
                 fault="dropout applied twice", source="DarcStar-Solutions-Tech/dilated-attention-pytorch")


def _windows(s: Sizes) -> Iterator[Case]:
    yield s.case("window", P.window(s.of(5)))
    yield s.case("window, causal", P.window(s.of(5)), causal=True,
                 fault="the window is one key short", source="vllm-project/vllm#3385")
    yield s.case("window, one side", P.window(s.of(7), 0),
                 fault="one backend's window has a key more than the other's", source="huggingface/transformers#29623")
    yield s.case("window, asymmetric", P.window(s.of(5), s.of(2)))
    yield s.case("window ahead", P.band(0, s.of(9)))
    yield s.case("window that starts behind", P.band(s.of(9), -s.of(2)))
    yield s.case("window of one key", P.window(0))
    yield s.case("window longer than the keys", P.window(2 * s.length), causal=True)
    yield s.case("window, more keys", P.window(s.of(5), 0), seq_len=s.of(6) | 1, kv_len=s.length,
                 fault="the window is ignored: every query sees the whole prefix", source="sgl-project/sglang#26516")
    yield s.case("window, grouped", P.window(s.of(6), 0), kv_heads=2,
                 fault="the window never reaches the kernel", source="vllm-project/vllm#23969")
    yield s.case("window, grouped, one head", P.window(s.of(6)), kv_heads=1, causal=True,
                 fault="the window is dropped where the mask is made", source="huggingface/transformers#35924")
    yield s.case("windows of each head", P.heads(0, 2) & P.window(s.of(4)) | P.heads(2, 4) & P.window(s.of(9)),
                 fault="a mask is cached without the window's size (found in review)", source="allenai/OLMo-core#388")
    yield s.case("all but a window", ~P.window(s.of(3)))
    yield s.case("dilated window", P.window(s.of(12)) & P.dilated(s.of(20), 2, offset=1), causal=True)


def _grouped_queries(s: Sizes) -> Iterator[Case]:
    yield s.case("grouped queries", causal=True, kv_heads=2,
                 fault="returned LSE is zero", source="meta-pytorch/attention-gym#37")
    yield s.case("one key head", kv_heads=1, fault="LSE in base 2 instead of e", source="pytorch/pytorch#181645")
    yield s.case("groups of three", heads=6, kv_heads=2, causal=True)
    yield s.case("seven heads, one key head", heads=7, kv_heads=1, causal=True)
    yield s.case("grouped, more keys", heads=6, kv_heads=3, seq_len=s.of(5) | 1, kv_len=s.length, causal=True)


def _documents(s: Sizes) -> Iterator[Case]:
    lengths = [s.of(5), 1, s.length - s.of(5) - 1]
    each = {"documents": [[0, 1, s.of(18), s.length], [0, s.of(20), s.of(20), s.length]]}
    yield s.case("documents, known", P.documents(lengths), causal=True)
    yield s.case("documents, known, both directions", P.documents(lengths),
                 fault="every mask but a causal one is dropped", source="NVIDIA-NeMo/Automodel#2622")
    yield s.case("documents of one token", P.documents([1] * s.length), causal=True)
    yield s.case("documents", P.documents(), operands={"documents": s.ends(5, 18)}, causal=True,
                 fault="document boundaries are ignored: the loss is 1.83 times what it should be",
                 source="axolotl-ai-cloud/axolotl#3608")
    yield s.case("documents, some empty", P.documents(), operands={"documents": s.ends(0, 5, 5, 5, 18)})
    yield s.case("documents of each element", P.documents(), operands=each, kv_heads=2,
                 fault="NaN with masks that depend on the batch element", source="pytorch/pytorch#186775")
    yield s.case("documents, window", P.documents() & P.window(s.of(4), 0), operands={"documents": s.ends(5, 18)},
                 fault="masking within documents is wrong in one of the backends", source="allenai/OLMo-core#388")
    yield s.case("documents, grouped, more keys", P.documents(), seq_len=s.of(9) | 1, kv_len=s.length, kv_heads=2,
                 operands={"documents": s.ends(5, 30)}, causal=True)
    yield s.case("documents, padding", P.documents() & P.padding(), causal=True,
                 operands={**each, "key_padding": _real(s.length, s.length, s.of(21))})
    yield s.case("documents or sinks", P.documents() | P.sinks(2), operands={"documents": s.ends(5, 18)}, causal=True)
    yield s.case("documents, open length", P.documents(), seq_len=Dim("s", max=s.length), causal=True, kv_heads=2,
                 kv_len=Dim("s", max=s.length), lengths=(s.of(21) | 1,) * 2,
                 operands={"documents": [[0, s.of(4), s.of(21) | 1], [0, s.of(20), s.of(21) | 1]]},
                 fault="zeros for every batch element but the first", source="pytorch/pytorch#139462")


def _padding(s: Sizes) -> Iterator[Case]:
    real = {"key_padding": _real(s.length, s.length, s.of(21))}
    yield s.case("padding, known", P.padding([s.length, s.of(21)]))
    yield s.case("padding", P.padding(), operands=real,
                 fault="the mask is ignored by backends that take none", source="huggingface/diffusers#12605")
    yield s.case("padding, causal", P.padding(), operands=real, causal=True,
                 fault="without a mask function padding and causality vanish", source="huggingface/transformers#45811")
    yield s.case("padding at the front", P.padding(), operands={"key_padding": _late(s.length, 0, s.of(8))},
                 causal=True,
                 fault="rows without a key make every gradient NaN", source="pytorch/pytorch#41508")
    yield s.case("an element without a real key", P.padding(), operands={"key_padding": _real(s.length, s.length, 0)})
    yield s.case("padding, window", P.padding() & P.window(s.of(4)), operands=real, kv_heads=2)
    yield s.case("longnet, padding", _ladder(s) & P.padding(), operands=real, causal=True,
                 fault="key_padding_mask is ignored on the flash path",
                 source="microsoft/torchscale, multihead_attention.py")


def _shared_tokens(s: Sizes) -> Iterator[Case]:
    yield s.case("sinks", P.streaming(sinks=4, window=s.of(6)), causal=True)
    yield s.case("sinks, grouped, more keys", P.streaming(sinks=3, window=s.of(6)), kv_heads=2, seq_len=s.of(7) | 1,
                 kv_len=s.length)
    yield s.case("global tokens", P.longformer(s.of(2), [0, s.of(11), s.length - 1]))
    yield s.case("first tokens global", P.longformer(s.of(2), 3), causal=True)
    yield s.case("prefix", P.prefix_lm(s.of(7)))
    yield s.case("bigbird", P.bigbird(s.of(2), num_random_blocks=2, seed=3))
    yield s.case("vertical and slash", P.vertical_slash([0, 1, s.of(9)], [0, 1, s.of(8)]))


def _sparse(s: Sizes) -> Iterator[Case]:
    layout = np.eye(5, dtype=bool) | (np.arange(25).reshape(5, 5) % 3 == 0)
    each = np.stack([layout, layout.T, np.eye(5, dtype=bool), np.tri(5, dtype=bool)])
    yield s.case("blocks", P.blocks(layout, s.of(8)),
                 fault="the softmaxes of blocks are summed instead of joined",
                 source="DarcStar-Solutions-Tech/dilated-attention-pytorch")
    yield s.case("blocks of each head", P.blocks(each, s.of(8)), causal=True)
    yield s.case("blocks of each head, grouped", P.blocks(each, s.of(8)), kv_heads=2)
    yield s.case("rows without a block", P.blocks(np.tri(5, k=-1, dtype=bool), s.of(8)),
                 fault="NaN for certain masks", source="pytorch/pytorch#109517")
    yield s.case("random blocks", P.random_blocks(0.4, s.of(4), seed=7), causal=True)
    yield s.case("window of blocks", P.block_window(s.of(4), 2, 0))
    yield s.case("strided", P.sparse_transformer(s.of(3)))
    yield s.case("fixed", P.sparse_transformer(s.of(3), kind="fixed", expressivity=s.of(1)), kv_heads=2)
    yield s.case("neighborhood", P.neighborhood(s.of(2) | 1))
    plane, volume = (8, s.of(4) | 1), (4, 6, s.of(1) | 1)
    yield s.case("neighborhood of a plane", P.neighborhood([3, 5], [2, 1], plane), seq_len=plane[0] * plane[1])
    yield s.case("neighborhood of a volume", P.neighborhood(3, shape=volume, causal=[True, False, False]),
                 seq_len=volume[0] * volume[1] * volume[2])
    yield s.case("segments", P.segments(s.of(8)), causal=True)
    yield s.case("groups shifted by half", P.longlora(s.of(8), 4, s.length), causal=True,
                 fault="the first tokens see the last ones", source="dvlab-research/LongLoRA, arXiv 2309.12307")


def _mixtures(s: Sizes) -> Iterator[Case]:
    lengths = [s.of(8), s.of(16), s.of(32)]
    yield s.case("longnet", _ladder(s), causal=True,
                 fault="backward with the LSE of each part instead of the merged one: dQ is off by 9.6 %",
                 source="tenstorrent/tt-metal#53205")
    yield s.case("longnet, both directions, grouped", _ladder(s), kv_heads=2,
                 fault="backward reuses the first part's keys and values", source="huggingface/diffusers#14265")
    yield s.case("longnet, detached weights", _ladder(s, mix="lse-detached"), causal=True)
    yield s.case("longnet, mean", _ladder(s, mix="mean"), causal=True)
    yield s.case("longnet, more queries", _ladder(s), seq_len=s.of(23) | 1, kv_len=s.of(9))
    yield s.case("dilated, causal", P.dilated(s.of(12), 3, offset="interleave"), causal=True,
                 fault="slots are masked by their number instead of their position",
                 source="DarcStar-Solutions-Tech/dilated-attention-pytorch")
    yield s.case("rows that no branch covers", P.longnet([s.of(8), s.of(12)], [4, 3]),
                 fault="their LSE is -1e8 instead of -inf",
                 source="microsoft/torchscale, dilated_attention.py")
    yield s.case("offsets that differ in a group", P.longnet([s.of(8), s.of(24)], [2, 3]), heads=6, kv_heads=2)
    yield s.case("grouped heads", P.grouped(lengths, [1, 2, 4]), heads=5,
                 fault="heads are computed twice or never where groups do not divide them",
                 source="fkodom/dilated-attention-pytorch 0.2.0")
    yield s.case("grouped heads, mean, causal", P.grouped(lengths[:2], [1, 2], mix="mean"), causal=True,
                 fault="division by a sum over the sequence: late values reach early rows",
                 source="fkodom/dilated-attention-pytorch 0.2.0")
    yield s.case("mixture of windows", P.mix([P.window(s.of(3)), P.segments(s.of(16)), P.sinks(2)]), causal=True)
    yield s.case("weighted sum", P.mix([P.window(s.of(3)), P.segments(s.of(16))], rule="sum", weights=[-0.25, 1.5]))


def _functions(s: Sizes) -> Iterator[Case]:
    yield s.case("mask function", P.mask(_rule_of_heads), causal=True,
                 fault="the function is lost before the backward pass: wrong gradients",
                 source="Dao-AILab/flash-attention#2101")
    yield s.case("mask function, grouped", P.mask(_rule_of_heads), kv_heads=2)
    yield s.case("mask function, empty rows", P.mask(_rule_of_rows), kv_heads=1)
    yield s.case("offset", P.window(s.of(9)), seq_len=s.of(3) | 1, kv_len=s.length, q_offset=True, causal=True,
                 operands={"q_offset": s.of(12)})
    yield s.case("offset of each element", _ladder(s), seq_len=s.of(3) | 1, kv_len=s.length, q_offset=True,
                 causal=True, operands={"q_offset": [3, s.of(30)]})


# fmt: on


def _ladder(s: Sizes, **options: Any) -> P.Mixture:
    return P.longnet([s.of(8), s.of(16), 2 * s.length], [1, 2, 4], **options)


def _real(length: int, *counts: int) -> list[list[bool]]:
    """Return key padding in which each element has its first keys real."""
    return [[k < n for k in range(length)] for n in counts]


def _late(length: int, *starts: int) -> list[list[bool]]:
    """Return key padding in which each element is padded at the front."""
    return [[k >= n for k in range(length)] for n in starts]


def _rule_of_heads(h: Array, q: Array, k: Array) -> Array:
    return (q + 2 * k + h) % 3 != 0


def _rule_of_rows(h: Array, q: Array, k: Array) -> Array:
    return ((q * q + 3 * k + h) % 5 < 2) & (q % 7 != 3)


_FAMILIES: tuple[Callable[[Sizes], Iterator[Case]], ...] = (
    _plain, _windows, _grouped_queries, _documents, _padding, _shared_tokens, _sparse, _mixtures, _functions,
)  # fmt: skip


def catalogue(size: str = "small", dtype: str = "float32") -> Mapping[str, Case]:
    """Return the cases of the catalogue by name.

    Parameters
    ----------
    size
        ``"small"``: lengths near 150, heads of 16 features. ``"large"``: lengths near 600, heads of 64 features.
    dtype
        Of every spec.

    Raises
    ------
    SpecError
        If the size or the dtype is unknown.

    Examples
    --------
    >>> len(catalogue()) >= 60, len([c for c in catalogue().values() if c.fault]) >= 30
    (True, True)
    >>> catalogue("large", "bfloat16")["window, asymmetric"].spec.pattern
    window(80, 32)
    >>> catalogue("medium")
    Traceback (most recent call last):
    ...
    attnplan.errors.SpecError: unknown size 'medium'; known: large, small
    """
    if size not in SIZES:
        raise SpecError(f"unknown size {size!r}{did_you_mean(size, SIZES)}")
    if dtype not in DTYPES:
        raise SpecError(f"unknown dtype {dtype!r}{did_you_mean(dtype, DTYPES)}")
    return _catalogue(size, dtype)


@lru_cache(maxsize=16)
def _catalogue(size: str, dtype: str) -> Mapping[str, Case]:
    sizes = attrs.evolve(SIZES[size], dtype=dtype)
    return {case.name: case for family in _FAMILIES for case in family(sizes)}
