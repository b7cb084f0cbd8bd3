from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from watched import Watched

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
