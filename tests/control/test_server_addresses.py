"""Where the gRPC server listens, and what it says where it cannot."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest
from small_sidecar import (
    Start,
    get_migration,
    tls_settings,
)

from pageferry.errors import FerryError, Reason
from pageferry.tls import TlsFiles

pytestmark = pytest.mark.timeout(30)


async def test_addresses_come_back_in_their_order_with_the_ports_that_were_taken(start: Start, tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/grpc.sock"
    sidecar = await start(insecure=True, listen=["127.0.0.1:0", path, "127.0.0.1:0"])
    first, second, third = sidecar.bound
    assert second == path
    assert first != third
    assert stat.S_IMODE((tmp_path / "grpc.sock").stat().st_mode) == 0o600
    for address in sidecar.bound:
        assert not address.endswith(":0")
        await get_migration(sidecar.channel(address=address))


async def test_a_port_in_use_is_an_error_that_says_so(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FerryError, match=rf"127\.0\.0\.1:{port} is in use") as raised:
            await start(insecure=True, listen=["127.0.0.1:0", f"127.0.0.1:{port}"])
    assert raised.value.reason is Reason.ADDRESS_IN_USE


async def test_two_sidecars_do_not_share_a_port(start: Start) -> None:
    first = await start(insecure=True)
    with pytest.raises(FerryError) as raised:
        await start(insecure=True, listen=first.bound)
    assert raised.value.reason is Reason.ADDRESS_IN_USE


async def test_a_port_can_be_taken_again_right_after_a_stop(start: Start) -> None:
    first = await start(insecure=True)
    await get_migration(first.channel())
    await first.stop()
    second = await start(insecure=True, listen=first.bound)
    assert second.bound == first.bound


async def test_an_address_of_another_host_is_refused(start: Start, server_files: TlsFiles) -> None:
    # TEST-NET-1 of RFC 5737 is nobody's.
    with pytest.raises(FerryError, match=r"192\.0\.2\.1") as raised:
        await start(**tls_settings(server_files, listen=["192.0.2.1:0"]))
    assert raised.value.reason is Reason.CONFIG_INVALID


async def test_a_socket_that_a_dead_sidecar_left_is_replaced(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    sidecar = await start(insecure=True, api_socket=path)
    await get_migration(sidecar.channel(address=f"unix:{path}"))


async def test_a_socket_of_a_living_sidecar_stays_its_own(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    first = await start(insecure=True, api_socket=path)
    with pytest.raises(FerryError) as raised:
        await start(insecure=True, api_socket=path)
    assert raised.value.reason is Reason.ADDRESS_IN_USE
    await get_migration(first.channel(address=f"unix:{path}"))


async def test_a_file_in_the_place_of_a_socket_is_left_alone(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    path.write_text("precious")
    with pytest.raises(FerryError, match="no socket") as raised:
        await start(insecure=True, api_socket=path)
    assert raised.value.reason is Reason.CONFIG_INVALID
    assert path.read_text() == "precious"


async def test_a_socket_in_a_directory_that_does_not_exist_is_refused(start: Start, tmp_path: Path) -> None:
    with pytest.raises(FerryError, match="create it") as raised:
        await start(insecure=True, api_socket=tmp_path / "absent" / "api.sock")
    assert raised.value.reason is Reason.CONFIG_INVALID


async def test_certificates_that_cannot_be_read_stop_the_start(start: Start, server_files: TlsFiles) -> None:
    server_files.key.unlink()
    with pytest.raises(FerryError, match="private key") as raised:
        await start(**tls_settings(server_files))
    assert raised.value.reason is Reason.CONFIG_INVALID
