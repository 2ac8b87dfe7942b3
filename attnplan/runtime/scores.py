"""What calls bring for the scores: biases that are added to them, and sink logits, each with its gradients.

References
----------
Press et al., ALiBi, arXiv 2108.12409; sink logits: OpenAI, gpt-oss model card, arXiv 2508.10925.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnplan.ir import RowMap
from attnplan.runtime.masks import ORIGIN, element_indices
from attnplan.runtime.views import accumulator
from attnplan.spec import LEARNED


def learned(operands: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the operands of a call that gradients flow back to."""
    return tuple(n for n in LEARNED if isinstance(x := operands.get(n), Tensor) and x.requires_grad)


def position(value: Any, device: torch.device) -> Tensor:
    """Return a position, an int or an int tensor, on a device: numbers are filled in there, and not copied from here.

    A copy from memory that is not pinned fails where a CUDA graph is captured. A tensor without dimensions on the CPU
    is a number, too.
    """
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.int64, device=device)
    if value.device.type == "cpu" and device.type != "cpu" and value.dim() == 0:
        return torch.full((), int(value), dtype=value.dtype, device=device)
    return value.to(device)


class BiasBuilder(torch.nn.Module):
    """Builds what is added to the scores of one attend, ``[B or 1, *axes, R, C]`` with sizes of 1 where it broadcasts.

    Parameters
    ----------
    names
        Operands that are added: ``"bias"``, ``"alibi_slopes"``.
    q, k
        Row maps of the queries and keys, as :class:`~attnplan.runtime.masks.MaskBuilder` takes them.
    shift
        Position of query row 0, or None if it arrives with the call.
    whole
        Whether the maps are whole inputs ``[B, H, S, D]``.
    follow
        Whether lengths are those of the tensors that each call brings.
    local
        Row maps in the inputs of a piece, which is given the part of ``bias`` that its inputs meet.
    """

    def __init__(
        self,
        names: Sequence[str],
        q: RowMap,
        k: RowMap,
        shift: int | None,
        *,
        whole: bool,
        follow: bool = False,
        local: tuple[RowMap, RowMap] | None = None,
    ) -> None:
        super().__init__()
        self.names, self.q, self.k, self.shift, self.whole, self.follow = tuple(names), q, k, shift, whole, follow
        self.local = local or (q, k)

    def forward(self, operands: Mapping[str, Any], q: Tensor, k: Tensor) -> Tensor:
        """Return the sum of the biases in the accumulating dtype, for the call's whole q and k."""
        wide = accumulator(q.dtype)
        parts: list[Tensor] = [getattr(self, f"_{name}")(operands, q, k).to(wide) for name in self.names]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _indices(self, q: Tensor, k: Tensor, maps: tuple[RowMap, RowMap]) -> tuple[Tensor, Tensor, Tensor]:
        lengths = (q.shape[2], k.shape[2]) if self.follow else (maps[0].length, maps[1].length)
        head, query = element_indices(maps[0], lengths[0], q.device, query=True)
        _, key = element_indices(maps[1], lengths[1], q.device, query=False)
        return head, query, key

    def _bias(self, operands: Mapping[str, Any], q: Tensor, k: Tensor) -> Tensor:
        given: Tensor = operands["bias"]
        given = given if given.dim() == 4 else given.unsqueeze(0)
        if self.whole:
            return given
        maps = self.local if ORIGIN in operands else (self.q, self.k)
        each = zip(self._indices(q, k, maps), given.shape[1:], strict=True)
        index = [x[0] if size > 1 else x.new_zeros((1,) * (x.dim() - 1)) for x, size in each]
        heads, queries, keys = index
        found: Tensor = given[:, heads, queries, keys]
        return found

    def _alibi_slopes(self, operands: Mapping[str, Any], q: Tensor, k: Tensor) -> Tensor:
        head, query, key = self._indices(q, k, (self.q, self.k))
        head = head + operands.get(ORIGIN, (0, 0, 0))[1]
        shift: Any = k.shape[2] - q.shape[2] if self.follow else self.shift
        if self.shift is None:
            shift = position(operands["q_offset"], q.device).reshape(-1, *(1,) * (query.dim() - 1))
        slopes: Tensor = operands["alibi_slopes"]
        each = slopes.reshape(-1, slopes.shape[-1])[:, head[0]]
        distance: Tensor = (query + shift - key).abs()
        return each.to(accumulator(q.dtype)) * -distance


class BiasGradients(torch.nn.Module):
    """The gradients of a :class:`BiasBuilder`'s operands from those of the scores."""

    def __init__(self, builder: BiasBuilder) -> None:
        super().__init__()
        self.builder = builder

    def forward(self, operands: Mapping[str, Any], q: Tensor, k: Tensor, slope: Tensor) -> dict[str, Tensor]:
        """Return the gradient of each operand by name; ``slope`` is that of the scores ``[B, *axes, R, C]``."""
        names = self.builder.names
        # A plan's own code runs below autograd, which is switched on again here.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            with torch.enable_grad():
                leaves = {n: operands[n].detach().to(slope.dtype).requires_grad_() for n in names}
                made = self.builder({**operands, **leaves}, q, k)
            found = torch.autograd.grad(made, list(leaves.values()), slope.sum_to_size(made.shape))
        return dict(zip(names, found, strict=True))


