"""What to compute: shapes, pattern, numerics. Hashable data, without device or tensors."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import attrs
from cattrs import Converter

from attnplan import patterns as P
from attnplan.errors import SpecError, did_you_mean
from attnplan.patterns.base import require, require_int
from attnplan.patterns.counts import count_pairs
from attnplan.patterns.mixtures import Mixture

DTYPES = ("float64", "float32", "float16", "bfloat16")
LAYOUTS = ("bhsd", "bshd")
PRECISIONS = ("ieee", "tf32")
OPERANDS = ("documents", "key_padding", "q_offset", "dropout_seed", "bias", "alibi_slopes", "sink_logits")
BIASES = ("alibi_slopes", "bias")
"""Operands that are added to scores."""
LEARNED = (*BIASES, "sink_logits")
"""Operands that have gradients."""


@attrs.frozen
class Dim:
    """A length that arrives with the call.

    Parameters
    ----------
    name
        Two lengths of one name are always equal.
    max
        The largest value; plans are priced and proved at it.

    Examples
    --------
    >>> Dim("s", max=4096)
    Dim(name='s', max=4096)
    """

    name: str
    max: int = attrs.field(kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise SpecError(f'a Dim needs a name such as "s", got {self.name!r}')
        require_int(self.max, f"max of Dim {self.name!r}", 1)


def _one_of(value: object, known: tuple[str, ...], name: str) -> None:
    if value not in known:
        raise SpecError(f"unknown {name} {value!r}{did_you_mean(str(value), known)}")


def _dtype_name(value: object) -> str:
    """Accept ``torch.bfloat16`` for ``"bfloat16"``."""
    return str(value).removeprefix("torch.")


def _pattern(value: object) -> object:
    return P.parse(value) if isinstance(value, str) else value


@attrs.frozen(cache_hash=True, kw_only=True)
class AttentionSpec:
    """Which attention to compute, as data.

    Parameters
    ----------
    seq_len, heads, head_dim
        Query rows S, query heads H and features D of ``q``, ``[B, H, S, D]``. S is an int or a :class:`Dim`.
    pattern
        A pattern or mixture, or its text form.
    causal
        Restrict every branch to keys at or before the query's position.
    kv_len, kv_heads, value_dim
        Keys, key/value heads and features of ``v``; the defaults are those of the queries.
    batch
        A hint for pricing; any batch size runs.
    dtype
        ``"float64"``, ``"float32"``, ``"float16"`` or ``"bfloat16"`` of q, k, v and the output.
    layout
        ``"bhsd"`` or ``"bshd"``: the order of the dimensions of q, k, v and the output.
    scale
        Factor on ``q @ k^T``; the default is ``1 / sqrt(head_dim)``.
    softcap
        If given, scores s become ``softcap * tanh(s / softcap)``.
    dropout
        Probability with which an attention weight is dropped, by a mask that is a function of the call's operand
        ``dropout_seed`` and of (batch, head, query, key): it does not depend on the plan.
    precision
        ``"ieee"``, or ``"tf32"`` to allow TF32 for float32 on CUDA.
    training
        Price the backward pass too. Any plan can be differentiated.
    ring_size
        Number of ranks over which the sequence is spread.
    q_offset
        If True, the position of query row 0 arrives with each call as the operand ``q_offset``. Otherwise row i has
        position ``i + kv_len - seq_len``.
    bias
        If True, each call brings the operand ``bias``, ``[H, S, K]`` or ``[B, H, S, K]`` with sizes of 1 where it
        broadcasts, which is added to the scores after scale and softcap. It has gradients.
    alibi_slopes
        If True, each call brings the operand ``alibi_slopes``, ``[H]`` or ``[B, H]``: ``-slope * |i - j|`` is added to
        the score of the query at position i and the key at position j. It has gradients.
    sink_logits
        If True, each call brings the operand ``sink_logits``, ``[H]``: every softmax of head h has one more key, of
        this score and of value 0. It has gradients. Under the rule ``"lse"`` of a mixture it is one key for all
        branches; under the others there is no one softmax, and it is refused.

    Raises
    ------
    SpecError
        If the spec contradicts itself or cannot be computed.

    Examples
    --------
    >>> from attnplan import patterns as P
    >>> spec = AttentionSpec(seq_len=8, heads=4, head_dim=16, pattern=P.window(2), causal=True)
    >>> spec.count_pairs()
    84
    >>> AttentionSpec(seq_len=8, heads=8, kv_heads=3, head_dim=16)
    Traceback (most recent call last):
    ...
    attnplan.errors.SpecError: kv_heads=3 does not divide heads=8; grouped-query attention needs heads % kv_heads == 0

    References
    ----------
    Press et al., ALiBi, arXiv 2108.12409; Raffel et al., relative position bias, arXiv 1910.10683; sink logits:
    OpenAI, gpt-oss model card, arXiv 2508.10925.
    """

    seq_len: int | Dim
    heads: int
    head_dim: int
    pattern: P.Pattern | Mixture = attrs.field(factory=P.full, converter=_pattern)
    causal: bool = False
    kv_len: int | Dim = attrs.field(default=attrs.Factory(lambda self: self.seq_len, takes_self=True))
    kv_heads: int = attrs.field(default=attrs.Factory(lambda self: self.heads, takes_self=True))
    value_dim: int = attrs.field(default=attrs.Factory(lambda self: self.head_dim, takes_self=True))
    batch: int = 1
    dtype: str = attrs.field(default="bfloat16", converter=_dtype_name)
    layout: str = "bhsd"
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    precision: str = "ieee"
    training: bool = False
    ring_size: int = 1
    q_offset: bool = False
    bias: bool = False
    alibi_slopes: bool = False
    sink_logits: bool = False

    def __attrs_post_init__(self) -> None:
        self._check_sizes()
        self._check_numerics()
        if not isinstance(self.pattern, P.Pattern | Mixture):
            raise SpecError(f"pattern must be a pattern or mixture, got {self.pattern!r}; write pattern=P.window(512)")
        self._check_pattern()
        if self.sink_logits and self.rule != "lse":
            raise SpecError(
                f"sink_logits join one softmax, and under mix={self.rule!r} each branch has its own; use the rule 'lse'"
            )
        if self.ring_size > 1 and self.bias:
            raise SpecError(f"a bias would lie whole on every rank: it needs ring_size=1, got {self.ring_size}")

    def _check_sizes(self) -> None:
        for name in ("heads", "head_dim", "kv_heads", "value_dim", "batch", "ring_size"):
            require_int(getattr(self, name), name, 1)
        for name in ("seq_len", "kv_len"):
            if not isinstance(getattr(self, name), Dim):
                require_int(getattr(self, name), name, 1)
        q, kv = self.seq_len, self.kv_len
        if isinstance(q, Dim) and isinstance(kv, Dim) and q.name == kv.name and q != kv:
            raise SpecError(f"Dim {q.name!r} has max={q.max} for seq_len and max={kv.max} for kv_len; give it one max")
        require(
            self.heads % self.kv_heads == 0,
            f"kv_heads={self.kv_heads} does not divide heads={self.heads}; grouped-query attention needs "
            "heads % kv_heads == 0",
        )
        require(
            not isinstance(self.seq_len, Dim) or self.ring_size == 1,
            f"ring_size={self.ring_size} needs a fixed seq_len, got {self.seq_len}",
        )

    def _check_numerics(self) -> None:
        _one_of(self.dtype, DTYPES, "dtype")
        _one_of(self.layout, LAYOUTS, "layout")
        _one_of(self.precision, PRECISIONS, "precision")
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, float | int) and math.isfinite(value) and value > 0):
                raise SpecError(f"{name} must be a positive finite number or None, got {value!r}")
        if not (isinstance(self.dropout, float | int) and 0 <= self.dropout < 1):
            raise SpecError(f"dropout must be a probability in [0, 1), got {self.dropout!r}")
        for name in ("causal", "training", "q_offset", *LEARNED):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _check_pattern(self) -> None:
        if self.is_static:
            self.pattern.check(self.shape)
        elif any(type(p).__name__ in ("Documents", "Padding") and not p.operands for p in self.pattern.walk()):
            raise SpecError(
                f"{self.pattern!r} fixes lengths, but seq_len or kv_len is a Dim; leave the lengths out and pass "
                "documents= or key_padding= with each call"
            )
        else:
            self._check_open_pattern()

    def _check_open_pattern(self) -> None:
        for part in self.pattern.walk():
            kind = type(part).__name__
            if kind == "Blocks" or (kind == "Neighborhood" and getattr(part, "shape", None) is not None):
                raise SpecError(
                    f"{kind.lower()} has a fixed size, but seq_len or kv_len is a Dim; give both lengths as ints"
                )
            if kind == "Mask":
                part.check(self.shape)

    @property
    def is_static(self) -> bool:
        """Whether both lengths are known."""
        return not (isinstance(self.seq_len, Dim) or isinstance(self.kv_len, Dim))

    @property
    def shape(self) -> P.Shape:
        """The sizes that patterns are checked against; a :class:`Dim` counts as its maximum."""
        q, kv = (n.max if isinstance(n, Dim) else n for n in (self.seq_len, self.kv_len))
        return P.Shape(q, kv, self.heads, self.batch)

    def at(self, seq_len: int, kv_len: int) -> AttentionSpec:
        """Return this spec with every :class:`Dim` replaced by the length of one call.

        Raises
        ------
        SpecError
            If a length exceeds its maximum, or lengths of one name differ.

        Examples
        --------
        >>> AttentionSpec(seq_len=Dim("s", max=64), heads=1, head_dim=8).at(5, 5).seq_len
        5
        """
        bound: dict[str, int] = {}
        for name, dim, length in (("seq_len", self.seq_len, seq_len), ("kv_len", self.kv_len, kv_len)):
            if not isinstance(dim, Dim):
                require(dim == length, f"{name} is {length}, the spec has {dim}")
                continue
            require(
                1 <= length <= dim.max, f"{name}={length} is not between 1 and the max={dim.max} of Dim {dim.name!r}"
            )
            require(
                bound.setdefault(dim.name, length) == length,
                f"Dim {dim.name!r} is {bound[dim.name]} in seq_len and {length} in {name}; use two names for lengths "
                "that differ",
            )
        return attrs.evolve(self, seq_len=seq_len, kv_len=kv_len)

    @property
    def branches(self) -> tuple[P.Pattern, ...]:
        """One pattern per softmax, causality included."""
        bare = (
            self.pattern.branches(self.heads) if isinstance(self.pattern, Mixture) else (self.pattern.bind(self.heads),)
        )
        return tuple(b & P.causal() for b in bare) if self.causal else bare

    @property
    def rule(self) -> str:
        """How the branches are mixed."""
        return self.pattern.rule if isinstance(self.pattern, Mixture) else "lse"

    @property
    def operands(self) -> frozenset[str]:
        """Names of the runtime operands that each call must bring."""
        positions = {"q_offset"} if self.q_offset else set()
        learned = {name for name in LEARNED if getattr(self, name)}
        return self.pattern.operands | positions | learned | ({"dropout_seed"} if self.dropout else set())

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of the operands that are added to scores."""
        return tuple(name for name in BIASES if getattr(self, name))

    @property
    def softmax_scale(self) -> float:
        """The factor on ``q @ k^T``."""
        return float(self.scale) if self.scale is not None else 1 / math.sqrt(self.head_dim)

    @property
    def has_lse(self) -> bool:
        """Whether there is one log-sum-exp for each row."""
        return self.rule in ("lse", "lse-detached")

    def count_pairs(self) -> int:
        """Return the exact number of (batch, branch, head, query, key) pairs.

        Raises
        ------
        SpecError
            If it depends on runtime operands or on a :class:`Dim`.
        """
        if not self.is_static or self.q_offset:
            raise SpecError("the number of pairs depends on lengths or positions that arrive with the call")
        return sum(count_pairs(b, self.shape) for b in self.branches)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain data; fields at their default are left out.

        Examples
        --------
        >>> AttentionSpec(seq_len=8, heads=2, head_dim=16, pattern="window(2)").to_dict()
        {'seq_len': 8, 'heads': 2, 'head_dim': 16, 'pattern': 'window(2)'}
        """
        data: dict[str, Any] = _converter.unstructure(self)
        base = attrs.fields_dict(type(self))
        minimal = AttentionSpec(seq_len=self.seq_len, heads=self.heads, head_dim=self.head_dim)
        return {
            name: value
            for name, value in data.items()
            if base[name].default is attrs.NOTHING or getattr(self, name) != getattr(minimal, name)
        }

    @classmethod
    def from_dict(cls, data: object) -> AttentionSpec:
        """Read a spec from plain data.

        Raises
        ------
        SpecError
            If a key is unknown (with a suggestion) or missing, or a value has the wrong type.

        Examples
        --------
        >>> AttentionSpec.from_dict({"seq_len": 8, "heads": 2, "head_dims": 16})
        Traceback (most recent call last):
        ...
        attnplan.errors.SpecError: unknown spec key 'head_dims'; did you mean 'head_dim'?
        """
        if not isinstance(data, dict):
            raise SpecError(f"a spec is a table of keys such as seq_len = 8192, got {type(data).__name__}")
        known = [a.name for a in attrs.fields(cls)]
        for key in data:
            if key not in known:
                raise SpecError(f"unknown spec key {key!r}{did_you_mean(str(key), known)}")
        for name in ("seq_len", "heads", "head_dim"):
            if name not in data:
                raise SpecError(f"the spec has no {name}; it needs seq_len, heads and head_dim")
        lengths = {n: _structure_length(n, data[n]) for n in ("seq_len", "kv_len") if n in data}
        return cls(**{**data, **lengths})

    def to_toml(self) -> str:
        """Return the spec as a TOML document that :meth:`from_file` reads back."""
        return "".join(f"{name} = {_toml_value(value)}\n" for name, value in self.to_dict().items())

    def to_json(self) -> str:
        """Return the spec as a JSON document that :meth:`from_file` reads back."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_file(cls, path: str | Path) -> AttentionSpec:
        """Read a spec from a ``.toml`` or ``.json`` file.

        Raises
        ------
        SpecError
            If the file cannot be read or parsed, or does not describe a possible spec.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SpecError(f"cannot read the spec file {str(path)!r}: {reason}") from None
        return cls.from_text(text, kind="json" if str(path).endswith(".json") else "toml", name=str(path))

    @classmethod
    def from_text(cls, text: str, kind: str = "toml", name: str = "the spec") -> AttentionSpec:
        """Read a spec from TOML or JSON text; ``name`` stands for it in errors."""
        try:
            data = json.loads(text) if kind == "json" else tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{name} is not valid {kind.upper()}: {error}") from None
        try:
            return cls.from_dict(data)
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from None


def _structure_length(name: str, value: Any) -> int | Dim:
    if not isinstance(value, dict):
        return value  # type: ignore[no-any-return]  # the spec's own check words the error
    if sorted(value) != ["max", "name"]:
        raise SpecError(f'{name} must be an int or a table such as {{ name = "s", max = 4096 }}, got {value!r}')
    return Dim(**value)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)  # scalars are written alike in JSON and TOML


def _text_form(pattern: P.Pattern | Mixture) -> str:
    if any(type(p).__name__ == "Mask" for p in pattern.walk()):
        raise SpecError(f"{pattern!r} holds a Python function and cannot be saved; use the built-in patterns")
    return repr(pattern)


def _is_pattern(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, P.Pattern | Mixture)


_converter = Converter()
_converter.register_unstructure_hook_func(_is_pattern, _text_form)
