"""The mask function: prove which pattern a rule of transformers is, or build the dense mask of stock SDPA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan import patterns as P
from attnplan.patterns.bands import Band


@attrs.frozen(eq=False)
class MaskRequest:
    """What a proven mask says.

    Parameters
    ----------
    pattern
        Which pairs may meet, padding and documents included.
    operands
        What :class:`~attnplan.Plan` takes with the call: ``key_padding``, ``documents``, ``q_offset``.
    """

    pattern: P.Pattern
    operands: Mapping[str, Any] = attrs.field(factory=dict)


class ProvenMask(torch.Tensor):
    """A boolean mask ``[B, 1, S, T]`` known as a pattern, whose elements are computed only if somebody asks.

    Transformers treats masks as tensors: ``generate`` with a static cache calls ``.contiguous()`` and hands the mask in
    again as ``attention_mask``, where whatever is no tensor of four dimensions fails; some models slice or concatenate
    masks. So this is a tensor without storage. Any operation on it runs on the dense mask of stock SDPA and gives a
    plain tensor, which the attention function counts as a fallback.
    """

    request: MaskRequest
    dense: Callable[[], Tensor]

    # Shapes, devices and types are read at every layer: skip the Python detour that subclasses get by default.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], device: torch.device | str, request: MaskRequest, dense: Callable[[], Tensor]
    ) -> ProvenMask:
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        mask.request, mask.dense = request, dense
        return mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch documents a classmethod and declares a method
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda mask: mask.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ProvenMask({list(self.shape)}, {self.request.pattern!r})"


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor:
    """Build the mask of one forward pass: the mask function of transformers' ``AttentionMaskInterface``.

    Parameters
    ----------
    batch_size, q_length, kv_length
        B, S and T of the mask ``[B, 1, S, T]``.
    q_offset, kv_offset
        Positions of query row 0 and of key 0.
    mask_function
        ``(batch, head, query, key) -> bool``; causal by default.
    attention_mask
        Booleans ``[B, seen + S]``, True for real tokens, or None. Keys beyond it are padding.
    options
        What :func:`transformers.masking_utils.sdpa_mask` takes besides.

    Returns
    -------
    Tensor
        A :class:`ProvenMask`, or the dense mask of stock SDPA where there is no proof. Never None, which would leave
        the attention function to guess what was meant.

    References
    ----------
    ``transformers.masking_utils.sdpa_mask``, whose parameters and meaning these are.
    """
    masking_utils = transformers_masks()
    # A static cache adds to this very tensor before the layers read it: subtraction makes a tensor of our own.
    shift = q_offset - kv_offset
    rule = masking_utils.causal_mask_function if mask_function is None else mask_function
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense = partial(
        masking_utils.sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=shift + kv_offset,
        kv_offset=kv_offset,
        mask_function=rule,
        attention_mask=attention_mask,
        device=device,
        **{**options, **skips},
    )
    reason = "masks are dense while tracing"
    if not masking_utils.is_tracing(attention_mask):
        try:
            request = _prove(rule, range(kv_offset, kv_offset + kv_length))
            request = _add_padding(request, attention_mask, q_length, kv_length, q_offset, kv_offset)
            request = add_offset(request, shift, q_length, kv_length)
            return ProvenMask((batch_size, 1, q_length, kv_length), device, request, dense)
        except _NoProofError as no_proof:
            reason = str(no_proof)
    mask: Tensor = dense()
    mask._attnplan_reason = reason  # type: ignore[attr-defined]  # for the count, if the model passes it on untouched
    return mask


class _NoProofError(Exception):
    """Why a mask is not known to be a pattern."""


@cache
def _rules() -> tuple[tuple[Any, str], ...]:
    """Return the code object of each kind of closure that transformers builds masks from, and the kind's name."""
    masking_utils = transformers_masks()
    makers = {
        "and_masks": (),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "packed_sequence_mask_function": (None,),
        "remap_positions_for_packed_sequence": (None, None),
    }
    return tuple(
        (getattr(masking_utils, name)(*args).__code__, name)
        for name, args in makers.items()
        if hasattr(masking_utils, name)
    )


