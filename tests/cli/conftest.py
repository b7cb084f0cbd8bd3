"""A sidecar that plays its part in a process of its own, and the command called in this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pageferry.cli.main import main

FAKE = Path(__file__).with_name("fake_sidecar.py")


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Ferry = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PAGEFERRY_") or name in {"NO_COLOR", "FORCE_COLOR", "COLUMNS"}:
            monkeypatch.delenv(name)


def started(address: str) -> Iterator[str]:
    with subprocess.Popen([sys.executable, str(FAKE), address], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    yield from started("127.0.0.1:0")


@pytest.fixture
def pageferry(capsys: pytest.CaptureFixture[str]) -> Ferry:
    """Call the command with its arguments, against no particular sidecar."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        status = main(arguments)
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture
def ferry(address: str, pageferry: Ferry) -> Ferry:
    """Call the command against the fake sidecar."""
    return lambda *arguments: pageferry("--insecure", "--address", address, *arguments)


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port of loopback that is taken, but not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
