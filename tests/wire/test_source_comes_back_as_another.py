"""A source that comes back as what it was not: another migration, secret, layout or life. Nothing of it is taken."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from guarded import content
from wire_hosts import LOSSES, PAGES, TOKEN, Hosts, of
from wire_proxy import WireProxy

from pageferry.errors import Reason
from pageferryd.core.layout import PAGE_SIZE

pytestmark = pytest.mark.userfaultfd
MIDDLE = PAGES * PAGE_SIZE // 4
EARLIER = 5000
"""What an earlier life of the guest had: every page is another."""


@pytest.fixture(params=["sockets", "grpc"])
async def hosts(request: pytest.FixtureRequest) -> AsyncIterator[Hosts]:
    with WireProxy() as wire:
        made = Hosts(wire, request.param)
        await made.start()
        yield made
        await made.stop()


OTHERS: dict[str, tuple[Callable[[Hosts], object], Reason]] = {
    "forgot the migration": (lambda hosts: hosts.source.forgets(), Reason.UNKNOWN_MIGRATION),
    "has another secret": (lambda hosts: hosts.source.offers(token=b"u" * 32), Reason.TOKEN_INVALID),
    "has an earlier life of the guest under the same name": (
        lambda hosts: hosts.source.offers(token=b"e" * 32, first=EARLIER),
        Reason.TOKEN_INVALID,
    ),
    "has less memory": (lambda hosts: hosts.source.offers(pages=PAGES - 1), Reason.LAYOUT_MISMATCH),
    "has more memory": (lambda hosts: hosts.source.offers(pages=PAGES + 1, first=EARLIER), Reason.LAYOUT_MISMATCH),
    "lets the guest run still": (lambda hosts: hosts.source.offers(first=EARLIER, is_open=False), Reason.ILLEGAL_STATE),
}


@pytest.mark.parametrize("case", OTHERS)
async def test_a_source_that_comes_back_as_another_is_refused_until_it_is_itself(hosts: Hosts, case: str) -> None:
    become, reason = OTHERS[case]
    cutting = hosts.wire.when_forwarded(MIDDLE, hosts.wire.cut)
    guest = hosts.arrive()
    await guest.until_lost(cutting, *LOSSES)
    missing = guest.session.pager.map.missing
    become(hosts)
    reading = guest.guarded.reading(PAGES - 1)
    hosts.wire.heal()
    await guest.until_paused(reason)
    # It is asked again and again, and nothing is taken of what it has.
    await guest.until_paused(reason, behind=len(guest.paused))
    assert guest.session.pager.map.missing == missing
    assert not reading.done()
    assert hosts.source.completions == 0

    hosts.source.offers(token=TOKEN)
    assert await of(reading) == content(PAGES - 1)
    await guest.is_whole()
    assert hosts.source.completions == 1


async def test_a_source_that_is_another_from_the_beginning_gives_nothing(hosts: Hosts) -> None:
    hosts.source.offers(token=b"e" * 32, first=EARLIER)
    guest = hosts.arrive()
    reading = guest.guarded.reading(0)
    await guest.until_paused(Reason.TOKEN_INVALID)
    assert guest.session.pager.map.missing == PAGES
    hosts.source.offers()
    assert await of(reading) == content(0)
    await guest.is_whole()
