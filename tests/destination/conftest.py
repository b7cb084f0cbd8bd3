"""What the tests of the destination share."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("arriving", "door_conformance", "installer_conformance", "lanes_conformance")

from door_conformance import Delivered  # noqa: E402
from guarded import Guarded  # noqa: E402

from pageferry.vmm.memory import Backing  # noqa: E402


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
def delivered() -> Delivered:
    """Takes what a door delivers."""
    return Delivered()


@pytest.fixture
def open_files() -> Callable[[], Counter[str]]:
    """Count this process's open file descriptors by kind."""
    return _open_files


def _open_files() -> Counter[str]:
    kinds: Counter[str] = Counter()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(file.readlink())
            # Sockets and pipes have a number each.
            kinds[target if target.startswith("anon_inode") else target.partition(":[")[0]] += 1
    return kinds


@pytest.fixture
def short_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose path leaves room for the names of sockets: unix(7) allows 107 bytes in all."""
    return tmp_path_factory.mktemp("s")
