"""The gRPC server over real sockets: who gets in, what they may call, how errors reach them, and where it listens."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from certificates import Authority
from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.tls import TlsFiles
from pageferry.v1 import (
    incoming_pb2,
    incoming_pb2_grpc,
    migration_pb2,
    migration_pb2_grpc,
    page_pb2,
    page_pb2_grpc,
)
from pageferryd import logs
from pageferryd.config import Settings, Tls
from pageferryd.core.errors import PageRangeError
from pageferryd.server import SERVICES, GrpcServer

pytestmark = pytest.mark.timeout(30)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Migrations(migration_pb2_grpc.MigrationServiceServicer):
    """Does what a test says when its methods are called."""

    failure: BaseException | None = None

    async def GetMigration(self, request: Any, context: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        return migration_pb2.GetMigrationResponse()

    async def WatchMigration(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield migration_pb2.WatchMigrationResponse()
        if self.failure is not None:
            raise self.failure
        yield migration_pb2.WatchMigrationResponse()


class Incoming(incoming_pb2_grpc.IncomingServiceServicer):
    async def Probe(self, request: Any, context: Any) -> Any:
        return incoming_pb2.ProbeResponse(host="b")


class Pages(page_pb2_grpc.PageServiceServicer):
    """A page service in the coroutine style, with `read` and `write` and with an iterator."""

    failure: BaseException | None = None

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def FetchPages(self, requests: Any, context: Any) -> None:
        try:
            async for _ in requests:
                await context.write(page_pb2.FetchPagesResponse())
                if self.failure is not None:
                    raise self.failure
        finally:
            self.left.set()

    async def GetLayout(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")


class Sidecar:
    """A started server with servicers of the test, and ways to call it."""

    def __init__(self, settings: Settings) -> None:
        self.grpc = GrpcServer(settings)
        self.migrations, self.pages = Migrations(), Pages()
        migration_pb2_grpc.add_MigrationServiceServicer_to_server(self.migrations, self.grpc.server)
        incoming_pb2_grpc.add_IncomingServiceServicer_to_server(Incoming(), self.grpc.server)
        page_pb2_grpc.add_PageServiceServicer_to_server(self.pages, self.grpc.server)
        self.bound: list[str] = []
        self.channels: list[grpc.aio.Channel] = []

    def channel(self, files: TlsFiles | None = None, name: str | None = None, address: str = "") -> grpc.aio.Channel:
        channel = open_channel(address or self.bound[0], files, name)
        self.channels.append(channel)
        return channel

    async def stop(self) -> None:
        for channel in self.channels:
            await channel.close()
        await self.grpc.stop(0)


Start = Callable[..., Awaitable[Sidecar]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[Sidecar] = []

    async def start_sidecar(**settings: Any) -> Sidecar:
        sidecar = Sidecar(Settings(**{"host": "a", "listen": ["127.0.0.1:0"], **settings}))
        started.append(sidecar)
        sidecar.bound = await sidecar.grpc.start()
        return sidecar

    yield start_sidecar
    for sidecar in started:
        await sidecar.stop()


@pytest.fixture
def log() -> Iterator[StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = StringIO()
    logs.configure("json", "debug", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def server_files(tmp_path: Path, authority: Authority) -> TlsFiles:
    return authority.write(tmp_path / "server", "host-a")


def tls_settings(files: TlsFiles, **more: Any) -> dict[str, Any]:
    return {"tls": Tls(ca=files.ca, certificate=files.certificate, key=files.key), **more}


async def get_migration(channel: grpc.aio.Channel) -> Any:
    return await migration_pb2_grpc.MigrationServiceStub(channel).GetMigration(
        migration_pb2.GetMigrationRequest(), timeout=10
    )


async def probe(channel: grpc.aio.Channel) -> Any:
    return await incoming_pb2_grpc.IncomingServiceStub(channel).Probe(incoming_pb2.ProbeRequest(), timeout=10)


async def get_layout(channel: grpc.aio.Channel) -> Any:
    return await page_pb2_grpc.PageServiceStub(channel).GetLayout(page_pb2.GetLayoutRequest(), timeout=10)


async def health(channel: grpc.aio.Channel, service: str = "") -> Any:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return answer.status


async def error_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, Reason, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    ours = from_rpc(raised.value, Reason.SIDECAR_UNREACHABLE)
    return raised.value.code(), ours.reason, ours.message


# Errors


async def test_an_error_of_a_handler_reaches_the_caller_with_its_code_reason_and_sentence(start: Start) -> None:
    sidecar = await start(insecure=True)
    sidecar.migrations.failure = FerryError(Reason.UNKNOWN_GUEST, "no guest is called köln; list them")
    expected = (grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_GUEST, "no guest is called köln; list them")
    assert await error_of(get_migration(sidecar.channel())) == expected


async def test_an_error_of_the_core_keeps_its_reason(start: Start) -> None:
    sidecar = await start(insecure=True)
    sidecar.migrations.failure = PageRangeError("page 7 of 3")
    expected = (grpc.StatusCode.OUT_OF_RANGE, Reason.PAGE_OUT_OF_RANGE, "page 7 of 3")
    assert await error_of(get_migration(sidecar.channel())) == expected


async def test_a_bug_is_logged_with_its_traceback_and_tells_the_caller_nothing_of_it(
    start: Start, log: StringIO
) -> None:
    sidecar = await start(insecure=True)
    sidecar.migrations.failure = ZeroDivisionError("the inner life")
    code, reason, message = await error_of(get_migration(sidecar.channel()))
    assert (code, reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)
    assert "the inner life" not in message
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    (failed,) = [line for line in lines if line["event"] == "call failed"]
    assert failed["method"] == "/pageferry.v1.MigrationService/GetMigration"
    assert "ZeroDivisionError: the inner life" in failed["exception"]


async def test_an_endless_message_is_cut_so_that_it_fits_a_status(start: Start) -> None:
    sidecar = await start(insecure=True)
    sidecar.migrations.failure = FerryError(Reason.GUEST_BUSY, "ß" * 100_000)
    _, reason, message = await error_of(get_migration(sidecar.channel()))
    assert reason is Reason.GUEST_BUSY
    assert 0 < len(message) < 1_024


async def test_a_generator_sends_its_messages_and_then_its_error(start: Start) -> None:
    sidecar = await start(insecure=True)
    sidecar.migrations.failure = FerryError(Reason.SHUTTING_DOWN, "come back later")
    messages = []

    async def watch() -> None:
        stub = migration_pb2_grpc.MigrationServiceStub(sidecar.channel())
        async for message in stub.WatchMigration(migration_pb2.WatchMigrationRequest(), timeout=10):
            messages.append(message)  # noqa: PERF401 - what came before the error counts

    code, reason, _ = await error_of(watch())
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, Reason.SHUTTING_DOWN)
    assert len(messages) == 1


async def test_a_generator_without_an_error_ends_its_stream_well(start: Start) -> None:
    sidecar = await start(insecure=True)
    stub = migration_pb2_grpc.MigrationServiceStub(sidecar.channel())
    messages = [m async for m in stub.WatchMigration(migration_pb2.WatchMigrationRequest(), timeout=10)]
    assert len(messages) == 2


async def test_a_lane_in_coroutine_style_answers_and_carries_its_error(start: Start) -> None:
    sidecar = await start(insecure=True)
    call = page_pb2_grpc.PageServiceStub(sidecar.channel()).FetchPages(timeout=10)
    for _ in range(3):
        await call.write(page_pb2.FetchPagesRequest())
        assert isinstance(await call.read(), page_pb2.FetchPagesResponse)
    sidecar.pages.failure = FerryError(Reason.TOKEN_INVALID, "this token is of no migration")
    await call.write(page_pb2.FetchPagesRequest())

    async def drain() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass
        # Reading to the end of a failed call may end quietly.
        assert await call.code() is not grpc.StatusCode.OK
        raise grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )

    assert (await error_of(drain()))[:2] == (grpc.StatusCode.PERMISSION_DENIED, Reason.TOKEN_INVALID)


async def test_a_lane_that_its_caller_drops_is_left_without_a_word_in_the_log(start: Start, log: StringIO) -> None:
    sidecar = await start(insecure=True)
    call = page_pb2_grpc.PageServiceStub(sidecar.channel()).FetchPages()
    await call.write(page_pb2.FetchPagesRequest())
    await call.read()
    call.cancel()
    await asyncio.wait_for(sidecar.pages.left.wait(), 10)
    assert await health(sidecar.channel()) == SERVING
    assert "call failed" not in log.getvalue()


async def test_a_status_that_a_handler_chose_itself_passes(start: Start) -> None:
    sidecar = await start(insecure=True)
    code, _, message = await error_of(get_layout(sidecar.channel()))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "not here" in message


async def test_a_method_that_nobody_serves_is_unimplemented(start: Start) -> None:
    sidecar = await start(insecure=True)
    call = sidecar.channel().unary_unary("/pageferry.v1.MigrationService/NoSuchMethod")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(b"", timeout=10)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Health and reflection


async def test_health_says_serving_until_told_otherwise(start: Start) -> None:
    sidecar = await start(insecure=True)
    channel = sidecar.channel()
    assert [await health(channel, name) for name in ("", *SERVICES)] == [SERVING] * 4
    await sidecar.grpc.set_serving(False)
    assert [await health(channel, name) for name in ("", *SERVICES)] == [NOT_SERVING] * 4


async def test_a_stop_says_not_serving_and_lets_a_call_end(start: Start) -> None:
    sidecar = await start(insecure=True)
    channel = sidecar.channel()
    call = page_pb2_grpc.PageServiceStub(channel).FetchPages()
    await call.write(page_pb2.FetchPagesRequest())
    await call.read()
    seen = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert (await seen.read()).status == SERVING
    stopping = asyncio.ensure_future(sidecar.grpc.stop(20))
    assert (await seen.read()).status == NOT_SERVING
    seen.cancel()
    await call.write(page_pb2.FetchPagesRequest())
    assert isinstance(await call.read(), page_pb2.FetchPagesResponse)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    await asyncio.wait_for(stopping, 10)


async def test_reflection_lists_all_services_and_shows_their_methods(start: Start) -> None:
    sidecar = await start(insecure=True)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services="*"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="pageferry.v1.PageService"),
    ]
    stub = reflection_pb2_grpc.ServerReflectionStub(sidecar.channel())
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asked), timeout=10)]
    names = {service.name for service in listed.list_services_response.service}
    assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert any(b"FetchPages" in file for file in described.file_descriptor_response.file_descriptor_proto)


# Who may call


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


# Where it listens


async def test_addresses_come_back_in_their_order_with_the_ports_that_were_taken(start: Start, tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/grpc.sock"
    sidecar = await start(insecure=True, listen=["127.0.0.1:0", path, "127.0.0.1:0"])
    first, second, third = sidecar.bound
    assert second == path
    assert first != third
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
