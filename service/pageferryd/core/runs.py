"""Runs of pages, and the message that carries them.

The message is FetchPagesResponse and PushPagesResponse of proto/pageferry/v1/page.proto. It is written and read by hand
because a generated class copies the pages once more, which costs a large part of the push rate.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.checksums import CHECKSUM_SIZE
from pageferryd.core.errors import MalformedPagesError
from pageferryd.core.layout import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

RAW = 1
ZERO = 2
POISONED = 3
PRIVATE = 4
PRIVATE_ZERO = 5
OPAQUE = 6
_KINDS = frozenset({RAW, ZERO, POISONED, PRIVATE, PRIVATE_ZERO, OPAQUE})
WITH_BYTES = frozenset({RAW, PRIVATE})
"""Kinds of which each page comes with its 4096 bytes."""

MAX_RUNS = 16384
"""Most runs in one message."""

_TAG_FIRST = b"\x0a"
_TAG_COUNT = b"\x12"
_TAG_KINDS = b"\x1a"
_TAG_DATA = b"\x22"
_LAST = b"\x28\x01"
_TAG_CHECKSUMS = b"\x32"
_TAGS = frozenset({0x0A, 0x12, 0x1A, 0x22, 0x28, 0x32})
_LAST_FIELD = 6
_MAX_VARINT = 2**64 - 1
_MAX_SHORT = 2**32 - 1
_MAX_SHORT_BYTES = 5
_NUMBER, _BYTES = 0, 2


class Run(NamedTuple):
    """Pages of one kind: first page number, length in pages, PageKind."""

    first: int
    pages: int
    kind: int


class Batch(NamedTuple):
    """A decoded message: its runs, and the bytes of the raw ones end to end inside `message` from `offset` on.

    `checksums` is where the checksums of the raw pages begin, in the same order; 0 where there are none.
    """

    runs: list[Run]
    message: bytes
    offset: int
    last: bool
    checksums: int = 0


# A single raw page, as nearly every answer on the demand lane is: all of its head but the page number is constant.
_BEFORE_FIRST = b"\x0a\x08"
_AFTER_FIRST = b"\x12\x04" + struct.pack("<I", 1) + b"\x1a\x01" + bytes((RAW,)) + b"\x22\x80\x20"
_PAGE_FIRST = struct.Struct(f"<2sQ{len(_AFTER_FIRST)}s")
_PAGE_HEAD_SIZE = _PAGE_FIRST.size
_PAGE_MESSAGE = _PAGE_HEAD_SIZE + PAGE_SIZE
# The same with its checksum, which is all that follows the page.
_BEFORE_CHECKSUM = _TAG_CHECKSUMS + bytes((CHECKSUM_SIZE,))
_CHECKSUM_AT = _PAGE_MESSAGE + len(_BEFORE_CHECKSUM)
_CHECKED_MESSAGE = _CHECKSUM_AT + CHECKSUM_SIZE


def raw_pages(runs: Sequence[Run]) -> int:
    """Return how many pages of the runs are raw."""
    pages = 0
    for run in runs:
        if run.kind in WITH_BYTES:
            pages += run.pages
    return pages


def varint(value: int) -> bytes:
    """Return a number as protobuf's base-128 varint."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(
    runs: Sequence[Run], data: Sequence[bytes | memoryview], *, last: bool = False, checksums: bytes = b""
) -> bytes:
    """Return the message; `data` are the bytes of the raw runs in order, in any number of parts.

    `checksums` are those of the raw pages, as `checksums_of` gives them, or nothing.
    """
    return b"".join(encode_parts(runs, data, last=last, checksums=checksums))


def encode_parts(
    runs: Sequence[Run], data: Sequence[bytes | memoryview], *, last: bool = False, checksums: bytes = b""
) -> list[bytes | memoryview]:
    """Return the message in parts, the pages among them as they were given."""
    count = len(runs)
    if count == len(data) == 1 and runs[0][1:] == (1, RAW) and not last:
        head = _PAGE_FIRST.pack(_BEFORE_FIRST, runs[0].first, _AFTER_FIRST)
        return [head, data[0], _BEFORE_CHECKSUM, checksums] if checksums else [head, data[0]]
    size = sum(map(len, data))
    parts: list[bytes | memoryview] = []
    if count:
        parts = [
            _TAG_FIRST,
            varint(8 * count),
            struct.pack(f"<{count}Q", *[run.first for run in runs]),
            _TAG_COUNT,
            varint(4 * count),
            struct.pack(f"<{count}I", *[run.pages for run in runs]),
            _TAG_KINDS,
            varint(count),
            bytes([run.kind for run in runs]),
        ]
    if size:
        parts += [_TAG_DATA, varint(size), *data]
    if last:
        parts.append(_LAST)
    if checksums:
        parts += [_TAG_CHECKSUMS, varint(len(checksums)), checksums]
    return parts


