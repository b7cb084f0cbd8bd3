"""Numbers as people write and read them."""

from __future__ import annotations

import pytest

from pageferry.cli import units


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 65536),
        ("512M", 512 << 20),
        ("512 MiB", 512 << 20),
        ("1.5g", 3 << 29),
        ("2T", 2 << 40),
        ("10MB", 10 << 20),
        (" 7B ", 7),
        (str(2**64 - 1), 2**64 - 1),
    ],
)
def test_a_size_is_understood(text, value):
    assert units.parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "M", "-1", "1e3", "12X", "1,5M", "0x10", str(2**64), "9999999999999T", "1M/s"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a size|is too large"):
        units.parse_bytes(text)


@pytest.mark.parametrize(("text", "value"), [("200M", 200 << 20), ("1GiB/s", 1 << 30), ("5 K/s", 5120), ("0", 0)])
def test_a_rate_is_understood(text, value):
    assert units.parse_rate(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("800", 800), ("800us", 800), ("1.5ms", 1500), ("2 s", 2_000_000), ("3µs", 3)]
)
def test_a_duration_is_understood(text, value):
    assert units.parse_microseconds(text) == value


@pytest.mark.parametrize("text", ["", "ms", "-1ms", "1h", "1.5", "1 m", f"{2**64}s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a duration|is too large"):
        units.parse_microseconds(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (512 << 20, "512.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_bytes_are_written(value, text):
    assert units.bytes_text(value) == text


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0, "0 us"),
        (85.4, "85 us"),
        (1_240, "1.24 ms"),
        (12_300, "12.3 ms"),
        (250_000, "250 ms"),
        (2_500_000, "2.50 s"),
        (90_000_000, "90.0 s"),
        (200_000_000, "3 min 20 s"),
    ],
)
def test_durations_are_written(microseconds, text):
    assert units.duration_text(microseconds) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"), [(0, 0, "0 %"), (0, 10, "0 %"), (9_999, 10_000, "99 %"), (10, 10, "100 %")]
)
def test_a_share_is_whole_only_when_it_is(part, whole, text):
    assert units.share_text(part, whole) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (13, "13th"), (21, "21st"), (112, "112th")],
)
def test_a_place_in_a_row_is_written(value, text):
    assert units.ordinal_text(value) == text
