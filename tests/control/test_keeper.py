"""The keeper, with real services that are killed and started again."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keeper_conformance import CAPACITY, StoreConformance
from keeper_control import DEADLINE, Control, Manager, controlled
from keeper_process import KeeperProcess, Start, keepers


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    with controlled(tmp_path) as control:
        yield control


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with keepers(tmp_path / "run") as start:
        yield start


class TestKeeper(StoreConformance):
    @pytest.fixture
    def manager(self, start: Start, control: Control) -> Manager:
        return start(control, capacity=CAPACITY)


# --- what is stored, and by whom


def test_many_descriptors_keep_their_names_and_their_order(start: Start, control: Control) -> None:
    service = start(control).first()
    for number in range(120):
        service.ask("keep", name=f"guest {number % 60}", content=f"memory {number}")
    service.kill()

    after = control.accept()

    assert after.ask("names") == [f"guest {number}" for number in range(60)]
    for number in range(60):
        assert after.contents(f"guest {number}") == [f"memory {number}", f"memory {number + 60}"]


def test_a_strangers_descriptors_are_not_stored_and_said_once(start: Start, control: Control) -> None:
    keeper = start(control)
    service = keeper.first()
    reader, writer = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.connect(str(keeper.socket))
        for _ in range(5):
            socket.send_fds(stranger, [b"FDSTORE=1\nFDNAME=foreign"], [writer])
        socket.send_fds(stranger, [b"FDSTOREREMOVE=1\nFDNAME=guest"], [])
    os.close(writer)
    # The keeper has closed them all once nobody can write any more.
    assert select.select([reader], [], [], DEADLINE)[0]
    os.close(reader)

    service.ask("keep", name="guest", content="memory")
    service.kill()

    assert control.accept().ask("names") == ["guest"]
    [said] = keeper.said("stranger_ignored")
    assert (said["pid"], said["level"]) == (os.getpid(), "warning")


def test_only_its_own_user_can_send_to_the_keeper(start: Start, control: Control) -> None:
    keeper = start(control)

    assert stat.S_IMODE(keeper.socket.stat().st_mode) == 0o600


def test_a_service_that_stores_too_much_is_refused_the_rest(start: Start, control: Control) -> None:
    keeper = start(control, capacity=3)
    service = keeper.first()

    service.ask("send", message="FDSTORE=1\nFDNAME=guest", memories=2)
    service.ask("send", message="FDSTORE=1\nFDNAME=more", memories=5)
    service.ask("send", message="FDSTORE=1\nFDNAME=most", memories=253)
    service.kill()

    after = control.accept()
    assert after.contents("guest") == ["sent 0", "sent 1"]
    assert after.contents("more") == ["sent 0"]
    assert after.ask("names") == []
    [said] = keeper.said("store_full")
    assert (said["name"], said["refused"], said["capacity"]) == ("more", 4, 3)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "FDSTORE=1\nFDNAME=long\nSTATUS=" + "x" * 4096,
        "FDSTORE=1\nFDNAME=nul\0",
        "FDSTOREREMOVE=1",
        "FDSTOREREMOVE=1\nFDNAME=a:b",
        "BARRIER=1\nFDSTORE=1",
        "\xff\xfe",
        "WATCHDOG=1",
    ],
)
def test_what_is_malformed_or_unknown_is_ignored_and_its_descriptors_are_closed(
    start: Start, control: Control, message: str
) -> None:
    keeper = start(control)
    service = keeper.first()
    service.ask("keep", name="before", content="1")
    files = keeper.open_files

    service.ask("send", message=message, memories=3)
    service.ask("keep", name="after", content="2")

    assert keeper.open_files == files + 1
    service.kill()
    assert control.accept().ask("names") == ["before", "after"]


def test_a_descriptor_that_hangs_up_is_let_go_of_unless_it_is_not_to_be_polled(start: Start, control: Control) -> None:
    keeper = start(control)
    service = keeper.first()

    service.ask("send", message="FDSTORE=1\nFDNAME=watched", dead_pipe=True)
    service.ask("send", message="FDSTORE=1\nFDNAME=whatever\nFDPOLL=0", dead_pipe=True)

    assert keeper.events("descriptor_hung_up")[0]["name"] == "watched"
    service.kill()
    after = control.accept()
    assert (after.ask("count", name="watched"), after.ask("count", name="whatever")) == (0, 1)


def test_what_was_sent_before_a_kill_counts_however_late_the_keeper_hears_of_it(start: Start, control: Control) -> None:
    keeper = start(control)
    service = keeper.first()
    keeper.signal(signal.SIGSTOP)
    try:
        service.ask("send", message="FDSTORE=1\nFDNAME=guest", memories=1)
        service.kill()
    finally:
        keeper.signal(signal.SIGCONT)

    assert control.accept().contents("guest") == ["sent 0"]


# --- the keeper's own end


def test_a_service_outlives_its_keeper_and_says_that_nothing_is_stored(start: Start, control: Control) -> None:
    keeper = start(control)
    service = keeper.first()
    service.ask("keep", name="guest", content="memory")

    keeper.signal(signal.SIGKILL)
    assert keeper.code() == -signal.SIGKILL

    refused = service.try_to("keep", name="another", content="lost")
    assert refused["error"] == "INTERNAL"
    assert "nobody listens" in refused["message"]
    service.ask("drop", name="guest")
    service.ask("stopping")


def test_the_next_keeper_clears_up_and_is_not_taken_for_the_one_before(
    start: Start, control: Control, tmp_path: Path
) -> None:
    before = start(control)
    orphan = before.first()
    left_behind = before.socket
    before.signal(signal.SIGKILL)
    before.code()

    second = start(control)
    second.first()

    assert second.socket != left_behind
    assert list((tmp_path / "run").iterdir()) == [second.socket]
    assert orphan.try_to("keep", name="guest", content="lost")["error"] == "INTERNAL"


def test_a_second_keeper_is_refused(start: Start, control: Control) -> None:
    first = start(control)
    first.first()
    path = first.socket

    second = start(control)

    assert second.code() == 2
    assert f"ADDRESS_IN_USE: another keeper runs already, and listens at {path}" in second.other_lines()
    assert path.exists()


def test_a_directory_that_cannot_be_used_is_complained_of(control: Control, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with KeeperProcess(tmp_path / "file" / "run", control) as keeper:
        assert keeper.code() == 2
        assert "PERMISSION_MISSING" in keeper.other_lines()


# --- what it is made of


def test_the_keeper_imports_nothing_big() -> None:
    script = "import sys, pageferryd.keeper.running; print(*{name.partition('.')[0] for name in sys.modules})"
    listed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE, check=True
    )

    heavy = {"grpc", "google", "uvloop", "pydantic", "asyncio", "aiohttp", "structlog", "typer", "rich", "pageferry"}
    assert "pageferryd" in listed.stdout.split()
    assert heavy & set(listed.stdout.split()) == set()


@pytest.mark.parametrize(("option", "code", "words"), [("--version", 0, "pageferryd "), ("--no-such-option", 2, "")])
def test_pageferryd_itself_is_started_with_its_options(tmp_path: Path, option: str, code: int, words: str) -> None:
    script = "import sys; from pathlib import Path; from pageferryd.keeper.running import become\n"
    script += "become(sys.argv[2:], Path(sys.argv[1]), stop_seconds=5, log_format='console')"

    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), option],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
        cwd=tmp_path,
    )

    assert ran.returncode == code
    assert words in ran.stdout
    assert f"sidecar_ended [pageferryd.keeper] code={code} " in ran.stderr
