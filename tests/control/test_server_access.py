"""Who gets a connection, and which services they may then call."""

from __future__ import annotations

import stat
from io import StringIO
from pathlib import Path

import grpc
import pytest
from small_sidecar import (
    SERVING,
    Start,
    error_of,
    get_layout,
    get_migration,
    health,
    probe,
    tls_settings,
)

from certificates import Authority
from pageferry.errors import Reason
from pageferry.tls import TlsFiles
from pageferry.v1 import page_pb2_grpc

pytestmark = pytest.mark.timeout(30)


async def test_with_certificates_of_one_ca_both_sides_meet(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files))
    channel = sidecar.channel(authority.write(tmp_path / "client", "host-b"), "host-a")
    assert (await probe(channel)).host == "b"
    await get_migration(channel)
    assert await health(channel) == SERVING


@pytest.mark.parametrize("who", ["another CA", "an expired certificate", "no TLS at all", "another name expected"])
async def test_nobody_gets_in_with(
    who: str, start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files))
    directory, name = tmp_path / "client", "host-a"
    files: TlsFiles | None
    if who == "another CA":
        files = Authority("another CA").write(directory, "host-b")
        # The client trusts the server, so that only the server can be the one that refuses.
        files.ca.write_bytes(authority.certificate)
    elif who == "an expired certificate":
        files = authority.write(directory, "host-b", expired=True)
    elif who == "no TLS at all":
        files = None
    else:
        files, name = authority.write(directory, "host-b"), "host-c"
    code, _, _ = await error_of(probe(sidecar.channel(files, name)))
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_client_does_not_trust_a_server_of_another_ca(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files))
    files = authority.write(tmp_path / "client", "host-b")
    files.ca.write_bytes(Authority("another CA").certificate)
    assert (await error_of(probe(sidecar.channel(files, "host-a"))))[0] is grpc.StatusCode.UNAVAILABLE


async def test_renewed_certificates_serve_new_connections_without_a_restart(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files))
    client = authority.write(tmp_path / "client", "host-b")
    old = sidecar.channel(client, "host-a")
    await probe(old)

    newer = Authority("next CA")
    newer.write(tmp_path / "server", "renamed")
    new_client = newer.write(tmp_path / "new-client", "host-b")
    await probe(sidecar.channel(new_client, "renamed"))
    # A connection that exists keeps what it began with.
    await probe(old)


async def test_a_half_renewed_certificate_leaves_the_old_one_in_use(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path, log: StringIO
) -> None:
    sidecar = await start(**tls_settings(server_files))
    server_files.key.write_bytes(authority.issue("renamed").key)
    await probe(sidecar.channel(authority.write(tmp_path / "client", "host-b"), "host-a"))
    assert "keeping the last good ones" in log.getvalue()


async def test_peers_and_operators_are_told_apart_by_the_names_in_their_certificates(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files, peers=["Host-B"], operators=["alice"]))
    peer = sidecar.channel(authority.write(tmp_path / "peer", "host-b"), "host-a")
    operator = sidecar.channel(authority.write(tmp_path / "operator", "Alice"), "host-a")
    stranger = sidecar.channel(authority.write(tmp_path / "stranger", "mallory"), "host-a")
    denied = (grpc.StatusCode.PERMISSION_DENIED, Reason.PEER_NOT_ALLOWED)

    await probe(peer)
    await get_migration(operator)
    assert (await error_of(get_migration(peer)))[:2] == denied
    for call in (probe(operator), get_layout(operator), probe(stranger), get_migration(stranger)):
        assert (await error_of(call))[:2] == denied
    assert await health(stranger) == SERVING


async def test_a_stream_is_refused_before_its_handler_runs(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files, peers=["host-b"]))
    stranger = sidecar.channel(authority.write(tmp_path / "stranger", "mallory"), "host-a")
    call = page_pb2_grpc.PageServiceStub(stranger).FetchPages(timeout=10)
    assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
    assert not sidecar.pages.left.is_set()


async def test_a_common_name_counts_only_without_alternative_names(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files, peers=["host-b"]))
    plain = authority.write(tmp_path / "plain", common_name="host-b")
    disguised = authority.write(tmp_path / "disguised", "mallory", common_name="host-b")
    await probe(sidecar.channel(plain, "host-a"))
    assert (await error_of(probe(sidecar.channel(disguised, "host-a"))))[1] is Reason.PEER_NOT_ALLOWED


async def test_a_refused_caller_is_logged_once_however_often_it_calls(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path, log: StringIO
) -> None:
    sidecar = await start(**tls_settings(server_files, peers=["host-b"]))
    stranger = sidecar.channel(authority.write(tmp_path / "stranger", "mallory"), "host-a")
    for _ in range(5):
        await error_of(probe(stranger))
    refused = [line for line in log.getvalue().splitlines() if "caller refused" in line]
    assert len(refused) == 1
    assert "mallory" in refused[0]


async def test_the_local_socket_is_for_operators_without_a_certificate(
    start: Start, server_files: TlsFiles, tmp_path: Path
) -> None:
    path = tmp_path / "api.sock"
    sidecar = await start(**tls_settings(server_files, operators=["alice"], api_socket=path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(sidecar.bound) == 1
    local = sidecar.channel(address=f"unix:{path}")
    await get_migration(local)
    assert await health(local) == SERVING
    for call in (probe(local), get_layout(local)):
        code, reason, _ = await error_of(call)
        assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.PEER_NOT_ALLOWED)


async def test_in_insecure_mode_everything_may_be_called_over_the_local_socket_too(
    start: Start, tmp_path: Path
) -> None:
    path = tmp_path / "api.sock"
    sidecar = await start(insecure=True, api_socket=path)
    for address in (sidecar.bound[0], f"unix:{path}"):
        await get_migration(sidecar.channel(address=address))
        await probe(sidecar.channel(address=address))
