"""FaultService over a real socket: each fault that a VMM forwards is answered once, whatever else goes on."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from arriving import at_source, expected
from guarded import DEADLINE, content
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from queue_lanes import QueueSource
from shared_guest import Kind, SharedGuest

from forwarding_vmm import ForwardingVmm, HandSession
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import fault_pb2 as pb
from pageferryd.config import Settings
from pageferryd.control.faults import Faults
from pageferryd.core.errors import PageRangeError
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import PagerOptions
from pageferryd.destination import exit_door, fault_service
from pageferryd.destination.address_map import AddressMap
from pageferryd.destination.door import Settled
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.fault_stream import FaultStream
from pageferryd.destination.handed_over import Handoff
from pageferryd.destination.session import Session, SessionOptions
from pageferryd.linux.vmm_directory import VmmDirectory

INSTALLED, ZERO, SPURIOUS = pb.OUTCOME_INSTALLED, pb.OUTCOME_ZERO, pb.OUTCOME_SPURIOUS
# Pages 0 to 7 lie above pages 8 to 607.
LAYOUT = Layout([Region(1 << 32, 8 * PAGE_SIZE), Region(0, 600 * PAGE_SIZE)])
HIGH = 1 << 32


class Site:
    """One guest's FaultService, its VMM, and the pager behind it."""

    def __init__(self, faults: Faults, door: ExitDoor, session: Any, handoff: Handoff, far_end: socket.socket) -> None:
        self.faults, self.door, self.session = faults, door, session
        faults.connect(door, session, handoff)
        self.vmms: list[ForwardingVmm] = []
        self.vmm = self.another_vmm()
        self._ends = handoff.connection, far_end

    def another_vmm(self) -> ForwardingVmm:
        self.vmms.append(ForwardingVmm(self.faults.endpoint))
        return self.vmms[-1]

    async def close(self) -> None:
        for vmm in self.vmms:
            await vmm.close()
        await self.faults.stop()
        for end in self._ends:
            end.close()


@pytest.fixture
def settings(short_dir: Path) -> Settings:
    return Settings(host="a", listen=["127.0.0.1:0"], insecure=True, runtime_dir=short_dir)


async def serve_by_hand(settings: Settings, name: str) -> Site:
    """A guest of which the test settles the pages."""
    door = ExitDoor(LAYOUT)
    return await serve(settings, name, door, HandSession(door), addresses=AddressMap(LAYOUT, [1 << 40, 1 << 30]))


async def serve(settings: Settings, name: str, door: ExitDoor, session: Any, addresses: AddressMap) -> Site:
    here, there = socket.socketpair()
    here.setblocking(False)
    handoff = Handoff(None, addresses, here, door.layout)
    directory = VmmDirectory.make(settings.runtime_dir, name, os.getpid())
    return Site(await Faults.start(settings, directory), door, session, handoff, there)


@pytest.fixture
async def by_hand(settings: Settings) -> AsyncIterator[Site]:
    site = await serve_by_hand(settings, "g")
    yield site
    await site.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.001)


# Each fault by itself


@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        (Settled.INSTALLED, INSTALLED),
        (Settled.ZERO, ZERO),
        (Settled.POISONED, pb.OUTCOME_POISONED),
        (Settled.PRESENT, SPURIOUS),
    ],
)
async def test_a_fault_is_answered_as_it_was_settled(by_hand: Site, how: Settled, outcome: int) -> None:
    token = await by_hand.vmm.ask(5 * PAGE_SIZE + 123, vcpu=3, access=pb.ACCESS_WRITE, exit_flags=1 << 63)
    await by_hand.session.until(1)
    by_hand.door.settled(13, 1, how)
    response = await by_hand.vmm.answer()
    assert by_hand.session.faults == [13]
    assert (response.token, response.guest_address, response.size) == (token, 5 * PAGE_SIZE, PAGE_SIZE)
    assert response.outcome == outcome


