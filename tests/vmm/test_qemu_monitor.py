"""The connection to QEMU's monitor: with QEMU, and with servers that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from qemu_process import SECONDS, needs_qemu, running_qemu

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.qemu.monitor import Monitor

GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}}
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


@asynccontextmanager
async def server(path: Path, serve: Serve) -> AsyncIterator[Path]:
    tasks = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        try:
            await serve(reader, writer)
        except (ConnectionError, EOFError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_unix_server(handle, path)
    async with listening:
        try:
            yield path
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def command_id(reader: asyncio.StreamReader) -> str | None:
    """Read one command, which ends where its JSON does; return its id."""
    data = b""
    while True:
        data += await reader.readuntil(b"}")
        try:
            number: str | None = json.loads(data).get("id")
        except ValueError:
            continue
        return number


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(line(GREETING))
    await command_id(reader)
    writer.write(line({"return": {}}))


def answering(*pieces: bytes, close: bool = False) -> Serve:
    """A server that greets, and answers each command with the next of `pieces`, where `ID` stands for the command's."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        for piece in pieces:
            number = await command_id(reader)
            writer.write(piece.replace(b'"ID"', json.dumps(number).encode()))
            await writer.drain()
        if not close:
            await reader.read()

    return serve


def saying(data: bytes, *, close: bool = True) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if not close:
            await reader.read()

    return serve


async def open_error(path: Path, seconds: float = SECONDS) -> FerryError:
    with pytest.raises(FerryError) as caught:
        await Monitor.open(path, seconds)
    return caught.value


async def execute_error(path: Path, seconds: float = SECONDS) -> FerryError:
    monitor = await Monitor.open(path, SECONDS)
    try:
        with pytest.raises(FerryError) as caught:
            await monitor.execute("query-name", seconds=seconds)
        return caught.value
    finally:
        await monitor.close()


def open_files(pid: int) -> list[str]:
    return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]


async def test_where_no_socket_is_the_monitor_is_unreachable(tmp_path: Path) -> None:
    error = await open_error(tmp_path / "none")
    assert error.reason is Reason.VMM_UNREACHABLE
    assert "No such file" in error.message


async def test_a_server_that_never_greets_is_told_to_serve_another_client(tmp_path: Path) -> None:
    async with server(tmp_path / "qmp", saying(b"", close=False)) as path:
        error = await open_error(path, 0.2)
    assert error.reason is Reason.VMM_UNREACHABLE
    assert "one client at a time" in error.message


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"", Reason.VMM_UNREACHABLE),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Reason.VMM_FAILED),
        (line({"QMP": []}), Reason.VMM_FAILED),
        (line({"return": {}}), Reason.VMM_FAILED),
        (b"[" * 100_000 + b"\n", Reason.VMM_FAILED),
        (b"\xff\xfe\n", Reason.VMM_FAILED),
        (line(GREETING) + line({"error": {"class": "GenericError", "desc": "no"}}), Reason.VMM_FAILED),
    ],
    ids=["none", "ssh", "no-version", "an-answer", "deep", "no-utf8", "refuses-to-begin"],
)
async def test_what_does_not_greet_as_qmp_does_is_refused(tmp_path: Path, greeting: bytes, reason: Reason) -> None:
    async with server(tmp_path / "qmp", saying(greeting)) as path:
        assert (await open_error(path)).reason is reason


async def test_a_greeting_without_end_is_cut_off(tmp_path: Path) -> None:
    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b" " * (1 << 20))
            await writer.drain()

    async with server(tmp_path / "qmp", endless) as path:
        assert (await open_error(path)).reason is Reason.VMM_FAILED


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (line({"error": {"class": "GenericError", "desc": "it burns"}, "id": "ID"}), Reason.VMM_FAILED),
        (line({"error": "it burns", "id": "ID"}), Reason.VMM_FAILED),
        (line({"error": {"class": "GenericError", "desc": "parse"}}), Reason.VMM_FAILED),
        (line({"id": "ID"}), Reason.VMM_FAILED),
        (b"no json\n", Reason.VMM_FAILED),
        (b"17\n", Reason.VMM_FAILED),
        (b"[" * 100_000 + b"\n", Reason.VMM_FAILED),
        (b" " * (5 << 20), Reason.VMM_FAILED),
    ],
    ids=["refuses", "refuses-oddly", "parse-error", "neither", "no-json", "no-object", "deep", "no-end"],
)
async def test_an_answer_that_is_none_is_an_error(tmp_path: Path, answer: bytes, reason: Reason) -> None:
    async with server(tmp_path / "qmp", answering(answer)) as path:
        assert (await execute_error(path)).reason is reason


async def test_a_refusal_is_told_in_qemus_words(tmp_path: Path) -> None:
    refusal = line({"error": {"class": "DeviceNotFound", "desc": "it burns"}, "id": "ID"})
    async with server(tmp_path / "qmp", answering(refusal)) as path:
        assert "it burns (DeviceNotFound)" in (await execute_error(path)).message


async def test_a_server_that_hangs_up_in_an_answer_was_lost(tmp_path: Path) -> None:
    async with server(tmp_path / "qmp", answering(b"", close=True)) as path:
        assert (await execute_error(path)).reason is Reason.VMM_UNREACHABLE


