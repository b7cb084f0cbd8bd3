"""Opaque pages at the source: page numbers to guest addresses and back, and a check of what the VMM gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferry.v1 import page_pb2, vmm_pb2
from pageferryd.core.errors import PageRangeError
from pageferryd.core.layout import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pageferryd.core.layout import Layout
    from pageferryd.vmm.driver import VmmDriver

MAX_BUNDLE_PAGES = 512
MAX_PAYLOAD = 4 << 20
MAX_METADATA = 1 << 20


def exporter(driver: VmmDriver, layout: Layout) -> Callable[[Sequence[int]], Awaitable[Sequence[page_pb2.PageBundle]]]:
    """Return what exports pages by number. It raises FerryError(VMM_FAILED) for bundles that cannot be."""

    async def export(pages: Sequence[int]) -> Sequence[page_pb2.PageBundle]:
        bundles = await driver.export_pages([layout.guest_address_of(page) for page in pages])
        converted = [_converted(layout, bundle) for bundle in bundles]
        lacking = set(pages).difference(*(bundle.pages for bundle in converted))
        if lacking:
            raise FerryError(
                Reason.VMM_FAILED, f"the VMM did not export {len(lacking)} pages, page {min(lacking)} first"
            )
        return converted

    return export


def _converted(layout: Layout, bundle: vmm_pb2.GuestPageBundle) -> page_pb2.PageBundle:
    count = len(bundle.guest_addresses)
    if not 0 < count <= MAX_BUNDLE_PAGES or len(bundle.payload) > MAX_PAYLOAD or len(bundle.metadata) > MAX_METADATA:
        raise FerryError(
            Reason.VMM_FAILED,
            f"the VMM exported a bundle of {count} pages with {len(bundle.payload)} and {len(bundle.metadata)} bytes",
        )
    try:
        pages = [layout.run_at(address, PAGE_SIZE)[0] for address in bundle.guest_addresses]
    except PageRangeError as error:
        raise FerryError(Reason.VMM_FAILED, f"the VMM exported a page that its guest does not have: {error}") from error
    if len(set(pages)) < count:
        raise FerryError(Reason.VMM_FAILED, "the VMM exported a bundle with a page twice")
    return page_pb2.PageBundle(
        pages=pages, payload=bundle.payload, metadata=bundle.metadata, stream=bundle.stream, epoch=bundle.epoch
    )
