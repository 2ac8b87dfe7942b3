"""``plan.verify()``: the coverage proof again, and numbers against float64 on sampled rows, forward and backward.

The upstream gradient is random on the sampled rows and zero elsewhere. Every gradient, of all keys and values too, then
depends on those rows only, and can be computed exactly in float64 in O(rows x keys).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.errors import NoBackendError, SpecError, VerifyError
from attnplan.ir.coverage import check_coverage, coverage, spec_coverage
from attnplan.spec import LEARNED, AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor

    from attnplan.plan import Plan

TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-3, "bfloat16": 4e-3}
"""Largest relative L2 error of the output."""
GRADIENT_TOLERANCES = {"float64": 1e-12, "float32": 5e-6, "float16": 4e-3, "bfloat16": 1.5e-2}


@attrs.frozen
class Check:
    """One compared tensor."""

    name: str
    error: float
    """Relative L2 error against float64."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@attrs.frozen
class Report:
    """What was verified."""

    rows: int
    """Number of sampled (head, row) pairs, in each batch element."""
    checks: tuple[Check, ...]
    proof_seconds: float
    seconds: float

    def __str__(self) -> str:
        lines = [f"coverage   proved: every pair of the spec exactly once ({self.proof_seconds * 1e3:.1f} ms)"]
        lines += [
            f"{c.name:<10} {'ok' if c.passed else 'WRONG':<7} relative L2 {c.error:.2e}, tolerance {c.tolerance:.0e}"
            for c in self.checks
        ]
        lines.append(f"numbers    {self.rows} sampled rows against float64 ({self.seconds:.1f} s)")
        return "\n".join(lines)


def verify_plan(plan: Plan, rows: int, seed: int) -> Report:
    """Verify a plan; see :meth:`attnplan.Plan.verify`."""
    spec = plan.spec

    def prove() -> None:
        check_coverage(spec_coverage(spec), coverage(plan.graph), "the plan")

    return judged(plan, rows, prove, lambda: _compare(plan, rows, seed), ("the coverage", repr(plan)))


def judged(
    plan: Plan,
    rows: int,
    prove: Callable[[], object],
    compare: Callable[[], tuple[Check, ...]],
    names: tuple[str, str],
) -> Report:
    """Prove a plan, then compare its numbers; ``names`` are what is proved, and what the plan is called in errors."""
    start = time.perf_counter()
    prove()
    proof_seconds = time.perf_counter() - start
    proved, who = names
    if plan.target.torch_device is None:
        raise NoBackendError(f"{proved} is proved, but {plan.device.title} is not here to check numbers on")
    if rows < 1:
        raise SpecError(f"verify needs at least one row, got {rows}")
    checks = compare()
    report = Report(rows, checks, proof_seconds, time.perf_counter() - start - proof_seconds)
    wrong = [c for c in checks if not c.passed]
    if wrong:
        found = ", ".join(f"{c.name} {c.error:.2e} > {c.tolerance:.0e}" for c in wrong)
        raise VerifyError(f"{who} differs from float64 on {rows} sampled rows: {found}")
    return report


def _compare(plan: Plan, rows: int, seed: int) -> tuple[Check, ...]:
    import torch

    spec, device = plan.spec, str(plan.target.torch_device)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (x.to(device).requires_grad_() for x in random_inputs(spec, generator))
    operands: dict[str, Any] = {name: x.to(device) for name, x in random_operands(spec, generator).items()}
    names = [name for name in LEARNED if name in operands]
    leaves = (q, k, v, *(operands[name].requires_grad_() for name in names))
    flat = torch.randint(0, spec.heads * spec.shape.seq_len, (rows,), generator=generator)
    flat = torch.unique(flat).to(device)
    heads, positions = flat // spec.shape.seq_len, flat % spec.shape.seq_len
    out, lse = plan(q, k, v, return_lse=True, **operands) if spec.has_lse else (plan(q, k, v, **operands), None)
    swap = spec.layout == "bshd"
    got = (out.transpose(1, 2) if swap else out)[:, heads, positions]
    upstream = torch.randn(got.shape, generator=generator).to(device, torch.float64)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    inner = [x.transpose(1, 2) for x in wide[:3]] if swap else wide
    given = {**operands, **dict(zip(names, wide[3:], strict=True))}
    want, want_lse = sampled_attention(spec, inner[0], inner[1], inner[2], given, heads, positions)
    grads = torch.autograd.grad((got * upstream.to(got.dtype)).sum(), leaves)
    wanted = torch.autograd.grad((want * upstream.to(got.dtype).double()).sum(), wide)
    limit, gradient_limit = TOLERANCES[spec.dtype], GRADIENT_TOLERANCES[spec.dtype]
    checks = [Check("output", relative_error(got, want), limit)]
    if lse is not None and want_lse is not None:
        checks.append(Check("lse", _lse_error(lse[:, heads, positions], want_lse), max(limit, 2e-6)))
    checks += [
        Check(f"grad {name}", relative_error(g, w), gradient_limit)
        for name, g, w in zip((*"qkv", *names), grads, wanted, strict=True)
    ]
    return tuple(checks)