def read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the varint at an offset, and the offset behind it. IndexError where the message ends in it."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 and value <= _MAX_VARINT:
            return value, at
        shift += 7
        if shift > 63:
            raise MalformedPagesError("a message of pages has a number that cannot be")


def read_short(message: bytes, at: int) -> tuple[int, int]:
    """Return the tag or length at an offset, and the offset behind it: 32 bits in at most 5 bytes."""
    value, behind = read_varint(message, at)
    if value > _MAX_SHORT or behind - at > _MAX_SHORT_BYTES:
        raise MalformedPagesError("a message of pages has a tag or a length that cannot be")
    return value, behind


def _fields(message: bytes) -> dict[int, tuple[int, int]]:
    """Return tag → (start, stop) of the length-delimited fields, and (value, value) of the varints."""
    found: dict[int, tuple[int, int]] = {}
    at, end = 0, len(message)
    while at < end:
        tag, at = read_short(message, at)
        value, at = (read_short if tag & 7 == _BYTES else read_varint)(message, at)
        form = tag & 7
        if form not in (_NUMBER, _BYTES) or tag < 8 or (tag not in _TAGS and tag >> 3 <= _LAST_FIELD):
            raise MalformedPagesError(f"a message of pages has a field of an unexpected form (tag {tag})")
        if tag in found:
            raise MalformedPagesError(f"a message of pages has the same field twice (tag {tag})")
        if form == _NUMBER:
            found[tag] = (value, value)
        else:
            found[tag] = (at, at + value)
            at += value
    if at != end:
        raise MalformedPagesError("a message of pages ends in the middle of a field")
    return found


def decode(message: bytes, *, checksums: bool = False) -> Batch:
    """Read a message; raise MalformedPagesError where its columns or its bytes do not agree.

    With `checksums` there must be one a raw page, and none without: two ends that do not agree on whether pages are
    checked would lose the checks in silence.
    """
    if len(message) == (_CHECKED_MESSAGE if checksums else _PAGE_MESSAGE):
        before, first, after = _PAGE_FIRST.unpack_from(message)
        if before == _BEFORE_FIRST and after == _AFTER_FIRST:
            if not checksums:
                return Batch([Run(first, 1, RAW)], message, _PAGE_HEAD_SIZE, last=False)
            if message[_PAGE_MESSAGE:_CHECKSUM_AT] == _BEFORE_CHECKSUM:
                return Batch([Run(first, 1, RAW)], message, _PAGE_HEAD_SIZE, last=False, checksums=_CHECKSUM_AT)
    try:
        fields = _fields(message)
    except IndexError:
        raise MalformedPagesError("a message of pages ends in the middle of a field") from None
    kinds_at, kinds_end = fields.get(0x1A, (0, 0))
    count = kinds_end - kinds_at
    first_at, first_end = fields.get(0x0A, (0, 0))
    count_at, count_end = fields.get(0x12, (0, 0))
    if count > MAX_RUNS or first_end - first_at != 8 * count or count_end - count_at != 4 * count:
        raise MalformedPagesError("a message of pages has columns of different lengths")
    firsts = struct.unpack_from(f"<{count}Q", message, first_at)
    counts = struct.unpack_from(f"<{count}I", message, count_at)
    runs = list(map(Run, firsts, counts, message[kinds_at:kinds_end]))
    data_at, data_end = fields.get(0x22, (0, 0))
    raw = _check(runs, data_end - data_at)
    checksums_at, checksums_end = fields.get(0x32, (0, 0))
    told = checksums_end - checksums_at
    if told != (CHECKSUM_SIZE * raw if checksums else 0):
        asked = "must carry a checksum each" if checksums else "were to carry no checksums"
        raise MalformedPagesError(f"{raw} raw pages that {asked} came with {told} bytes of them")
    return Batch(runs, message, data_at, bool(fields.get(0x28, (0, 0))[0]), checksums_at if told else 0)


def _check(runs: list[Run], size: int) -> int:
    """Return how many pages of the runs are raw; raise MalformedPagesError unless `size` bytes are what these have."""
    raw = 0
    for run in runs:
        if run.kind not in _KINDS or not run.pages:
            raise MalformedPagesError(f"a run of pages at {run.first} has kind {run.kind} and length {run.pages}")
        if run.kind in WITH_BYTES:
            raw += run.pages
    if raw * PAGE_SIZE != size:
        raise MalformedPagesError(f"{raw} raw pages came with {size} bytes instead of {raw * PAGE_SIZE}")
    return raw
