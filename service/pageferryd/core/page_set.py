"""A set of page numbers that stays small: bitmaps in chunks, made when first touched and dropped when full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitarray import bitarray

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_PAGES = 1 << 15


class PageSet:
    """A set of page numbers below `page_count`.

    A chunk of 32,768 pages (128 MiB of guest) costs 4 KiB while it is partly filled, and nothing while it is empty or
    full, so a sparse layout of a terabyte costs no more than what was touched of it.
    """

    __slots__ = ("_chunks", "_full", "count", "page_count")

    def __init__(self, page_count: int) -> None:
        self.page_count = page_count
        self.count = 0
        chunks = -(-page_count // CHUNK_PAGES)
        # A chunk without a bitmap is empty, or full when its bit in _full is set.
        self._chunks: list[bitarray | None] = [None] * chunks
        self._full = bitarray(chunks)

    def __len__(self) -> int:
        return self.count

    def __contains__(self, page: int) -> bool:
        index = page >> 15
        chunk = self._chunks[index]
        return bool(self._full[index] if chunk is None else chunk[page & (CHUNK_PAGES - 1)])

    def add(self, first: int, count: int) -> int:
        """Add a run; return how many of its pages were not in the set."""
        return self._assign(first, count, 1)

    def remove(self, first: int, count: int) -> int:
        """Remove a run; return how many of its pages were in the set."""
        return self._assign(first, count, 0)

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
        while (start := self.next_absent(first, stop)) < stop:
            first = self.next_present(start, stop)
            yield start, first - start

    def _size(self, index: int) -> int:
        return min(CHUNK_PAGES, self.page_count - index * CHUNK_PAGES)

    def _assign(self, first: int, count: int, value: int) -> int:
        changed = 0
        stop = first + count
        while first < stop:
            index, offset = divmod(first, CHUNK_PAGES)
            take = min(stop - first, CHUNK_PAGES - offset)
            changed += self._assign_chunk(index, offset, take, value)
            first += take
        self.count += changed if value else -changed
        return changed

    def _assign_chunk(self, index: int, offset: int, count: int, value: int) -> int:
        chunk = self._chunks[index]
        size = self._size(index)
        if chunk is None:
            if self._full[index] == value:
                return 0
            if count == size:
                self._full[index] = value
                return count
            chunk = bitarray(size)
            chunk.setall(not value)
            self._chunks[index] = chunk
            self._full[index] = 0
        if count == 1:
            if chunk[offset] == value:
                return 0
            chunk[offset] = value
            changed = 1
        else:
            changed = count - chunk.count(value, offset, offset + count)
            chunk[offset : offset + count] = value
        # Looking for the last opposite bit is cheap only where one is near: start behind the run, then look everywhere.
        if changed and self._uniform(chunk, value, offset, size):
            self._chunks[index] = None
            self._full[index] = value
        return changed

    @staticmethod
    def _uniform(chunk: bitarray, value: int, offset: int, size: int) -> bool:
        other = not value
        return chunk.find(other, offset, size) < 0 and chunk.find(other, 0, offset) < 0

    def _find(self, first: int, stop: int, value: int) -> int:
        index = first >> 15
        while first < stop:
            chunk = self._chunks[index]
            if chunk is not None:
                base = index * CHUNK_PAGES
                found = chunk.find(value, first - base, min(stop - base, len(chunk)))
                if found >= 0:
                    return base + found
                index += 1
            elif self._full[index] == value:
                return first
            else:
                index = self._next_other_chunk(index + 1, value)
            first = index * CHUNK_PAGES
        return stop

    def _next_other_chunk(self, index: int, value: int) -> int:
        """Skip chunks that hold nothing of what is looked for, from `index` on."""
        if value == 0:
            found = self._full.find(0, index)
            return found if found >= 0 else len(self._chunks)
        while index < len(self._chunks) and self._chunks[index] is None and not self._full[index]:
            index += 1
        return index
