"""Faults on their way in: each answer of the pager is carried out, and counted."""

from __future__ import annotations

import itertools

import pytest
from guarded import contents
from scripted_installer import POISON, ZEROES, ScriptedInstaller

from pageferryd.core.demand import FaultTimes
from pageferryd.core.figures import FAULT_CLASSES
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.page_map import PageState
from pageferryd.core.pager import Answer, Lane, Pager, PagerOptions
from pageferryd.core.runs import POISONED, RAW, Run, decode, encode
from pageferryd.destination.arrivals import ArrivalMap
from pageferryd.destination.door import DoorEvents
from pageferryd.destination.intake import CLASSES, FaultIntake
from pageferryd.destination.placer import Placer

PAGES = 64


class Way:
    def __init__(self) -> None:
        layout = Layout([Region(0, PAGES * PAGE_SIZE)])
        self.installer = ScriptedInstaller()
        self.ended: list[FaultTimes] = []
        self.worked = 0
        self.pager = Pager(layout, PagerOptions(fault_around=0), 0.0)
        times = itertools.count(10.0)

        def clock() -> float:
            return float(next(times))

        self.placer = Placer(self.pager, self.installer, ArrivalMap(PAGES), lambda: None, self.ended.extend, clock)
        self.noted: list[tuple[int, int]] = []
        self.intake = FaultIntake(self.pager, self.placer, self.ended.extend, self._work, clock, self._note)

    def _note(self, first: int, pages: int) -> None:
        self.noted.append((first, pages))

    def _work(self) -> None:
        self.worked += 1

    def take(self, *faults: int, discards: tuple[tuple[int, int], ...] = ()) -> None:
        self.intake.take("uffd", DoorEvents(discards, faults, 9.0))

    def arrive(self, run: Run) -> None:
        data = [contents(run.first, run.pages)] if run.kind == RAW else []
        self.placer.place(decode(encode([run], data)), Lane.PUSH)


@pytest.fixture
def way() -> Way:
    return Way()


def test_classes_are_those_of_metrics() -> None:
    assert set(CLASSES) == set(Answer)
    assert set(CLASSES.values()) == set(FAULT_CLASSES)


def test_a_missing_page_is_asked_for_once_however_many_wait(way: Way) -> None:
    way.take(3, 3)
    way.take(3)
    assert way.pager.next_fetch(11.0) == ((3, 1),)
    assert way.pager.next_fetch(11.0) is None
    assert way.intake.counts == {("uffd", "missing"): 1, ("uffd", "joined"): 2}
    assert way.worked == 2


def test_a_page_that_is_there_is_woken(way: Way) -> None:
    way.arrive(Run(3, 1, RAW))
    way.take(3)
    assert way.installer.woken == [(3, 1)]
    assert way.intake.counts == {("uffd", "present"): 1}


def test_a_page_that_was_given_away_is_zero_and_never_fetched(way: Way) -> None:
    way.take(discards=((3, 2),))
    way.take(4)
    assert way.installer.pages == {4: ZEROES}
    assert way.intake.counts == {("uffd", "zero"): 1}
    assert way.pager.next_fetch(11.0) is None
    way.arrive(Run(3, 2, RAW))
    assert way.installer.pages == {4: ZEROES}


def test_a_discard_comes_before_the_faults_it_was_read_with(way: Way) -> None:
    way.take(3, discards=((3, 1),))
    assert way.installer.pages == {3: ZEROES}
    assert way.pager.next_fetch(11.0) is None


def test_a_discard_answers_who_waited_for_the_page(way: Way) -> None:
    way.take(3, 4)
    way.take(discards=((3, 1),))
    assert way.installer.pages == {3: ZEROES}
    assert [times.page for times in way.ended] == [3]
    assert way.pager.faults_waiting == 1
    assert way.pager.next_fetch(20.0) == ((4, 1),)


def test_a_poisoned_page_fails_whoever_touches_it(way: Way) -> None:
    way.arrive(Run(3, 1, POISONED))
    way.take(3)
    assert way.installer.pages == {3: POISON}
    assert way.installer.woken == [(3, 1)]
    assert way.intake.counts == {("uffd", "poisoned"): 1}


def test_the_time_of_a_fault_is_when_its_door_saw_it(way: Way) -> None:
    way.take(3)
    way.pager.next_fetch(20.0)
    way.arrive(Run(3, 1, RAW))
    (times,) = way.ended
    assert times.read == 1.0
    assert times.total == times.read + times.queued + times.fetched + times.installed


def test_what_is_given_away_is_noted_and_what_was_so_before_is_not_noted_again() -> None:
    way = Way()
    way.take(discards=((3, 2),))
    way.intake.restore(8, 4)
    assert way.noted == [(3, 2)]
    assert [way.pager.state(page) for page in (3, 4, 8, 11)] == 4 * [PageState.DISCARDED]
