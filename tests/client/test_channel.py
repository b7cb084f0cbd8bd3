"""Channels: where they go, what they check, and that two of them are two connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from certificates import Authority
from pageferry.channel import CHANNEL_OPTIONS, SERVER_OPTIONS, open_channel
from pageferry.errors import FerryError, Reason
from pageferry.tls import TlsFiles, server_credentials

SERVING = health_pb2.HealthCheckResponse.SERVING


class Server:
    """Answers health checks, with or without TLS, and notes who asked."""

    def __init__(self) -> None:
        self.peers: set[str] = set()
        self.grpc = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = health.aio.HealthServicer()
        answer = servicer.Check

        async def check(request: object, context: grpc.aio.ServicerContext) -> object:
            self.peers.add(context.peer())
            return await answer(request, context)

        servicer.Check = check
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self.grpc)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    await server.grpc.stop(None)


async def ask(channel: grpc.aio.Channel) -> int:
    try:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status
    finally:
        await channel.close()


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return Authority().write(tmp_path / "tls", "host-a")


async def test_a_channel_reaches_a_port(server: Server) -> None:
    port = server.grpc.add_insecure_port("127.0.0.1:0")
    await server.grpc.start()
    assert await ask(open_channel(f"127.0.0.1:{port}", None)) == SERVING


async def test_a_channel_reaches_a_unix_socket_however_it_is_written(server: Server, tmp_path: Path) -> None:
    server.grpc.add_insecure_port(f"unix:{tmp_path}/s")
    await server.grpc.start()
    assert await ask(open_channel(f"unix:{tmp_path}/s", None)) == SERVING
    assert await ask(open_channel(f"unix://{tmp_path}/s", None)) == SERVING


async def test_two_channels_are_two_connections(server: Server) -> None:
    port = server.grpc.add_insecure_port("127.0.0.1:0")
    await server.grpc.start()
    one, other = (open_channel(f"127.0.0.1:{port}", None) for _ in range(2))
    await asyncio.gather(ask(one), ask(other))
    assert len(server.peers) == 2


async def test_a_proxy_in_the_environment_is_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 (discard) answers nobody.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    port = server.grpc.add_insecure_port("127.0.0.1:0")
    await server.grpc.start()
    assert await ask(open_channel(f"127.0.0.1:{port}", None)) == SERVING


async def test_the_certificate_must_bear_the_expected_name_or_the_address(server: Server, files: TlsFiles) -> None:
    port = server.grpc.add_secure_port("127.0.0.1:0", server_credentials(files))
    await server.grpc.start()
    for name in ("host-a", None, ""):
        assert await ask(open_channel(f"127.0.0.1:{port}", files, name)) == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ask(open_channel(f"127.0.0.1:{port}", files, "host-b"))
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_tls_works_over_a_unix_socket_with_an_expected_name(
    server: Server, files: TlsFiles, tmp_path: Path
) -> None:
    server.grpc.add_secure_port(f"unix:{tmp_path}/s", server_credentials(files))
    await server.grpc.start()
    assert await ask(open_channel(f"unix:{tmp_path}/s", files, "host-a")) == SERVING


async def test_tls_over_a_unix_socket_without_a_name_is_refused(files: TlsFiles) -> None:
    with pytest.raises(FerryError, match="give the expected name") as raised:
        open_channel("unix:/run/a.sock", files)
    assert raised.value.reason is Reason.INVALID_ARGUMENT


async def test_a_wrong_address_is_refused_at_once() -> None:
    with pytest.raises(FerryError) as raised:
        open_channel("nowhere", None)
    assert raised.value.reason is Reason.INVALID_ARGUMENT


async def test_options_of_the_caller_win(server: Server) -> None:
    port = server.grpc.add_insecure_port("127.0.0.1:0")
    await server.grpc.start()
    channel = open_channel(f"127.0.0.1:{port}", None, options=[("grpc.max_receive_message_length", 1)])
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ask(channel)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_servers_allow_the_keepalive_that_clients_send() -> None:
    client, server = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    assert int(server["grpc.http2.min_ping_interval_without_data_ms"]) < int(client["grpc.keepalive_time_ms"])
    assert client["grpc.keepalive_permit_without_calls"] == 1
