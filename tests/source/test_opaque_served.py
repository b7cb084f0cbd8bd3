"""Opaque pages at the source: named on the lanes, never read, and exported for nobody but the destination."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import page_pb2, page_pb2_grpc
from pageferryd.config import Settings
from pageferryd.core.errors import PageRangeError
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.requests import encode_request
from pageferryd.core.runs import OPAQUE, PRIVATE, RAW, Run, decode
from pageferryd.server import GrpcServer
from pageferryd.source.memory import Collected
from pageferryd.source.page_service import PageService
from pageferryd.source.served import TOKEN_BYTES, Served

DEADLINE = 10.0
TOKEN = bytes(range(TOKEN_BYTES))
LAYOUT = Layout([Region(0, 32 * PAGE_SIZE)])


class Memory:
    """Notes what is read: each page is its number."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def collect(self, first: int, pages: int, credit: int) -> Collected:
        pages = min(pages, credit // PAGE_SIZE)
        self.read += range(first, first + pages)
        runs = [Run(first, pages, RAW)] if pages else []
        return Collected(runs, [bytes([page]) * PAGE_SIZE for page in range(first, first + pages)], first + pages)

    def close(self) -> None:
        pass


class Offer:
    """Pages 4 to 7 and 12 are opaque; `bundles` is what their VMM exports."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.served = Served("m", TOKEN, "b", self.memory, LAYOUT, lambda: None)  # type: ignore[arg-type]
        self.asked: list[list[int]] = []
        self.bundles: list[page_pb2.PageBundle] = []
        self.failure: Exception | None = None

    def open(self) -> None:
        self.served.open([(4, 4), (12, 1)], self._export)

    async def _export(self, pages: Sequence[int]) -> Sequence[page_pb2.PageBundle]:
        self.asked.append(list(pages))
        if self.failure is not None:
            raise self.failure
        return self.bundles


@pytest.fixture
def offer() -> Offer:
    return Offer()


def collect_all(served: Served, credit: int) -> list[Run]:
    runs, first = [], 0
    while first < LAYOUT.page_count:
        collected = served.collect(first, LAYOUT.page_count - first, credit)
        runs += collected.runs
        first = collected.next_page
    return runs


def test_opaque_pages_are_named_and_never_read(offer: Offer) -> None:
    offer.open()
    assert collect_all(offer.served, 1 << 20) == [
        Run(0, 4, RAW), Run(4, 4, OPAQUE), Run(8, 4, RAW), Run(12, 1, OPAQUE), Run(13, 19, RAW),
    ]  # fmt: skip
    assert offer.memory.read == [page for page in range(32) if page not in (4, 5, 6, 7, 12)]


def test_naming_them_costs_no_credit(offer: Offer) -> None:
    offer.open()
    assert offer.served.collect(4, 20, 0) == Collected([Run(4, 4, OPAQUE)], [], 8)


def test_private_pages_without_an_export_are_read_as_ever(offer: Offer) -> None:
    offer.served.open([(4, 4)])
    assert Run(4, 4, PRIVATE) in collect_all(offer.served, 1 << 20)
    assert offer.memory.read == list(range(32))


@pytest.mark.parametrize("run", [(31, 2), (32, 1), (0, 0), (-1, 1)])
def test_private_pages_outside_the_guest_are_refused(offer: Offer, run: tuple[int, int]) -> None:
    with pytest.raises(PageRangeError):
        offer.served.open([run])


async def refused(offer: Offer, *pages: int) -> Reason:
    with pytest.raises(FerryError) as error:
        await offer.served.export(pages)
    return error.value.reason


async def test_nothing_is_exported_before_the_guest_stands_still_or_after_it_was_let_go(offer: Offer) -> None:
    assert await refused(offer, 4) is Reason.ILLEGAL_STATE
    offer.open()
    offer.served.close()
    assert await refused(offer, 4) is Reason.ILLEGAL_STATE
    assert offer.asked == []


async def test_no_other_page_is_exported(offer: Offer) -> None:
    offer.open()
    assert await refused(offer, 4, 8) is Reason.INVALID_ARGUMENT
    with pytest.raises(PageRangeError):
        await offer.served.export([32])
    assert offer.asked == []


async def test_a_page_that_the_vmm_did_not_call_opaque_never_leaves_as_one(offer: Offer) -> None:
    offer.open()
    offer.bundles = [page_pb2.PageBundle(pages=[4, 8])]
    assert await refused(offer, 4) is Reason.VMM_FAILED


async def test_bundles_leave_as_they_are_and_are_counted(offer: Offer) -> None:
    offer.open()
    offer.bundles = [page_pb2.PageBundle(pages=[4, 7], payload=bytes(5000)), page_pb2.PageBundle(pages=[12])]
    assert await offer.served.export([4, 12]) == offer.bundles
    assert offer.served.pages == {("demand", "raw"): 3}
    assert offer.served.bytes == {"demand": 5000}


# Over the wire


class Caller:
    """The destination's end."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.stub: Any = page_pb2_grpc.PageServiceStub(self.channel)

    async def export(self, *pages: int, token: bytes = TOKEN) -> page_pb2.ExportPagesResponse:
        metadata = (("pageferry-migration", "m"), ("pageferry-token-bin", token))
        request = page_pb2.ExportPagesRequest(pages=pages)
        response = await self.stub.ExportPages(request, metadata=metadata, timeout=DEADLINE)
        assert isinstance(response, page_pb2.ExportPagesResponse)
        return response

    async def refusal(self, *pages: int, token: bytes = TOKEN) -> Reason:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await self.export(*pages, token=token)
        return from_rpc(error.value, Reason.INTERNAL).reason

    async def asked(self, method: str, request: bytes) -> list[Run]:
        call: Any = self.channel.stream_stream(f"/pageferry.v1.PageService/{method}")
        stream = call(metadata=(("pageferry-migration", "m"), ("pageferry-token-bin", TOKEN)), timeout=DEADLINE)
        await stream.write(request)
        runs = decode(await stream.read()).runs
        stream.cancel()
        return runs


@pytest.fixture
async def caller(offer: Offer) -> AsyncIterator[Caller]:
    server = GrpcServer(Settings(host="a", listen=["127.0.0.1:0"], insecure=True))
    pages = PageService(secure=False)
    pages.offer(offer.served)
    pages.add_to(server.server)
    (address,) = await server.start()
    one = Caller(address)
    yield one
    await one.channel.close()
    await server.stop(0)


async def test_both_lanes_name_opaque_pages_without_bytes(offer: Offer, caller: Caller) -> None:
    offer.open()
    assert await caller.asked("FetchPages", encode_request([(3, 3)])) == [Run(3, 1, RAW), Run(4, 2, OPAQUE)]
    pushed = await caller.asked("PushPages", encode_request([(4, 9)], 4 * PAGE_SIZE))
    assert pushed == [Run(4, 4, OPAQUE), Run(8, 4, RAW), Run(12, 1, OPAQUE)]


async def test_an_export_is_answered_over_the_wire(offer: Offer, caller: Caller) -> None:
    offer.open()
    offer.bundles = [page_pb2.PageBundle(pages=[7, 4], payload=b"p", metadata=b"m", stream=3, epoch=9)]
    assert list((await caller.export(4)).bundles) == offer.bundles


async def test_exports_that_may_not_be_are_refused_with_their_reason(offer: Offer, caller: Caller) -> None:
    assert await caller.refusal(4) is Reason.ILLEGAL_STATE
    offer.open()
    assert await caller.refusal(4, token=bytes(TOKEN_BYTES)) is Reason.TOKEN_INVALID
    assert await caller.refusal() is Reason.INVALID_ARGUMENT
    assert await caller.refusal(*[4] * 513) is Reason.INVALID_ARGUMENT
    assert await caller.refusal(3) is Reason.INVALID_ARGUMENT
    assert await caller.refusal(32) is Reason.PAGE_OUT_OF_RANGE
    assert await caller.refusal((1 << 64) - 1) is Reason.PAGE_OUT_OF_RANGE
    offer.failure = FerryError(Reason.VMM_UNREACHABLE, "it hangs")
    assert await caller.refusal(4) is Reason.VMM_UNREACHABLE
