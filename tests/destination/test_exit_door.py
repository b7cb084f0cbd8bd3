"""The exit door: faults that a VMM forwards, answered one by one."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future

import pytest
from door_conformance import Delivered, DoorConformance

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination import exit_door
from pageferryd.destination.door import Settled
from pageferryd.destination.exit_door import ExitDoor

LAYOUT = Layout([Region(1 << 32, 3 * PAGE_SIZE), Region(0, 5 * PAGE_SIZE)])


class ExitHouse:
    """A VMM that forwards one fault at a time, and waits on where that is refused."""

    def __init__(self) -> None:
        self.door = ExitDoor(LAYOUT)
        self._waiting: list[tuple[int, Future[bytes]]] = []

    def touch(self, page: int) -> Future[bytes]:
        reading: Future[bytes] = Future()
        self._waiting.append((page, reading))
        with contextlib.suppress(FerryError):
            self.door.fault(page, 1, lambda _how: self._answer(reading))
        return reading

    def wait_queued(self) -> None:
        pass

    def install(self, page: int) -> None:
        self.door.settled(page, 1, Settled.INSTALLED)
        for touched, reading in self._waiting:
            if touched == page:
                self._answer(reading)

    @staticmethod
    def _answer(reading: Future[bytes]) -> None:
        if not reading.done():
            reading.set_result(b"\0")


@pytest.fixture
def house() -> ExitHouse:
    return ExitHouse()


class TestExitDoor(DoorConformance):
    """Passes what every door must."""


@pytest.fixture
def door(delivered: Delivered) -> ExitDoor:
    one = ExitDoor(LAYOUT)
    one.open(delivered.take, delivered.fail)
    return one


def test_a_fault_over_pages_is_answered_once_with_the_worst_of_them(door: ExitDoor) -> None:
    answers: list[Settled] = []
    door.fault(1, 4, answers.append)
    door.settled(0, 3, Settled.ZERO)
    door.settled(3, 1, Settled.POISONED)
    assert answers == []
    door.settled(4, 1, Settled.INSTALLED)
    door.settled(0, 8, Settled.PRESENT)
    assert answers == [Settled.POISONED]


def test_an_answer_may_come_before_the_fault_was_taken(door: ExitDoor) -> None:
    answers: list[Settled] = []
    door.open(lambda events: door.settled(events.faults[0], 1, Settled.PRESENT), lambda _error: None)
    door.fault(2, 1, answers.append)()
    assert answers == [Settled.PRESENT]


def test_who_gave_up_is_not_answered_and_others_are(door: ExitDoor) -> None:
    gone: list[Settled] = []
    there: list[Settled] = []
    forget = door.fault(2, 2, gone.append)
    door.fault(3, 1, there.append)
    forget()
    forget()
    door.settled(2, 2, Settled.INSTALLED)
    assert (gone, there) == ([], [Settled.INSTALLED])


def test_no_more_wait_than_may_and_each_that_ends_makes_room(door: ExitDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_door, "MAX_WAITING", 2)
    forget = door.fault(0, 1, lambda _how: None)
    door.fault(1, 1, lambda _how: None)
    with pytest.raises(FerryError) as full:
        door.fault(2, 1, lambda _how: None)
    assert full.value.reason is Reason.TOO_MANY_MIGRATIONS
    forget()
    door.fault(2, 1, lambda _how: None)
    door.settled(1, 1, Settled.ZERO)
    door.fault(3, 1, lambda _how: None)


def test_a_fault_too_large_to_be_one_is_refused(door: ExitDoor) -> None:
    with pytest.raises(FerryError) as refused:
        door.fault(0, 513, lambda _how: None)
    assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_faults_that_came_together_are_delivered_together_and_answered_one_by_one(delivered: Delivered) -> None:
    door = ExitDoor(LAYOUT)
    batches: list[list[int]] = []
    door.open(lambda events: batches.append(list(events.faults)), delivered.fail)
    answers: list[tuple[int, Settled]] = []
    door.faults([(page, lambda how, page=page: answers.append((page, how))) for page in (5, 2, 5)])
    assert batches == [[5, 2, 5]]
    door.settled(2, 1, Settled.ZERO)
    assert answers == [(2, Settled.ZERO)]
    door.settled(0, 8, Settled.INSTALLED)
    assert answers == [(2, Settled.ZERO), (5, Settled.INSTALLED), (5, Settled.INSTALLED)]


def test_faults_that_came_together_are_refused_together(door: ExitDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_door, "MAX_WAITING", 2)
    answers: list[Settled] = []
    with pytest.raises(FerryError) as full:
        door.faults([(page, answers.append) for page in range(3)])
    assert full.value.reason is Reason.TOO_MANY_MIGRATIONS
    door.settled(0, 8, Settled.INSTALLED)
    assert answers == []
    door.faults([(page, answers.append) for page in range(2)])
    door.settled(0, 8, Settled.INSTALLED)
    assert answers == [Settled.INSTALLED] * 2


def test_faults_that_the_pager_fails_to_take_are_not_answered_and_leave_their_room(
    delivered: Delivered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_door, "MAX_WAITING", 2)
    door = ExitDoor(LAYOUT)

    def fail(_events: object) -> None:
        door.settled(1, 1, Settled.PRESENT)
        raise OSError("no pager")

    door.open(fail, delivered.fail)
    answers: list[Settled] = []
    for _ in range(2):
        with pytest.raises(OSError, match="no pager"):
            door.faults([(1, answers.append), (2, answers.append)])
    door.settled(0, 8, Settled.INSTALLED)
    # What was settled before the failure is all that was answered.
    assert answers == [Settled.PRESENT] * 2