async def test_everything_after_a_lost_connection_says_so(tmp_path: Path) -> None:
    async with server(tmp_path / "qmp", answering(b"", close=True)) as path:
        monitor = await Monitor.open(path, SECONDS)
        with monitor.events("STOP") as events:
            for attempt in (
                monitor.execute("stop"),
                monitor.execute("stop"),
                monitor.hmp("info status"),
                monitor.send_fd("null", 0),
                monitor.wait_event(events, SECONDS),
            ):
                with pytest.raises(FerryError) as caught:
                    await attempt
                assert caught.value.reason is Reason.VMM_UNREACHABLE
        assert monitor.is_closed
        await monitor.close()
        await monitor.close()


async def test_calls_under_way_at_once_all_learn_of_the_loss(tmp_path: Path) -> None:
    async with server(tmp_path / "qmp", answering(b"", b"", b"", close=True)) as path:
        monitor = await Monitor.open(path, SECONDS)
        results = await asyncio.gather(*(monitor.execute("stop") for _ in range(3)), return_exceptions=True)
        await monitor.close()
    assert [getattr(result, "reason", None) for result in results] == [Reason.VMM_UNREACHABLE] * 3


async def test_a_command_that_is_not_answered_times_out_and_the_next_one_works(tmp_path: Path) -> None:
    async with server(tmp_path / "qmp", answering(b"", line({"return": 7, "id": "ID"}))) as path:
        monitor = await Monitor.open(path, SECONDS)
        with pytest.raises(FerryError) as caught:
            await monitor.execute("stop", seconds=0.1)
        assert caught.value.reason is Reason.VMM_UNREACHABLE
        assert await monitor.execute("query-name") == 7
        await monitor.close()


async def test_of_a_flood_of_events_only_the_newest_are_kept(tmp_path: Path) -> None:
    flood = b"".join(line({"event": "STOP", "data": {"number": number}}) for number in range(1000))
    async with server(tmp_path / "qmp", answering(flood + line({"return": 0, "id": "ID"}))) as path:
        monitor = await Monitor.open(path, SECONDS)
        with monitor.events("STOP") as events:
            await monitor.execute("stop")
            kept = [(await monitor.wait_event(events, SECONDS))["data"]["number"] for _ in range(64)]
            with pytest.raises(FerryError, match="no event"):
                await monitor.wait_event(events, 0.05)
        await monitor.close()
    assert kept == list(range(936, 1000))


async def test_a_server_that_reads_nothing_does_not_hold_up_the_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pageferryd.vmm.qemu.monitor._CLOSE_SECONDS", 0.1)

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        await asyncio.Event().wait()

    async with server(tmp_path / "qmp", deaf) as path:
        monitor = await Monitor.open(path, SECONDS)
        with pytest.raises(FerryError) as caught:
            await monitor.execute("stop", {"long": "x" * (8 << 20)}, seconds=0.1)
        assert caught.value.reason is Reason.VMM_UNREACHABLE
        async with asyncio.timeout(SECONDS):
            await monitor.close()


class TestWithQemu:
    pytestmark = needs_qemu

    async def test_commands_answer_and_are_listed(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", "pc", "-m", "16", "-S") as qemu:
            assert (await qemu.monitor.execute("query-status"))["running"] is False
            assert {"stop", "getfd", "add-fd"} <= await qemu.monitor.commands()
            assert "paused" in await qemu.monitor.hmp("info status")

    async def test_a_second_client_is_told_that_another_holds_the_monitor(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", "pc", "-m", "16"):
            error = await open_error(tmp_path / "qmp", 0.2)
        assert error.reason is Reason.VMM_UNREACHABLE
        assert "another" in error.message

    async def test_after_a_close_the_next_client_is_served(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", "pc", "-m", "16") as qemu:
            await qemu.monitor.close()
            again = await Monitor.open(tmp_path / "qmp", SECONDS)
            assert (await again.execute("query-status"))["running"] is True
            await again.close()

    async def test_an_event_that_comes_with_the_answer_is_not_missed(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", "pc", "-m", "16") as qemu:
            with qemu.monitor.events("STOP", "RESUME") as events:
                await qemu.monitor.execute("stop")
                await qemu.monitor.execute("cont")
                names = [(await qemu.monitor.wait_event(events, SECONDS))["event"] for _ in range(2)]
            assert names == ["STOP", "RESUME"]

    async def test_a_file_descriptor_goes_to_qemu(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", "pc", "-m", "16") as qemu:
            with (tmp_path / "given").open("wb") as file:
                await qemu.monitor.send_fd("given", file.fileno())
            assert str(tmp_path / "given") in open_files(qemu.pid)
            await qemu.monitor.execute("closefd", {"fdname": "given"})
            assert str(tmp_path / "given") not in open_files(qemu.pid)

    async def test_a_qemu_that_ends_was_lost(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", "pc", "-m", "16") as qemu:
            with qemu.monitor.events("STOP") as events:
                qemu.process.kill()
                with pytest.raises(FerryError) as caught:
                    await qemu.monitor.wait_event(events, SECONDS)
            assert caught.value.reason is Reason.VMM_UNREACHABLE
