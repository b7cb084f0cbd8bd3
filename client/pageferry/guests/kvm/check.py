"""Fill the guest's memory for its start, and check every byte of it while the vCPU stands still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from pageferry.guests.control import LISTED_FINDINGS, Verification
from pageferry.guests.kvm.layout import Layout
from pageferry.guests.kvm.program import HOLE_RUN, PAGE_SIZE, QWORDS, Progress, Work, is_hole

_CHUNK_PAGES: Final = 256
_ZEROES: Final = bytes(PAGE_SIZE)


class Readable(Protocol):
    """Guest memory that can be read: bytes from an offset on."""

    def read(self, offset: int, length: int) -> bytes:
        """Return a copy of the range."""


class Writable(Protocol):
    """Guest memory that can be written to."""

    def write(self, offset: int, data: bytes) -> None:
        """Copy `data` to `offset`."""


def fill(memory: Writable, layout: Layout, work: Work) -> None:
    """Write the program, the page tables and version 0 of the data; holes stay untouched."""
    memory.write(layout.entry, layout.fixed_part())
    for first in range(0, work.pages, HOLE_RUN):
        if not is_hole(first, 0):
            pages = range(first, min(first + HOLE_RUN, work.pages))
            memory.write(work.data_address + first * PAGE_SIZE, b"".join(work.contents(page, 0) for page in pages))


def check(memory: Readable, layout: Layout, work: Work, progress: Progress) -> Verification:
    """Compare every page with what the program must have left there at `progress`. It takes seconds a GiB."""
    bad = 0
    first_bad: list[str] = []
    expected = _expected_pages(layout, work, progress)
    for start in range(0, layout.pages, _CHUNK_PAGES):
        length = min(_CHUNK_PAGES, layout.pages - start) * PAGE_SIZE
        chunk = memory.read(start * PAGE_SIZE, length)
        for offset in range(0, length, PAGE_SIZE):
            found, wanted = chunk[offset : offset + PAGE_SIZE], next(expected)
            if found != wanted:
                bad += 1
                if len(first_bad) < LISTED_FINDINGS:
                    first_bad.append(_describe(start + offset // PAGE_SIZE, found, wanted))
    return Verification(layout.pages, bad, first_bad)


def _expected_pages(layout: Layout, work: Work, progress: Progress) -> Iterator[bytes]:
    fixed = bytes(layout.entry) + layout.fixed_part()
    fixed = fixed.ljust(layout.data_address, b"\0")
    for address in range(0, len(fixed), PAGE_SIZE):
        yield fixed[address : address + PAGE_SIZE]
    yield from _expected_data(work, progress)
    for _ in range(layout.first_data_page + work.pages, layout.pages):
        yield _ZEROES


def _expected_data(work: Work, progress: Progress) -> Iterator[bytes]:
    passes, steps = divmod(progress.steps, work.pages)
    current = work.page_at(progress.steps)
    for page in range(work.pages):
        version = passes + (work.steps_before(page) < steps)
        contents = work.contents(page, version)
        if page == current:
            written = _written_bytes(work, current, progress)
            contents = work.contents(page, version + 1)[:written] + contents[written:]
        yield contents


def _written_bytes(work: Work, current: int, progress: Progress) -> int:
    """Return how many bytes of the current page are at the next version already."""
    written = progress.store_address - (work.data_address + current * PAGE_SIZE)
    return written if 0 <= written <= PAGE_SIZE else 0


def _describe(page: int, found: bytes, wanted: bytes) -> str:
    index = next(i for i in range(QWORDS) if found[8 * i : 8 * i + 8] != wanted[8 * i : 8 * i + 8])
    at = slice(8 * index, 8 * index + 8)
    return (
        f"page {page}: qword {index} is {int.from_bytes(found[at], 'little'):#x}, "
        f"not {int.from_bytes(wanted[at], 'little'):#x}"
    )
