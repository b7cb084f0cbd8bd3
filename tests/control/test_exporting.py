"""What exports a guest's opaque pages: a VMM behind its real socket, which gives what it should not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from pageferry.channel import SERVER_OPTIONS
from pageferry.errors import FerryError, Reason
from pageferry.v1 import page_pb2, vmm_pb2, vmm_pb2_grpc
from pageferryd.control.exporting import exporter
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.vmm import own
from pageferryd.vmm.driver import PrivatePages
from pageferryd.vmm.own import VmmServiceDriver

# Pages 0 to 7 lie above pages 8 to 1007.
HIGH = 1 << 40
LAYOUT = Layout([Region(HIGH, 8 * PAGE_SIZE), Region(0, 1000 * PAGE_SIZE)])
Bundle = vmm_pb2.GuestPageBundle


class Vmm(vmm_pb2_grpc.VmmServiceServicer):
    """Answers with what the test has put there."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.bundles: list[Bundle] = []
        self.private = vmm_pb2.ListPrivatePagesResponse()
        self.hangs = False

    async def ListPrivatePages(self, request: Any, context: Any) -> vmm_pb2.ListPrivatePagesResponse:
        return self.private

    async def ExportGuestPages(self, request: Any, context: Any) -> vmm_pb2.ExportGuestPagesResponse:
        self.asked.append(list(request.guest_addresses))
        if self.hangs:
            await asyncio.Event().wait()
        return vmm_pb2.ExportGuestPagesResponse(bundles=self.bundles)


class House:
    def __init__(self, driver: VmmServiceDriver, vmm: Vmm) -> None:
        self.driver = driver
        self.vmm = vmm
        self.export = exporter(driver, LAYOUT)

    async def refused(self, *pages: int) -> FerryError:
        with pytest.raises(FerryError) as refused:
            await self.export(pages)
        return refused.value


Build = Callable[[vmm_pb2_grpc.VmmServiceServicer], Any]


@pytest.fixture
async def build(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Build]:
    made: list[tuple[VmmServiceDriver, grpc.aio.Server]] = []

    async def make(vmm: vmm_pb2_grpc.VmmServiceServicer) -> VmmServiceDriver:
        path: Path = tmp_path_factory.mktemp("s") / "vmm.sock"
        server = grpc.aio.server(options=SERVER_OPTIONS)
        vmm_pb2_grpc.add_VmmServiceServicer_to_server(vmm, server)
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        made.append((VmmServiceDriver(str(path)), server))
        return made[-1][0]

    yield make
    for driver, server in made:
        await driver.close()
        await server.stop(0)


@pytest.fixture
async def house(build: Build) -> House:
    vmm = Vmm()
    return House(await build(vmm), vmm)


async def test_pages_are_addresses_for_the_vmm_and_numbers_for_the_peer(house: House) -> None:
    house.vmm.bundles = [
        Bundle(guest_addresses=[PAGE_SIZE, HIGH + 7 * PAGE_SIZE], payload=b"p", metadata=b"m", stream=2, epoch=1 << 63),
        Bundle(guest_addresses=[HIGH], metadata=b"pending"),
    ]
    assert await house.export([9, 0]) == [
        page_pb2.PageBundle(pages=[9, 7], payload=b"p", metadata=b"m", stream=2, epoch=1 << 63),
        page_pb2.PageBundle(pages=[0], metadata=b"pending"),
    ]
    assert house.vmm.asked == [[PAGE_SIZE, HIGH]]


async def test_the_largest_bundle_passes(house: House) -> None:
    addresses = [page * PAGE_SIZE for page in range(512)]
    house.vmm.bundles = [Bundle(guest_addresses=addresses, payload=bytes(4 << 20), metadata=bytes(1 << 20))]
    (bundle,) = await house.export([8])
    assert len(bundle.pages) == 512


CANNOT_BE = {
    "nothing": [],
    "another page": [Bundle(guest_addresses=[PAGE_SIZE])],
    "no page": [Bundle(guest_addresses=[0]), Bundle(payload=b"p")],
    "a page twice": [Bundle(guest_addresses=[0, PAGE_SIZE, 0])],
    "outside": [Bundle(guest_addresses=[0, 1000 * PAGE_SIZE])],
    "between the regions": [Bundle(guest_addresses=[0, HIGH - PAGE_SIZE])],
    "far outside": [Bundle(guest_addresses=[0, (1 << 64) - PAGE_SIZE])],
    "half a page": [Bundle(guest_addresses=[0, PAGE_SIZE // 2])],
    "too many pages": [Bundle(guest_addresses=[page * PAGE_SIZE for page in range(513)])],
    "too much payload": [Bundle(guest_addresses=[0], payload=bytes((4 << 20) + 1))],
    "too much metadata": [Bundle(guest_addresses=[0], metadata=bytes((1 << 20) + 1))],
    "more than a message holds": [Bundle(guest_addresses=[0], payload=bytes(4 << 20))] * 21,
}


@pytest.mark.parametrize("what", CANNOT_BE)
async def test_an_export_that_cannot_be_is_the_vmms_failure(house: House, what: str) -> None:
    house.vmm.bundles = CANNOT_BE[what]
    assert (await house.refused(8)).reason is Reason.VMM_FAILED


async def test_a_vmm_that_hangs_is_given_up(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_EXPORT_SECONDS", 0.2)
    house.vmm.hangs = True
    assert (await house.refused(8)).reason is Reason.VMM_UNREACHABLE


async def test_a_vmm_that_lists_opaque_pages_and_cannot_export_is_told_so(build: Build) -> None:
    driver = await build(vmm_pb2_grpc.VmmServiceServicer())
    with pytest.raises(FerryError) as refused:
        await exporter(driver, LAYOUT)([8])
    assert refused.value.reason is Reason.VMM_FAILED
    assert await driver.private_pages() == PrivatePages()


async def test_the_list_says_whether_pages_are_opaque(house: House) -> None:
    house.vmm.private = vmm_pb2.ListPrivatePagesResponse(guest_addresses=[0, HIGH], sizes=[8192, 4096], opaque=True)
    assert await house.driver.private_pages() == PrivatePages([(0, 8192), (HIGH, 4096)], opaque=True)


async def test_a_list_in_uneven_columns_is_the_vmms_failure(house: House) -> None:
    house.vmm.private = vmm_pb2.ListPrivatePagesResponse(guest_addresses=[0, HIGH], sizes=[8192])
    with pytest.raises(FerryError) as refused:
        await house.driver.private_pages()
    assert refused.value.reason is Reason.VMM_FAILED
