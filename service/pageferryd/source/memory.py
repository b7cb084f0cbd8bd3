"""The memory of a guest at its source: pages are collected from it, holes and zeroes as flags."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple, Self

from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2
from pageferryd.core.layout import PAGE_SIZE, Layout
from pageferryd.core.runs import POISONED, RAW, ZERO, Run
from pageferryd.linux.pidfd import PidFd
from pageferryd.source.readers import FileReader, ProcessReader, RegionReader

MOST_RUNS = 4096
"""Most runs that one call collects."""
LARGEST_READ = 256 << 10
MOST_READ = 4 << 20
"""Bytes that one call reads, unless its credit is more: pages of zeroes cost no credit, but time."""
SMALL = 16
"""So few pages are read without looking for holes first."""

_ZEROES = bytes(LARGEST_READ)
_ZERO_PAGE = bytes(PAGE_SIZE)
_PAGE_WORDS = PAGE_SIZE // 8


class Collected(NamedTuple):
    """Pages that were collected: their runs in order, the bytes of the raw ones end to end, and where to go on.

    `next_page` is the first page of the asked run that was not collected: one past its last when all were.
    """

    runs: list[Run]
    data: list[bytes | memoryview]
    next_page: int


class _Region(NamedTuple):
    reader: RegionReader
    base: int
    """Where the region begins in its reader."""
    sparse: bool
    """Whether holes can be looked up."""


class SourceMemory:
    """All regions of one guest, open for reading. Used by one thread at a time."""

    def __init__(self, layout: Layout, process: PidFd | None, kept: Mapping[str, int]) -> None:
        """Start without readers: use `open`."""
        self.layout = layout
        self._process = process
        self._kept = dict(kept)
        self.files: dict[str, int] = {}
        """Descriptors of the memory that outlives its VMM, by names that `open` knows again."""
        self._regions: list[_Region] = []
        self._readers: dict[tuple[str, str | int], RegionReader] = {}

    @classmethod
    def open(
        cls,
        layout: Layout,
        locations: Sequence[memory_pb2.MemoryLocation],
        pid: int | None,
        kept: Mapping[str, int] | None = None,
    ) -> Self:
        """Open the memory of the VMM `pid`, None for one that has ended: one location a region.

        `kept` are descriptors that were `files` of an earlier sidecar's; they are taken over, and used instead of the
        VMM's.

        FerryError: MEMORY_UNREADABLE, PERMISSION_MISSING, VMM_GONE, MEMORY_NOT_ITS_OWN where a location is not the
        VMM's, or LAYOUT_MISMATCH where it does not hold as many bytes as its region.
        """
        if len(locations) != len(layout.regions):
            raise FerryError(
                Reason.LAYOUT_MISMATCH, f"{len(locations)} locations for {len(layout.regions)} regions of memory"
            )
        memory = cls(layout, PidFd(pid) if pid is not None else None, kept or {})
        try:
            for number, (location, region) in enumerate(zip(locations, layout.regions, strict=True)):
                memory._add(f"region{number}", location, region.size)
        except BaseException:
            memory.close()
            raise
        return memory

    def collect(self, first: int, pages: int, credit_bytes: int) -> Collected:
        """Collect pages from `first` on, in order, until all `pages` are, or something is used up.

        Raw pages cost credit; pages of zeroes and poisoned ones cost none. A call also ends early after MOST_RUNS runs
        or MOST_READ bytes. With credit for a page it always gets on. PageRangeError where the run is outside the guest;
        FerryError: VMM_GONE, MEMORY_UNREADABLE.
        """
        if pages == 1:
            return self._collect_one(first, credit_bytes)
        gathered = _Gathering(first, credit_bytes)
        for piece in self.layout.pieces(first, pages):
            region = self._regions[piece.region]
            if not gathered.take(region, self.layout.starts[piece.region], piece.first, piece.pages):
                break
        return Collected(gathered.runs, gathered.data, gathered.next_page)

    @property
    def vmm_exited(self) -> bool:
        """Whether the process that holds the memory has ended. A memfd or file of it is readable still."""
        return self._process is None or self._process.exited

    @property
    def outlives_vmm(self) -> bool:
        """Whether all of it can be read when the VMM has ended."""
        return all(isinstance(reader, FileReader) for reader in self._readers.values())

    def close(self) -> None:
        """Let everything go. Twice does nothing."""
        while self._readers:
            self._readers.popitem()[1].close()
        self.files.clear()
        while self._kept:
            os.close(self._kept.popitem()[1])
        if self._process is not None:
            self._process.close()

    def _collect_one(self, page: int, credit_bytes: int) -> Collected:
        self.layout.check(page, 1)
        index = bisect_right(self.layout.starts, page) - 1
        region = self._regions[index]
        try:
            content = _read_pages(
                region.reader, region.base + (page - self.layout.starts[index]) * PAGE_SIZE, PAGE_SIZE
            )
        except OSError:
            return Collected([Run(page, 1, POISONED)], [], page + 1)
        if content == _ZERO_PAGE:
            return Collected([Run(page, 1, ZERO)], [], page + 1)
        if credit_bytes < PAGE_SIZE:
            return Collected([], [], page)
        return Collected([Run(page, 1, RAW)], [content], page + 1)

    def _add(self, name: str, location: memory_pb2.MemoryLocation, size: int) -> None:
        match location.WhichOneof("location"):
            case "process":
                base = location.process.address
                reader = self._reader(("process", 0), lambda: ProcessReader(self._vmm()))
            case "memfd":
                base, number = location.memfd.offset, location.memfd.fd
                reader = self._reader(("memfd", number), self._file(name, lambda: FileReader.take(self._vmm(), number)))
            case "file":
                base, path = location.file.offset, location.file.path
                if not PurePath(path).is_absolute():
                    raise FerryError(Reason.INVALID_ARGUMENT, f"memory file {path!r}: its path must be absolute")
                reader = self._reader(("file", path), self._file(name, lambda: FileReader.open(self._vmm(), path)))
            case _:
                raise FerryError(Reason.INVALID_ARGUMENT, "a region of memory came without a location that is known")
        self._regions.append(_Region(reader, base, reader.check(base, size)))

    def _vmm(self) -> PidFd:
        if self._process is None:
            raise FerryError(Reason.VMM_GONE, "the VMM has ended, and the guest's memory was not kept")
        return self._process

    def _file(self, name: str, make: Callable[[], FileReader]) -> Callable[[], FileReader]:
        """Return what opens a file: as it was kept, or by asking the VMM."""

        def open_file() -> FileReader:
            fd = self._kept.pop(name, None)
            reader = FileReader(fd, f"the memory that was kept as {name}") if fd is not None else make()
            self.files[name] = reader.fileno()
            return reader

        return open_file

    def _reader(self, key: tuple[str, str | int], make: Callable[[], RegionReader]) -> RegionReader:
        """Return the one reader for all regions in the same place."""
        if key not in self._readers:
            self._readers[key] = make()
        return self._readers[key]


class _Gathering:
    """One call of `collect` under way."""

    def __init__(self, first: int, credit_bytes: int) -> None:
        self.runs: list[Run] = []
        self.data: list[bytes | memoryview] = []
        self.next_page = first
        self._credit = credit_bytes // PAGE_SIZE
        self._to_read = max(self._credit, MOST_READ // PAGE_SIZE)

    def take(self, region: _Region, region_start: int, first: int, pages: int) -> bool:
        """Collect a piece of a region; return False when it was not all, and the call is over."""
        origin = region.base - region_start * PAGE_SIZE
        end = region_start + first + pages
        if not region.sparse or pages <= SMALL:
            return self._take_data(region.reader, origin, end)
        while self.next_page < end:
            at = origin + self.next_page * PAGE_SIZE
            found = region.reader.extents(at, origin + end * PAGE_SIZE - at)
            for start, stop in found.data:
                if not self._take_hole((start - origin) // PAGE_SIZE):
                    return False
                if not self._take_data(region.reader, origin, (stop - origin) // PAGE_SIZE):
                    return False
            if not self._take_hole((found.end - origin) // PAGE_SIZE):
                return False
        return True

    def _take_hole(self, end: int) -> bool:
        return end == self.next_page or self._add(end - self.next_page, ZERO)

    def _take_data(self, reader: RegionReader, origin: int, end: int) -> bool:
        while self.next_page < end:
            pages = min(end - self.next_page, LARGEST_READ // PAGE_SIZE, self._credit, self._to_read)
            if pages <= 0:
                return False
            try:
                content = _read_pages(reader, origin + self.next_page * PAGE_SIZE, pages * PAGE_SIZE)
            except OSError:
                self._to_read -= 1
                if not self._add(1, POISONED):
                    return False
                continue
            self._to_read -= len(content) // PAGE_SIZE
            if not self._take_content(content):
                return False
        return True

    def _take_content(self, content: bytes) -> bool:
        """Part pages of zeroes from others."""
        words = memoryview(content).cast("Q")[::_PAGE_WORDS].tolist()
        if 0 not in words:
            return self._add(len(words), RAW, content)
        if not any(words) and content == (_ZEROES if len(content) == LARGEST_READ else _ZEROES[: len(content)]):
            return self._add(len(words), ZERO)
        view = memoryview(content)
        start, count = 0, len(words)
        while start < count:
            zero = _is_zero(content, words, start)
            stop = start + 1
            while stop < count and _is_zero(content, words, stop) == zero:
                stop += 1
            part = None if zero else view[start * PAGE_SIZE : stop * PAGE_SIZE]
            if not self._add(stop - start, ZERO if zero else RAW, part):
                return False
            start = stop
        return True

    def _add(self, pages: int, kind: int, content: bytes | memoryview | None = None) -> bool:
        """Add pages to the runs; return False where that needs one run too many."""
        last = self.runs[-1] if self.runs else None
        if last is not None and last.kind == kind:
            self.runs[-1] = Run(last.first, last.pages + pages, kind)
        elif len(self.runs) == MOST_RUNS:
            return False
        else:
            self.runs.append(Run(self.next_page, pages, kind))
        self.next_page += pages
        if content is not None:
            self._credit -= pages
            self.data.append(content)
        return True


def _is_zero(content: bytes, words: list[int], page: int) -> bool:
    return not words[page] and content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] == _ZERO_PAGE


def _read_pages(reader: RegionReader, at: int, length: int) -> bytes:
    """Return the first whole pages of the range, at least one. OSError where the first cannot be read."""
    content = reader.read(at, length)
    while len(content) < PAGE_SIZE:
        content += reader.read(at + len(content), PAGE_SIZE - len(content))
    excess = len(content) % PAGE_SIZE
    return content[:-excess] if excess else content
