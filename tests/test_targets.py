"""What the core promises in figures, each measured in this run. `python -m bench.spine` writes the same to a file."""

import pytest

from bench import dilated, spine

pytestmark = pytest.mark.timing


def test_a_plan_adds_at_most_15_microseconds_to_sdpa_and_a_cached_call_at_most_30():
    row = spine.host_overhead(calls=200, rounds=15)
    for mode in ("with gradients", "without gradients"):
        assert row[mode]["plan_adds"] <= 15, row
        assert row[mode]["attention_adds"] <= 30, row


def test_longnet_over_a_million_tokens_is_planned_and_proved_in_50_ms():
    assert spine.planning()["cpu_seconds"]["median"] <= 0.050


def test_explain_takes_at_most_a_third_of_importing_torch():
    assert spine.explain_without_torch("examples/longnet.toml", rounds=3)["share_of_import_torch"] <= 1 / 3


def test_longnet_is_4_times_as_fast_as_its_equivalent_sdpa_call_and_3_times_as_fast_as_dense():
    row = spine.longnet(rounds=3)
    assert row["worst_relative_l2"] <= 2e-6
    assert row["times_faster_than_bias"] >= 4, row["seconds"]
    assert row["times_faster_than_dense"] >= 3, row["seconds"]


def test_grouped_dilation_takes_at_most_5_percent_more_than_strided_sdpa_by_hand():
    for backward in (False, True):
        row = dilated.row(8192, 9, backward, rounds=5)
        assert row["relative_l2_to_hand_written"] <= 2e-6
        fastest = {name: seconds["min"] for name, seconds in row["seconds"].items()}  # the least disturbed round
        assert fastest["plan"] <= 1.05 * fastest["strided SDPA by hand"], row["seconds"]
