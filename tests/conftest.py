"""What every test relies on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pageferry.vmm.memory import Backing

# Run in the background, as by a script with `&`, this process would have been started with SIGINT ignored, and so would
# all that it starts: tests that interrupt a program would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    with _reserved_huge_pages(4) as reserved:
        if not reserved:
            pytest.skip("4 huge pages of 2 MiB cannot be reserved")
        yield


@pytest.fixture(
    params=[
        Backing.ANONYMOUS,
        Backing.SHMEM,
        pytest.param(Backing.HUGETLBFS, marks=[pytest.mark.hugetlb, pytest.mark.root]),
    ]
)
def backing(request: pytest.FixtureRequest) -> Backing:
    chosen: Backing = request.param
    if chosen is Backing.HUGETLBFS:
        request.getfixturevalue("huge_pages")
    return chosen


@contextmanager
def _reserved_huge_pages(count: int) -> Iterator[bool]:
    """Reserve 2 MiB pages for a while; yields whether that worked."""
    setting = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    try:
        before = int(setting.read_text())
        setting.write_text(str(before + count))
    except OSError:
        yield False
        return
    try:
        yield int(setting.read_text()) >= before + count
    finally:
        setting.write_text(str(before))
