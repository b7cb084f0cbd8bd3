"""The page service over a real socket and a child's real memory: who is served, what, and how much of it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
from held_memory import DATA, HOLE, PAGE, ZERO, InProcess, content

from certificates import Authority
from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.tls import TlsFiles
from pageferry.v1 import memory_pb2, page_pb2, page_pb2_grpc
from pageferryd.config import Settings, Tls
from pageferryd.core.checksums import checksums_of
from pageferryd.core.layout import Layout, Region
from pageferryd.core.requests import MAX_CREDIT, MAX_FETCH_PAGES, MAX_PUSH_RUNS
from pageferryd.server import GrpcServer
from pageferryd.source.answers import PUSH_MESSAGE_BYTES
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import PageService
from pageferryd.source.served import Access, Served

pytestmark = pytest.mark.root

TOKEN = b"t" * 32
PLAN = DATA * 200 + HOLE * 100 + ZERO * 100 + (DATA + ZERO) * 50
PAGES = len(PLAN)
DEADLINE = 10.0


class Source:
    """A server with one guest, and calls to it by the generated stubs, as anybody may make them."""

    def __init__(self, settings: Settings, held: InProcess) -> None:
        self.layout = Layout([Region(0, 150 * PAGE), Region(1 << 32, (PAGES - 150) * PAGE)])
        locations = [held.location(0), held.location(150 * PAGE)]
        memory = SourceMemory.open(self.layout, locations, held.pid)
        self.completed = asyncio.Event()
        self.served = Served("m", TOKEN, "B", memory, self.layout, self.completed.set)
        self.pages = PageService(secure=not settings.insecure)
        self.pages.offer(self.served)
        self.server = GrpcServer(settings)
        self.pages.add_to(self.server.server)
        self.address = ""

    async def start(self) -> None:
        (self.address,) = await self.server.start()


class Caller:
    """One that calls the page service."""

    def __init__(
        self, source: Source, files: TlsFiles | None = None, migration: str = "m", token: bytes = TOKEN
    ) -> None:
        self._channel = open_channel(source.address, files, "a" if files else None)
        self._stub = page_pb2_grpc.PageServiceStub(self._channel)
        self._metadata = (("pageferry-migration", migration), ("pageferry-token-bin", token))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def layout(self) -> Any:
        return await _told(self._stub.GetLayout(page_pb2.GetLayoutRequest(), metadata=self._metadata, timeout=DEADLINE))

    async def complete(self, pages: int = PAGES) -> None:
        request = page_pb2.CompleteRequest(pages=pages)
        await _told(self._stub.Complete(request, metadata=self._metadata, timeout=DEADLINE))

    async def fetch(self, *runs: tuple[int, int]) -> Any:
        """Return the answer to one request."""
        call = self._stub.FetchPages(metadata=self._metadata, timeout=DEADLINE)
        request = page_pb2.FetchPagesRequest(first_pages=[r[0] for r in runs], page_counts=[r[1] for r in runs])
        return await _told(_ask(call, request))

    async def push(self, credit: int, *runs: tuple[int, int]) -> list[Any]:
        """Return the answers to one request."""
        call = self._stub.PushPages(metadata=self._metadata, timeout=DEADLINE)
        request = page_pb2.PushPagesRequest(
            first_pages=[r[0] for r in runs], page_counts=[r[1] for r in runs], credit_bytes=credit
        )
        answers = [await _told(_ask(call, request))]
        while not answers[-1].last:
            answers.append(await _told(call.read()))
        call.cancel()
        return answers

    async def raw(self, method: str, message: bytes) -> None:
        """Send a message as it is, and read until the call ends."""
        call: Any = self._channel.stream_stream(f"/pageferry.v1.PageService/{method}")
        stream = call(metadata=self._metadata, timeout=DEADLINE)
        await _told(_ask(stream, message))


async def _ask(call: Any, request: Any) -> Any:
    await call.write(request)
    answer = await call.read()
    if answer is grpc.aio.EOF:
        status = grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )
        raise status
    return answer


async def _told(awaitable: Any) -> Any:
    try:
        return await awaitable
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, Reason.INTERNAL) from error


async def reason_of(awaitable: Any) -> Reason:
    with pytest.raises(FerryError) as refused:
        await awaitable
    return refused.value.reason


def listed(*answers: Any) -> list[int]:
    return [
        page
        for answer in answers
        for first, pages in zip(answer.first_pages, answer.page_counts, strict=True)
        for page in range(first, first + pages)
    ]


def rebuilt(*answers: Any) -> bytes:
    """Put the pages of answers end to end."""
    out = b""
    for answer in answers:
        data, at = answer.data, 0
        for pages, kind in zip(answer.page_counts, answer.kinds, strict=True):
            size = pages * PAGE
            out += data[at : at + size] if kind == memory_pb2.PAGE_KIND_RAW else bytes(size)
            at += size if kind == memory_pb2.PAGE_KIND_RAW else 0
        assert at == len(data)
    return out


@pytest.fixture(scope="module")
def held() -> Iterator[InProcess]:
    one = InProcess(PLAN)
    yield one
    one.close()


@pytest.fixture
async def source(held: InProcess) -> AsyncIterator[Source]:
    one = Source(Settings(host="a", listen=["127.0.0.1:0"], insecure=True), held)
    await one.start()
    one.served.open()
    yield one
    await one.server.stop(0)
    one.pages.withdraw("m")


@pytest.fixture
async def caller(source: Source) -> AsyncIterator[Caller]:
    async with Caller(source) as one:
        yield one


async def test_the_layout_is_told_with_every_region(source: Source, caller: Caller) -> None:
    source.served.access = Access.CLOSED
    regions = (await caller.layout()).layout.regions
    assert [(one.guest_address, one.size, one.page_size) for one in regions] == [
        (0, 150 * PAGE, PAGE), (1 << 32, (PAGES - 150) * PAGE, PAGE),
    ]  # fmt: skip


async def test_pages_are_fetched_in_the_order_asked_for_across_regions(caller: Caller) -> None:
    answer = await caller.fetch((148, 4), (3, 1), (250, 1), (499, 1))
    assert listed(answer) == [148, 149, 150, 151, 3, 250, 499]
    whole = content(PLAN)
    assert rebuilt(answer) == b"".join(whole[page * PAGE : (page + 1) * PAGE] for page in listed(answer))
    assert not answer.data.endswith(bytes(PAGE))


async def test_as_many_pages_as_a_request_may_have_are_answered_at_once(caller: Caller) -> None:
    answer = await caller.fetch((0, 500), (0, MAX_FETCH_PAGES - 500))
    assert len(listed(answer)) == MAX_FETCH_PAGES
    assert rebuilt(answer)[: PAGES * PAGE] == content(PLAN)


@pytest.mark.parametrize("credit_pages", [1, 7, 32, 33, 100, 250])
async def test_credit_is_respected_to_the_page_and_zeroes_cost_none(
    source: Source, caller: Caller, credit_pages: int
) -> None:
    answers = await caller.push(credit_pages * PAGE, (0, PAGES))
    assert sum(len(answer.data) for answer in answers) == credit_pages * PAGE
    pages = listed(*answers)
    assert pages == list(range(len(pages)))
    assert rebuilt(*answers) == content(PLAN)[: len(pages) * PAGE]
    # It goes on over zeroes until a page comes that would cost.
    assert len(pages) == PAGES or PLAN[len(pages)] == DATA
    assert source.served.bytes["push"] == credit_pages * PAGE
    assert all(len(answer.data) <= PUSH_MESSAGE_BYTES for answer in answers)


@pytest.mark.parametrize("odd", [1, 4095])
async def test_credit_for_a_part_of_a_page_pays_for_none(caller: Caller, odd: int) -> None:
    answers = await caller.push(2 * PAGE + odd, (0, 10))
    assert listed(*answers) == [0, 1]


async def test_all_of_a_request_is_answered_where_credit_is_enough(caller: Caller) -> None:
    answers = await caller.push(MAX_CREDIT, (400, 100), (0, 400))
    assert listed(*answers) == [*range(400, 500), *range(400)]
    assert [answer.last for answer in answers] == [False] * (len(answers) - 1) + [True]


async def test_zeroes_alone_come_in_one_answer_without_bytes(caller: Caller) -> None:
    (answer,) = await caller.push(PAGE, (200, 200))
    assert len(listed(answer)) == 200
    assert answer.data == b""


async def test_each_raw_page_carries_its_checksum_where_the_policy_asks_for_them(
    source: Source, caller: Caller
) -> None:
    source.served.checksums = True
    answers = [await caller.fetch((7, 1)), await caller.fetch((148, 4), (250, 1), (400, 6), (199, 2))]
    answers += await caller.push(150 * PAGE, (0, PAGES))
    for answer in answers:
        column = struct.pack(f"<{len(answer.checksums)}Q", *answer.checksums)
        assert len(answer.checksums) == len(answer.data) // PAGE
        assert column == checksums_of([answer.data])
    assert sum(len(answer.checksums) for answer in answers) == 1 + (4 + 3 + 1) + 150


async def test_no_page_carries_a_checksum_otherwise(caller: Caller) -> None:
    answers = [await caller.fetch((7, 1)), await caller.fetch((148, 4)), *await caller.push(150 * PAGE, (0, PAGES))]
    assert all(answer.data and not answer.checksums for answer in answers)


async def test_nothing_is_read_before_the_guest_stands_still(source: Source, caller: Caller) -> None:
    source.served.access = Access.CLOSED
    assert await reason_of(caller.fetch((0, 1))) is Reason.ILLEGAL_STATE
    assert await reason_of(caller.push(PAGE, (200, 1))) is Reason.ILLEGAL_STATE
    assert await reason_of(caller.complete()) is Reason.ILLEGAL_STATE
    assert source.served.pages == {}
    assert not source.completed.is_set()


@pytest.mark.parametrize("run", [(PAGES, 1), (PAGES - 1, 2), (2**64 - 1, 1), (2**63, 2), (0, 501)])
async def test_pages_outside_the_guest_are_refused(caller: Caller, run: tuple[int, int]) -> None:
    assert await reason_of(caller.fetch(run)) is Reason.PAGE_OUT_OF_RANGE
    assert await reason_of(caller.push(PAGE, run)) is Reason.PAGE_OUT_OF_RANGE


async def test_a_run_as_long_as_can_be_written_is_refused(caller: Caller) -> None:
    assert await reason_of(caller.push(PAGE, (0, 2**32 - 1))) is Reason.PAGE_OUT_OF_RANGE


async def test_requests_beyond_their_bounds_are_refused(caller: Caller) -> None:
    assert await reason_of(caller.fetch((0, MAX_FETCH_PAGES + 1))) is Reason.MALFORMED_PAGES
    assert await reason_of(caller.fetch()) is Reason.MALFORMED_PAGES
    assert await reason_of(caller.push(PAGE - 1, (0, 1))) is Reason.MALFORMED_PAGES
    assert await reason_of(caller.push(MAX_CREDIT + 1, (0, 1))) is Reason.MALFORMED_PAGES
    assert await reason_of(caller.push(PAGE, *[(0, 1)] * (MAX_PUSH_RUNS + 1))) is Reason.MALFORMED_PAGES


@pytest.mark.parametrize("method", ["FetchPages", "PushPages"])
@pytest.mark.parametrize(
    "message", [b"", b"\xff" * 20, b"\x0a\x08", b"\x0a\x08" + bytes(8), b"\x0a\x08" + bytes(8) + b"\x12\x02\0\0"]
)
async def test_messages_that_do_not_add_up_are_refused(caller: Caller, method: str, message: bytes) -> None:
    assert await reason_of(caller.raw(method, message)) is Reason.MALFORMED_PAGES


@pytest.mark.parametrize("token", [b"", b"t" * 31, b"u" * 32])
async def test_another_token_opens_nothing(source: Source, token: bytes) -> None:
    async with Caller(source, token=token) as caller:
        for call in (caller.layout(), caller.fetch((0, 1)), caller.push(PAGE, (0, 1)), caller.complete()):
            assert await reason_of(call) is Reason.TOKEN_INVALID
    assert not source.completed.is_set()


async def test_another_migration_is_not_known(source: Source) -> None:
    async with Caller(source, migration="n") as caller:
        for call in (caller.layout(), caller.fetch((0, 1)), caller.push(PAGE, (0, 1)), caller.complete()):
            assert await reason_of(call) is Reason.UNKNOWN_MIGRATION


async def test_after_completion_nothing_is_read_and_completion_can_be_repeated(source: Source, caller: Caller) -> None:
    await caller.complete()
    assert source.completed.is_set()
    await caller.complete()
    await caller.layout()
    assert await reason_of(caller.fetch((0, 1))) is Reason.ILLEGAL_STATE
    assert await reason_of(caller.push(PAGE, (0, 1))) is Reason.ILLEGAL_STATE


async def test_a_completion_short_of_pages_completes_nothing(source: Source, caller: Caller) -> None:
    assert await reason_of(caller.complete(PAGES - 1)) is Reason.INVALID_ARGUMENT
    assert not source.completed.is_set()
    assert listed(await caller.fetch((0, 1))) == [0]


async def test_what_was_withdrawn_is_not_known_any_more(source: Source, caller: Caller) -> None:
    source.pages.withdraw("m")
    source.pages.withdraw("m")
    assert await reason_of(caller.layout()) is Reason.UNKNOWN_MIGRATION


async def test_a_stream_that_ends_completes_nothing(source: Source, caller: Caller) -> None:
    await caller.push(PAGE, (0, 1))
    async with Caller(source) as another:
        await another.fetch((0, 1))
    assert not source.completed.is_set()
    assert listed(await caller.fetch((0, 1))) == [0]


async def test_only_the_destination_that_was_named_is_served(tmp_path: Path, held: InProcess) -> None:
    authority = Authority()
    files = authority.write(tmp_path / "a", "a")
    tls = Tls(ca=files.ca, certificate=files.certificate, key=files.key)
    source = Source(Settings(host="a", listen=["127.0.0.1:0"], tls=tls), held)
    await source.start()
    source.served.open()
    try:
        async with Caller(source, authority.write(tmp_path / "c", "c")) as stranger:
            for call in (stranger.layout(), stranger.fetch((0, 1)), stranger.push(PAGE, (0, 1)), stranger.complete()):
                assert await reason_of(call) is Reason.PEER_NOT_ALLOWED
        # Names are compared without regard to case.
        async with Caller(source, authority.write(tmp_path / "b", "b")) as destination:
            assert listed(await destination.fetch((0, 1))) == [0]
    finally:
        await source.server.stop(0)
        source.pages.withdraw("m")
