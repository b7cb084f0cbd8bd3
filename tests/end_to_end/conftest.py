"""What the tests of whole migrations share: sidecars and guests as processes of their own."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from crossing import Stage
from sidecar_process import Sidecar


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for socket names: unix(7) allows 107 bytes in all."""
    with tempfile.TemporaryDirectory(prefix="ferry-") as directory:
        yield Path(directory)


@pytest.fixture
async def stage(short_path: Path, standing_hosts: tuple[Sidecar, Sidecar]) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        made = Stage(short_path, stack, tuple(host.address for host in standing_hosts))
        yield made
        await made.leave()


@pytest.fixture(scope="session")
def standing_hosts() -> Iterator[tuple[Sidecar, Sidecar]]:
    """Two insecure sidecars that serve many tests one after another, as real ones do."""
    with tempfile.TemporaryDirectory(prefix="ferry-") as directory:
        made: list[Sidecar] = []
        try:
            made += [Sidecar(Path(directory), name) for name in ("alpha", "beta")]
            yield made[0], made[1]
        finally:
            for one in made:
                one.close()


@pytest.fixture
def alpha(standing_hosts: tuple[Sidecar, Sidecar]) -> Sidecar:
    return standing_hosts[0]


@pytest.fixture
def beta(standing_hosts: tuple[Sidecar, Sidecar]) -> Sidecar:
    return standing_hosts[1]
