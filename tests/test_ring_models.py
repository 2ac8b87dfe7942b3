"""Models over ranks train like models alone: under DDP, FSDP, data beside sequence, and in compiled graphs."""

from __future__ import annotations

import pytest

from tests.ring_group import run_group, values
from tests.ring_models import data_beside_sequence, dies_in_a_graph, refused_whole, trained

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("wrapper", "make", "strategy", "backend"),
    [
        ("ddp", "modules", "zigzag > ring", ""),
        ("fsdp", "modules", "contiguous > rows", ""),
        pytest.param("ddp", "plans", "zigzag > ring", "aot_eager", marks=SLOW),
        pytest.param("fsdp", "plans", "zigzag > ring", "", marks=SLOW),
        pytest.param("ddp", "modules", "contiguous > ulysses", "eager", marks=SLOW),
        pytest.param("ddp", "plans", "contiguous > all-gather", "inductor", marks=SLOW),
        pytest.param("fsdp", "modules", "striped > ring", "", marks=SLOW),
    ],
)
def test_a_step_is_that_of_one_process(wrapper: str, make: str, strategy: str, backend: str) -> None:
    found = values(run_group(2, trained, wrapper, make, strategy, backend, deadline=150.0))
    assert found[0] == found[1] > 10


@pytest.mark.slow
def test_rings_run_beside_data_parallel_ranks() -> None:
    assert values(run_group(4, data_beside_sequence, deadline=150.0)) == [2] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "length", "why"),
    [
        ("contiguous > ulysses", 32, "it spreads heads over ranks"),
        ("zigzag > ring", 31, "its ranks hold unlike numbers of rows"),
    ],
)
def test_what_is_no_part_of_a_whole_graph_says_why(strategy: str, length: int, why: str) -> None:
    for said in values(run_group(2, refused_whole, strategy, length, deadline=150.0)):
        assert why in said
        assert "without fullgraph=True" in said


@pytest.mark.slow
def test_a_death_in_a_compiled_graph_is_named() -> None:
    first, *_ = run_group(2, dies_in_a_graph, deadline=150.0)
    assert "RingError" in first.error
    assert "rank 1 did not answer" in first.error
    assert first.seconds < 7
