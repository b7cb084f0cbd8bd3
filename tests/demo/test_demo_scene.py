"""The processes of the demonstration: what they say is heard and logged, and none outlives its scene."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pageferry.demo import scene as scenes
from pageferry.demo.guests import Guest, Kind
from pageferry.demo.report import readable
from pageferry.demo.scene import Child, Scene, together
from pageferry.errors import FerryError, Reason

SECONDS = 20
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


async def spawn(scene: Scene, code: str, heard: list[bytes], stream: str = "stdout") -> Child:
    return await scene.spawn_python("child", ["-c", code], heard.append, heard=stream, gone=Reason.VMM_GONE)


async def test_both_streams_are_logged_and_one_is_heard():
    heard: list[bytes] = []
    async with Scene() as scene:
        child = await spawn(scene, "import sys; print('a', flush=True); print('b', file=sys.stderr)", heard)
        await child.until(lambda: child.ended, SECONDS, "its end")
        await child.exited(SECONDS)

        assert heard == [b"a\n"]
        assert sorted(child.last_words()) == ["a", "b"]


async def test_the_directory_is_private_and_goes_with_the_scene():
    async with Scene() as scene:
        assert stat.S_IMODE(scene.directory.stat().st_mode) == 0o700

    assert not scene.directory.exists()


async def test_a_long_temporary_directory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    async with Scene() as scene:
        assert len(os.fsencode(scene.directory)) < 64


async def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scenes, "END_SECONDS", 0.1)
    heard: list[bytes] = []
    async with Scene() as scene:
        child = await spawn(scene, STUBBORN, heard)
        await child.until(lambda: bool(heard), SECONDS, "its first line")

    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


async def test_waiting_for_a_process_that_ended_is_an_error():
    async with Scene() as scene:
        child = await spawn(scene, "", [])
        with pytest.raises(FerryError, match="child ended while waiting for a sign") as caught:
            await child.until(lambda: False, SECONDS, "a sign")

    assert caught.value.reason is Reason.VMM_GONE


async def test_waiting_in_vain_is_an_error():
    async with Scene() as scene:
        child = await spawn(scene, "input()", [])
        with pytest.raises(FerryError, match=r"waited 0\.1 s for a sign in vain"):
            await child.until(lambda: False, 0.1, "a sign")


async def test_a_log_has_a_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scenes, "MOST_LOG_BYTES", 10)
    heard: list[bytes] = []
    async with Scene() as scene:
        child = await spawn(scene, "for _ in range(9): print('1234567')", heard)
        await child.until(lambda: len(heard) == 9, SECONDS, "all lines")

        assert child.log.stat().st_size == 16


async def test_of_two_that_are_started_together_the_first_error_counts():
    async def fail() -> int:
        raise FerryError(Reason.VMM_GONE, "gone")

    async def succeed() -> int:
        return 1

    assert await together(succeed(), succeed()) == (1, 1)
    with pytest.raises(FerryError, match="gone"):
        await together(succeed(), fail())


async def test_the_last_words_leave_out_what_is_said_all_the_time():
    async with Scene() as scene:
        child = await spawn(scene, """print('why'); print('{"event": "progress", "steps": 1}\\n' * 50)""", [])
        await child.until(lambda: child.ended, SECONDS, "its end")

        assert child.last_words() == ["why", ""]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"level": "error", "event": "lost", "peer": "b", "host": "x", "timestamp": "t"}', "error: lost peer=b"),
        ("Traceback", "Traceback"),
        ('{"event": "ready"}', '{"event": "ready"}'),
        ("[1]", "[1]"),
    ],
)
def test_a_log_line_is_shown_as_a_person_reads_it(line: str, text: str):
    assert readable(line) == text


def test_what_a_guest_says_is_understood(tmp_path: Path):
    guest = Guest(Kind.KVM, tmp_path)

    guest.hear(b'{"event": "ready", "pid": 1}\n')
    guest.hear(b'{"event": "progress", "steps": 7, "errors": 1, "state": "running", "new": 0}\n')
    guest.hear(b'{"event": "error", "message": "page 3 is old"}\n')
    guest.hear(b'{"event": "unheard of"}\n')
    guest.hear(b"Segmentation fault\n")

    assert (guest.ready, guest.steps, guest.errors, guest.state) == (True, 7, 1, "running")
    assert guest.findings == ["page 3 is old", "said something that is no event: b'Segmentation fault\\n'"]
