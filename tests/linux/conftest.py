from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from watched import Watched, reserved_huge_pages

from pageferry.vmm.memory import Backing


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    """Make watched memory that is closed after the test."""
    made: list[Watched] = []

    def make(*arguments: int | Backing, **keywords: bool) -> Watched:
        made.append(Watched(*arguments, **keywords))
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
