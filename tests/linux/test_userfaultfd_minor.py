"""Minor faults: shared memory whose pages are in the page cache, and only not mapped."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from watched import DEADLINE, PAGE, Watched, page_of, wait_events

from pageferry.abi import userfaultfd as abi
from pageferry.vmm.memory import Backing
from pageferryd.linux.userfaultfd import Fault, Outcome

pytestmark = pytest.mark.userfaultfd
Watch = Callable[..., Watched]


def put(watched: Watched, page: int, content: bytes) -> None:
    """Put a page into the page cache without mapping it."""
    os.pwrite(watched.memory.memfd, page_of(content), page * PAGE)


@pytest.fixture
def watched(watch: Watch) -> Watched:
    return watch(4, Backing.SHMEM, abi.UFFD_FEATURE_MINOR_SHMEM, minor=True)


def test_a_reader_of_a_page_that_is_only_not_mapped_waits_for_it_to_be_mapped(watched: Watched) -> None:
    put(watched, 1, b"written elsewhere")
    reading = watched.reading(1)

    (fault,) = wait_events(watched.uffd)
    assert isinstance(fault, Fault)
    assert (fault.address, fault.minor) == (watched.at(1), True)

    put(watched, 1, b"ferried meanwhile")
    assert watched.uffd.resolve_minor(watched.at(1), PAGE) == (PAGE, Outcome.INSTALLED)
    assert reading.result(DEADLINE) == b"ferried meanwhile"[:16]


def test_many_pages_are_mapped_at_once_up_to_one_that_is_mapped(watched: Watched) -> None:
    for page in range(4):
        put(watched, page, b"content")
    assert watched.uffd.resolve_minor(watched.at(2), PAGE) == (PAGE, Outcome.INSTALLED)

    assert watched.uffd.resolve_minor(watched.at(0), 4 * PAGE) == (2 * PAGE, Outcome.EXISTS)


def test_a_page_that_is_not_in_the_file_cannot_be_mapped(watched: Watched) -> None:
    put(watched, 0, b"content")

    assert watched.uffd.resolve_minor(watched.at(0), 2 * PAGE) == (PAGE, Outcome.UNMAPPED)


def test_missing_and_minor_faults_are_told_apart(watch: Watch) -> None:
    watched = watch(2, Backing.SHMEM, abi.UFFD_FEATURE_MINOR_SHMEM, minor=True)
    watched.uffd.unregister(watched.at(0), 2 * PAGE)
    watched.uffd.register(watched.at(0), 2 * PAGE, missing=True, minor=True)
    put(watched, 1, b"cached")
    first, second = watched.reading(0), None
    (missing,) = wait_events(watched.uffd)
    second = watched.reading(1)
    (minor,) = wait_events(watched.uffd)

    assert isinstance(missing, Fault)
    assert isinstance(minor, Fault)
    assert (missing.minor, minor.minor) == (False, True)
    watched.zero(0)
    watched.uffd.resolve_minor(watched.at(1), PAGE)
    assert first.result(DEADLINE) == bytes(16)
    assert second.result(DEADLINE)[:6] == b"cached"
