"""Addresses of Python's own buffers."""

from __future__ import annotations

import ctypes

import pytest

from pageferryd.linux.buffers import address_of, address_of_view, uninitialised_bytes


def test_the_address_of_bytes_is_where_they_are() -> None:
    content = b"0123456789" * 100
    assert ctypes.string_at(address_of(content), 10) == b"0123456789"
    assert ctypes.string_at(address_of(content, 995), 5) == b"56789"


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_the_address_of_a_view_is_that_of_its_first_byte(kind: type) -> None:
    view = memoryview(kind(b"0123456789"))[3:7]
    assert ctypes.string_at(address_of_view(view), len(view)) == b"3456"


def test_a_view_that_is_not_contiguous_has_no_address() -> None:
    with pytest.raises(BufferError):
        address_of_view(memoryview(b"0123456789")[::2])


def test_a_released_address_leaves_its_object_free() -> None:
    content = bytearray(b"0123456789")
    with memoryview(content) as view:
        address_of_view(view)
    content.extend(b"more")
    assert len(content) == 14


@pytest.mark.parametrize("wrong", [bytearray(b"x"), memoryview(b"x"), "x"])
def test_only_bytes_have_a_lasting_address(wrong: object) -> None:
    with pytest.raises(TypeError):
        address_of(wrong)


def test_new_bytes_can_be_filled_at_their_address() -> None:
    made = uninitialised_bytes(8192)
    assert len(made) == 8192
    ctypes.memset(address_of(made), 7, len(made))
    assert made == bytes([7]) * 8192
