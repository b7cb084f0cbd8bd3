"""Roles: who may look, who may act, and who may have pages; and what becomes of those who may not."""

from __future__ import annotations

from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from small_sidecar import Start, error_of, get_layout, get_migration, probe, tls_settings

from certificates import Authority
from pageferry.channel import MAX_STREAMS
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.tls import TlsFiles
from pageferry.v1 import incoming_pb2, migration_pb2, migration_pb2_grpc, page_pb2, page_pb2_grpc
from pageferryd.access import Caller, Throng

pytestmark = pytest.mark.timeout(30)

MIGRATIONS = migration_pb2.DESCRIPTOR.services_by_name["MigrationService"]
LOOKING = {"Preflight", "ListGuests", "GetMigration", "ListMigrations", "WatchMigration", "ResolveMigration"}
DENIED = grpc.StatusCode.PERMISSION_DENIED


async def let_in(channel: grpc.aio.Channel, name: str, **fields: Any) -> Reason | None:
    """Call a method of the migration service; return the reason of a refusal, or None where it was let in."""
    request = getattr(migration_pb2, MIGRATIONS.methods_by_name[name].input_type.name)(**fields)
    call = getattr(migration_pb2_grpc.MigrationServiceStub(channel), name)(request, timeout=10)
    try:
        await (call.read() if name == "WatchMigration" else call)
    except grpc.aio.AioRpcError as error:
        reason = from_rpc(error, Reason.INTERNAL).reason
        # The servicer of these tests has two methods only; whoever hears of that was let in.
        return None if reason is Reason.INTERNAL else reason
    finally:
        call.cancel()
    return None


@pytest.mark.parametrize("name", sorted(MIGRATIONS.methods_by_name))
async def test_a_viewer_may_look_and_do_nothing_else(
    name: str, start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files, operators=["alice"], viewers=["Watcher", "alice"]))
    viewer = sidecar.channel(authority.write(tmp_path / "viewer", "watcher"), "host-a")
    operator = sidecar.channel(authority.write(tmp_path / "operator", "alice"), "host-a")
    assert await let_in(operator, name) is None
    assert await let_in(viewer, name) is (None if name in LOOKING else Reason.ROLE_MISSING)


async def test_a_viewer_may_see_what_is_in_doubt_and_decide_nothing(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files, operators=["alice"], viewers=["watcher"]))
    viewer = sidecar.channel(authority.write(tmp_path / "viewer", "watcher"), "host-a")
    operator = sidecar.channel(authority.write(tmp_path / "operator", "alice"), "host-a")
    for decision in (migration_pb2.DECISION_RUN_AT_SOURCE, migration_pb2.DECISION_GIVE_UP, 77):
        assert await let_in(viewer, "ResolveMigration", decision=decision) is Reason.ROLE_MISSING
        assert await let_in(operator, "ResolveMigration", decision=decision) is None


async def test_a_viewer_is_told_which_setting_it_lacks(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files, viewers=["watcher"]))
    viewer = sidecar.channel(authority.write(tmp_path / "viewer", "watcher"), "host-a")
    stub = migration_pb2_grpc.MigrationServiceStub(viewer)
    _, _, message = await error_of(stub.StartMigration(migration_pb2.StartMigrationRequest(), timeout=10))
    assert "operators" in message
    assert "watcher" in message
    # Where any host may be a peer, one that is there to look may not.
    for call in (probe(viewer), get_layout(viewer)):
        code, reason, message = await error_of(call)
        assert (code, reason) == (DENIED, Reason.ROLE_MISSING)
        assert "peers" in message


async def test_who_is_named_nowhere_has_no_more_rights_than_a_viewer_has(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files, viewers=["watcher"]))
    stranger = sidecar.channel(authority.write(tmp_path / "stranger", "mallory"), "host-a")
    for name in ("ListGuests", "StartMigration"):
        assert await let_in(stranger, name) is Reason.PEER_NOT_ALLOWED


async def test_refusals_are_counted_by_place_and_reason(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files, operators=["alice"], viewers=["watcher"], peers=["host-b"]))
    viewer = sidecar.channel(authority.write(tmp_path / "viewer", "watcher"), "host-a")
    peer = sidecar.channel(authority.write(tmp_path / "peer", "host-b"), "host-a")
    for _ in range(3):
        await let_in(viewer, "RegisterGuest")
        await error_of(probe(viewer))
    await get_migration(viewer)
    await error_of(get_migration(peer))
    assert sidecar.refusals.counts == {
        ("api", "ROLE_MISSING"): 3, ("peer", "PEER_NOT_ALLOWED"): 3, ("api", "PEER_NOT_ALLOWED"): 1,
    }  # fmt: skip


