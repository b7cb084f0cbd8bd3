"""What the model found, each by itself: private pages between both doors, and a VMM that reports their imports."""

from __future__ import annotations

import itertools

import pytest
from guarded import content
from scripted_installer import POISON, ZEROES, ScriptedInstaller

from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.page_map import PageState
from pageferryd.core.pager import Lane, Pager, PagerOptions
from pageferryd.core.runs import POISONED, PRIVATE, Run, decode, encode
from pageferryd.destination.arrivals import ArrivalMap
from pageferryd.destination.door import DoorEvents, Settled
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.imports import ImportEnd
from pageferryd.destination.installer import Placed
from pageferryd.destination.intake import FaultIntake
from pageferryd.destination.placer import Placer

PAGE = 3


class Between:
    """Both doors, the placer between them, and what the exit door was answered."""

    def __init__(self) -> None:
        layout = Layout([Region(0, 8 * PAGE_SIZE)])
        self.installer = ScriptedInstaller()
        self.answers: list[Settled] = []
        self.pager = Pager(layout, PagerOptions(fault_around=0), 0.0)
        self._door = ExitDoor(layout)
        times = itertools.count(1.0)

        def clock() -> float:
            return next(times)

        self.placer = Placer(
            self.pager,
            self.installer,
            ArrivalMap(8),
            lambda: None,
            self._ended,
            clock,
            self._door.settled,
        )
        self._intake = FaultIntake(self.pager, self.placer, self._ended, lambda: None, clock)
        self._door.open(lambda events: self._intake.take("exit", events), lambda _error: None)

    def _ended(self, ended: list) -> None:
        for times in ended:
            self.placer.touched_shared.discard(times.page)

    def exits(self) -> None:
        self._door.fault(PAGE, 1, self.answers.append)

    def touches_shared(self) -> None:
        self._intake.take("uffd", DoorEvents((), [PAGE], 0.5))

    def arrives(self, kind: int = PRIVATE) -> None:
        data = [content(PAGE)] if kind == PRIVATE else []
        self.placer.place(decode(encode([Run(PAGE, 1, kind)], data)), Lane.DEMAND)

    def reports(self, end: ImportEnd = ImportEnd.DONE) -> None:
        self.placer.desk.report(PAGE, 1, end)

    def converts(self) -> None:
        self._intake.discard(PAGE, 1, 9.0)


@pytest.fixture
def between() -> Between:
    return Between()


def test_a_device_that_joins_a_vcpus_wait_for_a_private_page_is_served_at_once(between: Between) -> None:
    between.exits()
    between.arrives()
    between.touches_shared()
    assert between.installer.pages == {PAGE: ZEROES}
    assert between.answers == []
    between.reports()
    assert between.answers == [Settled.INSTALLED]
    assert between.placer.shared_accesses == 1


def test_a_device_that_touched_first_is_served_when_the_page_turns_out_private(between: Between) -> None:
    between.touches_shared()
    between.exits()
    assert between.installer.pages == {}
    between.arrives()
    assert between.installer.pages == {PAGE: ZEROES}
    assert between.answers == []


def test_zeroes_for_a_device_that_have_to_be_tried_again_are_no_answer_to_a_vcpu(between: Between) -> None:
    between.exits()
    between.arrives()
    between.installer.script.append((0, Placed.RETRY))
    between.touches_shared()
    assert between.placer.behind
    between.placer.retry()
    assert between.installer.pages == {PAGE: ZEROES}
    assert between.answers == []
    assert between.placer.shared_accesses == 1


def test_an_exit_that_comes_late_learns_that_its_page_is_there_and_nothing_is_put_on_the_shared_side(
    between: Between,
) -> None:
    between.arrives()
    between.reports()
    between.exits()
    assert between.answers == [Settled.PRESENT]
    assert between.installer.pages == {}
    assert between.pager.state(PAGE) is PageState.PRESENT


def test_a_late_exit_is_answered_after_a_device_has_touched_the_page_too(between: Between) -> None:
    between.arrives()
    between.reports()
    between.touches_shared()
    between.exits()
    assert between.answers == [Settled.PRESENT]


def test_accesses_to_a_page_are_let_through_before_anybody_is_told_that_it_was_imported(between: Between) -> None:
    between.exits()
    between.arrives()
    assert between.installer.let == []
    between.reports()
    assert between.installer.let == [(PAGE, 1)]


def test_a_poisoned_page_that_is_given_away_fails_no_more(between: Between) -> None:
    between.arrives(POISONED)
    assert between.installer.pages == {PAGE: POISON}
    del between.installer.pages[PAGE]
    between.converts()
    assert between.installer.pages == {PAGE: ZEROES}


def test_nothing_is_put_anywhere_for_a_page_that_is_converted_before_anybody_touched_it(between: Between) -> None:
    between.arrives()
    between.converts()
    between.reports()
    assert between.installer.pages == {}
    assert between.pager.state(PAGE) is PageState.DISCARDED
