"""Sizes and times as people write them."""

from __future__ import annotations

import re

from attnplan.errors import SpecError

_BYTES = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_ROUNDS_TO_1000 = 999.5
"""From here on three significant digits would write 1e+03."""
_BYTES_BY_LOWER = {unit.lower(): factor for unit, factor in _BYTES.items()}


def parse_bytes(text: int | str) -> int:
    """Read a number of bytes: an int, or text such as ``"2 GiB"`` or ``"512MB"``.

    Raises
    ------
    SpecError
        If the text is not a positive number with a known unit.

    Examples
    --------
    >>> parse_bytes("2 GiB")
    2147483648
    >>> parse_bytes("1.5kB"), parse_bytes(4096)
    (1500, 4096)
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text <= 0:
            raise SpecError(f"a memory size must be positive, got {text}")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    factor = _BYTES_BY_LOWER.get(match[2].lower()) if match else None
    if match is None or factor is None:
        hint = (
            f"; did you mean '{match[1]} {match[2][0].upper()}iB'?" if match and match[2][:1].lower() in "kmgt" else ""
        )
        raise SpecError(f"cannot read {text!r} as a memory size: write a number and one of B, KiB, MiB, GiB, TiB{hint}")
    size = int(float(match[1]) * factor)
    if size <= 0:
        raise SpecError(f"a memory size must be positive, got {text!r}")
    return size


def format_bytes(size: float) -> str:
    """Write a number of bytes with a binary unit and three significant digits.

    Examples
    --------
    >>> format_bytes(301 * 2**20), format_bytes(900), format_bytes(1.5 * 2**40)
    ('301 MiB', '900 B', '1.5 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < _ROUNDS_TO_1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if abs(size) < _ROUNDS_TO_1000 else f"{size:,.0f} TiB"


def format_seconds(seconds: float) -> str:
    """Write a time with the unit that reads best.

    Examples
    --------
    >>> format_seconds(0.00118), format_seconds(2.5), format_seconds(4e-5)
    ('1.18 ms', '2.5 s', '40 us')
    """
    if seconds * 1e6 < _ROUNDS_TO_1000:
        return f"{seconds * 1e6:.3g} us"
    if seconds * 1e3 < _ROUNDS_TO_1000:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < _ROUNDS_TO_1000 else f"{seconds:,.0f} s"


def format_count(number: float) -> str:
    """Write a large count with a decimal suffix.

    Examples
    --------
    >>> format_count(812), format_count(65_536), format_count(4.29e9)
    ('812', '65.5 K', '4.29 G')
    """
    for suffix in ("", " K", " M", " G", " T"):
        if abs(number) < _ROUNDS_TO_1000:
            return f"{number:.3g}{suffix}"
        number /= 1000
    return f"{number:.3g} P"


_COUNTS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def parse_count(text: int | str) -> int:
    """Read a number of tokens or heads: an int, or text such as ``"64k"`` or ``"1m"``, in powers of 1024.

    Raises
    ------
    SpecError
        If the text is no positive whole number.

    Examples
    --------
    >>> parse_count("64k"), parse_count("1m"), parse_count("1_000_003")
    (65536, 1048576, 1000003)
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kmg]?)\s*", text.lower())
    number = float(match[1].replace("_", "")) * _COUNTS[match[2]] if match else 0.0
    if number <= 0 or number != int(number):
        raise SpecError(f"cannot read {text!r} as a count: write a whole number, or one with k, m or g, such as 64k")
    return int(number)


def format_factor(ratio: float) -> str:
    """Write how many times as long as another something takes: in per cent more up to twice, then as a factor.

    Examples
    --------
    >>> format_factor(1.18), format_factor(3.456)
    ('+18 %', 'x 3.46')
    """
    return f"+{100 * (ratio - 1):.0f} %" if ratio < 2 else f"x {ratio:.3g}"


def format_number(value: float) -> str:
    """Write three significant digits, or the whole number where it has more.

    Examples
    --------
    >>> format_number(0.12345), format_number(21.5), format_number(254475.3)
    ('0.123', '21.5', '254,475')
    """
    return f"{value:,.0f}" if value >= _ROUNDS_TO_1000 else f"{value:.3g}"
