"""Sink logits and ALiBi slopes over several ranks: the numbers of one rank, and gradients that add up over ranks."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import RingError, SpecError
from tests.ring_group import run_group, values
from tests.ring_models import learned_on_a_mesh
from tests.test_score_operands import assert_same, by_plan, drawn, expected, numbers, spec_of

BOTH = {"alibi_slopes": True, "sink_logits": True}
CASES = {
    "full": (spec_of(kv_heads=2, **BOTH), {}),
    "causal": (spec_of(causal=True, kv_heads=1, **BOTH), {}),
    "rows without a key": (spec_of(P.dilated(12, 3), **BOTH), {}),
    "longnet": (spec_of(P.longnet([8, 16, 64], [1, 2, 4]), causal=True, kv_heads=2, **BOTH), {}),
    "sinks beside a window, bshd": (spec_of(P.window(5) | P.sinks(2), causal=True, layout="bshd", **BOTH), {}),
    "slopes of a mean": (spec_of(P.longnet([8, 16], [1, 2], mix="mean"), alibi_slopes=True), {}),
    "documents": (
        spec_of(P.documents(), causal=True, **BOTH), {"documents": torch.tensor([0, 5, 5, 18, 37], dtype=torch.int32)}
    ),
}  # fmt: skip
STRATEGIES = ("zigzag > ring", "contiguous > ulysses", "striped > all-gather", "contiguous > rows")
SAMPLE = [(name, STRATEGIES[i % 4]) for i, name in enumerate(CASES)]
REST = [(n, s) for n in CASES for s in STRATEGIES if (n, s) not in SAMPLE]


@pytest.mark.parametrize(
    ("name", "strategy"), [*SAMPLE, *(pytest.param(*x, marks=pytest.mark.slow) for x in REST)]
)  # fmt: skip
def test_a_virtual_ring_gives_the_numbers_and_gradients_of_one_rank(name: str, strategy: str) -> None:
    spec, operands = CASES[name]
    operands = {**drawn(spec), **operands}
    plan = attnplan.compile(attrs.evolve(spec, ring_size=4), device="cpu", strategy=strategy)
    want = numbers(lambda q, k, v, given: expected(spec, q, k, v, given), spec, operands)
    assert_same(numbers(by_plan(plan), spec, operands), want, f"{name}, {plan}")


def test_verify_checks_them() -> None:
    spec = AttentionSpec(seq_len=37, heads=4, head_dim=8, causal=True, dtype="float32", ring_size=4, **BOTH)
    report = attnplan.compile(spec, device="cpu", strategy="zigzag > ring").verify()
    assert {"grad alibi_slopes", "grad sink_logits"} <= {c.name for c in report.checks}
    assert all(c.passed for c in report.checks)


@pytest.mark.slow
def test_they_are_part_of_a_compiled_graph() -> None:
    spec = attrs.evolve(CASES["longnet"][0], ring_size=4)
    plan = attnplan.compile(spec, device="cpu", strategy="zigzag > ring")
    compiled = torch.compile(plan, backend="aot_eager", fullgraph=True)

    def call(run: Any) -> Any:
        return numbers(lambda q, k, v, given: run(q, k, v, return_lse=True, **given), spec, drawn(spec))

    got, want = call(compiled), call(plan)
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("strategy", ["zigzag > ring", pytest.param("contiguous > ulysses", marks=pytest.mark.slow)])
def test_gradients_of_ranks_add_up(strategy: str) -> None:
    assert values(run_group(2, learned_on_a_mesh, strategy)) == [2, 2]


def test_a_bias_is_refused() -> None:
    with pytest.raises(SpecError, match="a bias would lie whole on every rank"):
        attnplan.compile(spec_of(bias=True, ring_size=2), device="cpu")
    from attnplan.ring.transports import setting_of

    with pytest.raises(RingError, match="a row for each query and a column for each key"):
        setting_of(spec_of(bias=True), 2, "contiguous", "ring")
