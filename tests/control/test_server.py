"""The gRPC server over real sockets: how errors reach a caller, health, reflection, and draining."""

from __future__ import annotations

import asyncio
import json
from io import StringIO

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from small_sidecar import (
    NOT_SERVING,
    SERVING,
    Start,
    error_of,
    get_layout,
    get_migration,
    health,
)

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2, migration_pb2_grpc, page_pb2, page_pb2_grpc
from pageferryd.core.errors import PageRangeError
from pageferryd.server import SERVICES

pytestmark = pytest.mark.timeout(30)


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
