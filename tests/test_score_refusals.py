"""Which specs, calls and kernels take sink logits, biases and ALiBi slopes, and what the others say."""

from __future__ import annotations

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import resolve
from attnplan.errors import SpecError
from attnplan.search import candidates
from tests.score_calls import BASE


def test_kernels_that_add_nothing_to_scores_say_so():
    spec = attrs.evolve(BASE, dtype="bfloat16", causal=True, head_dim=64, value_dim=64, bias=True)
    found = {(c.backend, c.schedule): c.reasons for c in candidates(spec, resolve("h100"))}
    for key in (("eager", "flash"), ("flash", "fa4"), ("xformers", "flash")):
        assert any("adds nothing to scores, %3 has bias" in reason for reason in found[key]), key
    assert not found["eager", "efficient"]
    slopes = attrs.evolve(spec, bias=False, alibi_slopes=True)
    found = {(c.backend, c.schedule): c.reasons for c in candidates(slopes, resolve("h100"))}
    assert any("rounds the distances of alibi_slopes" in reason for reason in found["eager", "efficient"])


def test_sinks_run_on_every_kernel():
    spec = attrs.evolve(BASE, dtype="bfloat16", causal=True, head_dim=64, value_dim=64, sink_logits=True)
    accepted = {c.schedule for c in candidates(spec, resolve("h100")) if not c.reasons}
    assert {"cudnn", "flash", "fa2", "fa3", "fa4", "efficient", "math"} <= accepted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_logits": True, "pattern": P.longnet([8, 16], [1, 2], mix="mean")}, "sink_logits join one softmax"),
        ({"bias": 1}, "bias must be True or False, got 1"),
        ({"bias": True, "ring_size": 2}, "a bias would lie whole on every rank: it needs ring_size=1"),
    ],
)
def test_specs_that_cannot_be_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        attrs.evolve(BASE, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the spec needs bias, sink_logits with each call"),
        ({"bias": torch.zeros(4, 37, 37)}, "the spec needs sink_logits with each call"),
        ({"bias": torch.zeros(4, 36, 37), "sink_logits": torch.zeros(4)},
         r"bias must be a floating-point tensor \[4, 37, 37\] or \[2, 4, 37, 37\], with sizes of 1 .*\[4, 36, 37\]"),
        ({"bias": torch.zeros(37, 37), "sink_logits": torch.zeros(4)}, r"got torch.float32 \[37, 37\]"),
        ({"bias": torch.zeros(4, 37, 37, dtype=torch.int64), "sink_logits": torch.zeros(4)}, "got torch.int64"),
        ({"bias": torch.zeros(1, 1, 1), "sink_logits": torch.zeros(1)}, r"tensor \[4\]; got torch.float32 \[1\]"),
        ({"bias": torch.zeros(1, 1, 1), "sink_logits": 0.5}, "got 0.5"),
        ({"bias": torch.zeros(1, 1, 1), "sink_logits": torch.zeros(4), "alibi_slopes": torch.zeros(4)},
         "this plan takes no alibi_slopes: its spec would need alibi_slopes=True"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused(given, message):
    plan = attnplan.compile(attrs.evolve(BASE, bias=True, sink_logits=True), device="cpu")
    q, k, v = (torch.zeros(2, 4, 37, 8, dtype=torch.float64) for _ in range(3))
    with pytest.raises(SpecError, match=message):
        plan(q, k, v, **given)


def test_refusals_on_every_golden_device_read_as_reviewed(golden):
    """What ``attnplan backends --spec FILE --device NAME`` lists for specs with biases and sinks."""
    lines = []
    options = {
        "sinks": {"sink_logits": True},
        "bias": {"bias": True},
        "alibi, window": {"alibi_slopes": True, "pattern": P.window(512)},
    }
    for device in ("cpu-2core", "gtx1080", "t4", "v100", "a100", "rtx4090", "h100", "b200"):
        dtype = "float16" if device in ("gtx1080", "t4", "v100") else "bfloat16"
        for name, given in options.items():
            spec = AttentionSpec(seq_len=4096, heads=8, head_dim=64, causal=True, dtype=dtype, **given)
            lines.append(f"# {name}, {dtype}, {device}")
            for c in sorted(candidates(spec, resolve(device)), key=lambda c: c.name):
                reasons = [r for r in c.reasons if "runs only when asked for" not in r]
                lines.append(f"  {c.name}: {'; '.join(reasons) or 'accepts'}")
    golden("refusals-score-operands", "\n".join(lines) + "\n")
