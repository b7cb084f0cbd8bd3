"""gRPC lanes to a real page service: over TCP and Unix sockets, with and without TLS, through a proxy to be cut."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from guarded import contents
from lanes_conformance import HOLE, PAGES, LanesConformance, reason_of
from stream_proxy import StreamProxy

from certificates import Authority
from pageferry.errors import Reason
from pageferry.tls import TlsFiles
from pageferry.v1 import memory_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.config import Settings, Tls
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.grpc_lanes import GrpcLaneOpener, Source
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
        self._directory = directory
        self._guest = GuestMemory(PAGES * PAGE_SIZE)
        self._guest.write(0, contents(0, HOLE))
        self.layout = Layout([Region(0, PAGES * PAGE_SIZE)])
        location = memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=self._guest.address))
        memory = SourceMemory.open(self.layout, [location], os.getpid())
        self.completions = 0
        self.served = Served("m", TOKEN, "destination", memory, self.layout, self._complete)
        self.served.open()
        self._pages = PageService(secure=authority is not None)
        self._pages.offer(self.served)
        self._server = GrpcServer(settings)
        self._pages.add_to(self._server.server)

    async def start(self) -> None:
        (bound,) = await self._server.start()
        self._proxy = await StreamProxy(bound, self._directory).__aenter__()

    async def stop(self) -> None:
        await self.stop_source()
        await self._proxy.__aexit__()
        self._pages.withdraw("m")
        self._guest.close()

    def opener(
        self,
        *,
        migration: str = "m",
        token: bytes | None = None,
        layout: Layout | None = None,
        name: str = "destination",
    ) -> GrpcLaneOpener:
        source = Source(
            migration, self._proxy.address, "source", TOKEN if token is None else token, layout or self.layout
        )
        return GrpcLaneOpener(source, self._files(name), SECONDS)

    def stranger(self) -> GrpcLaneOpener:
        if self._authority is None:
            pytest.skip("without certificates nobody proves a name")
        return self.opener(name="stranger")

    def _files(self, name: str) -> TlsFiles | None:
        return self._authority.write(self._directory / name, name) if self._authority is not None else None

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


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(params=["tcp", "unix", "tcp, TLS", "unix, TLS"])
async def link(request: pytest.FixtureRequest, short_dir: Path, authority: Authority) -> AsyncIterator[GrpcLink]:
    listen = "127.0.0.1:0" if request.param.startswith("tcp") else f"unix:{short_dir}/source.sock"
    secure = request.param.endswith("TLS")
    given: dict[str, object] = {"insecure": True}
    if secure:
        files = authority.write(short_dir / "source", "source")
        given = {"tls": Tls(ca=files.ca, certificate=files.certificate, key=files.key)}
    settings = Settings(host="source", listen=[listen], **given)  # type: ignore[arg-type]
    one = GrpcLink(settings, authority if secure else None, short_dir)
    await one.start()
    yield one
    await one.stop()


class TestGrpcLanes(LanesConformance):
    """Passes what all lanes must."""


async def test_completing_twice_is_heard_once_by_the_source(link: GrpcLink) -> None:
    lanes = await link.opener().open()
    await lanes.complete(PAGES)
    await lanes.complete(PAGES)
    await lanes.close()
    assert link.completions == 1


async def test_a_source_with_another_name_is_not_talked_to(link: GrpcLink) -> None:
    if link._authority is None:
        pytest.skip("without certificates nobody proves a name")
    source = Source("m", link._proxy.address, "impostor", TOKEN, link.layout)
    opener = GrpcLaneOpener(source, link._files("destination"), SECONDS)
    assert await reason_of(opener.open()) is Reason.SOURCE_UNREACHABLE
