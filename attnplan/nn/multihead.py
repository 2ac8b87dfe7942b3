"""Dilated attention with projections, ``[B, S, E]`` in and out, under the names of the published libraries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnplan.errors import SpecError, did_you_mean
from attnplan.nn.base import PatternAttention, ProjectedAttention, refuse_options
from attnplan.nn.dilated import DilatedAttention, ImprovedDilatedAttention

VARIANTS = ("pypi", "fork")


def init_xavier(layer: nn.Linear, gain: float = 1.0) -> None:
    """Draw the weight from the Xavier normal distribution and set the bias to 0."""
    nn.init.xavier_normal_(layer.weight, gain=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _parameter_order(variant: str, norms: tuple[str, ...]) -> tuple[str, ...]:
    """Return the submodules with parameters in the order of the published state dict."""
    first = ("q_proj", "k_proj", "v_proj")
    return (*first, *norms, "out_proj") if variant == "pypi" else (*first, "out_proj", *norms)


class MultiheadDilatedAttention(ProjectedAttention):
    """Self-attention with projections, :class:`DilatedAttention`, and MAGNETO's layer norm before the output.

    Two codes were published under version 0.2.0; ``variant`` says whose parameters and structure this module has.

    - ``"pypi"`` (fkodom): ``norm`` on the merged heads before ``out_proj``. Returns ``(output, None)``.
    - ``"fork"``: layer norms ``q_ln`` and ``k_ln`` on projected queries and keys, and ``q_ln`` once more before
      ``out_proj``. Returns the output. (It multiplied q and k weights by ``gamma_init``, too.)

    *Published*: both inherited what :class:`DilatedAttention` lists. The PyPI class took no masks; its ``dropout`` did
    nothing. The fork built a combined mask from ``attn_mask`` and ``key_padding_mask`` and ignored it.
    *Ours*: ``dropout`` and ``key_padding_mask`` work; ``attn_mask`` and ``need_weights`` raise. Both variants follow
    MAGNETO at initialisation: Xavier normal, with the gain ``gamma_init`` for v and output only. ``head_dim`` may be
    anything. State dicts of either publication load with ``strict=True`` into their variant.

    Parameters
    ----------
    embed_dim, num_heads
        E and H; H must divide E.
    dilation_rates, segment_lengths
        One of each per branch, rates *first*, as published. Lists swapped by position are refused.
    dropout
        Probability with which an attention weight is dropped in training.
    bias
        Whether the projections have biases.
    layer_norm, layer_norm_eps
        Whether to normalise, and the norms' epsilon.
    gamma_init
        MAGNETO's gain of the value and output projections.
    device, dtype
        Of the parameters.
    op
        Refused: the planner chooses the kernel.
    variant
        ``"pypi"`` or ``"fork"``.
    mix
        As in :class:`DilatedAttention`.

    Raises
    ------
    SpecError
        If sizes do not fit, the lists are swapped, or an option is refused.

    Examples
    --------
    >>> mha = MultiheadDilatedAttention(32, 4, dilation_rates=[1, 2], segment_lengths=[8, 16])
    >>> x = torch.randn(1, 32, 32)
    >>> out, _ = mha(x, x, x, is_causal=True)
    >>> out.shape
    torch.Size([1, 32, 32])

    References
    ----------
    Ding et al., arXiv 2307.02486; Wang et al., Foundation Transformers (MAGNETO), arXiv 2210.06423, fig. 2.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    norm: nn.LayerNorm
    q_ln: nn.LayerNorm
    k_ln: nn.LayerNorm

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        op: None = None,
        *,
        variant: str = "pypi",
        mix: str = "mean",
    ) -> None:
        super().__init__(embed_dim, num_heads)
        refuse_options(op=op)
        if variant not in VARIANTS:
            raise SpecError(f"unknown variant {variant!r}{did_you_mean(str(variant), VARIANTS)}")
        self.variant, self.layer_norm, self.gamma_init = variant, layer_norm, gamma_init
        self.attention = self._core(segment_lengths, dilation_rates, dropout, mix)
        norms = {"pypi": ("norm",), "fork": ("q_ln", "k_ln")}[variant] if layer_norm else ()
        for name in _parameter_order(variant, norms):  # optimizer states go by position
            layer: nn.Module = (
                nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype)
                if name in norms
                else nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
            )
            self.add_module(name, layer)
        self.reset_parameters()

    def _core(self, segments: Sequence[int], rates: Sequence[int], dropout: float, mix: str) -> PatternAttention:
        return DilatedAttention(segments, rates, attention_dropout=dropout, mix=mix)

    def reset_parameters(self) -> None:
        """Initialise the projections as MAGNETO does."""
        for layer, gain in (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, self.gamma_init),
            (self.out_proj, self.gamma_init),
        ):
            init_xavier(layer, gain)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: None = None,
        average_attn_weights: bool = True,
    ) -> Tensor | tuple[Tensor, None]:
        """Attend.

        Parameters
        ----------
        query, key, value
            ``[B, S, E]``, ``[B, K, E]``, ``[B, K, E]``; key defaults to query, value to key.
        is_causal
            Keep keys at or before the query's position.
        key_padding_mask
            Bool ``[B, K]``, True where the key is padding.
        need_weights, attn_mask
            Refused unless left at their default.
        average_attn_weights
            Accepted; it described the weights.

        Returns
        -------
        Tensor or tuple
            ``[B, S, E]``; the ``"pypi"`` variant returns ``(output, None)``.

        Raises
        ------
        SpecError
            If shapes or masks do not fit, or an option is refused.
        """
        refuse_options(need_weights=need_weights, attn_mask=attn_mask)
        _check_flag(is_causal)
        query, key, value = self._inputs(query, key, value)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.layer_norm and self.variant == "fork":
            q, k = self.q_ln(q).to(v.dtype), self.k_ln(k).to(v.dtype)  # norms are float32 under autocast
        merged = self._attend(q, k, v, is_causal, key_padding_mask)
        if self.layer_norm:
            merged = self.norm(merged) if self.variant == "pypi" else self.q_ln(merged)
        out: Tensor = self.out_proj(merged)
        return (out, None) if self.variant == "pypi" else out


