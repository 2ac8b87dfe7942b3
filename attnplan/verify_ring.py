"""``plan.verify()`` of a plan over several ranks: the proof of all ranks, and numbers against float64.

Every rank draws the same whole inputs and the same sample of rows. The upstream gradient is random on the sampled rows
and zero elsewhere, so that the gradients of all keys, on every rank, depend on those rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnplan.ring.proof import check_ring
from attnplan.spec import LEARNED
from attnplan.verify import (
    GRADIENT_TOLERANCES,
    TOLERANCES,
    Check,
    Report,
    _lse_error,
    judged,
    random_inputs,
    random_operands,
    relative_error,
    sampled_attention,
)

if TYPE_CHECKING:
    from torch import Tensor

    from attnplan.plan_ring import RingPlan


def verify_ring(plan: RingPlan, rows: int, seed: int) -> Report:
    """Verify a plan over several ranks; see :meth:`attnplan.plan_ring.RingPlan.verify`."""
    names = "the ring", f"{plan!r}, rank {plan.rank},"
    return judged(plan, rows, lambda: check_ring(plan.programs, plan.core), lambda: _compare(plan, rows, seed), names)


def _compare(plan: RingPlan, rows: int, seed: int) -> tuple[Check, ...]:
    import torch

    from attnplan.runtime.ring.groups import group_of

    spec, device = plan.spec, str(plan.target.torch_device)
    generator = torch.Generator().manual_seed(seed)
    inputs = [x.to(device) for x in random_inputs(spec, generator)]
    operands: dict[str, Any] = {name: x.to(device) for name, x in random_operands(spec, generator).items()}
    sample = torch.unique(torch.randint(0, spec.heads * spec.shape.seq_len, (rows,), generator=generator)).to(device)
    heads, positions = sample // spec.shape.seq_len, sample % spec.shape.seq_len
    dtype = getattr(torch, spec.dtype)
    upstream = torch.randn(spec.batch, len(sample), spec.value_dim, generator=generator).to(device, dtype)
    names = [name for name in LEARNED if name in operands]
    wide = [x.double().requires_grad_() for x in (*inputs, *(operands[name] for name in names))]
    given = {**operands, **dict(zip(names, wide[3:], strict=True))}
    inner = [x.transpose(1, 2) for x in wide[:3]] if spec.layout == "bshd" else wide
    want, want_lse = sampled_attention(spec, inner[0], inner[1], inner[2], given, heads, positions)
    wanted = torch.autograd.grad((want * upstream.double()).sum(), wide)
    own: Callable[[Tensor], Tensor] = plan.shard if plan.mesh is not None else lambda x: x
    q, k, v = (own(x).detach().clone().requires_grad_() for x in inputs)
    operands |= {name: operands[name].requires_grad_() for name in names}
    out, lse = plan(q, k, v, return_lse=True, **operands) if spec.has_lse else (plan(q, k, v, **operands), None)
    here, rank_heads, rank_rows = _held_here(plan, heads, positions)
    got = (out.transpose(1, 2) if spec.layout == "bshd" else out)[:, rank_heads, rank_rows]
    leaves = (q, k, v, *(operands[name] for name in names))
    dq, dk, dv, *more = torch.autograd.grad((got * upstream[:, here]).sum(), leaves)
    limit, gradient_limit = TOLERANCES[spec.dtype], GRADIENT_TOLERANCES[spec.dtype]
    checks = [Check("output", relative_error(got, want[:, here]), limit)]
    if lse is not None and want_lse is not None:
        error = _lse_error(lse[:, rank_heads, rank_rows], want_lse[:, here])
        checks.append(Check("lse", error, max(limit, 2e-6)))
    checks += [
        Check(f"grad {name}", relative_error(g, own(w)), gradient_limit)
        for name, g, w in zip("qkv", (dq, dk, dv), wanted[:3], strict=True)
    ]
    for name, g, w in zip(names, more, wanted[3:], strict=True):
        if plan.mesh is not None:
            torch.distributed.all_reduce(g, group=group_of(plan.mesh))
        checks.append(Check(f"grad {name}", relative_error(g, w), gradient_limit))
    return tuple(checks)


def _held_here(plan: RingPlan, heads: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which sampled rows this process holds, and their heads and rows in its output."""
    import torch

    if plan.mesh is None:
        return torch.arange(len(heads), device=heads.device), heads, positions
    place = torch.full((plan.spec.shape.seq_len,), -1, device=heads.device)
    held = plan.positions().to(heads.device)
    place[held] = torch.arange(len(held), device=heads.device)
    here = (place[positions] >= 0).nonzero().flatten()
    return here, heads[here], place[positions[here]]
