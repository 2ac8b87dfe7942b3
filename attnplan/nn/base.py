"""What the modules share: calls, operands, plans and refusals."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from attnplan.api import CALLS_OF_A_SHAPE, attention, compile, planned  # noqa: A004  # the public name
from attnplan.cost import resolve
from attnplan.deferred import Deferred, no_lse, run_deferred
from attnplan.errors import SpecError
from attnplan.patterns import Mixture, Pattern, padding
from attnplan.plan import Plan
from attnplan.runtime.planned import gradients_by_autograd
from attnplan.search_ring import sizes_of
from attnplan.spec import AttentionSpec

_NO_EFFECT = {
    "op": "it chose an xformers kernel, here the planner chooses; pin one with attnplan.compile(spec, backend=...)",
    "use_tf32": "the published class set torch's global TF32 flag; set torch.backends.cuda.matmul.fp32_precision "
    'yourself, or compile with AttentionSpec(precision="tf32")',
    "enable_memory_pool": "there is no pool: torch's caching allocator serves every tensor; for a limit use "
    "attnplan.compile(spec, max_memory=...)",
    "enable_profiling": "use .explain() for predicted times and bytes, or torch.profiler",
    "attention_mask": "an arbitrary mask has no dilated form; use key_padding_mask for padding and is_causal for "
    "causality, or a pattern with attnplan.attention",
    "attn_mask": "an arbitrary mask has no dilated form; use key_padding_mask for padding and is_causal for "
    "causality, or a pattern with attnplan.attention",
    "device": "the published class computed where its inputs were; move the inputs",
    "dtype": "the published class computed in the dtype of its inputs; convert the inputs",
    "need_weights": "attention weights are never formed; leave need_weights=False",
}


def refuse_options(**options: object) -> None:
    """Raise :class:`~attnplan.errors.SpecError` for an option that is neither None nor False."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise SpecError(f"{name}={_brief(value)}: {_NO_EFFECT[name]}")


def _brief(value: object) -> str:
    return f"<tensor {list(value.shape)}>" if isinstance(value, Tensor) else repr(value)


def dropout_operands(dropout: float, training: bool) -> dict[str, Any]:
    """Return what a call needs to drop weights: the probability and a seed from torch's default generator."""
    if not (training and dropout):
        return {}
    return {"dropout": dropout, "dropout_seed": torch.randint(2**31, ())}


def padding_operands(key_padding_mask: Tensor | None) -> dict[str, Tensor]:
    """Turn PyTorch's mask, True where a key is padding, into the operand, True where it is real.

    Raises
    ------
    SpecError
        If the mask is not a boolean tensor ``[B, K]``.
    """
    if key_padding_mask is None:
        return {}
    mask = key_padding_mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise SpecError(f"key_padding_mask must be a bool tensor [B, K], True where the key is padding; got {got}")
    return {"key_padding": ~mask}


def check_dropout(dropout: float) -> float:
    """Return ``dropout``, or raise :class:`~attnplan.errors.SpecError` unless it is in [0, 1)."""
    if isinstance(dropout, bool) or not isinstance(dropout, float | int) or not 0 <= dropout < 1:
        raise SpecError(f"dropout must be a probability in [0, 1), got {dropout!r}")
    return float(dropout)


