"""The client of a sidecar: its calls, their deadlines, and what it says when no sidecar answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_status import rpc_status

from certificates import Authority
from pageferry.client import SidecarClient, ended
from pageferry.errors import FerryError, Reason, to_status
from pageferry.tls import TlsFiles, server_credentials
from pageferry.v1 import migration_pb2 as pb
from pageferry.v1 import migration_pb2_grpc

STATES = [pb.MIGRATION_STATE_PREPARING, pb.MIGRATION_STATE_POSTCOPY, pb.MIGRATION_STATE_COMPLETED]
DEADLINE = 20


class Echo(migration_pb2_grpc.MigrationServiceServicer):
    """Remembers each request, and answers with what was asked for."""

    def __init__(self) -> None:
        self.requests: list = []
        self.watch_left = asyncio.Event()

    async def Preflight(self, request, context):
        self.requests.append(request)
        return pb.PreflightResponse(release="9.9")

    async def RegisterGuest(self, request, context):
        self.requests.append(request)
        return pb.RegisterGuestResponse(guest=pb.Guest(guest_id=request.guest_id))

    async def UnregisterGuest(self, request, context):
        self.requests.append(request)
        return pb.UnregisterGuestResponse()

    async def ListGuests(self, request, context):
        self.requests.append(request)
        return pb.ListGuestsResponse(guests=[pb.Guest(guest_id="web")])

    async def StartMigration(self, request, context):
        self.requests.append(request)
        return pb.StartMigrationResponse(migration=pb.Migration(migration_id="m", request_id=request.request_id))

    async def GetMigration(self, request, context):
        error = FerryError(Reason.UNKNOWN_MIGRATION, f"no migration {request.migration_id}")
        await context.abort_with_status(rpc_status.to_status(to_status(error)))

    async def ListMigrations(self, request, context):
        self.requests.append(request)
        return pb.ListMigrationsResponse(migrations=[pb.Migration(guest_id=request.guest_id)])

    async def CancelMigration(self, request, context):
        raise RuntimeError("a bug of the sidecar")

    async def ResumeMigration(self, request, context):
        await asyncio.Event().wait()

    async def SetLimits(self, request, context):
        self.requests.append(request)
        return pb.SetLimitsResponse(migration=pb.Migration(limits=request.limits))

    async def ResolveMigration(self, request, context):
        self.requests.append(request)
        return pb.ResolveMigrationResponse(
            ends=[pb.HandoverView(role=pb.ROLE_SOURCE), pb.HandoverView(role=pb.ROLE_DESTINATION)]
        )

    async def WatchMigration(self, request, context):
        try:
            if request.migration_id == "silent":
                await asyncio.Event().wait()
            for state in STATES:
                yield pb.WatchMigrationResponse(migration=pb.Migration(state=state))
                if request.migration_id == "cut":
                    return
                if request.migration_id == "endless":
                    await asyncio.Event().wait()
        finally:
            self.watch_left.set()


@asynccontextmanager
async def serving(servicer: Echo | None, address: str, tls: TlsFiles | None = None) -> AsyncIterator[str]:
    server = grpc.aio.server()
    if servicer is not None:
        migration_pb2_grpc.add_MigrationServiceServicer_to_server(servicer, server)
    if tls is None:
        server.add_insecure_port(address)
        port = 0
    else:
        port = server.add_secure_port(address, server_credentials(tls))
    await server.start()
    try:
        yield address.replace(":0", f":{port}")
    finally:
        await server.stop(None)


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def address(echo: Echo, tmp_path: Path) -> AsyncIterator[str]:
    async with serving(echo, f"unix:{tmp_path}/sidecar.sock") as where:
        yield where


@pytest.fixture
async def client(address: str) -> AsyncIterator[SidecarClient]:
    async with SidecarClient(address, None, timeout=DEADLINE) as opened:
        yield opened


async def test_every_call_carries_its_arguments(client, echo):
    limits = pb.Limits(push_bytes_per_second=7)
    policy = pb.Policy(on_loss=pb.ON_LOSS_KILL, loss_seconds=9, checksums=True)

    assert (await client.preflight("web", "b:1", "beta")).release == "9.9"
    assert (await client.register_guest("web", "/run/web.sock")).guest_id == "web"
    assert await client.unregister_guest("web") is None
    assert [guest.guest_id for guest in await client.list_guests()] == ["web"]
    started = await client.start_migration(
        "web", "b:1", request_id="r", destination_name="beta", limits=limits, policy=policy
    )
    assert started.request_id == "r"
    assert [found.guest_id for found in await client.list_migrations("web")] == ["web"]
    assert (await client.set_limits("m", limits)).limits == limits

    assert echo.requests == [
        pb.PreflightRequest(guest_id="web", destination_address="b:1", destination_name="beta"),
        pb.RegisterGuestRequest(guest_id="web", driver="vmm", vmm_address="/run/web.sock"),
        pb.UnregisterGuestRequest(guest_id="web"),
        pb.ListGuestsRequest(),
        pb.StartMigrationRequest(
            guest_id="web",
            destination_address="b:1",
            request_id="r",
            destination_name="beta",
            limits=limits,
            policy=policy,
        ),
        pb.ListMigrationsRequest(guest_id="web"),
        pb.SetLimitsRequest(migration_id="m", limits=limits),
    ]


async def test_a_start_without_a_policy_leaves_it_to_the_sidecars(client, echo):
    await client.start_migration("web", "b:1", request_id="r")

    assert not echo.requests[0].HasField("policy")


async def test_both_ends_are_shown_and_a_decision_is_carried_to_the_sidecar(client, echo):
    ends = await client.resolve_migration("m")
    await client.resolve_migration("m", pb.DECISION_RUN_AT_SOURCE, peer_fenced=True)

    assert [end.role for end in ends] == [pb.ROLE_SOURCE, pb.ROLE_DESTINATION]
    assert echo.requests == [
        pb.ResolveMigrationRequest(migration_id="m"),
        pb.ResolveMigrationRequest(migration_id="m", decision=pb.DECISION_RUN_AT_SOURCE, peer_fenced=True),
    ]


async def test_an_error_keeps_the_sidecars_reason_and_sentence(client):
    with pytest.raises(FerryError, match=r"^no migration m$") as caught:
        await client.get_migration("m")

    assert caught.value.reason is Reason.UNKNOWN_MIGRATION


@pytest.mark.filterwarnings("ignore")
async def test_a_bug_of_the_sidecar_is_an_internal_error(client):
    with pytest.raises(FerryError, match="a bug of the sidecar") as caught:
        await client.cancel_migration("m")

    assert caught.value.reason is Reason.INTERNAL


async def test_a_sidecar_that_never_answers_is_unreachable(address):
    async with SidecarClient(address, None, timeout=0.2) as client:
        with pytest.raises(FerryError, match="no sidecar answers") as caught:
            await client.resume_migration("m")

    assert caught.value.reason is Reason.SIDECAR_UNREACHABLE


async def test_no_sidecar_names_the_address_and_what_to_check(tmp_path):
    where = f"unix:{tmp_path}/absent.sock"
    async with SidecarClient(where, None) as client:
        with pytest.raises(FerryError, match="check that pageferryd runs there") as caught:
            await client.list_guests()

    assert caught.value.reason is Reason.SIDECAR_UNREACHABLE
    assert where in caught.value.message


async def test_a_server_that_is_no_sidecar_is_a_mismatch(tmp_path):
    async with serving(None, f"unix:{tmp_path}/other.sock") as where, SidecarClient(where, None) as client:
        with pytest.raises(FerryError, match="is it a current pageferryd") as caught:
            await client.list_guests()

    assert caught.value.reason is Reason.PROTOCOL_MISMATCH


async def test_a_watch_ends_with_the_migration(client):
    looks = [look async for look in client.watch_migration("m")]

    assert [look.state for look in looks] == STATES
    assert ended(looks[-1])
    assert not ended(looks[-2])


async def test_a_watch_that_ends_before_the_migration_is_an_error(client):
    looks = client.watch_migration("cut")

    assert (await anext(looks)).state == STATES[0]
    with pytest.raises(FerryError, match="watch it again") as caught:
        await anext(looks)
    assert caught.value.reason is Reason.SIDECAR_UNREACHABLE


async def test_a_watch_without_a_first_look_is_given_up(address):
    async with SidecarClient(address, None, timeout=0.2) as client:
        with pytest.raises(FerryError, match=r"no answer within 0\.2 s") as caught:
            await anext(client.watch_migration("silent"))

    assert caught.value.reason is Reason.SIDECAR_UNREACHABLE


async def test_a_watch_of_an_absent_sidecar_is_an_error(tmp_path):
    async with SidecarClient(f"unix:{tmp_path}/absent.sock", None) as client:
        with pytest.raises(FerryError) as caught:
            await anext(client.watch_migration("m"))

    assert caught.value.reason is Reason.SIDECAR_UNREACHABLE


async def test_later_looks_may_take_longer_than_a_call(address):
    async with (
        SidecarClient(address, None, timeout=1.0) as client,
        aclosing(client.watch_migration("endless")) as looks,
    ):
        await anext(looks)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(looks), 1.5)


async def test_a_watch_that_is_left_ends_at_the_sidecar_too(client, echo):
    async with aclosing(client.watch_migration("endless")) as looks:
        await anext(looks)

    await asyncio.wait_for(echo.watch_left.wait(), DEADLINE)


async def test_a_sidecar_is_known_by_its_certificate(echo, authority, tmp_path):
    files = authority.write(tmp_path / "alpha", "alpha")
    async with serving(echo, "127.0.0.1:0", files) as where, SidecarClient(where, files, "alpha") as client:
        assert len(await client.list_guests()) == 1


async def test_a_sidecar_with_another_name_is_not_talked_to(echo, authority, tmp_path):
    files = authority.write(tmp_path / "alpha", "alpha")
    async with serving(echo, "127.0.0.1:0", files) as where, SidecarClient(where, files, "beta", timeout=2) as client:
        with pytest.raises(FerryError, match="bear the right names") as caught:
            await client.list_guests()

    assert caught.value.reason is Reason.SIDECAR_UNREACHABLE
    assert echo.requests == []


async def test_a_client_that_was_not_entered_makes_no_calls():
    with pytest.raises(RuntimeError, match="async with"):
        await SidecarClient("127.0.0.1:7443", None).list_guests()


def test_an_address_that_is_none_is_refused_at_once():
    with pytest.raises(FerryError, match="is not an address"):
        SidecarClient("here", None)