@pytest.mark.parametrize(
    ("address", "size", "reason"),
    [
        (600 * PAGE_SIZE, PAGE_SIZE, "PAGE_OUT_OF_RANGE"),
        (599 * PAGE_SIZE, 2 * PAGE_SIZE, "PAGE_OUT_OF_RANGE"),
        (HIGH - PAGE_SIZE, PAGE_SIZE, "PAGE_OUT_OF_RANGE"),
        (HIGH + 7 * PAGE_SIZE, 2 * PAGE_SIZE, "PAGE_OUT_OF_RANGE"),
        ((1 << 64) - 1, PAGE_SIZE, "PAGE_OUT_OF_RANGE"),
        (0, 0, None),
        (0, 1, None),
        (0, PAGE_SIZE + 1, None),
        (0, 513 * PAGE_SIZE, None),
        (0, (1 << 64) - 1, None),
        (0, (1 << 64) - PAGE_SIZE, None),
    ],
)
async def test_a_fault_that_cannot_be_is_refused_and_the_stream_goes_on(
    by_hand: Site, address: int, size: int, reason: str | None
) -> None:
    found = await by_hand.vmm.refusal(address, size)
    assert found == reason or (reason is None and found in ("INVALID_ARGUMENT", "PAGE_OUT_OF_RANGE"))
    assert by_hand.session.faults == []
    await by_hand.vmm.ask(0)
    await by_hand.session.until(1)


@pytest.mark.parametrize("fields", [{"access": 9}, {"sharing": 3}, {"access": -1}, {"token": 0}])
async def test_a_fault_with_an_unknown_word_is_refused(by_hand: Site, fields: dict[str, int]) -> None:
    assert await by_hand.vmm.refusal(0, **fields) == "INVALID_ARGUMENT"


async def test_a_token_that_is_in_use_is_refused_and_free_again_when_answered(by_hand: Site) -> None:
    await by_hand.vmm.ask(0, token=7)
    await by_hand.session.until(1)
    assert await by_hand.vmm.refusal(PAGE_SIZE, token=7) == "INVALID_ARGUMENT"
    by_hand.door.settled(8, 1, Settled.ZERO)
    assert (await by_hand.vmm.answer()).token == 7
    await by_hand.vmm.ask(PAGE_SIZE, token=7)
    await by_hand.session.until(2)
    assert by_hand.session.faults == [8, 9]


async def test_a_fault_that_the_pager_cannot_take_is_refused_once_and_never_answered(by_hand: Site) -> None:
    def refuse(_events: object) -> None:
        raise FerryError(Reason.VMM_GONE, "the VMM ended")

    by_hand.door.open(refuse, by_hand.session.failures.append)
    assert await by_hand.vmm.refusal(0, token=5) == "VMM_GONE"
    assert [str(failure) for failure in by_hand.session.failures] == ["the VMM ended"]
    by_hand.door.open(by_hand.session._take, by_hand.session.failures.append)
    by_hand.door.settled(8, 1, Settled.INSTALLED)
    await by_hand.vmm.ask(PAGE_SIZE, token=6)
    await by_hand.session.until(1)
    by_hand.door.settled(9, 1, Settled.ZERO)
    assert (await by_hand.vmm.answer()).token == 6


async def test_more_faults_than_may_wait_are_refused(by_hand: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_door, "MAX_WAITING", 2)
    for page in range(2):
        await by_hand.vmm.ask(page * PAGE_SIZE)
    assert await by_hand.vmm.refusal(2 * PAGE_SIZE) == "TOO_MANY_MIGRATIONS"


async def test_after_the_door_was_closed_faults_are_refused(by_hand: Site) -> None:
    by_hand.door.close()
    assert await by_hand.vmm.refusal(0) == "ILLEGAL_STATE"


# Many at once


async def test_many_faults_are_answered_in_the_order_in_which_their_pages_come(by_hand: Site) -> None:
    tokens = {page: await by_hand.vmm.ask((page - 8) * PAGE_SIZE) for page in range(8, 308)}
    await by_hand.session.until(300)
    order = list(tokens)
    random.Random(7).shuffle(order)
    for page in order:
        by_hand.door.settled(page, 1, Settled.INSTALLED)
    assert [(await by_hand.vmm.answer()).token for _ in order] == [tokens[page] for page in order]


async def test_all_who_wait_for_a_page_are_answered_at_once(by_hand: Site) -> None:
    tokens = [await by_hand.vmm.ask(PAGE_SIZE, vcpu=vcpu) for vcpu in range(4)]
    await by_hand.session.until(4)
    by_hand.door.settled(8, 3, Settled.ZERO)
    assert sorted([(await by_hand.vmm.answer()).token for _ in tokens]) == tokens