class PatternAttention(nn.Module):
    """Base of the modules without projections: tensors ``[B, S, H, D]``, and a pattern that subclasses define."""

    softmax_scale: float | None = None
    dropout: float = 0.0
    mesh: Any = None
    ring_size: int = 1
    _strategy = "auto"
    _whole: int | None = None
    _last: dict[str, Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self._deferred = {causal: _DeferredCall(self, causal) for causal in (False, True)}

    def pattern(self, seq_len: int, heads: int) -> Pattern | Mixture:
        """Return the pattern that runs for ``seq_len`` keys and ``heads`` query heads."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the attention.

        Parameters
        ----------
        query, key, value
            ``[B, S, H, D]``, ``[B, K, H_kv, D]``, ``[B, K, H_kv, Dv]``.
        is_causal
            Keep keys at or before the query's position.
        attention_mask
            Must be None: an arbitrary mask has no dilated form.
        key_padding_mask
            Bool ``[B, K]``, True where the key is padding, as in ``torch.nn.MultiheadAttention``.

        Returns
        -------
        Tensor
            ``[B, S, H, Dv]``; rows that may see no key are 0.

        Raises
        ------
        SpecError
            If shapes, dtypes or masks do not fit.
        """
        refuse_options(attention_mask=attention_mask)
        if torch.compiler.is_compiling() and not self.is_ring:
            given = padding_operands(key_padding_mask)
            if self.training and self.dropout:
                given["dropout_seed"] = torch.randint(2**31, ())
            return run_deferred(query, key, value, given, self._deferred[is_causal].handle, "bshd")[0]
        operands = padding_operands(key_padding_mask) | dropout_operands(self.dropout, self.training)
        _check_4d(query, key, value)
        out = self._run(query, key, value, is_causal, operands)
        self._remember(query, key, value, is_causal, operands)
        return out

    def _options(self, kv_len: int, heads: int, is_causal: bool) -> dict[str, Any]:
        pattern = self.pattern(kv_len, heads)
        return {"pattern": pattern, "causal": is_causal, "scale": self.softmax_scale, "layout": "bshd"}

    def distribute(self, mesh: Any, seq_len: int | None = None, strategy: str = "auto") -> Self:
        """Run on a mesh from now on: every rank calls the module with its shards.

        Parameters
        ----------
        mesh
            A ``DeviceMesh``, as in :func:`attnplan.compile`.
        seq_len
            Rows of the whole sequence; the default is what a rank brings times the number of ranks.
        strategy
            Layout and transport; ``plan(...).shard_batch`` of this module says which rows a rank holds under it.

        Returns
        -------
        PatternAttention
            This module.

        Raises
        ------
        SpecError
            If the mesh is none, or of another size than ``ring_size``.
        """
        sizes_of(mesh, self.ring_size)
        self.mesh, self._whole, self._strategy = mesh, seq_len, strategy
        return self

    @property
    def is_ring(self) -> bool:
        """Whether calls run over several ranks, of a mesh or of a virtual ring."""
        return self.mesh is not None or self.ring_size > 1

    def _length(self, q: Tensor) -> int:
        """Return the rows of the whole sequence of which a call brings some."""
        return self._whole or q.shape[1] * (1 if self.mesh is None else int(self.mesh.size()))

    @torch.compiler.disable(
        reason="a module over several ranks finds its plan "
        "when it is called; compile the blocks around it without fullgraph=True, or call attnplan.compile(spec, mesh=)"
    )  # type: ignore[no-untyped-call, untyped-decorator]
    def _run_ring(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, operands: Mapping[str, Any]) -> Tensor:
        if k.shape[1] != q.shape[1]:
            raise SpecError(f"query has {q.shape[1]} rows, key has {k.shape[1]}: over several ranks they are as many")
        self._remember(q, k, v, is_causal, operands)
        assert self._last is not None
        plan = self.plan(**self._last)
        result = plan(q, k, v, **{name: x for name, x in operands.items() if name != "dropout"})
        assert isinstance(result, Tensor)
        return result

    def _run(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, operands: Mapping[str, Any]) -> Tensor:
        if self.is_ring:
            ran: Tensor = self._run_ring(q, k, v, is_causal, operands)
            return ran
        result = attention(q, k, v, **self._options(k.shape[1], q.shape[2], is_causal), **operands)
        assert isinstance(result, Tensor)
        return result

    def _remember(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, operands: Mapping[str, Any]) -> None:
        self._last = {
            "seq_len": self._length(q), "heads": q.shape[2], "head_dim": q.shape[3], "kv_len": self._length(k),
            "kv_heads": k.shape[2], "value_dim": v.shape[3], "batch": max(1, q.shape[0]), "causal": is_causal,
            "dtype": q.dtype, "device": q.device, "padded": "key_padding" in operands,
            "dropout": operands.get("dropout", 0.0),
        }  # fmt: skip

    def plan(
        self, seq_len: int, heads: int, head_dim: int, *, padded: bool = False, device: Any = "auto", **spec: Any
    ) -> Plan:
        """Return the plan for one shape; the same object that a call of that shape uses.

        Parameters
        ----------
        seq_len, heads, head_dim
            S, H and D of the query.
        padded
            Whether the call brings a ``key_padding_mask``.
        device
            As in :func:`attnplan.compile`.
        **spec
            Other fields of :class:`~attnplan.AttentionSpec`; the default dtype is float32.

        Examples
        --------
        >>> from attnplan.nn import DilatedAttention
        >>> DilatedAttention([8, 16], [1, 2]).plan(64, heads=4, head_dim=8, device="cpu-2core").strategy
        'lattice'
        """
        pattern = self.pattern(spec.get("kv_len", seq_len), heads)
        sizes = {"seq_len": seq_len, "heads": heads, "head_dim": head_dim, "dtype": "float32", **spec}
        chosen = pattern & padding() if padded else pattern
        sizes = {"ring_size": self.ring_size, **sizes}
        asked = AttentionSpec(pattern=chosen, scale=self.softmax_scale, layout="bshd", **sizes)
        if self.mesh is None and asked.ring_size == 1:
            return planned(asked, resolve(device), calls=CALLS_OF_A_SHAPE)  # as calls do
        if self.mesh is None:
            return compile(asked, device)
        return compile(asked, "auto", strategy=self._strategy, mesh=self.mesh)

    def explain(self, seq_len: int | None = None, heads: int = 8, head_dim: int = 64, **options: Any) -> str:
        """Return the page of :meth:`attnplan.Plan.explain` for the last call, or for a shape.

        Parameters
        ----------
        seq_len, heads, head_dim, **options
            As in :meth:`plan`. Without ``seq_len``, the shapes of the last call.

        Raises
        ------
        SpecError
            If there was no call and no ``seq_len`` is given.
        """
        if seq_len is not None:
            return str(self.plan(seq_len, heads, head_dim, **options).explain())
        if self._last is None:
            raise SpecError("nothing to explain: call the module first, or give a length: explain(seq_len=8192)")
        return str(self.plan(**self._last).explain())

    def extra_repr(self) -> str:
        """Return the pattern's arguments and, after a call, the plan that it used."""
        return ", ".join([*self._arguments(), *self._choice()])

    def _arguments(self) -> list[str]:
        return [f"{n}={v}" for n, v in (("scale", self.softmax_scale), ("dropout", self.dropout)) if v]

    def _choice(self) -> list[str]:
        if self._last is None:
            return []
        plan = self.plan(**self._last)
        return [f"plan at {self._last['seq_len']}: {plan.strategy} > {plan.backend} ({plan.schedule})"]


class _DeferredCall(Deferred):
    """A call of a module in a compiled program: its plan, or the module's own way to run, is found when it runs."""

    def __init__(self, module: PatternAttention, is_causal: bool) -> None:
        self.module, self.is_causal = module, is_causal
        super().__init__(self._call_options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _DeferredCall:
        return _DeferredCall(copy.deepcopy(self.module, memo), self.is_causal)

    def __reduce__(self) -> tuple[Any, ...]:
        return _DeferredCall, (self.module, self.is_causal)

    def _call_options(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> dict[str, Any]:
        return self.module._options(k.shape[2], q.shape[1], self.is_causal) | self._dropout(operands)

    def _dropout(self, operands: Mapping[str, Any]) -> dict[str, Any]:
        return {"dropout": self.module.dropout} if "dropout_seed" in operands else {}

    @property
    def _is_one_plan(self) -> bool:
        return type(self.module)._run is PatternAttention._run

    def _rerun(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        _check_4d(q, k, v)
        return self.module._run(q, k, v, self.is_causal, {**operands, **self._dropout(operands)}).transpose(1, 2)

    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        if self._is_one_plan:
            return super().answer(q, k, v, operands, return_lse)
        return self._rerun(q, k, v, operands), no_lse(q)

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        if self._is_one_plan:
            return super().gradients(flow, given, operands, names)

        def run(q: Tensor, k: Tensor, v: Tensor, has_lse: bool) -> tuple[Tensor, None]:
            return self._rerun(q, k, v, operands), None

        return gradients_by_autograd(run, flow, given[:3], False)


def _check_4d(q: Any, k: Any, v: Any) -> None:
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        if getattr(tensor, "ndim", None) != 4:
            got = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise SpecError(f"{name} must be a tensor [B, S, H, D], got {got}")


class ProjectedAttention(nn.Module):
    """Base of the modules with projections: subclasses create the submodules and define :meth:`forward`."""

    attention: PatternAttention

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name} must be a positive int, got {value!r}")
        if embed_dim % num_heads:
            raise SpecError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, key_padding_mask: Tensor | None) -> Tensor:
        """Split the heads of projected ``[B, S, E]``, attend, and merge them again."""
        q, k, v = (x.view(*x.shape[:2], self.num_heads, self.head_dim) for x in (q, k, v))
        out: Tensor = self.attention(q, k, v, is_causal=is_causal, key_padding_mask=key_padding_mask)
        return out.flatten(2)

    def distribute(self, mesh: Any, seq_len: int | None = None, strategy: str = "auto") -> Self:
        """Run on a mesh from now on; see :meth:`PatternAttention.distribute`."""
        self.attention.distribute(mesh, seq_len, strategy)
        return self

    def _inputs(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Fill in missing keys and values, as self-attention, and check the shapes."""
        key = query if key is None else key
        value = key if value is None else value
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.embed_dim:
                got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise SpecError(f"{name} must be a tensor [B, S, {self.embed_dim}], got {got}")
        return query, key, value

    def plan(self, seq_len: int, **options: Any) -> Plan:
        """Return the plan for calls of length ``seq_len``; options as in :meth:`PatternAttention.plan`."""
        options.setdefault("dtype", next(self.parameters()).dtype)
        return self.attention.plan(seq_len, self.num_heads, self.head_dim, **options)

    def explain(self, seq_len: int | None = None, **options: Any) -> str:
        """Return the page of :meth:`attnplan.Plan.explain` for the last call, or for a length.

        Raises
        ------
        SpecError
            If there was no call and no ``seq_len`` is given.
        """
        return self.attention.explain() if seq_len is None else str(self.plan(seq_len, **options).explain())

    def extra_repr(self) -> str:
        """Return the sizes for ``repr(module)``; the choice is in the inner attention's line."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
