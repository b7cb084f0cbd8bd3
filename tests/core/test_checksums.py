"""Checksums of pages: what they are, and that no flipped bit goes unseen."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferryd.core.checksums import CHECKSUM_SIZE, checksums_of, damaged_pages
from pageferryd.core.layout import PAGE_SIZE

pages = st.lists(st.integers(0, 255).map(lambda byte: bytes([byte]) * PAGE_SIZE), max_size=6)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize(
    ("page", "checksum"),
    [
        # Two hosts must agree on these, whatever releases they run.
        pytest.param(bytes(PAGE_SIZE), 0x93D76FE148C689BA, id="zeroes"),
        pytest.param(bytes(range(256)) * 16, 0xEB4B7C3707879151, id="every byte"),
    ],
)
def test_they_are_xxh3_of_each_page(page: bytes, checksum: int) -> None:
    assert checksums_of([page]) == struct.pack("<Q", checksum)


@given(pages, st.integers(0, 6))
def test_how_the_pages_are_parted_makes_no_difference(data: list[bytes], at: int) -> None:
    whole = b"".join(data)
    parted = [whole[: at * PAGE_SIZE], memoryview(whole)[at * PAGE_SIZE :]]
    assert checksums_of(parted) == checksums_of(data) == b"".join(checksums_of([page]) for page in data)
    assert len(checksums_of(data)) == CHECKSUM_SIZE * len(data)


@given(pages, st.binary(max_size=9))
def test_pages_that_match_are_not_damaged(data: list[bytes], before: bytes) -> None:
    message = before + b"".join(data) + checksums_of(data)
    at = len(before) + PAGE_SIZE * len(data)
    assert damaged_pages(message, len(before), len(data), message, at) == []


@given(st.data())
def test_each_page_with_a_flipped_bit_is_named(data: st.DataObject) -> None:
    given_pages = data.draw(pages.filter(bool))
    column = checksums_of(given_pages)
    hit = data.draw(st.sets(st.integers(0, len(given_pages) - 1)))
    for page in hit:
        given_pages[page] = flipped(given_pages[page], data.draw(st.integers(0, 8 * PAGE_SIZE - 1)))
    assert damaged_pages(b"".join(given_pages), 0, len(given_pages), column, 0) == sorted(hit)


@given(pages.filter(bool), st.data())
def test_a_flipped_bit_of_a_checksum_shows_as_a_damaged_page(given_pages: list[bytes], data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, 64 * len(given_pages) - 1))
    column = flipped(checksums_of(given_pages), bit)
    assert damaged_pages(b"".join(given_pages), 0, len(given_pages), column, 0) == [bit // 64]
