"""The socket of a VmmServer: private, taken over from the dead, never from the living, and removed at the end."""

# ruff: noqa: ASYNC240 - looking at a file or two blocks nobody here

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest
from recording_vmm import RecordingVmm

from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason
from pageferry.v1 import vmm_pb2, vmm_pb2_grpc
from pageferry.vmm import VmmServer


async def start(path: object) -> VmmServer:
    server = VmmServer()
    await server.start(RecordingVmm(), str(path))
    return server


async def refused(path: object) -> Reason:
    with pytest.raises(FerryError) as error:
        await start(path)
    return error.value.reason


async def answers(path: Path) -> bool:
    async with open_channel(f"unix:{path}", None) as channel:
        stub = vmm_pb2_grpc.VmmServiceStub(channel)
        described = await stub.DescribeMemory(vmm_pb2.DescribeMemoryRequest())
    return described.state == vmm_pb2.VMM_STATE_RUNNING


@pytest.fixture
def path(short_path: Path) -> Path:
    return short_path / "vmm.sock"


async def test_only_the_user_of_the_vmm_can_open_its_socket(path: Path) -> None:
    server = await start(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await server.stop(grace=0)


async def test_the_socket_file_goes_with_the_server(path: Path) -> None:
    server = await start(path)
    await server.stop(grace=0)

    assert list(path.parent.iterdir()) == []
    # A second stop is harmless.
    await server.stop(grace=0)


async def test_the_socket_file_of_a_dead_process_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    server = await start(path)

    assert await answers(path)
    await server.stop(grace=0)


async def test_a_path_that_somebody_serves_is_left_alone(path: Path) -> None:
    server = await start(path)

    assert await refused(path) is Reason.ADDRESS_IN_USE
    assert await answers(path)
    await server.stop(grace=0)


async def test_a_path_whose_owner_is_too_busy_to_accept_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))

        assert await refused(path) is Reason.ADDRESS_IN_USE
        assert path.is_socket()


async def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")

    assert await refused(path) is Reason.ADDRESS_IN_USE
    assert path.read_text() == "precious"


async def test_a_path_that_cannot_be_bound_is_an_invalid_argument(short_path: Path) -> None:
    assert await refused("vmm.sock") is Reason.INVALID_ARGUMENT
    assert await refused(short_path / ("x" * 107)) is Reason.INVALID_ARGUMENT
    assert await refused(short_path / "no such directory" / "vmm.sock") is Reason.INVALID_ARGUMENT


async def test_a_successor_on_the_same_path_is_left_alone(path: Path) -> None:
    server = await start(path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(path))
        successor.listen(1)

        await server.stop(grace=0)

        assert path.is_socket()


async def test_a_server_starts_once(path: Path) -> None:
    server = await start(path)

    with pytest.raises(FerryError) as error:
        await server.start(RecordingVmm(), str(path))

    assert error.value.reason is Reason.ILLEGAL_STATE
    await server.stop(grace=0)


async def test_a_server_that_never_started_can_be_stopped() -> None:
    server = VmmServer()

    await server.stop()
    await server.wait_closed()
