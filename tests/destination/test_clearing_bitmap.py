"""The userfault bitmap: the pager clears exactly the bits of its pages, in memory that it does not trust."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import FerryError, Reason
from pageferry.vmm.bitmap import UserfaultBitmap as VmmBitmap
from pageferryd.destination import userfault_bitmap
from pageferryd.destination.userfault_bitmap import UserfaultBitmap, bitmap_bytes

PAGES = 5000


def made(size: int, flags: int = os.MFD_ALLOW_SEALING) -> int:
    fd = os.memfd_create("bits", flags)
    os.ftruncate(fd, size)
    return fd


class Shared:
    """A bitmap of PAGES pages with all bits set, and the VMM's view of it."""

    def __init__(self) -> None:
        size = bitmap_bytes(PAGES)
        fd = made(size)
        self.view = mmap.mmap(fd, size)
        self.fill()
        self.bitmap = UserfaultBitmap(fd, PAGES)

    def fill(self) -> None:
        self.view[:] = b"\xff" * len(self.view)

    @property
    def clear_pages(self) -> set[int]:
        value = int.from_bytes(self.view, "little")
        return {page for page in range(8 * len(self.view)) if not value >> page & 1}


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    one = Shared()
    yield one
    one.bitmap.close()


@given(first=st.integers(0, PAGES - 1), pages=st.integers(1, PAGES))
def test_exactly_the_bits_of_a_run_are_cleared(shared: Shared, first: int, pages: int) -> None:
    pages = min(pages, PAGES - first)
    shared.fill()
    shared.bitmap.clear(first, pages)
    assert shared.clear_pages == set(range(first, first + pages))


def test_bits_are_in_the_order_that_the_vmm_reads_them() -> None:
    vmm = VmmBitmap(100)
    bitmap = UserfaultBitmap(os.dup(vmm.memfd), 100)
    bitmap.clear(64, 3)
    assert [page for page in range(100) if not vmm.is_set(page)] == [64, 65, 66]
    assert not bitmap.is_set(65)
    assert bitmap.is_set(67)
    bitmap.close()
    vmm.close()


def test_what_the_vmm_sets_again_is_seen_and_cleared_again(shared: Shared) -> None:
    shared.bitmap.clear(7, 1)
    shared.fill()
    assert shared.bitmap.is_set(7)
    shared.bitmap.clear(7, 1)
    assert not shared.bitmap.is_set(7)


@pytest.mark.parametrize(("first", "pages"), [(-1, 1), (0, PAGES + 1), (PAGES, 1), (1 << 60, 1), (0, -1)])
def test_no_bit_outside_is_touched(shared: Shared, first: int, pages: int) -> None:
    with pytest.raises(IndexError):
        shared.bitmap.clear(first, pages)


def test_a_closed_bitmap_is_not_touched() -> None:
    bitmap = UserfaultBitmap(made(8), 64)
    bitmap.close()
    bitmap.close()
    for use in (lambda: bitmap.clear(0, 1), lambda: bitmap.is_set(0)):
        with pytest.raises(IndexError):
            use()


# What a VMM may hand over


def refused(fd: int, pages: int = PAGES) -> Reason:
    with pytest.raises(FerryError) as refusal:
        UserfaultBitmap(fd, pages)
    # It is still the caller's.
    os.close(fd)
    return refusal.value.reason


@pytest.mark.parametrize(("pages", "size"), [(1, 8), (64, 8), (65, 16), (5000, 632), (1 << 28, 1 << 25)])
def test_a_bitmap_has_whole_words(pages: int, size: int) -> None:
    assert bitmap_bytes(pages) == size


def test_one_that_is_rounded_up_to_whole_pages_will_do() -> None:
    UserfaultBitmap(made(4096), PAGES).close()


@pytest.mark.parametrize("size", [0, 8, bitmap_bytes(PAGES) - 1, bitmap_bytes(PAGES) + 4096, 1 << 30])
def test_one_of_another_size_is_refused(size: int) -> None:
    assert refused(made(size)) is Reason.HANDOFF_REGIONS


def test_one_that_could_be_cut_short_is_refused() -> None:
    assert refused(made(4096, flags=0)) is Reason.HANDOFF_REGIONS


def test_one_that_was_taken_cannot_be_cut_short_and_holes_in_it_are_zeroes() -> None:
    fd = made(4096)
    view = mmap.mmap(fd, 4096)
    bitmap = UserfaultBitmap(os.dup(fd), PAGES)
    for size in (0, 4095):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    view.madvise(9)  # MADV_REMOVE
    bitmap.clear(0, PAGES)
    assert not bitmap.is_set(0)
    bitmap.close()
    os.close(fd)


def test_one_that_may_not_be_written_is_refused() -> None:
    sealed = made(4096)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert refused(sealed) is Reason.HANDOFF_NO_FD
    fd = made(4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert refused(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)) is Reason.HANDOFF_NO_FD
    os.close(fd)


def test_what_is_no_memfd_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bits"
    file.write_bytes(bytes(4096))
    others = [os.open(file, os.O_RDWR), os.eventfd(0), os.open("/dev/zero", os.O_RDWR)]
    assert {refused(fd) for fd in others} == {Reason.HANDOFF_NO_FD}


@pytest.mark.hugetlb
@pytest.mark.root
@pytest.mark.usefixtures("huge_pages")
def test_one_of_huge_pages_is_refused_since_a_hole_in_it_may_not_be_filled() -> None:
    fd = made(2 << 20, os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    assert refused(fd, 16 << 20) is Reason.HANDOFF_NO_FD


def test_on_a_machine_without_atomic_operations_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise FerryError(Reason.USERFAULTFD_UNAVAILABLE, "no such operations")

    monkeypatch.setattr(userfault_bitmap, "atomic_and", none)
    assert refused(made(4096)) is Reason.USERFAULTFD_UNAVAILABLE
