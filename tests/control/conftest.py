"""What the tests of the sidecar's surroundings share."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import structlog
from leaving import Departure
from small_sidecar import Sidecar, Start

from certificates import Authority
from pageferry.tls import TlsFiles
from pageferryd import logs
from pageferryd.config import Settings


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[Sidecar] = []

    async def start_sidecar(**settings: Any) -> Sidecar:
        sidecar = Sidecar(Settings(**{"host": "a", "listen": ["127.0.0.1:0"], **settings}))
        started.append(sidecar)
        sidecar.bound = await sidecar.grpc.start()
        return sidecar

    yield start_sidecar
    for sidecar in started:
        await sidecar.stop()


@pytest.fixture
def log() -> Iterator[StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = StringIO()
    logs.configure("json", "debug", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def server_files(tmp_path: Path, authority: Authority) -> TlsFiles:
    return authority.write(tmp_path / "server", "host-a")


@pytest.fixture
async def departure(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Departure]:
    one = Departure(tmp_path_factory.mktemp("s"))
    await one.start()
    yield one
    await one.stop()
