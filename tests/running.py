"""Runs plans and the oracle on the same tensors, and compares output, LSE and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from attnplan.backends import eager
from attnplan.cost import resolve
from attnplan.plan import Plan
from attnplan.search import Found, _options
from attnplan.spec import AttentionSpec
from attnplan.testing.numbers import Numbers
from tests import oracle

torch.set_num_threads(1)  # tensors of tests are tiny: threads would wait for one another, minutes on a busy machine

NONE: Mapping[str, Any] = {}
TOLERANCES = {"float64": 1e-12, "float32": 2e-6}
"""Largest relative L2 error of outputs, LSE and gradients alike."""


def every_plan(spec: AttentionSpec, device: object = "auto") -> Iterator[Plan]:
    """Iterate over a plan for each strategy, backend and schedule that accepts the spec, the reference included.

    On the CPU with tiles and chunks so small that the lengths of tests have many of them.
    """
    target = resolve(device)
    for backend in ("auto", "reference"):
        with mock.patch.object(eager, "FLASH_CPU", attrs.evolve(eager.FLASH_CPU, tile=(4, 3), chunk=3)):
            options = list(_options(spec, target, backend, "auto"))
        for lowered, accepted, schedule, candidate in options:
            if not candidate.reasons:
                found = Found(lowered, candidate, accepted, schedule, (candidate,))
                yield Plan(spec, target, found, {}, strict=True)


def way(plan: Plan) -> str:
    """Return strategy, backend and schedule in words."""
    return f"{plan.strategy} > {plan.backend} ({plan.schedule})"


def plan_for(spec: AttentionSpec, schedule: str, strategy: str | None = None) -> Plan:
    """Return the plan of one schedule, and of one strategy if that is given."""
    found = [p for p in every_plan(spec) if p.schedule == schedule and strategy in (None, p.strategy)]
    assert found, f"nothing runs {spec} by {schedule}"
    return found[-1]


@attrs.frozen(eq=False)
class Call:
    """The tensors of one call, and random upstream gradients that the dtype represents exactly."""

    spec: AttentionSpec
    inputs: tuple[Tensor, ...]
    operands: Mapping[str, Any]
    grad: Tensor
    grad_lse: Tensor | None

    @classmethod
    def of(
        cls,
        spec: AttentionSpec,
        operands: Mapping[str, Any] = NONE,
        batch: int = 1,
        seed: int = 0,
        through_lse: bool = True,
        device: str = "cpu",
    ) -> Call:
        """Return a random call of a spec with fixed lengths."""
        dtype = getattr(torch, spec.dtype)
        inputs = tuple(x.detach().to(device) for x in oracle.sample_inputs(spec, batch, seed, dtype))
        source = torch.Generator().manual_seed(seed + 1)
        sizes = (batch, spec.heads, spec.seq_len, spec.value_dim)
        grad = torch.randn(sizes, generator=source, dtype=torch.float64).to(device, dtype)
        grad_lse = torch.randn(sizes[:3], generator=source, dtype=torch.float64).to(device, dtype)
        return cls(spec, inputs, operands, grad, grad_lse if through_lse and spec.has_lse else None)

    def loss(self, out: Tensor, lse: Tensor | None) -> Tensor:
        """Return the scalar whose gradients are the upstream ones; rows without a key have no part in it."""
        total = (out * self.grad.to(out.dtype)).sum()
        if self.grad_lse is None or lse is None:
            return total
        return total.to(lse.dtype) + (lse.masked_fill(lse == -torch.inf, 0) * self.grad_lse.to(lse.dtype)).sum()

    def expected(self) -> Numbers:
        """Return the oracle's numbers, in float64."""
        leaves = [x.double().requires_grad_() for x in self.inputs]
        out, lse = oracle.dense(self.spec, *leaves, operands=on_cpu(self.operands))
        grads = torch.autograd.grad(self.loss(out, lse), leaves, allow_unused=True, materialize_grads=True)
        return Numbers(out.detach(), None if lse is None else lse.detach(), *grads)

    def got(self, plan: Plan) -> Numbers:
        """Return what a plan gives, called in its layout on leaves of its dtype."""
        swapped = plan.spec.layout == "bshd"
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        given = [x.transpose(1, 2).contiguous() for x in leaves] if swapped else leaves
        return self.results(plan, leaves, given)

    def results(self, plan: Plan, leaves: list[Tensor], given: list[Tensor]) -> Numbers:
        """Call a plan with tensors made of ``leaves``, and return what it gives and the gradients of the leaves."""
        if self.spec.has_lse:
            out, lse = plan(*given, return_lse=True, **self.operands)
        else:
            out, lse = plan(*given, **self.operands), None
        out = out.transpose(1, 2) if plan.spec.layout == "bshd" else out
        loss = self.loss(out, lse if self.grad_lse is not None else None)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return Numbers(out.detach(), None if lse is None else lse.detach(), *grads)


