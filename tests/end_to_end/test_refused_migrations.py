"""What cannot be moved is refused with a reason; its guest runs on at its source, and nothing is left over."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from child import DEADLINE
from crossing import CANCELLED, FAILED, HANDING_OVER, POSTCOPY, PREPARING, STAY, Stage, until
from sidecar_process import Sidecar

from pageferry.client import SidecarClient
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import incoming_pb2, incoming_pb2_grpc, memory_pb2, page_pb2, page_pb2_grpc
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


@pytest.fixture(autouse=True)
async def nothing_left_over(alpha: Sidecar, beta: Sidecar, stage: Stage) -> AsyncIterator[None]:
    """Whatever a test here does, both hosts hold no more afterwards than before."""
    before = alpha.fds, beta.fds
    yield
    await stage.leave()

    async def as_before() -> bool:
        return alpha.fds <= before[0] and beta.fds <= before[1]

    try:
        await until(as_before, "both hosts hold what they held before")
    except AssertionError as error:
        raise AssertionError(f"{error}: {before}, now {(alpha.fds, beta.fds)}") from None
    assert [*alpha.left_behind, *beta.left_behind] == []


async def refused(call: Any, reason: Reason, code: grpc.StatusCode) -> FerryError:
    """Expect a refusal that says enough to a person as well."""
    with pytest.raises(FerryError) as caught:
        await call
    assert caught.value.reason is reason, caught.value
    assert caught.value.code is code
    assert len(caught.value.message) > 20
    return caught.value


async def test_an_unknown_guest_is_refused(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    client = await stage.client(alpha)
    call = client.start_migration("nobody", beta.address, request_id="one")
    await refused(call, Reason.UNKNOWN_GUEST, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize(
    ("guest_id", "path"),
    [("a/b", "/tmp/x.sock"), ("", "/tmp/x.sock"), ("web", "relative.sock"), ("web", "/" + "x" * 200)],
)
async def test_guests_that_cannot_be_are_not_registered(stage: Stage, alpha: Sidecar, guest_id: str, path: str) -> None:
    client = await stage.client(alpha)
    await refused(client.register_guest(guest_id, path), Reason.INVALID_ARGUMENT, grpc.StatusCode.INVALID_ARGUMENT)
    assert await client.list_guests() == []


async def test_a_guest_without_a_vmm_is_not_registered(stage: Stage, alpha: Sidecar) -> None:
    client = await stage.client(alpha)
    call = client.register_guest("web", str(stage.directory / "nobody.sock"))
    await refused(call, Reason.VMM_UNREACHABLE, grpc.StatusCode.UNAVAILABLE)
    assert await client.list_guests() == []


@pytest.mark.parametrize("how", ["describe-nothing", "describe-overlap", "describe-uneven", "describe-endless"])
async def test_a_vmm_that_describes_impossible_memory_is_not_registered(stage: Stage, alpha: Sidecar, how: str) -> None:
    client = await stage.client(alpha)
    vmm = await stage.guest("vmm", hostile=how)
    call = client.register_guest("web", vmm.socket_path)
    await refused(call, Reason.LAYOUT_INVALID, grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_guest_that_moves_already_is_busy_and_a_request_id_has_one_meaning(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile="attach-hangs")
    first = await crossing.start(request_id="once")
    await crossing.becomes(crossing.at_source, PREPARING)

    again = await crossing.start(request_id="once")
    assert again.migration_id == first.migration_id
    await refused(crossing.start(), Reason.GUEST_BUSY, grpc.StatusCode.FAILED_PRECONDITION)
    reused = crossing.start(request_id="once", address="127.0.0.1:9")
    await refused(reused, Reason.REQUEST_ID_REUSED, grpc.StatusCode.ALREADY_EXISTS)
    elsewhere = crossing.start(request_id="once", destination_name="gamma")
    await refused(elsewhere, Reason.REQUEST_ID_REUSED, grpc.StatusCode.ALREADY_EXISTS)
    busy = crossing.at_source.unregister_guest(crossing.guest_id)
    await refused(busy, Reason.GUEST_BUSY, grpc.StatusCode.FAILED_PRECONDITION)

    cancelled = await crossing.at_source.cancel_migration(first.migration_id)
    assert cancelled.state == CANCELLED
    # Over, and still the same request: what it started has ended.
    assert (await crossing.start(request_id="once")).state == CANCELLED
    await crossing.runs_at_source()


async def test_a_destination_that_nobody_answers_at_is_unreachable(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await stage.crossing(alpha, beta, waits=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        await crossing.start(address=f"127.0.0.1:{closed.getsockname()[1]}")
        await crossing.fails(Reason.DESTINATION_UNREACHABLE)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:0x50", "192.0.2.1:7443", "unix:relative"])
async def test_an_address_that_cannot_be_or_may_not_is_refused_at_once(
    stage: Stage, alpha: Sidecar, address: str
) -> None:
    client = await stage.client(alpha)
    call = client.start_migration("web", address, request_id="one")
    await refused(call, Reason.INVALID_ARGUMENT, grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_destination_without_the_guest_refuses(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await stage.crossing(alpha, beta, waits=False)
    await crossing.start()
    await crossing.fails(Reason.UNKNOWN_GUEST)


async def test_a_destination_where_the_guest_runs_already_refuses(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await stage.crossing(alpha, beta, waits=False)
    other = await stage.guest("other")
    await stage.register(crossing.at_destination, crossing.guest_id, other)
    await crossing.start()
    await crossing.fails(Reason.GUEST_NOT_INCOMING)
    await other.runs_on()


async def test_a_vmm_that_waits_for_a_guest_cannot_be_moved(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await stage.crossing(alpha, beta, "--incoming", waits=False)
    await crossing.start()
    migration = await crossing.becomes(crossing.at_source, FAILED)
    assert migration.error.reason == Reason.GUEST_NOT_RUNNING


async def test_a_vmm_with_other_memory_refuses(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await stage.crossing(alpha, beta, waiting_memory="8M")
    await crossing.start()
    await crossing.fails(Reason.LAYOUT_MISMATCH)
    # It was not touched, and can take another guest.
    assert (await crossing.waiting.status())["state"] == "incoming"


HANDOFFS = {
    "hand-no-fd": Reason.HANDOFF_NO_FD,
    "hand-many-fds": Reason.HANDOFF_NO_FD,
    "hand-nonsense": Reason.HANDOFF_MALFORMED,
    "hand-object": Reason.HANDOFF_MALFORMED,
    "hand-words": Reason.HANDOFF_MALFORMED,
    "hand-twice": Reason.HANDOFF_REGIONS,
    "hand-small": Reason.HANDOFF_REGIONS,
    "hand-crooked": Reason.HANDOFF_REGIONS,
    "hand-beyond": Reason.HANDOFF_REGIONS,
    "hand-pipe": Reason.HANDOFF_NO_FD,
    "attach-dies": Reason.VMM_UNREACHABLE,
    "attach-refuses": Reason.NO_SPACE,
    "load-dies": Reason.VMM_UNREACHABLE,
}


@pytest.mark.parametrize("how", HANDOFFS)
async def test_a_destination_vmm_that_fails_or_talks_nonsense_ends_the_migration_and_not_the_guest(
    stage: Stage, alpha: Sidecar, beta: Sidecar, how: str
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile=how, memory="8M")
    await crossing.start()
    # Its memory may tell that it has ended before its connection does.
    gone = [Reason.VMM_GONE] if how == "load-dies" else []
    await crossing.fails(HANDOFFS[how], *gone)
    there = await crossing.becomes(crossing.at_destination, FAILED)
    assert there.error.reason in (HANDOFFS[how], Reason.ABORTED_BY_SOURCE, Reason.VMM_GONE)
    await crossing.waiting.exit_code()


async def test_a_vmm_that_hands_over_in_pieces_or_never_runs_into_a_timeout(stage: Stage) -> None:
    limits = {"prepare_timeout": 0.5}
    source, destination = await asyncio.gather(
        stage.sidecar("source", limits=limits), stage.sidecar("destination", limits=limits)
    )
    for how in ("attach-hangs", "attach-lies", "hand-half"):
        crossing = await stage.crossing(source, destination, hostile=how, memory="8M")
        await crossing.start()
        await crossing.fails(Reason.HANDOFF_TIMEOUT)
        await crossing.waiting.exit_code()
        assert destination.left_behind == []


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("save-fails", Reason.VMM_FAILED),
        ("save-huge", Reason.VMM_FAILED),
        ("save-nonsense", Reason.INVALID_ARGUMENT),
    ],
)
async def test_a_source_vmm_that_cannot_save_its_state_runs_on(
    stage: Stage, alpha: Sidecar, beta: Sidecar, how: str, reason: Reason
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile_source=how, memory="8M")
    await crossing.start()
    await crossing.fails(reason)
    await crossing.waiting.exit_code()


async def test_a_source_vmm_that_dies_before_it_stands_still_takes_its_migration_along(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile_source="pause-dies", memory="8M")
    await crossing.start()
    left, came = await crossing.both_become(FAILED)
    assert left.error.reason == Reason.VMM_UNREACHABLE
    assert came.error.reason == Reason.ABORTED_BY_SOURCE
    await crossing.waiting.exit_code()


@pytest.mark.parametrize(
    ("hostile", "hostile_source", "state"),
    [("attach-hangs", None, PREPARING), ("load-hangs", None, HANDING_OVER), (None, "pause-hangs", HANDING_OVER)],
)
async def test_a_migration_can_be_cancelled_until_the_guest_was_handed_over(
    stage: Stage, alpha: Sidecar, beta: Sidecar, hostile: str | None, hostile_source: str | None, state: int
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile=hostile, hostile_source=hostile_source, memory="8M")
    await crossing.start()
    await crossing.becomes(crossing.at_source, state)
    await crossing.becomes(crossing.at_destination, PREPARING, HANDING_OVER)
    if hostile == "attach-hangs":
        # A VMM that was not asked for its memory yet is not ended.
        await crossing.waiting.event("attaching")
    cancelled = await crossing.at_source.cancel_migration(crossing.migration_id)
    assert cancelled.state == CANCELLED
    assert cancelled.error.reason == Reason.CANCELLED
    await crossing.runs_at_source()
    there = await crossing.becomes(crossing.at_destination, FAILED)
    assert there.error.reason == Reason.ABORTED_BY_SOURCE
    await crossing.waiting.exit_code()
    # Twice is not an error.
    again = await crossing.at_source.cancel_migration(crossing.migration_id)
    assert again.state == CANCELLED


async def test_a_guest_that_was_handed_over_cannot_be_taken_back(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await stage.crossing(alpha, beta, *STAY)
    await crossing.start(push_disabled=True)
    await crossing.both_become(POSTCOPY)
    call = crossing.at_source.cancel_migration(crossing.migration_id)
    await refused(call, Reason.ALREADY_COMMITTED, grpc.StatusCode.FAILED_PRECONDITION)
    call = crossing.at_destination.cancel_migration(crossing.migration_id)
    await refused(call, Reason.ILLEGAL_STATE, grpc.StatusCode.FAILED_PRECONDITION)
    call = crossing.at_source.resume_migration(crossing.migration_id)
    await refused(call, Reason.ILLEGAL_STATE, grpc.StatusCode.FAILED_PRECONDITION)
    async with grpc.aio.insecure_channel(beta.address) as channel:
        stub = incoming_pb2_grpc.IncomingServiceStub(channel)
        abort = incoming_pb2.AbortRequest(migration_id=crossing.migration_id, reason="too late")
        await rpc_refused(stub.Abort(abort, timeout=DEADLINE), Reason.ALREADY_COMMITTED)
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    await crossing.arrives()


async def test_a_destination_that_dies_before_the_commit_leaves_the_guest_at_its_source(
    stage: Stage, alpha: Sidecar
) -> None:
    destination = await stage.sidecar("destination")
    crossing = await stage.crossing(alpha, destination, hostile="load-hangs")
    await crossing.start()
    await crossing.becomes(crossing.at_source, HANDING_OVER)
    await crossing.becomes(crossing.at_destination, HANDING_OVER)
    destination.process.kill()
    await crossing.fails(Reason.DESTINATION_UNREACHABLE)


# Sidecars of another release


async def rpc_refused(call: Any, reason: Reason) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert from_rpc(caught.value, Reason.INTERNAL).reason is reason, caught.value


def prepare_request(**changes: Any) -> incoming_pb2.PrepareRequest:
    values = {
        "migration_id": secrets.token_hex(8),
        "guest_id": "web",
        "protocol_version": 1,
        "layout": memory_pb2.MemoryLayout(regions=[memory_pb2.MemoryRegion(size=16 << 20, page_size=4096)]),
        "page_address": "127.0.0.1:9",
        "source_name": "elsewhere",
        "token": bytes(32),
        "driver": "vmm",
        **changes,
    }
    return incoming_pb2.PrepareRequest(**values)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol_version": 2}, Reason.PROTOCOL_MISMATCH),
        ({"protocol_version": 0}, Reason.PROTOCOL_MISMATCH),
        ({"token": b"short"}, Reason.INVALID_ARGUMENT),
        ({"migration_id": "../../etc/cron.d/x"}, Reason.INVALID_ARGUMENT),
        ({"migration_id": "m" * 128}, Reason.INVALID_ARGUMENT),
        ({"migration_id": "é" * 16}, Reason.INVALID_ARGUMENT),
        ({"page_address": ""}, Reason.INVALID_ARGUMENT),
        ({"page_address": "nonsense"}, Reason.INVALID_ARGUMENT),
        ({"page_address": "127.0.0.1:9"}, Reason.SOURCE_UNREACHABLE),
        ({"layout": memory_pb2.MemoryLayout()}, Reason.LAYOUT_INVALID),
        ({"limits": pb.Limits(push_window_bytes=1)}, Reason.INVALID_ARGUMENT),
        ({"driver": "qemu"}, Reason.VMM_MISMATCH),
    ],
)
async def test_a_destination_checks_whatever_a_source_says(
    stage: Stage, beta: Sidecar, changes: dict[str, Any], reason: Reason
) -> None:
    waiting = await stage.guest("waiting", "--incoming")
    await stage.register(await stage.client(beta), "web", waiting)
    async with grpc.aio.insecure_channel(beta.address) as channel:
        stub = incoming_pb2_grpc.IncomingServiceStub(channel)
        await rpc_refused(stub.Prepare(prepare_request(**changes), timeout=DEADLINE), reason)


async def test_pages_are_for_who_has_the_token_and_not_before_the_guest_stands_still(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile="attach-hangs")
    await crossing.start()
    await crossing.becomes(crossing.at_destination, PREPARING)
    async with grpc.aio.insecure_channel(alpha.address) as channel:
        stub = page_pb2_grpc.PageServiceStub(channel)
        for migration, token, reason in (
            (crossing.migration_id, bytes(32), Reason.TOKEN_INVALID),
            (crossing.migration_id, b"", Reason.TOKEN_INVALID),
            ("another", bytes(32), Reason.UNKNOWN_MIGRATION),
        ):
            shown = (("pageferry-migration", migration), ("pageferry-token-bin", token))
            for call, request in (
                (stub.GetLayout, page_pb2.GetLayoutRequest()),
                (stub.Complete, page_pb2.CompleteRequest(pages=4096)),
            ):
                await rpc_refused(call(request, metadata=shown, timeout=DEADLINE), reason)
            fetch = stub.FetchPages(metadata=shown, timeout=DEADLINE)
            await rpc_refused(fetch.read(), reason)
    await crossing.at_source.cancel_migration(crossing.migration_id)
    await crossing.runs_at_source()


class LaterDestination(incoming_pb2_grpc.IncomingServiceServicer):
    """Speaks a version that is not ours."""

    async def Probe(self, request: incoming_pb2.ProbeRequest, context: Any) -> incoming_pb2.ProbeResponse:
        return incoming_pb2.ProbeResponse(protocol_version=request.protocol_version + 1, release="99.0", host="later")


async def test_a_destination_of_another_version_is_not_used(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    server = grpc.aio.server()
    incoming_pb2_grpc.add_IncomingServiceServicer_to_server(LaterDestination(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        crossing = await stage.crossing(alpha, beta, waits=False)
        await crossing.start(address=f"127.0.0.1:{port}")
        failed = await crossing.fails(Reason.PROTOCOL_MISMATCH)
        assert "99.0" in failed.error.message
    finally:
        await server.stop(None)


async def test_something_that_is_no_sidecar_is_not_used(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await stage.crossing(alpha, beta, waits=False)
    await crossing.start(address=beta.http)
    await crossing.fails(Reason.DESTINATION_UNREACHABLE)


async def test_unknown_migrations_are_unknown(stage: Stage, alpha: Sidecar) -> None:
    client: SidecarClient = await stage.client(alpha)
    for call in (
        client.get_migration("x"),
        client.cancel_migration("x"),
        client.resume_migration("x"),
        client.set_limits("x", pb.Limits()),
        anext(client.watch_migration("x")),
    ):
        await refused(call, Reason.UNKNOWN_MIGRATION, grpc.StatusCode.NOT_FOUND)