def pointwise(names: Sequence[str], operands: Mapping[str, Any], shift: int | None, q: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors of :func:`biased` for the operands of one call: none of their sizes needs to be known."""
    made: list[Tensor] = []
    for name in names:
        given: Tensor = operands[name]
        if name == "bias":
            made.append(given if given.dim() == 4 else given.unsqueeze(0))
            continue
        first = shift if shift is not None else operands["q_offset"]
        made += [given.reshape(-1, given.shape[-1]), position(first, q.device).reshape(-1)]
    return tuple(made)


def spread(names: Sequence[str], tensors: Sequence[Tensor], rows: int) -> tuple[Tensor, ...]:
    """Return the tensors of :func:`pointwise` with a row for each query where they need gradients and have neither.

    A kernel adds the gradients of a tile at the places that the tensor was read at. Inductor cannot write down places
    that are the same for a whole tile, and all tiles of a head would wait for one number. The sum over rows is left to
    autograd, in float32.

    Examples
    --------
    >>> slopes, first = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True), torch.zeros(1)
    >>> spread(["alibi_slopes"], (slopes, first), 5)[0].shape
    torch.Size([1, 2, 5])
    """
    made, rest = [], list(tensors)
    for name in names:
        data = rest.pop(0)
        if data.requires_grad and torch.is_grad_enabled():
            if name == "bias" and data.shape[2] == data.shape[3] == 1:
                data = data.float().expand(-1, -1, rows, -1)
            elif name != "bias":
                data = data.float().unsqueeze(-1).expand(-1, -1, rows)
        made += [data] if name == "bias" else [data, rest.pop(0)]
    return tuple(made)


def biased(
    score: Tensor, names: Sequence[str], tensors: Sequence[Tensor], b: Tensor, h: Tensor, row: Tensor, key: Tensor
) -> Tensor:
    """Return scores with their biases, at any places: index tensors that broadcast, or scalars of a mapped function."""
    rest = list(tensors)
    for name in names:
        data = rest.pop(0)
        if name == "bias":
            # Kernels ask about the rows that fill the last tile too. One place at least is not the same in all of it.
            places = (b, h, row.clamp(max=data.shape[2] - 1), key.clamp(max=data.shape[3] - 1))
            differs = [n > 1 for n in data.shape]
            differs[2] |= not differs[3]
            index = [x if own else torch.zeros_like(x) for x, own in zip(places, differs, strict=True)]
            score = score + data[index[0], index[1], index[2], index[3]]
            continue
        first = rest.pop(0)
        ahead = row + first[b if first.shape[0] > 1 else torch.zeros_like(b)] - key
        batch = b if data.shape[0] > 1 else torch.zeros_like(b)
        # With a row for each query, as :func:`spread` has made it.
        slope = data[batch, h] if data.dim() == 2 else data[batch, h, row.clamp(max=data.shape[2] - 1)]
        score = score - slope * ahead.abs()
    return score


def score_gradient(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    bias: Tensor,
) -> Tensor:
    """Return the gradient ``[B, *axes, R, C]`` of the biased scores of one attend, scores materialised.

    Arguments as in :func:`~attnplan.runtime.attend.attend_backward`: output and LSE are the merged ones of the rows.
    """
    wide = accumulator(q.dtype)
    grad, q, k, v, out = (x.to(wide) for x in (grad, q, k, v, out))
    grouped = q.dim() == 4 and q.shape[1] != k.shape[1]
    if grouped:  # axes that k does not have get size 1 there, as everywhere else
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = (q * scale) @ k.mT + bias
    finite = lse.to(wide).masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)  # such rows have weights of 0
    weights = torch.exp(scores - finite)
    weights = weights if mask is None else weights.masked_fill(~mask, 0)
    delta = (grad * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide).unsqueeze(-1)
    return weights * (grad @ v.mT - delta)


def added(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of two gradients of one operand."""
    return x + y


def sunk(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and LSE ``[B, H, S]`` of softmaxes that have one more key of value 0.

    It is a merge with a part whose output is 0 and whose LSE is the sink logit. A row that sees no key has output 0
    and the sink logit as its LSE.

    Examples
    --------
    >>> out, lse = sunk(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1), torch.zeros(1))
    >>> out.tolist(), lse.exp().tolist()
    ([[[[0.5, 0.5]]]], [[[2.0]]])
    """
    logits = sink_logits.to(lse.dtype).reshape(-1, 1)
    covered = (lse > -torch.inf) | (logits > -torch.inf)
    total = torch.logaddexp(lse.masked_fill(~covered, 0), logits)  # -inf and -inf would have a NaN gradient
    weight = torch.exp(lse - total)  # 0 where no key is seen
    return out * weight.unsqueeze(-1), total.masked_fill(~covered, -torch.inf)


def sink_gradient(grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Return the gradient ``[H]`` of sink logits from the output and LSE of rows, sinks included."""
    wide = lse.dtype
    delta = -(grad.to(wide) * out.to(wide)).sum(-1)
    if grad_lse is not None:
        delta = delta + grad_lse.to(wide)
    finite = lse.masked_fill(lse == -torch.inf, torch.inf)
    return (torch.exp(sink_logits.to(wide).reshape(-1, 1) - finite) * delta).sum((0, 2)).to(sink_logits.dtype)
