"""Checksums of pages: XXH3, 64 bits, seed 0. They tell damage, and nothing of who made the page or where it belongs."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from pageferryd.core.layout import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable

    Buffer = bytes | bytearray | memoryview

CHECKSUM_SIZE = 8


def checksums_of(parts: Iterable[Buffer]) -> bytes:
    """Return the checksums of whole pages, which lie end to end in any number of parts: 8 bytes each, little-endian."""
    found: list[int] = []
    for part in parts:
        if len(part) == PAGE_SIZE:
            found.append(xxh3_64_intdigest(part))
            continue
        view = memoryview(part)
        found += [xxh3_64_intdigest(view[at : at + PAGE_SIZE]) for at in range(0, len(view), PAGE_SIZE)]
    return struct.pack(f"<{len(found)}Q", *found)


def damaged_pages(data: Buffer, offset: int, pages: int, checksums: Buffer, at: int) -> list[int]:
    """Return which pages do not match, by their index, ascending.

    They lie in `data` from `offset` on, and their checksums in `checksums` from `at` on.
    """
    view = memoryview(data)
    told = struct.unpack_from(f"<{pages}Q", checksums, at)
    return [
        index
        for index, start in enumerate(range(offset, offset + pages * PAGE_SIZE, PAGE_SIZE))
        if xxh3_64_intdigest(view[start : start + PAGE_SIZE]) != told[index]
    ]
