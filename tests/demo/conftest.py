"""The demonstration with stand-ins for its sidecars and guests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from pageferry.demo import guests, run, sidecars

HERE = Path(__file__).parent


@pytest.fixture
def places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own, with a short path, where demonstrations make theirs."""
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(directory)


@pytest.fixture
def stand_ins(places: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the demonstration start stand-ins; what goes wrong is set as STAND_IN in the environment."""
    monkeypatch.setattr(sidecars, "MODULE", "stand_in_sidecar")
    monkeypatch.setattr(guests, "MODULES", dict.fromkeys(guests.Kind, "stand_in_guest"))
    monkeypatch.setattr(run, "EXIT_SECONDS", 1.0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    return monkeypatch
