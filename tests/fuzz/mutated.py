"""Bytes that are nearly right: valid examples that were cut, doubled, changed or joined, and pieces of any size."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

_NUMBERS = [0, 1, 7, 0x7F, 0x80, 0xFF, 0xFFF, 0x1000, 0xFFFF, 0x10001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40]
_NUMBERS += [(1 << 63) - 1, 1 << 63, (1 << 64) - 1]
_FORMS = ["<B", "<H", ">H", "<I", ">I", "<Q", ">Q"]
_HEAD = 160
"""Most of what gives a message its form is in so many first bytes; the rest is mostly contents."""
_WORDS = [
    b"",
    b"\0",
    b"\xff" * 9,
    b"{",
    b"}",
    b"[",
    b'"',
    b",",
    b" ",
    b"\n",
    b"\r\n",
    b"1e999",
    b"-1",
    b"null",
    b"[" * 3000,
]


@st.composite
def mutations(draw: st.DrawFn, valid_examples: Sequence[bytes], most: int = 4) -> bytes:
    """Draw one of the examples with up to `most` changes of any kind."""
    data = bytearray(draw(st.sampled_from(valid_examples)))
    for _ in range(draw(st.integers(0, most))):
        _change(draw, data, valid_examples)
    return bytes(data)


def anything(valid_examples: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Draw bytes that are nearly right, or any at all."""
    return st.one_of(mutations(valid_examples), mutations(valid_examples), st.binary(max_size=300))


def pieces(data: bytes) -> Iterator[bytes]:
    """Cut a stream as its first byte says, which is not part of it: whole, byte by byte, or at random."""
    how, rest = data[:1] or b"\0", data[1:]
    if how == b"\0":
        yield rest
        return
    sizes = random.Random(how[0])
    largest = 1 if how == b"\1" else sizes.choice([3, 20, 500, 20_000])
    at = 0
    while at < len(rest):
        # A page byte by byte says no more than its first bytes do.
        size = sizes.randint(1, largest if at < 2 * _HEAD else 4096)
        yield rest[at : at + size]
        at += size


def _change(draw: st.DrawFn, data: bytearray, examples: Sequence[bytes]) -> None:
    start = _place(draw, data)
    stop = min(len(data), start + draw(st.integers(0, 40)))
    piece = bytes(data[start:stop])
    kind = draw(st.sampled_from(["bit", "cut", "drop", "double", "insert", "word", "number", "join", "swap"]))
    if kind == "bit":
        data[start : start + 1] = bytes(one ^ 1 << draw(st.integers(0, 7)) for one in data[start : start + 1])
    elif kind == "cut":
        del data[start:]
    elif kind == "number":
        number = _number(draw)
        data[start : start + len(number)] = number
    elif kind == "swap":
        data[start:] = draw(st.sampled_from(examples))[start:]
    elif kind == "join":
        data += draw(st.sampled_from(examples))
    else:
        data[start:stop] = {
            "drop": b"",
            "double": piece * draw(st.sampled_from([2, 3, 50])),
            "insert": draw(st.binary(max_size=20)) + piece,
            "word": draw(st.sampled_from(_WORDS)),
        }[kind]


def _number(draw: st.DrawFn) -> bytes:
    form = draw(st.sampled_from(_FORMS))
    return struct.pack(form, draw(st.sampled_from(_NUMBERS)) % (1 << 8 * struct.calcsize(form)))


def _place(draw: st.DrawFn, data: bytearray) -> int:
    return draw(st.integers(0, min(len(data), _HEAD))) if draw(st.booleans()) else draw(st.integers(0, len(data)))