def random_inputs(spec: AttentionSpec, generator: Any) -> list[Tensor]:
    """Return random q, k, v for a spec, in its layout and dtype, on the CPU."""
    import torch

    shape = spec.shape
    sizes = [
        (spec.heads, shape.seq_len, spec.head_dim),
        (spec.kv_heads, shape.kv_len, spec.head_dim),
        (spec.kv_heads, shape.kv_len, spec.value_dim),
    ]
    order = (0, 1, 2) if spec.layout == "bhsd" else (1, 0, 2)
    return [
        torch.randn(spec.batch, *(size[i] for i in order), generator=generator).to(getattr(torch, spec.dtype))
        for size in sizes
    ]


_MOST_BIAS = 1 << 24
"""Elements of a random bias; a larger one is the same for all rows."""


def random_operands(spec: AttentionSpec, generator: Any) -> dict[str, Tensor]:
    """Return random runtime operands that a spec asks for, on the CPU."""
    import torch

    length = spec.shape.kv_len
    operands: dict[str, Tensor] = {}
    if "documents" in spec.operands:
        cuts = torch.randint(0, length + 1, (min(7, length),), generator=generator)
        operands["documents"] = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([length])])
    if "key_padding" in spec.operands:
        real = torch.randint(max(1, length // 2), length + 1, (spec.batch, 1), generator=generator)
        operands["key_padding"] = torch.arange(length) < real
    if "q_offset" in spec.operands:
        operands["q_offset"] = torch.tensor(max(0, spec.shape.shift))
    if "dropout_seed" in spec.operands:
        operands["dropout_seed"] = torch.randint(2**31, (), generator=generator)
    rows = spec.shape.seq_len if spec.heads * spec.shape.seq_len * length <= _MOST_BIAS else 1
    sizes = {"bias": (spec.heads, rows, length), "alibi_slopes": (spec.heads,), "sink_logits": (spec.heads,)}
    for name in LEARNED:
        if name in spec.operands:
            operands[name] = torch.rand(sizes[name], generator=generator)
    return operands


def sampled_attention(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: dict[str, Tensor], heads: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return float64 output ``[B, n, Dv]`` and LSE ``[B, n]`` of n sampled rows, straight from the spec.

    Parameters
    ----------
    q, k, v
        Float64, ``[B, H, S, D]`` and so on; gradients flow back to them.
    heads, positions
        Head and row of each sample.
    """
    import torch

    from attnplan.patterns.counts import Table
    from attnplan.runtime.kernels import softmax_attention
    from attnplan.runtime.masks import runtime_tables

    shape = attrs.evolve(spec.shape, batch=q.shape[0])
    offset = operands["q_offset"] if spec.q_offset else shape.shift
    key = torch.arange(shape.kv_len, device=q.device)
    runtime = {name: Table(t) for name, t in runtime_tables(operands, shape.kv_len).items()}
    by_head = [x.unbind(1) for x in (q, k, v)]  # selected one by one, each would get a gradient of full size
    outs, lses = [], []
    for where in spec.branches:
        static = where.tables(shape).items()
        tables = {name: Table(torch.as_tensor(t, device=q.device)) for name, t in static} | runtime
        parts = []
        for head in torch.unique_consecutive(heads).tolist():  # head by head, so that no key is copied for each row
            rows = positions[heads == head]
            mask = where.pairs(tables, torch.full((1, 1), head, device=q.device), (rows + offset)[:, None], key[None])
            kv = head // (spec.heads // spec.kv_heads)
            parts.append(
                softmax_attention(
                    by_head[0][head][:, rows],
                    by_head[1][kv],
                    by_head[2][kv],
                    mask=mask,
                    scale=spec.softmax_scale,
                    softcap=spec.softcap,
                    keep=_kept(spec, operands, head, rows, key, q.shape[0]),
                    dropout=spec.dropout,
                    bias=_bias(spec, operands, head, rows, offset, key),
                )
            )
        outs.append(torch.cat([out for out, _ in parts], dim=1))
        lses.append(torch.cat([lse for _, lse in parts], dim=1))
    out, lse = _mixed(spec, torch.stack(outs), torch.stack(lses))
    return (out, lse) if lse is None or not spec.sink_logits else _sunk(out, lse, operands["sink_logits"][heads])


def _bias(
    spec: AttentionSpec, operands: dict[str, Tensor], head: int, rows: Tensor, offset: Any, key: Tensor
) -> Tensor | None:
    """Return what is added to the scores of some rows of one head, ``[B or 1, n, K]``."""
    parts = []
    if spec.bias:
        given = operands["bias"]
        given = given if given.dim() == 4 else given.unsqueeze(0)
        one = given[:, head if given.shape[1] > 1 else 0]
        parts.append((one[:, rows] if one.shape[1] > 1 else one).double())
    if spec.alibi_slopes:
        slope = operands["alibi_slopes"].reshape(-1, spec.heads)[:, head].double().reshape(-1, 1, 1)
        parts.append(-slope * ((rows + offset)[:, None] - key).abs())
    return sum(parts[1:], start=parts[0]) if parts else None


def _sunk(out: Tensor, lse: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return output ``[B, n, Dv]`` and LSE ``[B, n]`` with one more key of value 0 and score ``[n]`` in each row."""
    import torch

    total = torch.logsumexp(torch.stack([lse, logits.double().expand_as(lse)]), 0)
    return out * torch.exp(lse - total).unsqueeze(-1), total


def _kept(
    spec: AttentionSpec, operands: dict[str, Tensor], head: int, rows: Tensor, key: Tensor, batch: int
) -> Tensor | None:
    if not spec.dropout:
        return None
    import torch

    from attnplan.runtime.dropout import keep_mask

    each = torch.arange(batch, device=key.device)[:, None, None]
    one = torch.tensor(head, device=key.device)
    return keep_mask(operands["dropout_seed"], each, one, rows[:, None], key, spec.dropout)


def _mixed(spec: AttentionSpec, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor | None]:
    import torch

    if not spec.has_lse:
        weights = getattr(spec.pattern, "weights", None) or [1.0] * len(outs)
        scale = torch.tensor(weights, dtype=outs.dtype, device=outs.device).reshape(-1, 1, 1, 1)
        return (outs * scale).sum(0) / (len(outs) if spec.rule == "mean" else 1), None
    covered = (lses > -torch.inf).any(0)
    total = torch.logsumexp(lses.masked_fill(~covered, 0), 0)
    weights = torch.exp(lses - total).masked_fill(~covered, 0)
    weights = weights.detach() if spec.rule == "lse-detached" else weights
    return (weights.unsqueeze(-1) * outs).sum(0), total.masked_fill(~covered, -torch.inf)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the relative L2 error; the absolute one where the reference is all zero."""
    got, want = got.detach().double(), want.detach().double()
    norm = want.norm().item()
    return float((got - want).norm().item() / (norm or 1.0))


def _lse_error(got: Tensor, want: Tensor) -> float:
    import torch

    if not torch.equal(got == -torch.inf, want == -torch.inf):
        return float("inf")
    finite = want > -torch.inf
    return relative_error(got[finite], want[finite])
