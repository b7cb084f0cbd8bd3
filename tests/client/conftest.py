"""What the tests of the VMM's side share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_pager import TinyPager


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for socket names: unix(7) allows 107 bytes in all."""
    with tempfile.TemporaryDirectory(prefix="ferry-") as directory:
        yield Path(directory)


@pytest.fixture
def tiny_pager(short_path: Path) -> Iterator[TinyPager]:
    """A pager that listens and waits for its hand-off."""
    pager = TinyPager(short_path / "pager.sock")
    yield pager
    pager.close()
