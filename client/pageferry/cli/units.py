"""Numbers as people write and read them: bytes, rates, durations, counts."""

from __future__ import annotations

import re
from typing import Final

_PREFIXES: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_BYTES: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|µs|ms|s)", re.IGNORECASE)
_MICROSECONDS: Final = {"us": 1, "µs": 1, "ms": 1_000, "s": 1_000_000}
# What a field of 64 bits holds.
_MOST: Final = 2**64 - 1


def parse_bytes(text: str) -> int:
    """Return the bytes that `512M`, `1.5GiB`, `64 KiB` or a bare number mean; all prefixes are powers of 1024.

    Raises ValueError for anything else.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with K, M, G or T, as in 512M")
    value = int(float(match[1]) * 1024 ** _PREFIXES[match[2].lower()]) if match[2] or "." in match[1] else int(match[1])
    return _bounded(text, value)


def parse_rate(text: str) -> int:
    """Return the bytes a second that `200M`, `1GiB/s` or a bare number mean. Raises ValueError."""
    return parse_bytes(text.strip().removesuffix("/s"))


def parse_microseconds(text: str) -> int:
    """Return the microseconds that `800us`, `1.5ms`, `2s` or a bare number of microseconds mean. Raises ValueError."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return _bounded(text, int(text))
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write microseconds, or a number with us, ms or s, as in 1.5ms")
    return _bounded(text, int(float(match[1]) * _MICROSECONDS[match[2].lower()]))


def _bounded(text: str, value: int) -> int:
    if value > _MOST:
        raise ValueError(f"{text!r} is too large")
    return value


def bytes_text(value: float) -> str:
    """Return bytes with the prefix that leaves one to four digits before the point: `0 B`, `512.0 MiB`."""
    if value < 1024:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def rate_text(bytes_per_second: float) -> str:
    """Return a rate: `812.4 MiB/s`."""
    return f"{bytes_text(bytes_per_second)}/s"


def count_text(value: int) -> str:
    """Return a count with its thousands apart: `131,072`."""
    return f"{value:,}"


def ordinal_text(value: int) -> str:
    """Return a place in a row: `1st`, `2nd`, `3rd`, `11th`."""
    ending = "th" if value // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{count_text(value)}{ending}"


def duration_text(microseconds: float) -> str:
    """Return a duration with three digits or so: `85 us`, `1.24 ms`, `2.50 s`, `3 min 20 s`."""
    if microseconds < 1_000:
        return f"{microseconds:.0f} us"
    if microseconds < 1_000_000:
        return f"{_three_digits(microseconds / 1_000)} ms"
    seconds = microseconds / 1_000_000
    if seconds < 120:
        return f"{_three_digits(seconds)} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def share_text(part: int, whole: int) -> str:
    """Return a share in percent, and never 100 % before it is whole: `42 %`."""
    if not whole:
        return "0 %"
    return "100 %" if part >= whole else f"{part * 100 // whole} %"


def _three_digits(value: float) -> str:
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"
