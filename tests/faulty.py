"""A backend that computes every published fault on purpose."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import numpy as np
import torch

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.backends import Schedule
from attnplan.backends.base import Backend
from attnplan.cost import KernelModel
from attnplan.lower import lower
from attnplan.runtime.interpreter import interpret

HERE = __name__
SPEC = AttentionSpec(seq_len=33, heads=4, kv_heads=2, head_dim=8, dtype="float32", pattern=P.window(5), causal=True)


def wrong_spec(change):
    """Compute another spec."""
    return lambda spec, right, other: other(change(spec))


def evolved(**changes):
    return wrong_spec(lambda spec: attrs.evolve(spec, **changes))


def wrong_gradient(change):
    """Compute the right numbers, and the gradients of another spec."""

    return lambda spec, right, other: map(_Swapped.apply, right, other(change(spec)))


class _Swapped(torch.autograd.Function):
    """Return the first tensor, with the gradient of the second."""

    @staticmethod
    def forward(ctx, right, wrong):
        return right.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def wrong_result(change):
    """Change output and LSE."""
    return lambda spec, right, other: change(*right)


def top_left(spec):
    return attrs.evolve(spec, pattern=P.band(None, -spec.shape.shift), causal=False)


def nan_in_empty_rows(out, lse):
    return out.masked_fill((lse == -torch.inf).unsqueeze(-1), torch.nan), lse


class _NaN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def after_the_first(value):
    def change(out, lse):
        return torch.cat([out[:1], torch.full_like(out[1:], value)]), lse

    return change


def summed_blocks(spec):
    layout = np.eye(5, dtype=bool) | (np.arange(25).reshape(5, 5) % 3 == 0)
    assert repr(spec.pattern) == repr(P.blocks(layout, 32))
    columns = [P.blocks(layout & (np.arange(5) == j), 32) for j in range(5)]
    return attrs.evolve(spec, pattern=P.mix(columns, rule="sum"))


def leaking_shift(spec):
    """The last half group, rolled to the front, is in one group with the first."""
    n = spec.seq_len
    rolled = P.mask(lambda h, q, k: (h >= 2) & (q < 16) & (k >= (n - 16) // 32 * 32 + 16))
    return attrs.evolve(spec, pattern=(spec.pattern & P.causal()) | rolled, causal=False)


def slots_for_positions(spec):
    w, r = spec.pattern.length, spec.pattern.rate
    return attrs.evolve(spec, pattern=spec.pattern & P.mask(lambda h, q, k: (k % w) // r <= q % w), causal=False)


FAULTS = {
    "causal, heads last": wrong_result(lambda out, lse: (_NaN.apply(out), lse)),
    "as many heads as rows": None,  # see the test below: its gradients come from transposed keys
    "one query, many keys": wrong_spec(top_left),
    "more keys than queries, causal": wrong_spec(top_left),
    "more queries than keys, causal": wrong_result(nan_in_empty_rows),
    "open length": wrong_result(lambda out, lse: (out, _NaN.apply(lse))),
    "scale": evolved(scale=None),
    "dropout": wrong_result(lambda out, lse: (torch.dropout(out, 0.2, True), lse)),
    "window, causal": evolved(pattern=P.window(19)),
    "window, one side": evolved(pattern=P.window(29, 0)),
    "window, more keys": evolved(pattern=P.causal()),
    "window, grouped": evolved(pattern=P.causal()),
    "window, grouped, one head": evolved(pattern=P.full()),
    "windows of each head": evolved(pattern=P.window(16)),
    "grouped queries": wrong_result(lambda out, lse: (out, lse * 0)),
    "one key head": wrong_result(lambda out, lse: (out, lse / math.log(2))),
    "documents, known, both directions": evolved(pattern=P.full()),
    "documents": evolved(pattern=P.full()),
    "documents of each element": wrong_result(after_the_first(torch.nan)),
    "documents, window": evolved(pattern=P.window(16, 0)),
    "documents, open length": wrong_result(after_the_first(0.0)),
    "padding": evolved(pattern=P.full()),
    "padding, causal": evolved(pattern=P.full(), causal=False),
    "padding at the front": wrong_result(lambda out, lse: (_NaN.apply(out), lse)),
    "longnet, padding": wrong_spec(lambda spec: attrs.evolve(spec, pattern=attrs.evolve(spec.pattern, where=P.full()))),
    "blocks": lambda spec, right, other: (other(summed_blocks(spec))[0], right[1]),
    "rows without a block": wrong_result(nan_in_empty_rows),
    "groups shifted by half": wrong_spec(leaking_shift),
    "longnet": wrong_gradient(lambda spec: attrs.evolve(spec, pattern=attrs.evolve(spec.pattern, mix="lse-detached"))),
    "longnet, both directions, grouped": wrong_gradient(lambda spec: attrs.evolve(spec, pattern=spec.branches[0])),
    "dilated, causal": wrong_spec(slots_for_positions),
    "rows that no branch covers": wrong_result(lambda out, lse: (out, lse.clamp(min=-1e8))),
    "grouped heads": wrong_result(lambda out, lse: (out * (torch.arange(5) < 4).reshape(-1, 1, 1), lse)),
    "grouped heads, mean, causal": wrong_result(lambda out, lse: (out / out.sum(2, keepdim=True), lse)),
    "mask function": wrong_gradient(lambda spec: attrs.evolve(spec, pattern=P.full())),
}
GRADIENTS_ALONE = {"causal, heads last", "as many heads as rows", "open length", "padding at the front", "longnet",
                   "longnet, both directions, grouped", "mask function"}  # fmt: skip
LSE_ALONE = {"grouped queries", "one key head"}


@attrs.frozen(cache_hash=True)
class Faulty(Backend):
    """The reference with a fault."""

    name: ClassVar[str] = "faulty"
    emitter: ClassVar[str] = HERE
    automatic: ClassVar[bool] = False
    naive: ClassVar[bool] = True
    fault: ClassVar = None
    louder: ClassVar = None
    """The input whose gradient is 1 % too large."""

    def schedules(self, device):
        return (Schedule("wrong", KernelModel(efficiency=0.1)),)

    def refuse(self, graph, spec, schedule, device):
        return ("too deep", "too wide") if spec.heads == 7 else ()


@attrs.frozen
class FaultyProgram:
    spec: AttentionSpec
    source: str = ""
    differentiable_lse: bool = True
    follows_lengths: bool = False

    def __call__(self, q, k, v, operands, return_lse):
        q, k, v = (
            _Swapped.apply(x, 1.01 * x) if name == Faulty.louder else x
            for name, x in zip("qkv", (q, k, v), strict=True)
        )

        def computed(spec, k=k, v=v):
            return interpret(lower(spec), q, k, v, operands, attrs.evolve(spec.shape, batch=len(q)))

        fault = Faulty.fault
        if fault is None:
            right, wrong = computed(self.spec), computed(self.spec, k.transpose(1, 2), v.transpose(1, 2))
            out, lse = map(_Swapped.apply, right, wrong)
        else:
            out, lse = fault(self.spec, computed(self.spec), computed)
        narrow = lse is not None and lse.dtype is torch.float64 and q.dtype is not torch.float64
        return out.to(q.dtype), lse.float() if narrow else lse


def emit(graph, spec, schedule, device):
    return FaultyProgram(spec)
