"""What the tests of the destination share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guarded import Guarded, reserved_huge_pages

from pageferry.vmm.memory import Backing


@pytest.fixture
def guard() -> Iterator[Callable[..., Guarded]]:
    """Make guarded memory that is closed after the test."""
    made: list[Guarded] = []

    def make(*sizes: int, backing: Backing = Backing.ANONYMOUS) -> Guarded:
        made.append(Guarded(*sizes, backing=backing))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def huge_pages() -> Iterator[None]:
    with reserved_huge_pages(4) as reserved:
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


@pytest.fixture
def open_files() -> Callable[[], int]:
    """Count this process's open file descriptors."""
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture
def short_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose path leaves room for the names of sockets: unix(7) allows 107 bytes in all."""
    return tmp_path_factory.mktemp("s")
