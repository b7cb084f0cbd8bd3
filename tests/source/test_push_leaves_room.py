"""Push leaves room for faults while these come: what is collected for it is sent a turn of the event loop later."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from pageferry.v1 import memory_pb2, page_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.core.frames import framed
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import FAULTS_COME_SECONDS
from pageferryd.core.requests import encode_request
from pageferryd.source.answers import PUSH_MESSAGE_BYTES
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_sockets import PageLane
from pageferryd.source.served import Served

PAGES = PUSH_MESSAGE_BYTES // PAGE_SIZE
TOKEN = b"t" * 32


class Transport(asyncio.Transport):
    """Notes which lane says something."""

    def __init__(self, lane: str, said: list[str]) -> None:
        super().__init__()
        self._lane = lane
        self._said = said

    def writelines(self, _parts: object) -> None:
        self._said.append(self._lane)

    def write(self, _data: object) -> None:
        self._said.append(f"{self._lane} hello")

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return False


class Source:
    """Both lanes of one guest's source."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.said: list[str] = []
        self._lanes = {name: PageLane(lambda _hello, _names: served, lambda _lane: None) for name in ("demand", "push")}
        for name, lane in self._lanes.items():
            lane.connection_made(Transport(name, self.said))
            which = page_pb2.LANE_DEMAND if name == "demand" else page_pb2.LANE_PUSH
            hello = page_pb2.LaneHello(migration_id="m", token=TOKEN, lane=which)
            lane.data_received(framed(hello.SerializeToString()))
        self.said.clear()

    def fetch(self, page: int) -> None:
        self._lanes["demand"].data_received(framed(encode_request([(page, 1)])))

    def push(self) -> None:
        self._lanes["push"].data_received(framed(encode_request([(0, PAGES)], PAGES * PAGE_SIZE)))


@pytest.fixture
def served() -> Iterator[Served]:
    memory = GuestMemory(PAGES * PAGE_SIZE)
    memory.write(0, os.urandom(PAGES * PAGE_SIZE))
    layout = Layout([Region(0, PAGES * PAGE_SIZE)])
    where = memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=memory.address))
    read = SourceMemory.open(layout, [where], os.getpid())
    made = Served("m", TOKEN, "destination", read, layout, lambda: None)
    made.open()
    yield made
    made.close()
    memory.close()


async def a_turn() -> None:
    await asyncio.sleep(0)


async def test_without_faults_a_push_message_is_sent_as_soon_as_it_is_collected(served: Served) -> None:
    source = Source(served)
    source.push()
    await a_turn()
    assert source.said == ["push"]


async def test_a_fault_that_comes_while_a_push_message_is_collected_is_answered_before_it_is_sent(
    served: Served,
) -> None:
    source = Source(served)
    source.fetch(3)
    source.push()
    await a_turn()
    source.fetch(5)
    assert source.said == ["demand", "demand"]
    await a_turn()
    assert source.said == ["demand", "demand", "push"]


async def test_faults_that_came_long_ago_change_nothing(served: Served) -> None:
    source = Source(served)
    source.fetch(3)
    served.fetched_at -= 2 * FAULTS_COME_SECONDS
    source.push()
    await a_turn()
    assert source.said == ["demand", "push"]