def _check_flag(is_causal: object) -> None:
    if not isinstance(is_causal, bool):
        raise SpecError(
            f"is_causal must be True or False, got {type(is_causal).__name__}; masks go by name: key_padding_mask=..."
        )


class ImprovedMultiheadDilatedAttention(ProjectedAttention):
    """Self-attention with one fused projection, :class:`ImprovedDilatedAttention`, and a norm before the output.

    *Published* (fork): attended over heads instead of tokens (see :class:`ImprovedDilatedAttention`); warned that it
    ignores masks, and ignored them; held a norm ``k_ln`` that nothing read, and used ``q_ln`` before ``out_proj``.
    *Ours*: dilated attention over tokens; ``key_padding_mask`` and ``dropout`` work. State dicts load with
    ``strict=True``: ``k_ln`` is kept for that, frozen, and reads nothing. Returns ``(output, None)``, as published.

    Parameters
    ----------
    embed_dim, num_heads, dilation_rates, segment_lengths, dropout, bias, layer_norm, layer_norm_eps, gamma_init, \
device, dtype, mix
        As in :class:`MultiheadDilatedAttention`, rates first.
    use_tf32
        Refused if True: no global flag is touched.

    Raises
    ------
    SpecError
        As for :class:`MultiheadDilatedAttention`.

    Examples
    --------
    >>> mha = ImprovedMultiheadDilatedAttention(32, 4, dilation_rates=[1, 2], segment_lengths=[8, 16])
    >>> mha(torch.randn(1, 32, 32))[0].shape
    torch.Size([1, 32, 32])

    References
    ----------
    As for :class:`MultiheadDilatedAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        use_tf32: bool = False,
        *,
        mix: str = "mean",
    ) -> None:
        super().__init__(embed_dim, num_heads)
        self.layer_norm, self.gamma_init = layer_norm, gamma_init
        self.attention = ImprovedDilatedAttention(segment_lengths, dilation_rates, dropout, use_tf32, mix=mix)
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        if layer_norm:
            self.q_ln = nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype)
            self.k_ln = nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype).requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as if the three projections were apart."""
        for part, gain in zip(self.qkv_proj.weight.chunk(3), (1.0, 1.0, self.gamma_init), strict=True):
            nn.init.xavier_normal_(part, gain=gain)
        if self.qkv_proj.bias is not None:
            nn.init.zeros_(self.qkv_proj.bias)
        init_xavier(self.out_proj, self.gamma_init)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, None]:
        """Attend; arguments as in :meth:`MultiheadDilatedAttention.forward`, in the fork's order."""
        refuse_options(need_weights=need_weights, attn_mask=attn_mask)
        _check_flag(is_causal)
        query, key, value = self._inputs(query, key, value)
        q, k, v = self._project(query, key, value)
        out = self._attend(q, k, v, is_causal, key_padding_mask)
        return self.out_proj(self.q_ln(out) if self.layer_norm else out), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v: one product for self-attention, else one with each third of the weight."""
        if key is query and value is query:
            q, k, v = self.qkv_proj(query).chunk(3, -1)
            return q, k, v
        weights = self.qkv_proj.weight.chunk(3)
        biases = (None,) * 3 if self.qkv_proj.bias is None else self.qkv_proj.bias.chunk(3)
        triples = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (nn.functional.linear(x, w, b) for x, w, b in triples)
        return q, k, v
