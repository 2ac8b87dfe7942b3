"""The tensors of one call, what a plan makes of them, and how far that is from what it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.plan import Plan
from attnplan.spec import AttentionSpec
from attnplan.testing.reference import added_scores, branch_masks, kept_pairs
from attnplan.verify import random_inputs, random_operands

Dense = Callable[..., tuple[Tensor, Tensor | None]]
"""``(spec, q, k, v, masks, keep, added, sinks) -> (output, LSE)``."""

PAIRS_AT_ONCE = 2**24
"""Pairs of one call that are compared; of a larger one a sample of the query rows."""


@attrs.frozen(eq=False)
class Numbers:
    """Output ``[B, H, n, Dv]``, LSE ``[B, H, n]`` where there is one, and the gradients of q, k and v."""

    out: Tensor
    lse: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the tensors by name, without the LSE."""
        yield from (("output", self.out), ("grad q", self.dq), ("grad k", self.dk), ("grad v", self.dv))


@attrs.frozen(eq=False)
class Call:
    """One call: inputs in the order ``[B, H, S, D]``, operands, and random upstream gradients on sampled rows.

    Upstream gradients are zero on the other rows. Every gradient, of all keys and values too, then depends on the
    sampled rows only.
    """

    spec: AttentionSpec
    """With fixed lengths."""
    inputs: tuple[Tensor, Tensor, Tensor]
    operands: Mapping[str, Tensor]
    rows: Tensor
    """Compared query rows ``[n]``, ascending."""
    masks: tuple[Tensor, ...]
    """Which pairs of each branch meet, ``[B, H, n, K]``."""
    keep: Tensor | None
    grad: Tensor
    """Upstream gradient of the output, float64 ``[B, H, n, Dv]``; the dtype of the spec holds it exactly."""
    grad_lse: Tensor | None
    """Upstream gradient of the LSE, float64 ``[B, H, n]``, where there is one; zero for rows without a key."""

    @classmethod
    def random(cls, spec: AttentionSpec, operands: Mapping[str, Any] | None, device: str, seed: int) -> Call:
        """Return a random call of a spec with fixed lengths; ``operands`` of None are drawn too."""
        source = torch.Generator().manual_seed(seed)
        q, k, v = (x.to(device) for x in random_inputs(attrs.evolve(spec, layout="bhsd"), source))
        drawn = random_operands(spec, source)
        given = drawn if operands is None else {name: torch.as_tensor(x) for name, x in operands.items()}
        placed = {name: x.to(device) for name, x in given.items()}
        rows = sampled_rows(spec, source).to(device)
        masks = branch_masks(spec, placed, rows, spec.batch)
        size = (spec.batch, spec.heads, len(rows), spec.value_dim)
        dtype = getattr(torch, spec.dtype)
        grad = torch.randn(size, generator=source, dtype=torch.float64).to(dtype).to(device, torch.float64)
        grad_lse = torch.randn(size[:3], generator=source, dtype=torch.float64).to(dtype).to(device, torch.float64)
        covered = torch.stack(masks).any(0).any(-1) | spec.sink_logits
        keep = kept_pairs(spec, placed, rows, spec.batch)
        through = grad_lse * covered if spec.has_lse else None
        return cls(spec, (q, k, v), placed, rows, tuple(masks), keep, grad, through)

    @property
    def empty(self) -> Tensor:
        """Rows ``[B, H, n]`` that no branch lets see a key, and that have no sink."""
        return ~(torch.stack(self.masks).any(0).any(-1) | self.spec.sink_logits)

    def copies(self, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sampled rows of q, and k and v repeated along the keys until they are ``keys``."""
        q, k, v = self.inputs
        count = keys // k.shape[2]
        return q[:, :, self.rows], torch.cat([k] * count, dim=2), torch.cat([v] * count, dim=2)

    def numbers(self, out: Tensor, lse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor) -> Numbers:
        """Return numbers of the sampled rows, nothing of them attached to a graph."""
        return Numbers(out.detach(), None if lse is None else lse.detach(), dq, dk, dv)

    def by_autograd(self, dtype: str, through_lse: bool, dense: Dense) -> Numbers:
        """Return the numbers of a dense function, computed in ``dtype``."""
        wide = getattr(torch, dtype)
        q, k, v = (x.detach().to(wide).requires_grad_() for x in (self.inputs[0][:, :, self.rows], *self.inputs[1:]))
        added = added_scores(self.spec, self.operands, self.rows)
        sinks = self.operands["sink_logits"] if self.spec.sink_logits else None
        out, lse = dense(self.spec, q, k, v, self.masks, self.keep, added, sinks)
        grads = self._gradients(out, lse if through_lse else None, (q, k, v))
        return self.numbers(out, lse, *grads)

    def by_plan(self, plan: Plan, through_lse: bool) -> Numbers:
        """Call a plan in its layout and dtype and return its numbers on the sampled rows."""
        heads_last = plan.spec.layout == "bshd"
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        q, k, v = (x.transpose(1, 2).contiguous() if heads_last else x for x in leaves)
        operands: dict[str, Any] = dict(self.operands)
        lse: Tensor | None = None
        if self.spec.has_lse:
            out, lse = plan(q, k, v, return_lse=True, **operands)
            self._check("LSE", lse, (self.spec.batch, self.spec.heads, self.spec.shape.seq_len), _lse_dtype(q.dtype))
        else:
            out = plan(q, k, v, **operands)
        self._check("output", out, (*q.shape[:3], self.spec.value_dim), q.dtype)
        out = out.transpose(1, 2) if heads_last else out
        out, lse = out[:, :, self.rows], None if lse is None else lse[:, :, self.rows]
        dq, dk, dv = self._gradients(out, lse if through_lse else None, leaves)
        return self.numbers(out, lse, dq[:, :, self.rows], dk, dv)

    def _gradients(self, out: Tensor, lse: Tensor | None, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        results, upstream = [out], [self.grad.to(out.dtype)]
        if lse is not None and self.grad_lse is not None:
            results.append(lse)
            upstream.append(self.grad_lse.to(lse.dtype))
        grads = torch.autograd.grad(results, leaves, upstream, allow_unused=True, materialize_grads=True)
        return grads[0], grads[1], grads[2]

    def _check(self, what: str, got: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> None:
        if got.shape != size or got.dtype is not dtype:
            raise TypeError(f"{what} is {got.dtype} {list(got.shape)}, it must be {dtype} {list(size)}")


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def sampled_rows(spec: AttentionSpec, source: torch.Generator) -> Tensor:
    """Return the query rows to compare: all of them, or a random sample where all would be too many pairs."""
    shape = spec.shape
    limit = max(1, PAIRS_AT_ONCE // (spec.batch * spec.heads * shape.kv_len * len(spec.branches)))
    if shape.seq_len <= limit:
        return torch.arange(shape.seq_len)
    return torch.randperm(shape.seq_len, generator=source)[:limit].sort().values


def relative(got: Tensor, want: Tensor) -> float:
    """Return the relative L2 error.

    A gradient may vanish, as in rows of one key; a thousandth of the size of the upstream gradients bounds what the
    error is relative to.
    """
    difference = float((got.detach().double() - want.detach()).norm())
    floor = 1e-3 * float(want.numel()) ** 0.5
    return difference / max(float(want.norm()), floor) if difference else 0.0


def relative_lse(got: Tensor, want: Tensor) -> float:
    """Return the relative L2 error of LSE; infinite unless exactly the rows without a key have -inf."""
    if not torch.equal(got == -torch.inf, want == -torch.inf):
        return float("inf")
    finite = want > -torch.inf
    got, want = got.detach(), want.detach()
    difference = float((got[finite].double() - want[finite]).norm())
    return difference / max(float(want[finite].norm()), float(finite.sum()) ** 0.5) if difference else 0.0
