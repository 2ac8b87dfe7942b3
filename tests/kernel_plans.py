"""Plans over stand-ins for the packages that need a GPU, on the CPU: what the tests of these backends share."""

from __future__ import annotations

import attrs
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.backends import eager, flash, xformers
from attnplan.cost import Target, catalogue
from attnplan.plan import Plan
from attnplan.search import Found, _options
from tests import fake_kernels
from tests.running import Call

BASE = AttentionSpec(seq_len=48, heads=4, head_dim=16, batch=2, dtype="float64")
H100 = Target(catalogue()["h100"], "cpu")


def spec_of(pattern=None, **options):
    lengths = {"kv_len": options.get("seq_len", BASE.seq_len), **options}
    heads = {"kv_heads": options.get("heads", BASE.heads), "value_dim": options.get("head_dim", BASE.head_dim)}
    return attrs.evolve(BASE, pattern=pattern or P.full(), **{**heads, **lengths})


@pytest.fixture
def packages(monkeypatch):
    """Pretend that every package is there, that kernels take float64, and that they have small tiles."""
    fake_kernels.install(monkeypatch)
    for module in (eager, flash, xformers):
        wider = {name: attrs.evolve(x, dtypes=(*x.dtypes, "float64")) for name, x in module.LIMITS.items()}
        monkeypatch.setattr(module, "LIMITS", wider)
    monkeypatch.setattr(flash, "_FA4_WIDTHS", ())
    monkeypatch.setattr(flash, "FA4", attrs.evolve(flash.FA4, tile=(8, 4)))
    monkeypatch.setattr(flash, "FA4_MASKS", attrs.evolve(flash.FA4_MASKS, tile=(8, 4), automatic=True))
    monkeypatch.setattr(eager, "EFFICIENT", attrs.evolve(eager.EFFICIENT, tile=(8, 8), chunk=8))
    monkeypatch.setattr(xformers, "CUTLASS", attrs.evolve(xformers.CUTLASS, tile=(8, 8), chunk=8))


def plans(spec, target=H100):
    """Iterate over a plan for each strategy and schedule of the GPU backends that accepts a spec."""
    for found_lowered, backend, schedule, candidate in _options(spec, target, "auto", "auto"):
        if not candidate.reasons and schedule.runs:
            found = Found(found_lowered, candidate, backend, schedule, (candidate,))
            yield Plan(spec, target, found, {"backend": "auto", "strategy": "auto", "max_memory": None})


def ways(spec):
    return {f"{p.backend} ({p.schedule})" for p in plans(spec)}


def plan_by(spec, schedule, strategy=None, target=H100):
    return next(p for p in plans(spec, target) if p.schedule == schedule and strategy in (None, p.strategy))


SPECS = {
    "full": spec_of(),
    "causal": spec_of(causal=True),
    "causal, odd length": spec_of(seq_len=37, causal=True),
    "grouped queries": spec_of(causal=True, kv_heads=2),
    "one key head": spec_of(P.window(5), causal=True, kv_heads=1),
    "longnet": spec_of(P.longnet([16, 32, 48], [1, 2, 4]), causal=True),
    "grouped longnet": spec_of(P.longnet([16, 32], [1, 2]), kv_heads=2, causal=True),
    "longnet mean": spec_of(P.longnet([16, 32], [1, 2], mix="mean")),
    "longnet detached": spec_of(P.longnet([16, 32], [1, 2], mix="lse-detached"), causal=True),
    "rows without a key": spec_of(P.longnet([16, 24], [4, 3]), seq_len=37),
    "beside the diagonal": spec_of(P.band(20, -4)),
    "beside it on the right": spec_of(P.band(-4, 20)),
    "more keys": spec_of(seq_len=19, kv_len=48, causal=True),
    "more queries": spec_of(seq_len=40, kv_len=11, causal=True),
    "window": spec_of(P.window(7), causal=True),
    "window to both sides": spec_of(P.window(3, 9)),
    "window to the right": spec_of(P.window(0, 5)),
    "window, more keys": spec_of(P.window(6, 2), seq_len=23, kv_len=41),
    "window, more queries": spec_of(P.window(6, 2), seq_len=41, kv_len=23),
    "window of segments": spec_of(P.window(7) & P.segments(20), causal=True),
    "longformer": spec_of(P.window(5) | P.global_tokens(3)),
    "streaming": spec_of(P.window(9) | P.sinks(3), causal=True, kv_heads=2),
    "any mask": spec_of(P.window(5) | P.random_blocks(0.3, 4, 0), causal=True),
    "whole tiles": spec_of(P.random_blocks(0.3, 8, 0)),
    "whole tiles, ragged": spec_of(P.random_blocks(0.4, 8, 1), seq_len=45, kv_heads=2),
    "heads differ": spec_of((P.heads(0, 2) & P.segments(16)) | (P.heads(2, 4) & P.full())),
    "bshd": spec_of(P.window(7), causal=True, layout="bshd"),
}  # fmt: skip


def float32_call(spec):
    return Call.of(attrs.evolve(spec, dtype="bfloat16"), batch=2, through_lse=False)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
