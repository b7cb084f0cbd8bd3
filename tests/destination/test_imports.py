"""The import desk: what was delivered to the VMM and not reported, in its order and within its bounds."""

from __future__ import annotations

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pager import Lane
from pageferryd.core.runs import OPAQUE, PRIVATE, PRIVATE_ZERO, Run
from pageferryd.destination import imports
from pageferryd.destination.imports import Delivery, ImportDesk, ImportEnd


class Desk:
    def __init__(self) -> None:
        self.imported: list[tuple[Run, Lane]] = []
        self.refused: list[int] = []
        self.sent: list[Delivery] = []
        self.desk = ImportDesk(lambda run, lane: self.imported.append((run, lane)), self.refused.append)

    def connect(self) -> list[Delivery]:
        self.sent = []
        self.desk.connect(self.sent.append)
        return self.sent

    def bundle(self, *pages: int, wanted: tuple[int, ...] | None = None, payload: bytes = b"", epoch: int = 0) -> None:
        delivery = Delivery(pages, payload, b"meta", 1, epoch)
        self.desk.deliver_bundle(delivery, pages if wanted is None else wanted, Lane.PUSH)


@pytest.fixture
def one() -> Desk:
    return Desk()


def test_pages_are_delivered_each_by_itself_and_once(one: Desk) -> None:
    one.connect()
    data = b"x" + b"a" * PAGE_SIZE + b"b" * PAGE_SIZE
    assert one.desk.deliver(Run(5, 2, PRIVATE), data, 1, Lane.DEMAND) == 0
    assert one.desk.deliver(Run(4, 3, PRIVATE_ZERO), b"", 0, Lane.PUSH) == 2
    assert one.sent == [
        Delivery((5,), b"a" * PAGE_SIZE), Delivery((6,), b"b" * PAGE_SIZE), Delivery((4,), b""),
    ]  # fmt: skip
    one.desk.report(4, 3, ImportEnd.DONE)
    assert [run for run, _ in one.imported] == [Run(4, 1, PRIVATE_ZERO), Run(5, 1, PRIVATE), Run(6, 1, PRIVATE)]


def test_a_bundle_is_delivered_whole_even_with_pages_that_came_before(one: Desk) -> None:
    one.connect()
    one.bundle(3, 9, 1)
    one.bundle(9, 4)
    assert [delivery.pages for delivery in one.sent] == [(3, 9, 1), (9, 4)]


@pytest.mark.parametrize("end", [ImportEnd.DONE, ImportEnd.STALE, ImportEnd.DUPLICATE])
def test_every_end_but_a_failure_settles_the_page_once(one: Desk, end: ImportEnd) -> None:
    one.bundle(3, 9)
    one.desk.report(3, 1, end)
    one.desk.report(3, 1, end)
    one.desk.report(8, 5, end)
    assert one.imported == [(Run(3, 1, OPAQUE), Lane.PUSH), (Run(9, 1, OPAQUE), Lane.PUSH)]
    assert 3 not in one.desk
    assert one.refused == []


def test_a_failed_import_is_refused_and_free_to_come_again(one: Desk) -> None:
    one.bundle(3, 9)
    one.desk.report(9, 1, ImportEnd.FAILED)
    one.desk.report(9, 1, ImportEnd.FAILED)
    assert one.refused == [9]
    assert (3 in one.desk, 9 in one.desk) == (True, False)
    one.bundle(9)
    one.desk.report(9, 1, ImportEnd.DONE)
    assert [run.first for run, _ in one.imported] == [9]


def test_a_bundle_that_fails_counts_once_however_many_pages_it_has(one: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "MAX_FAILURES", 3)
    for _ in range(3):
        one.bundle(*range(500))
        one.desk.report(0, 500, ImportEnd.FAILED)
    one.bundle(*range(500))
    with pytest.raises(FerryError) as failed:
        one.desk.report(0, 500, ImportEnd.FAILED)
    assert failed.value.reason is Reason.VMM_FAILED


def test_a_report_of_all_that_a_guest_could_have_costs_no_more_than_what_is_there(one: Desk) -> None:
    one.bundle(3, 9)
    one.desk.report(0, 1 << 40, ImportEnd.DONE)
    assert [run.first for run, _ in one.imported] == [3, 9]


def test_what_was_not_reported_is_delivered_again_each_bundle_once_and_in_order(one: Desk) -> None:
    one.bundle(1, 2, epoch=1)
    one.bundle(3, epoch=2)
    one.bundle(4, epoch=3)
    one.bundle(1, 5, epoch=4)
    one.desk.report(3, 1, ImportEnd.DONE)
    assert [delivery.epoch for delivery in one.connect()] == [1, 3, 4]
    one.desk.report(2, 1, ImportEnd.DONE)
    # All of the first bundle came again with the last one, or is in the guest.
    assert [delivery.epoch for delivery in one.connect()] == [3, 4]


def test_a_stream_that_took_the_place_of_another_is_not_ended_by_its_end(one: Desk) -> None:
    old: list[Delivery] = []
    send = old.append
    one.desk.connect(send)
    one.connect()
    one.desk.disconnect(send)
    one.bundle(1)
    assert (len(old), len(one.sent)) == (0, 1)


def test_what_the_guest_has_converted_is_known_no_more(one: Desk) -> None:
    one.bundle(1, 2)
    one.bundle(7)
    one.desk.drop(2, 6)
    one.desk.report(0, 10, ImportEnd.FAILED)
    assert one.refused == [1]
    assert one.connect() == []


def test_pages_of_a_bundle_that_nobody_wants_any_more_are_not_waited_for(one: Desk) -> None:
    one.connect()
    one.bundle(1, 2, 3, wanted=(2,))
    assert one.sent[0].pages == (1, 2, 3)
    one.desk.report(1, 1, ImportEnd.STALE)
    one.desk.report(3, 1, ImportEnd.FAILED)
    assert (one.imported, one.refused) == ([], [])
    one.desk.report(2, 1, ImportEnd.DONE)
    assert [run.first for run, _ in one.imported] == [2]


def test_pages_are_bounded_and_urgent_ones_have_as_much_room_again(one: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "MAX_UNREPORTED_PAGES", 10)
    one.bundle(*range(8))
    assert (one.desk.full, one.desk.has_room(2), one.desk.has_room(3)) == (False, True, False)
    assert (one.desk.has_room(12, urgent=True), one.desk.has_room(13, urgent=True)) == (True, False)
    one.bundle(8, 9)
    assert one.desk.full
    one.desk.report(4, 1, ImportEnd.DONE)
    assert not one.desk.full


def test_bytes_are_bounded_too_and_come_free_with_the_pages(one: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "MAX_UNREPORTED_BYTES", 1000)
    one.bundle(1, 2, payload=bytes(1200))
    assert one.desk.full
    assert one.desk.has_room(1, urgent=True)
    # Once more: it counts once.
    one.bundle(1, 2, payload=bytes(1200))
    assert one.desk.has_room(1, urgent=True)
    one.desk.report(1, 1, ImportEnd.DONE)
    assert not one.desk.full
    one.desk.drop(0, 10)
    assert one.desk._bytes == 0


def test_a_vmm_that_reports_what_it_has_not_read_gets_no_more(one: Desk) -> None:
    unread = 0
    one.desk.connect(one.sent.append, lambda: unread)
    assert one.desk.has_room(1)
    unread = imports.MAX_UNREPORTED_PAGES
    assert one.desk.full
    assert one.desk.has_room(1, urgent=True)
    unread *= 2
    assert not one.desk.has_room(1, urgent=True)
    one.desk.disconnect(one.sent.append)
    assert one.desk.has_room(1)
