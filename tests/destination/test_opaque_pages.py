"""Opaque pages cross with the real parts: exported and imported by VMMs, and looked into by nobody between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from guarded import DEADLINE
from opaque_guest import Bundles, Crossing, alone, by_dozen, cipher, is_pending

from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2 as pb
from pageferry.v1 import vmm_pb2
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination import imports, page_calls

Cross = Callable[..., Awaitable[Crossing]]
OPAQUE = range(20, 100)


@pytest.fixture
async def cross(short_dir: Path) -> AsyncIterator[Cross]:
    made: list[Crossing] = []

    async def make(*sizes: int, opaque: range = OPAQUE, push: bool = True, hold: bool = False) -> Crossing:
        one = Crossing(short_dir, sizes or (60, 60), opaque)
        made.append(one)
        await one.start(push=push)
        one.vmm.hold = hold
        return one

    yield make
    for one in made:
        await one.close()


class Closed:
    """Holds exports of the pages that it is given, until it is opened."""

    def __init__(self, *pages: int) -> None:
        self._pages = set(pages)
        self.opened = asyncio.Event()

    async def __call__(self, pages: list[int]) -> None:
        if not self._pages or not self._pages.isdisjoint(pages):
            await self.opened.wait()


# As they were exported


async def test_every_page_arrives_byte_for_byte(cross: Cross) -> None:
    one = await cross()
    one.session.start_push()
    await one.done()
    one.check()
    # Kept whole, several an answer, of pages that do not lie side by side, payload absent where they are pending.
    assert {len(delivery.bundle_addresses) for delivery in one.vmm.deliveries} > {1}
    assert {bool(delivery.payload) for delivery in one.vmm.deliveries} == {True, False}
    assert len(one.exporting.asked) < len(one.exporting.exported) < len(OPAQUE)
    # And none twice.
    assert one.served.pages["demand", "raw"] == len(OPAQUE)


async def test_a_bundle_of_the_largest_size_arrives(cross: Cross) -> None:
    one = await cross(1000, opaque=range(0, 1000, 2))
    one.exporting.bundle_of = lambda page: tuple(p for p in range(0, 1000, 2) if is_pending(p) == is_pending(page))
    large = bytes(range(256)) * (1 << 12)

    def enlarge(bundles: Bundles) -> Bundles:
        for bundle in bundles:
            bundle.payload, bundle.metadata = large * 4, large
        return bundles

    one.exporting.spoil = enlarge
    one.session.start_push()
    await one.done()
    assert all(delivery.payload == large * 4 and delivery.metadata == large for delivery in one.vmm.deliveries)
    assert set(one.vmm.imported) == set(range(0, 1000, 2))
    assert len(one.vmm.deliveries) == 2


async def test_until_the_last_import_is_reported_the_source_keeps_the_guest(cross: Cross) -> None:
    one = await cross(hold=True)
    one.session.start_push()
    await one.vmm.until(lambda: one.vmm.held_pages() == set(OPAQUE))
    while one.vmm.held:
        await one.vmm.until(lambda: one.session.pager.map.settled.holds_all(0, 20))
        assert not one.session.pager.complete
        assert one.completions == 0
        await one.vmm.release(1)
    await one.done()
    one.check()


# What the guest waits for


async def test_a_fault_comes_first_and_its_token_gets_the_bundle(cross: Cross) -> None:
    one = await cross(300, 300, opaque=range(20, 560))
    one.exporting.gate = bulk = Closed(*range(20, 400))
    one.session.start_push()
    await one.until_asked(20)
    answer = await one.vmm.answer(await one.vmm.fault(501))
    # By itself, though the others hang and many pages were named before it.
    assert one.exporting.asked[1:] == [[501]]
    assert answer.outcome == pb.OUTCOME_DELIVERED
    assert 501 in one.vmm.pages_of(answer)
    await one.vmm.until(lambda: one.vmm.imported.get(501) == cipher(501))
    bulk.opened.set()
    await one.done()
    one.check()


async def test_two_vcpus_that_wait_for_one_bundle_are_both_answered(cross: Cross) -> None:
    one = await cross(push=False, hold=True)
    one.exporting.gate = closed = Closed()
    first, second, same = [await one.vmm.fault(page) for page in (26, 28, 26)]
    await one.until_asked(26)
    closed.opened.set()
    assert {26, 28} <= set(one.vmm.pages_of(await one.vmm.answer(first)))
    assert same not in one.vmm.answers
    one.vmm.hold = False
    await one.vmm.release()
    outcomes = {(await one.vmm.answer(token)).outcome for token in (second, same)}
    assert outcomes <= {pb.OUTCOME_INSTALLED, pb.OUTCOME_DELIVERED, pb.OUTCOME_SPURIOUS}
    # Whoever comes later is told so at once.
    assert (await one.vmm.answer(await one.vmm.fault(28))).outcome == pb.OUTCOME_SPURIOUS


async def test_a_fault_on_a_page_that_is_being_imported_is_answered_with_its_import(cross: Cross) -> None:
    one = await cross(push=False, hold=True)
    first = await one.vmm.fault(26)
    await one.vmm.answer(first)
    second = await one.vmm.fault(28)
    # Answers come in order on the demand lane: once this one is there, the other was answered as well.
    await one.vmm.answer(await one.vmm.fault(3))
    assert second not in one.vmm.answers
    await one.vmm.release()
    assert (await one.vmm.answer(second)).outcome == pb.OUTCOME_INSTALLED
    assert len(one.exporting.asked) == 1


async def test_before_the_guest_runs_bundles_come_in_the_order_of_their_export(cross: Cross) -> None:
    one = await cross(push=False)
    turns = iter([5, 0, 3, 0, 1] * 100)

    async def slowly(_pages: list[int]) -> None:
        for _ in range(next(turns)):
            await asyncio.sleep(0)

    one.exporting.gate = slowly
    one.exporting.bundle_of = alone
    tokens = [await one.vmm.fault(page) for page in [*range(99, 19, -3), *range(20, 99, 3)]]
    for token in tokens:
        assert (await one.vmm.answer(token)).outcome == pb.OUTCOME_DELIVERED
    epochs = [delivery.epoch for delivery in one.vmm.deliveries]
    assert epochs == sorted(epochs)


# How imports end


@pytest.mark.parametrize("result", [pb.IMPORT_RESULT_STALE, pb.IMPORT_RESULT_DUPLICATE])
async def test_stale_and_duplicate_imports_are_ends_like_others(cross: Cross, result: int) -> None:
    one = await cross()
    one.vmm.result = lambda page: result if page % 2 else None
    one.session.start_push()
    await one.done()
    assert one.completions == 1
    assert one.paused == [None]


async def test_a_failed_import_is_asked_for_again(cross: Cross) -> None:
    one = await cross()
    left = {page: page % 3 for page in OPAQUE}

    def fail_some_times(page: int) -> int | None:
        left[page] -= 1
        return pb.IMPORT_RESULT_FAILED if left[page] >= 0 else None

    one.vmm.result = fail_some_times
    one.session.start_push()
    token = await one.vmm.fault(23)
    await one.done()
    one.check()
    assert (await one.vmm.answer(token)).outcome in (pb.OUTCOME_DELIVERED, pb.OUTCOME_INSTALLED)


async def test_a_vmm_that_refuses_for_ever_fails_the_migration_and_the_guest_is_held(
    cross: Cross, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "MAX_FAILURES", 30)
    one = await cross()
    one.vmm.result = lambda _page: pb.IMPORT_RESULT_FAILED
    one.session.start_push()
    assert await one.failed() is Reason.VMM_FAILED
    assert one.completions == 0
    assert all(one.guest.bits.is_set(page) for page in OPAQUE)
    assert len(one.exporting.exported) > 30


async def test_imports_that_nobody_reported_do_not_pile_up(cross: Cross, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "MAX_UNREPORTED_PAGES", 64)
    one = await cross(300, 300, opaque=range(20, 560), hold=True)
    desk = one.session.placer.desk
    most = 0

    one.session.start_push()
    while not one.session.pager.complete:
        await one.vmm.until(lambda: not desk.has_room(6) or one.session.pager.map.missing == len(desk._pages))
        await one.vmm.until(lambda: one.vmm.held_pages().issuperset(desk._pages))
        most = max(most, len(desk._pages))
        await one.vmm.release(3)
    await one.done()
    one.check()
    assert 64 - 6 < most <= 64


async def test_reports_of_pages_that_were_never_delivered_are_harmless(cross: Cross) -> None:
    one = await cross(push=False)
    await one.vmm.report([(page, pb.IMPORT_RESULT_DONE) for page in (0, 25, 119)])
    await one.vmm.report([(page, pb.IMPORT_RESULT_FAILED) for page in (0, 25, 119)])
    assert one.session.pager.map.missing == one.layout.page_count
    assert (await one.vmm.answer(await one.vmm.fault(25))).outcome == pb.OUTCOME_DELIVERED


# The VMM's stream


async def test_what_was_not_reported_comes_again_on_a_new_stream_in_its_order(cross: Cross) -> None:
    one = await cross(hold=True)
    one.session.start_push()
    await one.vmm.until(lambda: one.vmm.held_pages() == set(OPAQUE))
    reported = {page for held in one.vmm.held[:3] for page in one.vmm.pages_of(held)}
    lost = one.vmm.held[3:]
    await one.vmm.release(3)
    await one.vmm.hang_up()
    one.vmm.held = []
    one.vmm.open()
    left = set(one.session.placer.desk._pages)
    await one.vmm.until(lambda: one.vmm.held_pages() >= left)
    assert left == {page for before in lost for page in one.vmm.pages_of(before)} - reported
    # What a later bundle brought once more need not come in an earlier one, too.
    before = iter([delivery.epoch for delivery in lost])
    assert all(again.epoch in before for again in one.vmm.held)
    one.vmm.hold = False
    await one.vmm.release()
    await one.done()
    one.check()


async def test_a_fault_whose_bundle_was_lost_with_the_stream_is_answered_on_the_next(cross: Cross) -> None:
    one = await cross(push=False, hold=True)
    await one.vmm.answer(await one.vmm.fault(26))
    await one.vmm.hang_up()
    one.vmm.held, one.vmm.hold = [], False
    one.vmm.open()
    answer = await one.vmm.answer(await one.vmm.fault(26))
    assert answer.outcome in (pb.OUTCOME_INSTALLED, pb.OUTCOME_SPURIOUS)
    assert one.vmm.imported[26] == cipher(26)


async def test_bundles_that_come_while_no_stream_is_open_wait_for_one(cross: Cross) -> None:
    one = await cross()
    await one.vmm.hang_up()
    one.session.start_push()
    await one.until_asked(99)
    one.vmm.open()
    await one.done()
    one.check()


# Conversions


async def test_a_bundle_whose_pages_were_all_converted_meanwhile_is_not_delivered(cross: Cross) -> None:
    one = await cross(push=False)
    one.exporting.bundle_of = alone
    one.exporting.gate = closed = Closed(30)
    token = await one.vmm.fault(30)
    await one.until_asked(30)
    await one.vmm.convert(30)
    assert (await one.vmm.answer(token)).outcome == pb.OUTCOME_ZERO
    closed.opened.set()
    # Asked for behind it.
    await one.vmm.answer(await one.vmm.fault(32))
    assert [one.vmm.pages_of(delivery) for delivery in one.vmm.deliveries] == [[32]]
    assert 30 not in one.session.placer.private
    assert (await one.vmm.answer(await one.vmm.fault(30))).outcome == pb.OUTCOME_ZERO


async def test_a_bundle_of_which_a_page_was_converted_is_whole_and_the_stale_import_harmless(cross: Cross) -> None:
    one = await cross(push=False)
    one.exporting.gate = closed = Closed(26)
    token = await one.vmm.fault(26)
    await one.until_asked(26)
    await one.vmm.convert(28)
    closed.opened.set()
    answer = await one.vmm.answer(token)
    assert tuple(one.vmm.pages_of(answer)) == by_dozen(26)
    await one.vmm.until(lambda: (28, pb.IMPORT_RESULT_STALE) in one.vmm.results)
    assert 28 not in one.session.placer.private
    assert 28 not in one.vmm.imported
    assert (await one.vmm.answer(await one.vmm.fault(28))).outcome == pb.OUTCOME_ZERO


async def test_conversions_all_the_way_leave_nothing_stale_and_nothing_behind(cross: Cross) -> None:
    one = await cross(300, 300, opaque=range(20, 560))
    one.session.start_push()
    for page in range(25, 500, 50):
        await one.vmm.convert(page, 7)
    await one.done()
    one.check()


async def test_a_converted_page_is_not_delivered_again_to_a_new_stream(cross: Cross) -> None:
    one = await cross(push=False, hold=True)
    one.exporting.bundle_of = alone
    for page in (30, 32):
        await one.vmm.answer(await one.vmm.fault(page))
    await one.vmm.convert(30)
    await one.vmm.hang_up()
    one.vmm.held = []
    one.vmm.open()
    await one.vmm.until(lambda: bool(one.vmm.held))
    assert [one.vmm.pages_of(held) for held in one.vmm.held] == [[32]]


# Lanes and sources that do not do as they should


async def test_lanes_that_are_lost_during_an_export_are_opened_again_and_all_is_asked_for_again(cross: Cross) -> None:
    one = await cross()
    one.exporting.gate = Closed()
    one.session.start_push()
    token = await one.vmm.fault(90)
    await one.until_asked(90)
    one.proxy.cut()
    await one.until_paused()
    one.exporting.gate = None
    asked = len(one.exporting.asked)
    one.proxy.heal()
    await one.done()
    one.check()
    assert (await one.vmm.answer(token)).outcome in (pb.OUTCOME_DELIVERED, pb.OUTCOME_INSTALLED)
    assert set(OPAQUE) <= {page for pages in one.exporting.asked[asked:] for page in by_whole(pages)}


def by_whole(pages: list[int]) -> set[int]:
    return {member for page in pages for member in by_dozen(page)}


async def test_what_was_delivered_before_a_loss_is_not_exported_again(cross: Cross) -> None:
    one = await cross(hold=True)
    one.session.start_push()
    await one.vmm.until(lambda: one.vmm.held_pages() == set(OPAQUE))
    exported = len(one.exporting.exported)
    one.proxy.cut()
    await one.until_paused()
    one.proxy.heal()
    await one.vmm.until(lambda: None in one.paused)
    # Push names the same pages again, and others behind them.
    await one.vmm.until(lambda: one.session.pager.map.missing == len(OPAQUE))
    one.vmm.hold = False
    await one.vmm.release()
    await one.done()
    one.check()
    assert len(one.exporting.exported) == exported


def no_page(bundles: Bundles) -> Bundles:
    return bundles[1:]


def other_pages(bundles: Bundles) -> Bundles:
    for bundle in bundles:
        bundle.guest_addresses[:] = [0]
    return bundles


def page_twice(bundles: Bundles) -> Bundles:
    bundles[0].guest_addresses.append(bundles[0].guest_addresses[0])
    return bundles


def outside(bundles: Bundles) -> Bundles:
    bundles[0].guest_addresses.append(1 << 50)
    return bundles


def unaligned(bundles: Bundles) -> Bundles:
    bundles[0].guest_addresses.append(bundles[0].guest_addresses[0] + 8)
    return bundles


def empty(bundles: Bundles) -> Bundles:
    return [*bundles, vmm_pb2.GuestPageBundle()]


def too_many_pages(bundles: Bundles) -> Bundles:
    bundles[0].guest_addresses.extend([bundles[0].guest_addresses[0]] * 512)
    return bundles


def too_much_payload(bundles: Bundles) -> Bundles:
    bundles[0].payload = bytes((4 << 20) + 1)
    return bundles


def too_much_metadata(bundles: Bundles) -> Bundles:
    bundles[0].metadata = bytes((1 << 20) + 1)
    return bundles


def an_error(_bundles: Bundles) -> Bundles:
    raise FerryError(Reason.VMM_FAILED, "the module said no")


@pytest.mark.parametrize(
    "spoil",
    [
        no_page, other_pages, page_twice, outside, unaligned, empty,
        too_many_pages, too_much_payload, too_much_metadata, an_error,
    ],
)  # fmt: skip
async def test_an_export_that_cannot_be_pauses_the_migration_until_it_is_right(
    cross: Cross, spoil: Callable[[Bundles], Bundles]
) -> None:
    one = await cross()
    one.exporting.spoil = spoil
    one.session.start_push()
    await one.until_paused(Reason.VMM_FAILED)
    assert one.vmm.deliveries == []
    one.exporting.spoil = lambda bundles: bundles
    await one.done()
    one.check()


async def test_a_source_vmm_that_hangs_is_given_up_and_asked_again(
    cross: Cross, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_calls, "_EXPORT_SECONDS", 0.3)
    one = await cross()
    one.exporting.gate = Closed()
    one.session.start_push()
    await one.until_paused(Reason.SOURCE_UNREACHABLE)
    one.exporting.gate = None
    await one.done()
    one.check()


async def test_answers_that_are_too_large_for_a_message_are_asked_for_in_parts(cross: Cross) -> None:
    one = await cross(60, opaque=range(20, 60))
    one.exporting.bundle_of = alone
    most = 3

    def as_grpc_would(bundles: Bundles) -> Bundles:
        if len(bundles) > most:
            raise FerryError(Reason.VMM_FAILED, "the message is larger than the limit")
        return bundles

    one.exporting.spoil = as_grpc_would
    one.session.start_push()
    await asyncio.wait_for(asyncio.shield(one.running), DEADLINE)
    one.check()


async def test_nobody_gets_opaque_pages_as_plain_ones(cross: Cross) -> None:
    one = await cross()
    one.session.start_push()
    await one.done()
    assert one.session.placer.pages["push", "raw"] + one.session.placer.pages["demand", "raw"] == 120
    assert one.served.bytes["push"] == (120 - len(OPAQUE)) * PAGE_SIZE
