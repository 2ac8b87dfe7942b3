"""Specs and limits that the tests on CUDA share."""

from __future__ import annotations

import attrs
import torch

from attnplan import AttentionSpec
from attnplan import patterns as P
from tests.running import error, lse_error

OUTPUT = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 2e-6}
"""Largest relative L2 error of the output."""
LSE = {"bfloat16": 1e-4, "float16": 1e-4, "float32": 2e-6}
FLOAT32_GRADIENT = 5e-6
BASE = AttentionSpec(seq_len=512, heads=8, head_dim=64, batch=2, dtype="bfloat16")


def spec_of(pattern=None, **options):
    """Return the base with another pattern and other fields; keys and K/V heads follow the queries'."""
    lengths = {"kv_len": options.get("seq_len", BASE.seq_len), **options}
    heads = {"kv_heads": options.get("heads", BASE.heads), "value_dim": options.get("head_dim", BASE.head_dim)}
    return attrs.evolve(BASE, pattern=pattern or P.full(), **{**heads, **lengths})


SHARED = {
    "full": spec_of(),
    "causal": spec_of(causal=True),
    "causal, odd length": spec_of(seq_len=301, causal=True),
    "grouped queries": spec_of(causal=True, kv_heads=2),
    "grouped longnet": spec_of(P.longnet([64, 128], [1, 2]), kv_heads=4, causal=True),
    "longnet detached": spec_of(P.longnet([64, 128], [1, 2], mix="lse-detached"), causal=True),
    "rows without a key": spec_of(P.longnet([64, 96], [4, 3]), seq_len=301),
    "more queries": spec_of(seq_len=300, kv_len=100, causal=True),
    "window": spec_of(P.window(64), causal=True),
}
"""What both the kernels of torch and those of other packages run."""


def assert_near(got, want, anchor, dtype, ratio, what):
    """Hold numbers against the oracle's; ``ratio`` is what gradients may err, over dense SDPA's error in that dtype."""
    floor = 1e-3 * want.out.numel() ** 0.5
    assert error(got.out, want.out, floor) <= OUTPUT[dtype], what
    if got.lse is not None:
        assert got.lse.dtype is torch.float32
        assert lse_error(got.lse, want.lse) <= LSE[dtype], what
    for gradient in ("dq", "dk", "dv"):
        ours, dense, exact = (getattr(n, gradient) for n in (got, anchor, want))
        limit = FLOAT32_GRADIENT if dtype == "float32" else ratio * max(error(dense, exact, floor), 1e-6)
        found = error(ours, exact, floor)
        assert found <= limit, f"{what}: {gradient} errs by {found:.2e}, {found / limit:.2f} x the limit"