async def test_a_fault_over_many_pages_is_answered_when_the_last_has_come(by_hand: Site) -> None:
    whole = await by_hand.vmm.ask(0, 512 * PAGE_SIZE)
    await by_hand.session.until(512)
    by_hand.door.settled(8, 511, Settled.ZERO)
    one = await by_hand.vmm.ask(512 * PAGE_SIZE)
    await by_hand.session.until(513)
    by_hand.door.settled(520, 1, Settled.ZERO)
    assert (await by_hand.vmm.answer()).token == one
    by_hand.door.settled(519, 1, Settled.INSTALLED)
    last = await by_hand.vmm.answer()
    assert (last.token, last.size, last.outcome) == (whole, 512 * PAGE_SIZE, INSTALLED)


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
async def test_whatever_overlaps_every_fault_is_answered_once_and_not_before_its_last_page(
    by_hand: Site, faults: list[tuple[int, int]], order: random.Random
) -> None:
    # What an example that failed has left behind is not this one's.
    await by_hand.vmm.hang_up()
    before = len(by_hand.session.faults)
    tokens = {await by_hand.vmm.ask(at * PAGE_SIZE, size * PAGE_SIZE): (at, size) for at, size in faults}
    await by_hand.session.until(before + sum(size for _, size in faults))
    pages = list(range(8, 34))
    order.shuffle(pages)
    answered: list[int] = []
    settled: set[int] = set()
    for page in pages:
        by_hand.door.settled(page, 1, Settled.INSTALLED)
        settled.add(page)
        done = [t for t, (at, size) in tokens.items() if settled.issuperset(range(8 + at, 8 + at + size))]
        while len(answered) < len(done):
            answered.append((await by_hand.vmm.answer()).token)
        assert sorted(answered) == sorted(done)
    assert sorted(answered) == sorted(tokens)


# VMMs that do not do as they should


async def test_a_vmm_that_reads_no_answers_is_not_listened_to_until_it_does_and_nobody_else_waits(
    by_hand: Site, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_service, "MAX_UNSENT", 50)
    unsent: list[int] = []
    put = FaultStream._put

    def count(stream: FaultStream, response: pb.ResolveFaultsResponse) -> None:
        put(stream, response)
        unsent.append(len(stream._unsent))

    monkeypatch.setattr(FaultStream, "_put", count)
    other = await serve_by_hand(settings, "other")
    by_hand.vmm.open()

    async def ask_much() -> None:
        # Refused at once, each of them: as many answers as questions, and longer ones.
        for token in range(1, 4001):
            await by_hand.vmm.call.write(pb.ResolveFaultsRequest(token=token, size=1))

    asking = asyncio.create_task(ask_much())
    try:
        await until(lambda: bool(unsent) and unsent[-1] > 50)
        token = await other.vmm.ask(0)
        await other.session.until(1)
        other.door.settled(8, 1, Settled.ZERO)
        assert (await other.vmm.answer()).token == token
        assert not asking.done()
        assert [(await by_hand.vmm.answer()).token for _ in range(4000)] == list(range(1, 4001))
        assert max(unsent) == 51
    finally:
        asking.cancel()
        await other.close()


async def test_a_vmm_that_ends_while_it_reads_no_answers_is_forgotten(
    by_hand: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_service, "MAX_UNSENT", 0)
    await by_hand.vmm.ask(0)
    await by_hand.session.until(1)
    for _ in range(3):
        await by_hand.vmm.ask(600 * PAGE_SIZE)
    await by_hand.vmm.hang_up()
    await until(lambda: not by_hand.door._waiting)


async def test_a_vmm_that_dies_with_faults_under_way_is_forgotten(by_hand: Site) -> None:
    for page in range(20):
        await by_hand.vmm.ask(page * PAGE_SIZE)
    await by_hand.session.until(20)
    await by_hand.vmm.hang_up()
    await until(lambda: not by_hand.door._waiting)
    assert by_hand.door._count == 0
    by_hand.door.settled(8, 20, Settled.INSTALLED)


async def test_a_stream_that_broke_is_opened_again_and_asked_again(by_hand: Site) -> None:
    await by_hand.vmm.ask(0, token=1)
    await by_hand.session.until(1)
    await by_hand.vmm.hang_up()
    await by_hand.vmm.ask(0, token=1)
    await by_hand.session.until(2)
    by_hand.door.settled(8, 1, Settled.INSTALLED)
    assert (await by_hand.vmm.answer()).outcome == INSTALLED


