"""gRPC lanes to a real page service: over TCP and Unix sockets, with and without TLS, through a proxy to be cut."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc_link import SECONDS, TOKEN, GrpcLink
from lanes_conformance import PAGES, LanesConformance, reason_of

from certificates import Authority
from pageferry.errors import Reason
from pageferryd.config import Settings, Tls
from pageferryd.destination.grpc_lanes import GrpcLaneOpener
from pageferryd.destination.page_calls import Source


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
    opener = GrpcLaneOpener(source, link.files("destination"), SECONDS)
    assert await reason_of(opener.open()) is Reason.SOURCE_UNREACHABLE
