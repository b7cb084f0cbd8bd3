"""The requests for pages: FetchPagesRequest and PushPagesRequest of proto/pageferry/v1/page.proto, by hand.

Both are columns of runs; a request to push grants bytes, too. What comes from a peer is checked here once.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.errors import MalformedPagesError
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.runs import read_short, read_varint, varint

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_FETCH_PAGES = 512
MAX_PUSH_RUNS = 256
MAX_CREDIT = 16 << 20

_ONE_PAGE = struct.Struct("<2sQ2sI")
_ONE_FETCH = (b"\x0a\x08", b"\x12\x04")


class Request(NamedTuple):
    """Runs of (first, pages), and the bytes granted for them; none are granted on the demand lane."""

    runs: list[tuple[int, int]]
    credit: int


def encode_request(runs: Sequence[tuple[int, int]], credit: int = 0) -> bytes:
    """Return the message that asks for the runs."""
    count = len(runs)
    if count == 1 and not credit:
        first, pages = runs[0]
        return _ONE_PAGE.pack(_ONE_FETCH[0], first, _ONE_FETCH[1], pages)
    parts = [
        b"\x0a",
        varint(8 * count),
        struct.pack(f"<{count}Q", *[first for first, _ in runs]),
        b"\x12",
        varint(4 * count),
        struct.pack(f"<{count}I", *[pages for _, pages in runs]),
    ]
    if credit:
        parts += [b"\x18", varint(credit)]
    return b"".join(parts)


def decode_fetch(message: bytes) -> Request:
    """Read a request of the demand lane. Raises MalformedPagesError."""
    if len(message) == _ONE_PAGE.size:
        before, first, between, pages = _ONE_PAGE.unpack(message)
        if (before, between) == _ONE_FETCH and pages <= MAX_FETCH_PAGES:
            return Request([(first, pages)], 0)
    request = _decode(message, MAX_FETCH_PAGES)
    pages = sum(pages for _, pages in request.runs)
    if pages > MAX_FETCH_PAGES:
        raise MalformedPagesError(f"a request asks for {pages} pages on the demand lane; {MAX_FETCH_PAGES} are allowed")
    return request


def decode_push(message: bytes) -> Request:
    """Read a request of the push lane. Raises MalformedPagesError."""
    request = _decode(message, MAX_PUSH_RUNS)
    if not PAGE_SIZE <= request.credit <= MAX_CREDIT:
        raise MalformedPagesError(
            f"a push request grants {request.credit} bytes; {PAGE_SIZE} to {MAX_CREDIT} are allowed"
        )
    return request


def _decode(message: bytes, max_runs: int) -> Request:
    columns: dict[int, bytes] = {}
    credit = at = 0
    end = len(message)
    try:
        while at < end:
            tag = message[at]
            if tag == 0x18:
                credit, at = read_varint(message, at + 1)
                continue
            value, at = read_short(message, at + 1)
            if tag in (0x0A, 0x12) and tag not in columns and at + value <= end:
                columns[tag] = message[at : at + value]
                at += value
            else:
                raise MalformedPagesError(f"a request for pages has a field of an unexpected form (tag {tag})")
    except IndexError:
        raise MalformedPagesError("a request for pages ends in the middle of a field") from None
    firsts, counts = columns.get(0x0A, b""), columns.get(0x12, b"")
    runs = len(firsts) // 8
    if not 0 < runs <= max_runs or len(firsts) != 8 * runs or len(counts) != 4 * runs:
        raise MalformedPagesError(f"a request for pages has {len(firsts)} and {len(counts)} bytes of columns")
    pairs = zip(struct.unpack(f"<{runs}Q", firsts), struct.unpack(f"<{runs}I", counts), strict=True)
    return Request(list(pairs), credit)
