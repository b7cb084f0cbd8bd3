"""The bitmap of missing pages: its bits as the pager sees them, and the runs that the VMM finds."""

from __future__ import annotations

import mmap
import os
import random

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.vmm import UserfaultBitmap


def clear(bitmap: UserfaultBitmap, *pages: int) -> None:
    """Clear bits as a pager does, through a mapping of its own."""
    with mmap.mmap(bitmap.memfd, bitmap.size) as shared:
        for page in pages:
            shared[page // 8] &= ~(1 << page % 8) & 0xFF


@pytest.mark.parametrize(("pages", "size"), [(1, 8), (64, 8), (65, 16), (1024, 128)])
def test_every_page_is_missing_at_first_and_the_file_has_whole_words(pages: int, size: int) -> None:
    bitmap = UserfaultBitmap(pages)

    assert os.fstat(bitmap.memfd).st_size == size
    assert int.from_bytes(os.pread(bitmap.memfd, size, 0), "little") == (1 << pages) - 1
    assert all(bitmap.is_set(page) for page in range(pages))
    bitmap.close()
    bitmap.close()


def test_a_bit_that_the_pager_clears_is_seen() -> None:
    bitmap = UserfaultBitmap(100)

    clear(bitmap, 0, 63, 64, 99)

    assert [page for page in range(100) if not bitmap.is_set(page)] == [0, 63, 64, 99]
    bitmap.set_all()
    assert bitmap.is_set(99)
    bitmap.close()


def test_runs_are_what_a_look_at_each_page_gives() -> None:
    rng = random.Random(3)
    bitmap = UserfaultBitmap(200)
    clear(bitmap, *(page for page in range(200) if rng.random() < 0.7))
    missing = [page for page in range(200) if bitmap.is_set(page)]

    for first, end in ((0, 200), (3, 77), (64, 128), (199, 200)):
        assert [page for run in bitmap.set_runs(first, end) for page in range(*run)] == [
            page for page in missing if first <= page < end
        ]
        for page in range(first, end):
            low, high = bitmap.clear_run_around(page, first, end)
            if bitmap.is_set(page):
                assert (low, high) == (page, page)
                continue
            assert first <= low <= page < high <= end
            assert not any(bitmap.is_set(one) for one in range(low, high))
            assert low == first or bitmap.is_set(low - 1)
            assert high == end or bitmap.is_set(high)
    bitmap.close()


def test_pages_outside_are_refused() -> None:
    bitmap = UserfaultBitmap(10)

    for question in (lambda: bitmap.is_set(10), lambda: bitmap.is_set(-1), lambda: bitmap.set_runs(0, 11)):
        with pytest.raises(IndexError):
            question()
    with pytest.raises(IndexError):
        bitmap.clear_run_around(5, 6, 10)
    bitmap.close()


def test_a_bitmap_without_pages_is_refused() -> None:
    with pytest.raises(FerryError) as refused:
        UserfaultBitmap(0)

    assert refused.value.reason is Reason.INVALID_ARGUMENT