async def test_two_streams_of_one_vmm_do_not_mix_their_tokens(by_hand: Site) -> None:
    second = by_hand.another_vmm()
    await by_hand.vmm.ask(0, token=1)
    await second.ask(PAGE_SIZE, token=1)
    await by_hand.session.until(2)
    by_hand.door.settled(9, 1, Settled.ZERO)
    assert (await second.answer()).guest_address == PAGE_SIZE
    by_hand.door.settled(8, 1, Settled.INSTALLED)
    assert (await by_hand.vmm.answer()).guest_address == 0


# Conversions


async def convert(site: Site, address: int, size: int, sharing: int = pb.SHARING_PRIVATE) -> None:
    request = pb.ConvertRangeRequest(guest_address=address, size=size, sharing=sharing)  # type: ignore[arg-type]
    await site.vmm.stub.ConvertRange(request, metadata=site.vmm.metadata, timeout=DEADLINE)


async def test_a_conversion_is_known_when_it_is_answered(by_hand: Site) -> None:
    await convert(by_hand, HIGH + PAGE_SIZE, 3 * PAGE_SIZE)
    await convert(by_hand, 0, PAGE_SIZE, pb.SHARING_SHARED)
    assert by_hand.session.converted == [(1, 3), (8, 1)]


@pytest.mark.parametrize(
    ("address", "size", "sharing"),
    [
        (0, PAGE_SIZE // 2, pb.SHARING_PRIVATE),
        (PAGE_SIZE // 2, PAGE_SIZE, pb.SHARING_PRIVATE),
        (0, 0, pb.SHARING_PRIVATE),
        (600 * PAGE_SIZE, PAGE_SIZE, pb.SHARING_PRIVATE),
        (HIGH, 9 * PAGE_SIZE, pb.SHARING_SHARED),
        (0, PAGE_SIZE, pb.SHARING_UNSPECIFIED),
        (0, PAGE_SIZE, 77),
    ],
)
async def test_a_conversion_that_cannot_be_is_refused(by_hand: Site, address: int, size: int, sharing: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await convert(by_hand, address, size, sharing)
    assert from_rpc(refused.value, Reason.INTERNAL).reason in (Reason.INVALID_ARGUMENT, Reason.PAGE_OUT_OF_RANGE)
    assert by_hand.session.converted == []


# With a session behind it


class Whole:
    """A guest of a memory file that arrives in this process, with both doors where a userfaultfd watches it."""

    def __init__(self, guest: SharedGuest, site: Site, source: QueueSource) -> None:
        self.guest, self.site, self.source = guest, site, source
        self.session: Session = site.session
        self.running = asyncio.create_task(self.session.run())

    async def outcome(self, page: int) -> int:
        piece = next(self.guest.layout.pieces(page, 1))
        address = self.guest.layout.regions[piece.region].guest_address + piece.first * PAGE_SIZE
        return await self.site.vmm.outcome(address)

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.site.close()
        await self.session.close()
        self.guest.close()
        self.source.close()


MakeWhole = Callable[..., Any]


@pytest.fixture
async def arrive(settings: Settings) -> AsyncIterator[MakeWhole]:
    made: list[Whole] = []

    async def make(*sizes: int, kind: Kind = Kind.MEMFD, watched: bool = False, push: bool = False) -> Whole:
        guest = SharedGuest(*sizes, kind=kind, watched=watched)
        source = QueueSource(guest.layout, at_source)
        # Its descriptors stay the guest's: it closes them.
        handoff = Handoff(guest.uffd, guest.addresses, socket.socket(), guest.layout, guest.memory, guest.bitmap)
        handoff.connection.close()
        door, doors = handoff.doors()
        options = PagerOptions(fault_around=0, pacing=PacingOptions(disabled=not push))
        session = Session(guest.layout, doors, guest.installer, source, SessionOptions(options))
        session.open_doors()
        site = await serve(settings, "whole", door, session, guest.addresses)
        made.append(Whole(guest, site, source))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture(params=[Kind.MEMFD, pytest.param(Kind.GUEST_MEMFD, marks=pytest.mark.kvm)])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


async def test_pages_come_from_the_source_and_repeated_faults_are_spurious(arrive: MakeWhole, kind: Kind) -> None:
    one = await arrive(20, 40, kind=kind)
    assert [await one.outcome(page) for page in (3, 25, 4, 5)] == [INSTALLED, INSTALLED, ZERO, INSTALLED]
    assert [await one.outcome(page) for page in (3, 4)] == [SPURIOUS, SPURIOUS]
    for page in (3, 4, 5, 25):
        assert not one.guest.bits.is_set(page)
        assert one.guest._read(page) == expected(page)
    assert one.guest.bits.is_set(6)


async def test_with_push_the_whole_guest_arrives(arrive: MakeWhole, kind: Kind) -> None:
    one = await arrive(300, 500, kind=kind, push=True)
    asked = {await one.site.vmm.ask((page - 300) * PAGE_SIZE + (1 << 40)) for page in range(300, 800, 25)}
    one.session.start_push()
    await asyncio.wait_for(asyncio.shield(one.running), DEADLINE)
    assert {(await one.site.vmm.answer()).token for _ in asked} == asked
    assert one.source.completions == 1
    for page in range(800):
        assert one.guest._read(page) == expected(page)
        assert not one.guest.bits.is_set(page)


async def test_pages_that_were_converted_are_zero_and_never_what_the_source_had(arrive: MakeWhole) -> None:
    one = await arrive(20)
    await convert(one.site, 0, 2 * PAGE_SIZE, pb.SHARING_SHARED)
    assert [await one.outcome(page) for page in (0, 1, 2)] == [ZERO, ZERO, INSTALLED]
    assert one.guest._read(0) == bytes(PAGE_SIZE)
    assert sum(pages for runs in one.source.connections[0].fetches for _, pages in runs) == 1


async def test_a_conversion_answers_who_waits_for_the_page(arrive: MakeWhole) -> None:
    one = await arrive(20)
    one.source.spoil = lambda _lane, _message: None
    token = await one.site.vmm.ask(0)
    await until(lambda: bool(one.site.door._waiting))
    await convert(one.site, 0, PAGE_SIZE, pb.SHARING_SHARED)
    response = await one.site.vmm.answer()
    assert (response.token, response.outcome) == (token, ZERO)


@pytest.mark.userfaultfd
async def test_a_page_wanted_through_both_doors_is_fetched_once(arrive: MakeWhole) -> None:
    one = await arrive(20, watched=True)
    one.source.flowing.clear()
    held: list[Any] = []
    one.source.spoil = lambda lane, message: held.append((lane, message))
    reading = one.guest.reading(7)
    token = await one.site.vmm.ask(7 * PAGE_SIZE)
    await until(lambda: bool(held) and sum(one.session.intake.counts.values()) >= 2)
    one.source.spoil = lambda _lane, message: message
    one.source.flowing.set()
    ((lane, message),) = held
    one.source.connections[0]._streams[lane]._context.answers.put_nowait(message)
    assert (await one.site.vmm.answer()).token == token
    assert await asyncio.wait_for(asyncio.wrap_future(reading), DEADLINE) == content(7)
    assert one.source.connections[0].fetches == [((7, 1),)]


@pytest.mark.userfaultfd
async def test_through_both_doors_at_once_every_page_is_the_sources(arrive: MakeWhole) -> None:
    one = await arrive(200, 100, watched=True, push=True)
    one.session.start_push()
    readings = {page: one.guest.reading(page) for page in range(0, 300, 3)}
    for page in range(0, 200, 7):
        assert await one.outcome(page) in (INSTALLED, ZERO, SPURIOUS)
    for page, reading in readings.items():
        assert await asyncio.wait_for(asyncio.wrap_future(reading), DEADLINE) == expected(page)
    await asyncio.wait_for(asyncio.shield(one.running), DEADLINE)
    await one.session.close()
    one.guest.installer.release()
    for page in range(300):
        assert one.guest._read(page) == expected(page)


@pytest.mark.userfaultfd
async def test_what_the_guest_gave_away_under_a_userfaultfd_is_zero_through_the_exit_door(arrive: MakeWhole) -> None:
    one = await arrive(20, watched=True)
    await asyncio.wait_for(asyncio.wrap_future(one.guest.discarding(2)), DEADLINE)
    assert await one.outcome(2) == ZERO
    assert await asyncio.wait_for(asyncio.wrap_future(one.guest.reading(2)), DEADLINE) == bytes(PAGE_SIZE)


def test_a_range_outside_is_the_cores_error() -> None:
    with pytest.raises(PageRangeError):
        LAYOUT.run_at(HIGH, 9 * PAGE_SIZE)
