"""A guest's memory on offer: closed, open, released, and never back."""

from __future__ import annotations

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.runs import POISONED, RAW, ZERO, Run
from pageferryd.source.served import TOKEN_BYTES, Access, Served

TOKEN = bytes(range(TOKEN_BYTES))
LAYOUT = Layout([Region(0, 8 * PAGE_SIZE)])


class Memory:
    closed = 0

    def close(self) -> None:
        self.closed += 1


class Offer:
    def __init__(self) -> None:
        self.memory = Memory()
        self.completions = 0
        self.served = Served("m", TOKEN, "b", self.memory, LAYOUT, self._complete)  # type: ignore[arg-type]

    def _complete(self) -> None:
        self.completions += 1

    def refused(self, what: object, *arguments: object) -> Reason:
        assert callable(what)
        with pytest.raises(FerryError) as refused:
            what(*arguments)
        return refused.value.reason


@pytest.fixture
def offer() -> Offer:
    return Offer()


def test_nothing_is_readable_before_the_guest_stands_still(offer: Offer) -> None:
    assert offer.refused(offer.served.readable) is Reason.ILLEGAL_STATE
    assert offer.refused(offer.served.complete, 8) is Reason.ILLEGAL_STATE
    assert offer.memory.closed == offer.completions == 0
    offer.served.open()
    assert offer.served.readable() is offer.memory


@pytest.mark.parametrize("token", [b"", TOKEN[:-1], TOKEN + b"x", bytes(TOKEN_BYTES)])
def test_no_other_token_will_do(offer: Offer, token: bytes) -> None:
    assert offer.refused(offer.served.check_token, token) is Reason.TOKEN_INVALID
    offer.served.check_token(TOKEN)


@pytest.mark.parametrize("pages", [0, 7, 9])
def test_a_completion_counts_every_page(offer: Offer, pages: int) -> None:
    offer.served.open()
    assert offer.refused(offer.served.complete, pages) is Reason.INVALID_ARGUMENT
    assert offer.served.access is Access.OPEN


def test_a_completion_lets_the_memory_go_once(offer: Offer) -> None:
    offer.served.open()
    offer.served.complete(8)
    offer.served.complete(8)
    assert offer.completions == offer.memory.closed == 1
    assert offer.refused(offer.served.readable) is Reason.ILLEGAL_STATE


def test_memory_that_was_taken_back_completes_nothing(offer: Offer) -> None:
    offer.served.open()
    offer.served.close()
    offer.served.close()
    offer.served.complete(8)
    assert offer.memory.closed == 1
    assert offer.completions == 0


def test_what_was_sent_is_counted_by_lane_and_kind(offer: Offer) -> None:
    offer.served.count("push", [Run(0, 3, RAW), Run(3, 2, ZERO), Run(5, 1, POISONED)])
    offer.served.count("demand", [Run(6, 1, RAW)])
    assert offer.served.pages == {
        ("push", "raw"): 3, ("push", "zero"): 2, ("push", "poisoned"): 1, ("demand", "raw"): 1,
    }  # fmt: skip
    assert offer.served.bytes == {"push": 3 * PAGE_SIZE, "demand": PAGE_SIZE}