def on_cpu(operands: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.cpu() if isinstance(x, Tensor) else x for name, x in operands.items()}


def error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Return the relative L2 error, relative to at least ``floor``."""
    difference = (got.double() - want).norm().item()
    return difference / max(want.norm().item(), floor) if difference else 0.0


def lse_error(got: Tensor, want: Tensor) -> float:
    """Return the relative L2 error of LSE: rows without a key must be -inf, exactly those."""
    assert torch.equal(got == -torch.inf, want == -torch.inf), "other rows than those without a key have LSE -inf"
    rows = want > -torch.inf
    return error(got[rows], want[rows], floor=rows.sum().item() ** 0.5)


def assert_agree(got: Numbers, want: Numbers, tolerance: float, what: str) -> None:
    """Compare everything. A gradient may vanish (rows of one key), so upstream sizes bound the error from below."""
    floor = 1e-3 * want.out.numel() ** 0.5
    for (name, a), (_, b) in zip(got.items(), want.items(), strict=True):
        assert a.shape == b.shape, f"{what}: {name} has shape {list(a.shape)}, not {list(b.shape)}"
        assert error(a, b, floor) <= tolerance, f"{what}: {name} is off by {error(a, b, floor):.2e}"
    assert (got.lse is None) == (want.lse is None)
    if got.lse is not None and want.lse is not None:
        assert lse_error(got.lse, want.lse) <= tolerance, f"{what}: lse is off by {lse_error(got.lse, want.lse):.2e}"


def dense_sdpa(call: Call) -> Numbers:
    """Return the numbers of dense SDPA with a boolean mask, in the dtype of the call, on the same tensors.

    Under ``lse`` a key counts once for each branch that sees it, so SDPA gets one copy of the keys per branch: the
    same softmax, with no bias that the dtype would round. Under the other rules it runs each branch by itself with the
    upstream gradient times the branch's weight. Sums over copies and branches are free: they are taken in float64.
    """
    spec = call.spec
    masks = [torch.tensor(m, device=call.grad.device) for m in oracle.branch_masks(spec, batch=call.grad.shape[0])]
    if spec.rule == "lse":
        return _sdpa(call, torch.cat(masks, dim=-1), torch.ones_like(call.grad[..., :1], dtype=torch.float64))
    each = [_sdpa(call, mask, weight) for mask, weight in zip(masks, _row_weights(call, masks), strict=True)]
    return Numbers(
        *(None if name == "lse" else sum(getattr(n, name) for n in each) for name in attrs.fields_dict(Numbers))
    )


def _row_weights(call: Call, masks: list[Tensor]) -> list[Tensor]:
    """Return the constant weight ``[B, H, S, 1]`` of each branch."""
    spec, count = call.spec, len(masks)
    if spec.rule in ("mean", "sum"):
        constants = [1 / count] * count if spec.rule == "mean" else spec.pattern.weights or [1.0] * count
        return [torch.full_like(call.grad[..., :1], w, dtype=torch.float64) for w in constants]
    q, k = (x.double() for x in call.inputs[:2])
    scores = q @ k.repeat_interleave(spec.heads // spec.kv_heads, 1).mT * spec.softmax_scale
    lses = torch.stack([scores.masked_fill(~m, -torch.inf).logsumexp(-1, keepdim=True) for m in masks])
    return list((lses - lses.logsumexp(0)).exp().nan_to_num(0.0))


def _sdpa(call: Call, mask: Tensor, weight: Tensor) -> Numbers:
    spec, (q, k, v) = call.spec, call.inputs
    copies = mask.shape[-1] // k.shape[2]
    found = mask.any(-1, keepdim=True)
    mask, weight = mask | ~found, weight * found  # some of SDPA's kernels give NaN for a row without a key
    leaves = [x.detach().requires_grad_() for x in (q, *(torch.cat([x] * copies, dim=2) for x in (k, v)))]
    out = F.scaled_dot_product_attention(
        *leaves, attn_mask=mask, scale=spec.softmax_scale, enable_gqa=spec.heads != spec.kv_heads
    )
    grads = torch.autograd.grad(out, leaves, (call.grad.double() * weight).to(out.dtype))
    dk, dv = (g.double().unflatten(2, (copies, -1)).sum(2) for g in grads[1:])
    return Numbers(out.detach().double() * weight, None, grads[0].double(), dk, dv)
