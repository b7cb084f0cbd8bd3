"""A set of page numbers that stays small: bitmaps in chunks, made when first touched and dropped when full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitarray import bitarray

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_BITS = 15
_OFFSET = (1 << _CHUNK_BITS) - 1
CHUNK_PAGES = 1 << _CHUNK_BITS


class PageSet:
    """A set of page numbers below `page_count`.

    A chunk of 32,768 pages (128 MiB of guest) costs 4 KiB while it is partly filled, and nothing while it is empty or
    full, so a sparse layout of a terabyte costs no more than what was touched of it.
    """

    __slots__ = ("_chunks", "_full", "_some", "count", "page_count")

    def __init__(self, page_count: int) -> None:
        self.page_count = page_count
        self.count = 0
        chunks = -(-page_count // CHUNK_PAGES)
        # Only chunks that are partly filled have a bitmap; the others are told by a bit.
        self._chunks: dict[int, bitarray] = {}
        self._full = bitarray(chunks)
        self._some = bitarray(chunks)

    def __len__(self) -> int:
        return self.count

    def __contains__(self, page: int) -> bool:
        index = page >> _CHUNK_BITS
        chunk = self._chunks.get(index)
        return bool(self._full[index] if chunk is None else chunk[page & _OFFSET])

    def add(self, first: int, count: int) -> int:
        """Add a run; return how many of its pages were not in the set."""
        changed = self._assign(first, count, 1)
        self.count += changed
        return changed

    def remove(self, first: int, count: int) -> int:
        """Remove a run; return how many of its pages were in the set."""
        changed = self._assign(first, count, 0)
        self.count -= changed
        return changed

    def holds_all(self, first: int, count: int) -> bool:
        """Say whether the whole run is in the set."""
        return self.next_absent(first, first + count) == first + count

    def next_absent(self, first: int, stop: int) -> int:
        """Return the first page of [first, stop) that is not in the set, or `stop`."""
        return self._find(first, stop, 0)

    def next_present(self, first: int, stop: int) -> int:
        """Return the first page of [first, stop) that is in the set, or `stop`."""
        return self._find(first, stop, 1)

    def absent_runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield the runs of [first, first + count) that are not in the set, as (first, count)."""
        stop = first + count
        while (start := self._find(first, stop, 0)) < stop:
            first = self._find(start, stop, 1)
            yield start, first - start

    def _assign(self, first: int, count: int, value: int) -> int:
        offset = first & _OFFSET
        if offset + count <= CHUNK_PAGES:
            return self._assign_chunk(first >> _CHUNK_BITS, offset, count, value)
        changed = 0
        stop = first + count
        while first < stop:
            offset = first & _OFFSET
            take = min(stop - first, CHUNK_PAGES - offset)
            changed += self._assign_chunk(first >> _CHUNK_BITS, offset, take, value)
            first += take
        return changed

    def _assign_chunk(self, index: int, offset: int, count: int, value: int) -> int:
        chunk = self._chunks.get(index)
        if chunk is None:
            if self._full[index] == value:
                return 0
            chunk = self._open(index)
        if count == 1:
            if chunk[offset] == value:
                return 0
            chunk[offset] = value
            changed = 1
        else:
            changed = count - chunk.count(value, offset, offset + count)
            chunk[offset : offset + count] = value
        # An opposite bit is mostly near: right behind the run, else before it.
        other = not value
        if changed and chunk.find(other, offset) < 0 and chunk.find(other, 0, offset) < 0:
            del self._chunks[index]
            self._full[index] = self._some[index] = value
        return changed

    def _open(self, index: int) -> bitarray:
        """Give an empty or a full chunk its bitmap."""
        chunk = bitarray(min(CHUNK_PAGES, self.page_count - index * CHUNK_PAGES))
        chunk.setall(self._full[index])
        self._chunks[index] = chunk
        self._full[index], self._some[index] = 0, 1
        return chunk

    def _find(self, first: int, stop: int, value: int) -> int:
        while first < stop:
            index = first >> _CHUNK_BITS
            base = index << _CHUNK_BITS
            chunk = self._chunks.get(index)
            if chunk is not None:
                found = chunk.find(value, first - base, stop - base)
                if found >= 0:
                    return base + found
                first = base + CHUNK_PAGES
                continue
            if self._full[index] == value:
                return first
            index = self._some.find(1, index + 1) if value else self._full.find(0, index + 1)
            if index < 0:
                return stop
            first = index << _CHUNK_BITS
        return stop
