"""The HTTP port: what its three paths answer, and where it listens."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from pageferry.errors import FerryError, Reason
from pageferryd.http import HttpServer


class Port:
    """A started server, and what makes it unready."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.registry = CollectorRegistry()
        self.server = HttpServer(self.registry, lambda: self.reasons)
        self.address = ""

    async def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"http://{self.address}{path}", headers=headers) as answer,
        ):
            return answer.status, answer.headers["Content-Type"], await answer.text()


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    port = Port()
    port.address = await port.server.start("127.0.0.1:0")
    yield port
    await port.server.stop()


async def test_it_is_healthy_while_it_answers(port: Port) -> None:
    assert (await port.get("/healthz"))[::2] == (200, "ok\n")


async def test_it_is_ready_until_there_is_a_reason_against_it(port: Port) -> None:
    assert (await port.get("/readyz"))[::2] == (200, "ok\n")
    port.reasons += ["draining", "no userfaultfd"]
    assert (await port.get("/readyz"))[::2] == (503, "draining\nno userfaultfd\n")
    assert (await port.get("/healthz"))[0] == 200
    port.reasons.clear()
    assert (await port.get("/readyz"))[0] == 200


async def test_metrics_are_text_by_default_and_open_metrics_when_asked_for(port: Port) -> None:
    Counter("ferries", "Ferries.", registry=port.registry).inc(3)
    status, kind, text = await port.get("/metrics")
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    assert "ferries_total 3.0" in text
    _, kind, text = await port.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


async def test_other_paths_and_methods_are_refused(port: Port) -> None:
    assert (await port.get("/"))[0] == 404
    assert (await port.get("/metrics", method="POST"))[0] == 405


async def test_a_port_in_use_is_an_error_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(FerryError, match=f"{number} is in use") as raised:
            await HttpServer(CollectorRegistry(), list).start(f"127.0.0.1:{number}")
    assert raised.value.reason is Reason.ADDRESS_IN_USE


async def test_an_address_of_another_host_is_refused() -> None:
    # TEST-NET-1 of RFC 5737 is nobody's.
    with pytest.raises(FerryError, match=r"192\.0\.2\.1") as raised:
        await HttpServer(CollectorRegistry(), list).start("192.0.2.1:0")
    assert raised.value.reason is Reason.CONFIG_INVALID


async def test_after_a_stop_nobody_listens_and_another_stop_is_harmless(port: Port) -> None:
    await port.server.stop()
    await port.server.stop()
    with pytest.raises(aiohttp.ClientConnectorError):
        await port.get("/healthz")


async def test_a_stop_without_a_start_is_harmless() -> None:
    await HttpServer(CollectorRegistry(), list).stop()