async def test_what_fails_for_another_reason_is_no_refusal(start: Start) -> None:
    sidecar = await start(insecure=True)
    sidecar.migrations.failure = FerryError(Reason.UNKNOWN_GUEST, "no such guest")
    await error_of(get_migration(sidecar.channel()))
    assert sidecar.refusals.counts == {}


async def test_a_vmm_that_names_foreign_memory_is_counted_as_such_whoever_asked_it(start: Start) -> None:
    sidecar = await start(insecure=True)
    sidecar.migrations.failure = FerryError(Reason.MEMORY_NOT_ITS_OWN, "/etc/shadow is not its memory")
    await error_of(get_migration(sidecar.channel()))
    assert sidecar.refusals.counts == {("vmm", "MEMORY_NOT_ITS_OWN"): 1}


async def test_the_request_of_a_caller_that_is_refused_is_not_even_received(
    start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    """Whoever has any certificate of the CA could otherwise make the host hold 80 MiB for each call."""
    sidecar = await start(**tls_settings(server_files, peers=["host-b"]))
    parsed: list[int] = []

    class Counting:
        @staticmethod
        def parse(data: bytes) -> Any:
            parsed.append(len(data))
            return incoming_pb2.HandOverRequest.FromString(data)

    async def hand_over(_request: Any, _context: Any) -> Any:
        return incoming_pb2.HandOverResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        hand_over, Counting.parse, incoming_pb2.HandOverResponse.SerializeToString
    )
    handlers = grpc.method_handlers_generic_handler("pageferry.v1.IncomingService", {"Other": handler})
    sidecar.grpc.server.add_generic_rpc_handlers((handlers,))
    for name, expected in (("mallory", 0), ("host-b", 1)):
        channel = sidecar.channel(authority.write(tmp_path / name, name), "host-a")
        call = channel.unary_unary("/pageferry.v1.IncomingService/Other")(bytes(8 << 20), timeout=10)
        assert await call.code() in (DENIED, grpc.StatusCode.INVALID_ARGUMENT)
        assert len(parsed) == expected


@pytest.mark.parametrize("service", ["FaultService", "NobodysService"])
async def test_what_is_for_nobody_over_the_network_is_refused(
    service: str, start: Start, server_files: TlsFiles, authority: Authority, tmp_path: Path
) -> None:
    sidecar = await start(**tls_settings(server_files))

    async def answer(_request: Any, _context: Any) -> bytes:
        return b""

    handlers = {"Call": grpc.unary_unary_rpc_method_handler(answer)}
    sidecar.grpc.server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(f"pageferry.v1.{service}", handlers),)
    )
    channel = sidecar.channel(authority.write(tmp_path / "client", "host-b"), "host-a")
    call = channel.unary_unary(f"/pageferry.v1.{service}/Call")(b"", timeout=10)
    assert (await error_of(call))[:2] == (DENIED, Reason.PEER_NOT_ALLOWED)


async def test_a_call_without_a_request_and_one_with_nonsense_are_refused(start: Start, log: StringIO) -> None:
    channel = (await start(insecure=True)).channel()
    method = "/pageferry.v1.MigrationService/GetMigration"
    empty = channel.stream_unary(method)(iter(()), timeout=10)
    nonsense = channel.unary_unary(method)(b"\xff" * 100, timeout=10)
    for call in (empty, nonsense):
        code, reason, message = await error_of(call)
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_ARGUMENT)
        assert "GetMigration" in message
    assert "Traceback" not in log.getvalue()


async def test_one_caller_with_too_many_calls_keeps_no_other_out() -> None:
    throng = Throng(most=3)
    mallory, alice = Caller(frozenset({"mallory"}), local=False), Caller(frozenset({"alice"}), local=False)
    with ExitStack() as under_way:
        for _ in range(3):
            under_way.enter_context(throng.one_more(mallory))
        with pytest.raises(FerryError, match="mallory") as refused, throng.one_more(mallory):
            pass
        assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        with throng.one_more(alice):
            pass
    with throng.one_more(mallory):
        pass
    assert not throng._under_way


async def test_a_connection_has_a_bounded_number_of_streams_and_others_go_on(start: Start) -> None:
    sidecar = await start(insecure=True)
    crowded, other = sidecar.channel(), sidecar.channel()
    stub = page_pb2_grpc.PageServiceStub(crowded)
    lanes = [stub.FetchPages(timeout=20) for _ in range(MAX_STREAMS)]
    for lane in lanes:
        await lane.write(page_pb2.FetchPagesRequest())
        assert await lane.read() is not grpc.aio.EOF
    one_more = stub.FetchPages(timeout=0.5)
    assert await one_more.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await get_migration(other)
    for lane in lanes:
        lane.cancel()