def _read(rule: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """Return which of transformers' own rules this is, and the values that it closes over.

    A function is its code and the values that it closes over. Comparing the code object itself, not its name, leaves
    no room for a function that merely looks alike.
    """
    masking_utils = transformers_masks()
    for name in ("causal_mask_function", "bidirectional_mask_function"):
        if rule is getattr(masking_utils, name):
            return name, {}
    code = getattr(rule, "__code__", None)
    for known, name in _rules():
        if code is known:
            return name, dict(zip(code.co_freevars, (c.cell_contents for c in rule.__closure__ or ()), strict=True))
    raise _NoProofError(f"unknown mask function {getattr(rule, '__qualname__', type(rule).__qualname__)}")


def _prove(rule: Callable[..., Any], keys: range) -> MaskRequest:
    """Return the pattern of a mask function over these keys, padding and query offset aside, or raise."""
    kind, values = _read(rule)
    if kind == "causal_mask_function":
        return MaskRequest(P.causal())
    if kind == "bidirectional_mask_function":
        return MaskRequest(P.full())
    if kind == "sliding_window_overlay":  # k > q - w: the query's own position counts
        return MaskRequest(P.band(values["sliding_window"] - 1, None))
    if kind == "sliding_window_bidirectional_overlay":  # |q - k| <= w: it does not
        return MaskRequest(P.window(values["sliding_window"]))
    if kind != "and_masks" or not values["mask_functions"]:
        raise _NoProofError(f"{kind} on its own")
    terms = values["mask_functions"]
    read = [_read(term) for term in terms]
    if [name for name, _ in read] == ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        return _prove_packed(read[0][1], read[1][1], keys)
    requests = [_prove(term, keys) for term in terms]
    if any(request.operands for request in requests):
        raise _NoProofError("packed sequences combined with another rule")
    pattern = requests[0].pattern
    for request in requests[1:]:
        pattern = pattern & request.pattern
    return MaskRequest(pattern)


def _prove_packed(packed: dict[str, Any], remapped: dict[str, Any], keys: range) -> MaskRequest:
    """Return documents & rule, for sequences packed one after another in each row.

    Positions count up by one inside a document, so a rule on the distance between positions is the same rule on the
    distance between rows; but only if the documents are those that the positions imply.
    """
    index: Tensor = packed["packed_sequence_mask"]
    implied = transformers_masks().find_packed_sequence_indices(remapped["position_ids"])
    if implied is None or not torch.equal(implied, index) or keys != range(index.shape[1]):
        raise _NoProofError("packed sequences that do not follow from position_ids")
    inner = _prove(remapped["mask_function"], keys)
    if inner.operands:
        raise _NoProofError("packed sequences inside packed sequences")
    counts = index.new_zeros(index.shape[0], int(index.max()) + 1).scatter_add_(1, index, torch.ones_like(index))
    ends = torch.nn.functional.pad(counts.cumsum(1), (1, 0))  # rows with fewer documents end in empty ones
    return MaskRequest(P.documents() & inner.pattern, {"documents": ends})


def _add_padding(
    request: MaskRequest,
    attention_mask: Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
) -> MaskRequest:
    if attention_mask is None:
        return request
    if attention_mask.dim() != 2:
        raise _NoProofError(f"attention_mask with {attention_mask.dim()} dimensions")
    end = kv_offset + kv_length
    # Without padding the kernels without masks are open, which is worth the one look per forward pass that stock SDPA
    # takes too. Not with a static cache: there every step must look alike, so padding stays in the one plan.
    if isinstance(q_offset, int):
        causal = any(isinstance(t, Band) and t.right == 0 for t in request.pattern.walk())
        needed = min(end, q_offset + q_length) if causal else end
        if attention_mask.shape[1] >= needed and bool(attention_mask[:, kv_offset:needed].all()):
            return request
    missing = max(0, end - attention_mask.shape[1])
    keys = torch.nn.functional.pad(attention_mask, (0, missing))[:, kv_offset:end]
    return MaskRequest(request.pattern & P.padding(), {**request.operands, "key_padding": keys})


def add_offset(request: MaskRequest, shift: int | Tensor, q_length: int, kv_length: int) -> MaskRequest:
    """Pass the position of query row 0 along, unless it is the default or does not matter."""
    local = any(isinstance(t, Band) for t in request.pattern.walk())
    if not local or (isinstance(shift, int) and shift == kv_length - q_length):
        return request
    return attrs.evolve(request, operands={**request.operands, "q_offset": shift})


def transformers_masks() -> Any:
    """Return transformers' mask module: imported only when used, and Any whether it is installed or not."""
    return import_module("transformers.masking_utils")
