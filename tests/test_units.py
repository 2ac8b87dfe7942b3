from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnplan.errors import SpecError
from attnplan.units import format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("12 B", 12), ("2GiB", 2 << 30), (" 1.5 kb ", 1500), ("3 MB", 3_000_000), ("1 tib", 1 << 40), (7, 7)],
)
def test_sizes_are_read_with_binary_and_decimal_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 G", r"cannot read '2 G' as a memory size: .*; did you mean '2 GiB'\?"),
        ("2 gigs", "did you mean '2 GiB'"),
        ("2 parsecs", "write a number and one of B, KiB, MiB, GiB, TiB$"),
        ("", "cannot read ''"),
        ("-2 GiB", "cannot read '-2 GiB'"),
        ("1e9", "cannot read '1e9'"),
        (True, "cannot read True"),
        (None, "cannot read None"),
        (0, "must be positive, got 0"),
        (-3, "must be positive, got -3"),
        ("0 GiB", "must be positive, got '0 GiB'"),
        ("0.1 B", "must be positive"),
    ],
)
def test_an_unreadable_size_says_why(text, message):
    with pytest.raises(SpecError, match=message):
        parse_bytes(text)


@given(st.floats(1, 999), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_written_sizes_read_back_within_rounding(number, unit):
    size = number * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006, abs=1)


def test_numbers_keep_three_digits():
    assert format_bytes(123_456_789) == "118 MiB"
    assert format_bytes(5000 * 2**40) == "5,000 TiB"
    assert format_seconds(1234.5) == "1,234 s"
    assert format_seconds(0.25) == "250 ms"
    assert format_count(1_234_567) == "1.23 M"


@pytest.mark.parametrize(
    "text", [format_bytes(999.7 * 2**20), format_count(999_700), format_seconds(0.0009997)], ids=["B", "count", "s"]
)
def test_numbers_just_below_the_next_unit_are_written_without_exponent(text):
    assert "e+" not in text
