"""Guests with private pages cross between two real sidecars: readable ones, opaque ones, and those on huge pages."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from child import Child, Event
from crossing import FAILED, PAUSED, Crossing, Stage, until
from moving_guest import Guest
from sidecar_process import Sidecar
from tcp_proxy import TcpProxy

from pageferry.errors import Reason
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

PROGRAM = str(Path(__file__).with_name("confidential_vmm.py"))
MEMORY = "4M"
PAGES = 1024
STEADY = 100
"""A private page that the guest never converts."""
HUGE = pytest.param(("--backing", "hugetlbfs"), id="huge", marks=pytest.mark.hugetlb)
OPAQUE_HUGE = pytest.param(("--opaque", "--backing", "hugetlbfs"), id="opaque-huge", marks=pytest.mark.hugetlb)
VARIANTS = [
    pytest.param((), id="readable"),
    pytest.param(("--opaque",), id="opaque"),
    pytest.param(("--backing", "anonymous"), id="readable-anonymous"),
    HUGE,
    OPAQUE_HUGE,
]


class ConfidentialGuest(Guest):
    """One process of confidential_vmm.py."""

    def __init__(self, socket_path: Path, *options: str) -> None:
        self.socket_path = str(socket_path)
        command = [sys.executable, PROGRAM, "--socket", self.socket_path, "--memory", MEMORY, *options]
        Child.__init__(self, command, "stdout")
        try:
            self.wait_event("ready")
        except BaseException:
            self.close()
            raise

    async def arrived(self) -> Event:
        """Wait until it was let go; return what it counted."""
        return await self.event("arrived")


@pytest.fixture
def variant(request: pytest.FixtureRequest) -> tuple[str, ...]:
    chosen: tuple[str, ...] = request.param
    if "hugetlbfs" in chosen:
        request.getfixturevalue("huge_pages")
    return chosen


@pytest.fixture
async def proxy() -> AsyncIterator[TcpProxy]:
    async with TcpProxy() as made:
        yield made


async def confidential(
    stage: Stage, source: Sidecar, destination: Sidecar, variant: tuple[str, ...], *waiting_options: str
) -> Crossing:
    """Start a guest at `source`, and a VMM that waits for it at `destination`."""
    guest_id = f"guest-{uuid.uuid4().hex[:8]}"
    running, waiting = await asyncio.gather(
        stage._made(lambda: ConfidentialGuest(stage.directory / f"{guest_id}-a.sock", *variant)),
        stage._made(
            lambda: ConfidentialGuest(stage.directory / f"{guest_id}-b.sock", "--incoming", *variant, *waiting_options)
        ),
    )
    clients = await stage.client(source), await stage.client(destination)
    for client, guest in zip(clients, (running, waiting), strict=True):
        await stage.register(client, guest_id, guest)
    await running.runs_on()
    return Crossing(guest_id, source, destination, *clients, running, waiting)


async def arrives(crossing: Crossing) -> Event:
    """Wait until it is over and every byte was found right; return what the VMM counted."""
    left, came = await crossing.arrives()
    assert isinstance(crossing.waiting, ConfidentialGuest)
    for shown in (left, came):
        assert shown.progress.pages_present + shown.progress.pages_discarded == shown.progress.pages_total == PAGES
        assert shown.progress.faults_waiting == shown.progress.pages_poisoned == 0
    return await crossing.waiting.arrived()


def has_crossed(counted: Event, variant: tuple[str, ...]) -> None:
    """Both ways of import were gone, and with opaque pages bundles of several streams."""
    assert counted["DONE"] > 400
    assert counted["pending"] > 50
    assert counted["private faults"] > 0
    assert counted["ahead of faults"] > 0
    if "--opaque" in variant:
        assert counted["bundles"] > 20
        assert all(counted[f"stream {number}"] > 5 for number in range(3))


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
async def test_a_confidential_guest_goes_on_at_the_destination_with_both_sides_of_its_memory(
    stage: Stage, alpha: Sidecar, beta: Sidecar, variant: tuple[str, ...]
) -> None:
    crossing = await confidential(stage, alpha, beta, variant)
    await crossing.start(push_bytes_per_second=2 << 20)
    counted = await arrives(crossing)
    has_crossed(counted, variant)
    if "hugetlbfs" not in variant:
        # A huge page comes as a whole, before the guest may have converted anything.
        assert counted["conversions to private"] > 10
        assert counted["conversions to shared"] > 10


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
async def test_a_cut_connection_loses_no_page_of_either_kind(
    stage: Stage, proxy: TcpProxy, variant: tuple[str, ...]
) -> None:
    # Over gRPC alone, or the pages would not go by the proxy.
    source, destination = await asyncio.gather(
        stage.sidecar("source", advertise=proxy.address, lane_sockets=False), stage.sidecar("destination")
    )
    proxy.target = source.address
    crossing = await confidential(stage, source, destination, variant)
    # What the guest is loaded with touches the lower half of its memory, which is one huge page: not before that.
    proxy.cut_after = 2600 << 10 if "hugetlbfs" in variant else 1 << 20
    await crossing.start()
    for cuts in (1, 2):
        await crossing.becomes(crossing.at_destination, PAUSED)
        proxy.heal()
        if cuts == 1:
            proxy.cut_after = proxy.forwarded + (100 << 10)

        async def is_over(cuts: int = cuts) -> bool:
            shown = await crossing.at_destination.get_migration(crossing.migration_id)
            return shown.progress.reconnects >= cuts

        await until(is_over, f"the {cuts}. loss is over")
    counted = await arrives(crossing)
    assert counted["DONE"] > 400


@pytest.mark.parametrize("variant", [pytest.param((), id="readable"), pytest.param(("--opaque",), id="opaque")])
async def test_an_import_that_fails_for_a_while_is_delivered_again(
    stage: Stage, alpha: Sidecar, beta: Sidecar, variant: tuple[str, ...]
) -> None:
    crossing = await confidential(stage, alpha, beta, variant, "--refuse", str(STEADY), "--refusals", "20")
    await crossing.start()
    counted = await arrives(crossing)
    assert counted["refused"] == 20
    has_crossed(counted, variant)


@pytest.mark.parametrize("variant", [pytest.param((), id="readable"), pytest.param(("--opaque",), id="opaque")])
async def test_an_import_that_fails_for_ever_ends_that_migration_and_harms_no_other_guest(
    stage: Stage, variant: tuple[str, ...]
) -> None:
    source, destination = await asyncio.gather(stage.sidecar("source"), stage.sidecar("destination"))
    doomed, other = await asyncio.gather(
        confidential(stage, source, destination, variant, "--refuse", str(STEADY), "--refusals", "-1"),
        confidential(stage, source, destination, variant),
    )
    await doomed.start()
    await other.start(push_bytes_per_second=2 << 20)

    async def has_failed() -> pb.Migration | None:
        shown = await doomed.at_source.get_migration(doomed.migration_id)
        return shown if shown.state == FAILED else None

    # A thousand deliveries take their time.
    failed = await until(has_failed, "the migration has failed", 40.0)
    assert failed.error.reason == Reason.VMM_FAILED
    assert "refused" in failed.error.message
    at_destination = await doomed.becomes(doomed.at_destination, FAILED)
    assert at_destination.progress.pages_present < PAGES
    has_crossed(await arrives(other), variant)
    # It ran at its destination, so it never runs at its source again; there it waits, and has seen nothing wrong.
    assert (await doomed.guest.status())["state"] == "paused"
    assert doomed.waiting is not None
    assert (await doomed.waiting.status())["state"] == "running"
    assert doomed.waiting.wrongs == []
