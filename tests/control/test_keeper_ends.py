"""Ends of the keeper's service: crashes, kills, upgrades, and when the keeper ends with it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from keeper_control import Control, controlled
from keeper_process import Start, keepers


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    with controlled(tmp_path) as control:
        yield control


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with keepers(tmp_path / "run") as start:
        yield start


def test_a_service_that_says_what_it_does_is_reported(start: Start, control: Control) -> None:
    keeper = start(control)
    service = keeper.first()

    service.ask("ready")
    assert keeper.events("sidecar_ready")[0]["pid"] == service.pid
    keeper.signal(signal.SIGTERM)

    assert keeper.events("sidecar_stopping")[0]["pid"] == service.pid
    assert keeper.code() == 0


def test_the_first_start_after_a_crash_is_at_once_and_later_ones_wait_longer(start: Start) -> None:
    keeper = start(command=[sys.executable, "-S", "-c", "raise SystemExit(3)"])

    again = keeper.events("sidecar_starts_again", 5)
    ended = keeper.said("sidecar_ended")

    assert [event["seconds"] for event in again[:5]] == [0.0, 0.01, 0.02, 0.04, 0.04]
    assert {(event["code"], event["level"]) for event in ended} == {(3, "error")}


def test_a_program_that_cannot_be_executed_is_tried_again(start: Start, tmp_path: Path) -> None:
    keeper = start(command=[str(tmp_path / "not there (yet)")])

    assert keeper.events("sidecar_ended", 2)[0]["code"] == 127
    keeper.signal(signal.SIGTERM)

    assert keeper.code() == 127
    assert "cannot execute" in keeper.other_lines()


@pytest.mark.parametrize("code", [0, 2])
def test_a_service_that_is_done_or_badly_configured_ends_the_keeper(start: Start, control: Control, code: int) -> None:
    keeper = start(control)
    socket_path = keeper.socket

    keeper.first().end(code)

    assert keeper.code() == code
    assert keeper.said("sidecar_starts_again") == []
    assert not socket_path.exists()


@pytest.mark.parametrize("code", [0, 2])
def test_guests_under_way_are_never_given_up(start: Start, control: Control, code: int) -> None:
    keeper = start(control)
    service = keeper.first()
    service.ask("keep", name="guest", content="memory")

    service.end(code)

    after = control.accept()
    assert after.contents("guest") == ["memory"]
    after.ask("drop", name="guest")
    after.end(code)
    assert keeper.code() == code


def test_a_sigterm_is_passed_on_and_the_code_is_the_services(start: Start, control: Control) -> None:
    keeper = start(control)
    service = keeper.first()
    service.ask("keep", name="guest", content="memory")
    service.ask("end_with", code=7)

    keeper.signal(signal.SIGTERM)

    service.wait()
    assert keeper.code() == 7
    assert keeper.events("descriptors_let_go")[0]["descriptors"] == 1
    assert list(keeper.runtime_dir.iterdir()) == []


def test_a_service_that_does_not_end_in_time_is_killed(start: Start, control: Control) -> None:
    keeper = start(control, stop_seconds=0.1)
    service = keeper.first()
    service.ask("ignore_sigterm")

    keeper.signal(signal.SIGTERM)

    service.wait()
    assert keeper.code() == 128 + signal.SIGKILL
    assert keeper.events("sidecar_killed")[0]["pid"] == service.pid


def test_a_sigterm_between_two_starts_ends_the_keeper(start: Start) -> None:
    command = [sys.executable, "-S", "-c", "raise SystemExit(3)"]
    keeper = start(command=command, backoff={"first": 600.0, "most": 600.0})
    keeper.events("sidecar_starts_again", 2)

    keeper.signal(signal.SIGTERM)

    assert keeper.code() == 3


def test_a_sighup_renews_the_service_and_keeps_the_descriptors(start: Start, control: Control) -> None:
    keeper = start(control)
    service = keeper.first()
    service.ask("keep", name="guest", content="memory")

    keeper.signal(signal.SIGHUP)

    service.wait()
    after = control.accept()
    assert after.pid != service.pid
    assert after.contents("guest") == ["memory"]
    assert keeper.events("sidecar_stopping")[0]["pid"] == service.pid
    assert keeper.events("sidecar_renewed")[0]["descriptors"] == 1
    assert keeper.said("sidecar_starts_again") == []


def test_a_sighup_between_two_starts_starts_at_once(start: Start) -> None:
    command = [sys.executable, "-S", "-c", "raise SystemExit(3)"]
    keeper = start(command=command, backoff={"first": 600.0, "most": 600.0})
    keeper.events("sidecar_starts_again", 2)

    keeper.signal(signal.SIGHUP)

    assert len(keeper.events("sidecar_started", 3)) == 3


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory with a path that sockets of a sidecar fit into."""
    with tempfile.TemporaryDirectory(prefix="ferry-") as name:
        yield Path(name)


def test_a_sidecar_that_was_killed_serves_again(start: Start, short_directory: Path) -> None:
    options = {"host": "a", "listen": "127.0.0.1:0", "http": "127.0.0.1:0", "runtime-dir": str(short_directory)}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    keeper = start(command=[sys.executable, "-m", "pageferryd.sidecar", "--insecure", *words])
    keeper.events("ready")

    os.kill(keeper.events("sidecar_started")[0]["pid"], signal.SIGKILL)

    assert len(keeper.events("ready", 2)) == 2
    keeper.signal(signal.SIGTERM)
    assert keeper.code() == 0


ORPHANS = """
import os, time
reader, writer = os.pipe()
if not os.fork():
    if not os.fork():
        os.write(writer, str(os.getpid()).encode())
    os._exit(0)
os.wait()
orphan = int(os.read(reader, 20))
deadline = time.monotonic() + 15
while os.path.exists(f"/proc/{orphan}") and time.monotonic() < deadline:
    os.sched_yield()
raise SystemExit(os.path.exists(f"/proc/{orphan}"))
"""


def test_as_the_first_process_of_a_container_it_leaves_no_zombies(start: Start) -> None:
    keeper = start(command=[sys.executable, "-S", "-c", ORPHANS], first_of_container=True)

    assert keeper.code() == 0
