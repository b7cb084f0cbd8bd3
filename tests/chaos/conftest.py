"""What the tests of failures share: which of them run, and the table in the end."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Sidecars, guests and proxies as the tests of whole migrations have them.
sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

TABLES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos-seed", type=int, default=None, help="run one random schedule of failures: the one of this seed"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for text in config.stash.get(TABLES, []):
        terminalreporter.write_line("")
        terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def tables(request: pytest.FixtureRequest) -> list[str]:
    """What is printed in the end."""
    return request.config.stash.setdefault(TABLES, [])


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for socket names: unix(7) allows 107 bytes in all."""
    with tempfile.TemporaryDirectory(prefix="ferry-") as directory:
        yield Path(directory)
