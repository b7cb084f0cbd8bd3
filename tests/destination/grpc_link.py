"""A real page service in this process, behind a proxy that can be cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from guarded import contents
from lanes_conformance import HOLE, PAGES
from stream_proxy import StreamProxy

from certificates import Authority
from pageferry.tls import TlsFiles
from pageferry.v1 import memory_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.config import Settings
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.grpc_lanes import GrpcLaneOpener
from pageferryd.destination.page_calls import Source
from pageferryd.server import GrpcServer
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import PageService
from pageferryd.source.served import Access, Served

TOKEN = b"t" * 32
SECONDS = 5.0


class GrpcLink:
    """A source in this process."""

    def __init__(self, settings: Settings, authority: Authority | None, directory: Path) -> None:
        self._authority = authority
        self.directory = directory
        self._guest = GuestMemory(PAGES * PAGE_SIZE)
        self._guest.write(0, contents(0, HOLE))
        self.layout = Layout([Region(0, PAGES * PAGE_SIZE)])
        location = memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=self._guest.address))
        memory = SourceMemory.open(self.layout, [location], os.getpid())
        self.completions = 0
        self.served = Served("m", TOKEN, "destination", memory, self.layout, self._complete)
        self.checksums = False
        self.served.open()
        self.pages = PageService(secure=authority is not None)
        self.pages.offer(self.served)
        self.settings = settings
        self._server = GrpcServer(settings)
        self.pages.add_to(self._server.server)

    async def start(self) -> None:
        (self.bound,) = await self._server.start()
        self._proxy = await StreamProxy(self.bound, self.directory).__aenter__()

    async def stop(self) -> None:
        await self.stop_source()
        await self._proxy.__aexit__()
        self.pages.withdraw("m")
        self._guest.close()

    def carry_checksums(self) -> None:
        """Both ends, from now on."""
        self.served.checksums = self.checksums = True

    def opener(
        self,
        *,
        migration: str = "m",
        token: bytes | None = None,
        layout: Layout | None = None,
        name: str = "destination",
    ) -> GrpcLaneOpener:
        source = Source(
            migration,
            self._proxy.address,
            "source",
            TOKEN if token is None else token,
            layout or self.layout,
            checksums=self.checksums,
        )
        return GrpcLaneOpener(source, self.files(name), SECONDS)

    def stranger(self) -> GrpcLaneOpener:
        if self._authority is None:
            pytest.skip("without certificates nobody proves a name")
        return self.opener(name="stranger")

    def files(self, name: str) -> TlsFiles | None:
        return self._authority.write(self.directory / name, name) if self._authority is not None else None

    def close_memory(self) -> None:
        self.served.access = Access.CLOSED

    async def cut(self) -> None:
        self._proxy.cut()

    async def heal(self) -> None:
        self._proxy.heal()

    async def stop_source(self) -> None:
        await self._server.stop(0)

    @property
    def released(self) -> bool:
        return self.completions > 0

    def _complete(self) -> None:
        self.completions += 1
