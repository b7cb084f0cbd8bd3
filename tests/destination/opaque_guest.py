"""A confidential guest on its way: a VMM that exports its pages, one that imports them, and all that lies between."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import os
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
from guarded import DEADLINE, content
from shared_guest import SharedGuest
from stream_proxy import StreamProxy

from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2 as pb
from pageferry.v1 import fault_pb2_grpc, memory_pb2, vmm_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.config import Settings
from pageferryd.control.exporting import exporter
from pageferryd.control.faults import Faults
from pageferryd.core.layout import PAGE_SIZE, Layout
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import PagerOptions
from pageferryd.destination.fault_service import TOKEN_KEY
from pageferryd.destination.grpc_lanes import GrpcLaneOpener
from pageferryd.destination.handed_over import Handoff
from pageferryd.destination.page_calls import Source
from pageferryd.destination.session import Session, SessionOptions
from pageferryd.linux.vmm_directory import VmmDirectory
from pageferryd.server import GrpcServer
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import PageService
from pageferryd.source.served import Served
from pageferryd.vmm.driver import FaultEndpoint

TOKEN = b"t" * 32
KEY = b"between the two VMMs"
FORBIDDEN = b"\xee" * PAGE_SIZE
"""What the host would read of an opaque page: it must never arrive."""
Bundles = list[vmm_pb2.GuestPageBundle]


def cipher(page: int) -> bytes:
    """What a page is encrypted to: random bytes, some of which look like a page of zeroes."""
    return bytes(PAGE_SIZE) if page % 5 == 0 else random.Random(page).randbytes(PAGE_SIZE)


def is_pending(page: int) -> bool:
    return page % 7 == 3


def address_of(layout: Layout, page: int) -> int:
    piece = next(layout.pieces(page, 1))
    return layout.regions[piece.region].guest_address + piece.first * PAGE_SIZE


def seal(addresses: Sequence[int], payload: bytes, stream: int, epoch: int) -> bytes:
    """Return metadata that fits these and nothing else."""
    head = struct.pack(f"<IQ{len(addresses)}Q", stream, epoch, *addresses)
    return hmac.new(KEY, head + payload, hashlib.sha256).digest()


def by_dozen(page: int) -> tuple[int, ...]:
    """Every second page of a dozen, those that are pending by themselves."""
    first = page - page % 12
    return tuple(p for p in range(first, first + 12) if p % 2 == page % 2 and is_pending(p) == is_pending(page))


def alone(page: int) -> tuple[int, ...]:
    return (page,)


class ExportingVmm:
    """The VMM at the source; also what drives it. `gate`, where it is set, is awaited by each export."""

    def __init__(self, layout: Layout, opaque: Iterable[int]) -> None:
        self._layout = layout
        self.opaque = frozenset(opaque)
        self.bundle_of: Callable[[int], tuple[int, ...]] = by_dozen
        self.asked: list[list[int]] = []
        self.exported: list[vmm_pb2.GuestPageBundle] = []
        self.gate: Callable[[list[int]], Awaitable[None]] | None = None
        self.spoil: Callable[[Bundles], Bundles] = lambda bundles: bundles
        self._epochs = itertools.count(1)
        self.changed = asyncio.Event()

    def ranges(self) -> list[tuple[int, int]]:
        return [(page, 1) for page in sorted(self.opaque)]

    async def export_pages(self, guest_addresses: Sequence[int]) -> Bundles:
        pages = [self._layout.run_at(address, PAGE_SIZE)[0] for address in guest_addresses]
        self.asked.append(pages)
        self.changed.set()
        if self.gate is not None:
            await self.gate(pages)
        bundles: Bundles = []
        covered: set[int] = set()
        for page in pages:
            if page not in covered:
                members = tuple(one for one in self.bundle_of(page) if one in self.opaque)
                covered.update(members)
                bundles.append(self.bundle(members))
        self.exported += bundles
        return self.spoil(bundles)

    def bundle(self, pages: Sequence[int]) -> vmm_pb2.GuestPageBundle:
        stream, epoch = pages[0] % 2, next(self._epochs)
        addresses = [address_of(self._layout, page) for page in pages]
        payload = b"" if is_pending(pages[0]) else b"".join(map(cipher, pages))
        return vmm_pb2.GuestPageBundle(
            guest_addresses=addresses,
            payload=payload,
            metadata=seal(addresses, payload, stream, epoch),
            stream=stream,
            epoch=epoch,
        )


class ImportingVmm:
    """The VMM at the destination: it imports what comes and says so, unless a test has it `hold` that."""

    def __init__(self, endpoint: FaultEndpoint, layout: Layout) -> None:
        self._channel = grpc.aio.insecure_channel(
            f"unix:{endpoint.socket_path}",
            options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 8 << 20)],
        )
        self.stub: Any = fault_pb2_grpc.FaultServiceStub(self._channel)
        self._metadata = ((TOKEN_KEY, endpoint.token),)
        self._layout = layout
        self._tokens = itertools.count(1)
        self.hold = False
        self.result: Callable[[int], int | None] = lambda _page: None
        self.deliveries: list[pb.ResolveFaultsResponse] = []
        self.held: list[pb.ResolveFaultsResponse] = []
        self.answers: dict[int, pb.ResolveFaultsResponse] = {}
        self.imported: dict[int, bytes] = {}
        self.converted: set[int] = set()
        self.results: list[tuple[int, int]] = []
        self.broken: list[str] = []
        self.changed = asyncio.Event()
        self.call: Any = None

    def open(self) -> None:
        self.call = self.stub.ResolveFaults(metadata=self._metadata)
        self._reading = asyncio.create_task(self._read(self.call))

    async def hang_up(self) -> None:
        self.call.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def close(self) -> None:
        await self.hang_up()
        await self._channel.close(None)

    async def fault(self, page: int) -> int:
        """Forward a private access; return its token."""
        token = next(self._tokens)
        await self.call.write(
            pb.ResolveFaultsRequest(
                token=token, guest_address=address_of(self._layout, page), size=PAGE_SIZE, sharing=pb.SHARING_PRIVATE
            )
        )
        return token

    async def answer(self, token: int) -> pb.ResolveFaultsResponse:
        await self.until(lambda: token in self.answers)
        return self.answers[token]

    async def convert(self, page: int, pages: int = 1) -> None:
        self.converted.update(range(page, page + pages))
        for one in range(page, page + pages):
            self.imported.pop(one, None)
        request = pb.ConvertRangeRequest(
            guest_address=address_of(self._layout, page), size=pages * PAGE_SIZE, sharing=pb.SHARING_SHARED
        )
        await self.stub.ConvertRange(request, metadata=self._metadata, timeout=DEADLINE)

    async def release(self, count: int | None = None) -> None:
        """Import and report what is held, or the first of it."""
        some, self.held = self.held[:count], self.held[count:] if count is not None else []
        for response in some:
            await self._import(response)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def pages_of(self, response: pb.ResolveFaultsResponse) -> list[int]:
        addresses = response.bundle_addresses or [response.guest_address]
        return [self._layout.run_at(address, PAGE_SIZE)[0] for address in addresses]

    def held_pages(self) -> set[int]:
        return {page for held in self.held for page in self.pages_of(held)}

    async def _read(self, call: Any) -> None:
        while isinstance(response := await call.read(), pb.ResolveFaultsResponse):
            if response.token:
                self.answers[response.token] = response
            if response.outcome == pb.OUTCOME_DELIVERED:
                self._check(response)
                self.deliveries.append(response)
                if self.hold:
                    self.held.append(response)
                else:
                    await self._import(response)
            self.changed.set()

    def _check(self, response: pb.ResolveFaultsResponse) -> None:
        addresses = list(response.bundle_addresses) or [response.guest_address]
        if response.metadata != seal(addresses, response.payload, response.stream, response.epoch):
            self.broken.append(f"the seal of epoch {response.epoch} is broken")
        if response.guest_address != addresses[0]:
            self.broken.append(f"{response.guest_address:#x} is not the first page of its bundle")

    async def _import(self, response: pb.ResolveFaultsResponse) -> None:
        results = []
        for index, page in enumerate(self.pages_of(response)):
            body = response.payload[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            results.append((page, self._import_page(page, body)))
        await self.report(results)

    def _import_page(self, page: int, body: bytes) -> int:
        result = self.result(page)
        if result is not None:
            return result
        if page in self.converted:
            return pb.IMPORT_RESULT_STALE
        if page in self.imported:
            return pb.IMPORT_RESULT_DUPLICATE
        self.imported[page] = body
        return pb.IMPORT_RESULT_DONE

    async def report(self, results: Sequence[tuple[int, int]]) -> None:
        self.results += results
        imports = [
            pb.Import(guest_address=address_of(self._layout, page), size=PAGE_SIZE, result=result)  # type: ignore[arg-type]
            for page, result in results
        ]
        request = pb.ReportImportsRequest(imports=imports)
        await self.stub.ReportImports(request, metadata=self._metadata, timeout=DEADLINE)
        self.changed.set()


class Crossing:
    """One guest between two sidecars' parts in this process."""

    def __init__(self, directory: Path, sizes: Sequence[int], opaque: Iterable[int]) -> None:
        self._directory = directory
        self.guest = SharedGuest(*sizes)
        self.layout = self.guest.layout
        self.exporting = ExportingVmm(self.layout, opaque)
        self.shared = frozenset(range(self.layout.page_count)) - self.exporting.opaque
        self.completions = 0
        self.paused: list[Reason | None] = []
        self._settings = Settings(host="a", listen=["127.0.0.1:0"], insecure=True, runtime_dir=directory)
        self._fill_source()

    def _fill_source(self) -> None:
        self._left = [GuestMemory(region.size) for region in self.layout.regions]
        for page in range(self.layout.page_count):
            piece = next(self.layout.pieces(page, 1))
            body = content(page) if page in self.shared else FORBIDDEN
            self._left[piece.region].write(piece.first * PAGE_SIZE, body)
        locations = [
            memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=memory.address)) for memory in self._left
        ]
        memory = SourceMemory.open(self.layout, locations, os.getpid())
        self.served = Served("m", TOKEN, "b", memory, self.layout, self._complete)
        self.served.open(self.exporting.ranges(), exporter(self.exporting, self.layout))  # type: ignore[arg-type]
        self.pages = PageService(secure=False)
        self.pages.offer(self.served)
        self.server = GrpcServer(self._settings)
        self.pages.add_to(self.server.server)

    async def start(self, *, push: bool) -> None:
        (bound,) = await self.server.start()
        self.proxy = await StreamProxy(bound, self._directory).__aenter__()
        here, self._there = socket.socketpair()
        here.setblocking(False)
        handoff = Handoff(None, self.guest.addresses, here, self.layout, self.guest.memory, self.guest.bitmap)
        self._connection = here
        door, doors = handoff.doors()
        options = PagerOptions(fault_around=0, pacing=PacingOptions(disabled=not push))
        opener = GrpcLaneOpener(Source("m", self.proxy.address, "a", TOKEN, self.layout), None, 5.0)
        self.session = Session(
            self.layout,
            doors,
            self.guest.installer,
            opener,
            SessionOptions(options, backoff_initial=0.001, backoff_max=0.01),
            self._note,
        )
        self.session.open_doors()
        directory = VmmDirectory.make(self._settings.runtime_dir, "g", os.getpid())
        self.faults = await Faults.start(self._settings, directory)
        self.faults.connect(door, self.session, handoff)
        self.vmm = ImportingVmm(self.faults.endpoint, self.layout)
        self.vmm.open()
        self.running = asyncio.create_task(self.session.run())

    async def done(self) -> None:
        await asyncio.wait_for(asyncio.shield(self.running), DEADLINE)

    async def failed(self) -> Reason:
        try:
            await self.done()
        except FerryError as error:
            return error.reason
        raise AssertionError("the session ended without an error")

    async def until_paused(self, reason: Reason | None = None) -> None:
        """Wait until the lanes were lost, for this reason."""
        await self.vmm.until(lambda: any(one and reason in (None, one) for one in self.paused))

    async def until_asked(self, page: int) -> None:
        """Wait until the source's VMM was asked for the page."""
        async with asyncio.timeout(DEADLINE):
            while not any(page in pages for pages in self.exporting.asked):
                self.exporting.changed.clear()
                await self.exporting.changed.wait()

    def check(self) -> None:
        """Each page is what was at the source, and no opaque one was written by this host."""
        assert self.vmm.broken == []
        converted = self.vmm.converted
        wrong = [
            page
            for page in self.exporting.opaque - converted
            if self.vmm.imported.get(page) != (b"" if is_pending(page) else cipher(page))
        ]
        wrong += [page for page in self.shared - converted if self.guest._read(page) != content(page)]
        wrong += [page for page in self.exporting.opaque if self.guest._read(page) != bytes(PAGE_SIZE)]
        assert sorted(wrong) == []
        assert self.completions == 1

    async def close(self) -> None:
        await self.vmm.close()
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.faults.stop()
        await self.session.close()
        self._connection.close()
        self._there.close()
        await self.server.stop(0)
        await self.proxy.__aexit__()
        self.pages.withdraw("m")
        self.guest.close()
        for memory in self._left:
            memory.close()

    def _complete(self) -> None:
        self.completions += 1

    def _note(self, error: FerryError | None) -> None:
        self.paused.append(None if error is None else error.reason)
        self.vmm.changed.set()
