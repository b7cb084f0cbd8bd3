"""A forwarder's faults on the hand-off's connection: threads that share it, and the FaultService behind it."""

from __future__ import annotations

import json
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fault_service import FaultService

from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2 as pb
from pageferry.vmm import FaultForwarder, HandoffRegion, Outcome, PagerLink, Resolution

PAGE = 4096
SECONDS = 20
HIGH = 1 << 32
REGIONS = [HandoffRegion(0, 64 * PAGE, 0, gpa_start=HIGH), HandoffRegion(0, 64 * PAGE, 64 * PAGE, gpa_start=0)]


class Pager:
    """The other end of a VMM's hand-off, a FaultService beside it, and the VMM's threads."""

    def __init__(self, path: Path) -> None:
        self.service = FaultService(path)
        vmm, self.connection = socket.socketpair()
        self.connection.settimeout(SECONDS)
        self.link = PagerLink(None, vmm, REGIONS)
        self.told: queue.SimpleQueue[Resolution] = queue.SimpleQueue()
        self.forwarder = FaultForwarder(self.service.endpoint, self.told.put)
        self.link.forward_through(self.forwarder)
        self.vcpus = ThreadPoolExecutor(16)
        # The service's stream is there from now on.
        self.forwarder.submit(0, 0).result(SECONDS)
        self.service.fault()
        self._decoder = json.JSONDecoder()
        self._text = ""

    def touch(self, page: int, vcpu: int = 0) -> Future[Resolution]:
        """Let a vCPU's thread fault."""
        return self.vcpus.submit(self.forwarder.resolve, vcpu, page * PAGE)

    def fault(self) -> dict[str, Any]:
        """Return the next fault on the connection."""
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text)
            except json.JSONDecodeError:
                self._text += self.connection.recv(65536).decode()
            else:
                self._text = self._text[end:]
                return found

    def answer(self, fault: dict[str, Any], **more: object) -> None:
        self.connection.sendall(reply(fault, **more))

    def close(self) -> None:
        self.forwarder.close()
        self.vcpus.shutdown()
        self.link.close()
        self.connection.close()
        self.service.stop()


def reply(fault: dict[str, Any], **more: object) -> bytes:
    kept = {name: fault[name] for name in ("vcpu", "token", "offset", "flags")}
    return json.dumps(kept | {"len": PAGE, "zero": False} | more).encode()


@pytest.fixture
def pager(short_path: Path) -> Iterator[Pager]:
    one = Pager(short_path / "faults.sock")
    yield one
    one.close()


@pytest.mark.parametrize(
    ("more", "outcome"),
    [
        ({}, Outcome.INSTALLED),
        ({"zero": True}, Outcome.ZERO),
        ({"poisoned": True}, Outcome.POISONED),
        ({"future": [{"a": "}{"}]}, Outcome.INSTALLED),
    ],
)
def test_a_fault_goes_by_its_place_in_the_hand_off_and_its_answer_says_what_became_of_it(
    pager: Pager, more: dict[str, object], outcome: Outcome
) -> None:
    waiting = pager.vcpus.submit(pager.forwarder.resolve, 3, 5 * PAGE + 17, exit_flags=16)
    fault = pager.fault()
    assert fault == {"vcpu": 3, "offset": 69 * PAGE, "flags": 16, "token": fault["token"], "poison": True}
    pager.answer(fault, **more)
    assert waiting.result(SECONDS) == Resolution(5 * PAGE, PAGE, outcome)
    assert pager.service.faults.empty()


def test_each_region_is_found_by_its_guest_address(pager: Pager) -> None:
    waiting = pager.touch((HIGH // PAGE) + 63)
    fault = pager.fault()
    pager.answer(fault)
    assert fault["offset"] == 63 * PAGE
    assert waiting.result(SECONDS).guest_address == HIGH + 63 * PAGE


def test_answers_in_any_order_and_cut_anywhere_find_their_threads(pager: Pager) -> None:
    waiting = {page: pager.touch(page, page) for page in range(16)}
    faults = sorted((pager.fault() for _ in waiting), key=lambda one: -one["offset"])
    answers = b"".join(reply(one, zero=one["vcpu"] % 2 == 0) for one in faults)
    for start in range(0, len(answers), 37):
        pager.connection.sendall(answers[start : start + 37])
    for page, future in waiting.items():
        expected = Outcome.INSTALLED if page % 2 else Outcome.ZERO
        assert future.result(SECONDS) == Resolution(page * PAGE, PAGE, expected)


def test_many_threads_fault_at_once_again_and_again(pager: Pager) -> None:
    def answer_all() -> None:
        for _ in range(16 * 100):
            pager.answer(pager.fault())

    answering = threading.Thread(target=answer_all)
    answering.start()

    def work(vcpu: int) -> list[int]:
        pages = [(vcpu + turn) % 64 for turn in range(100)]
        return [pager.forwarder.resolve(vcpu, page * PAGE).guest_address - page * PAGE for page in pages]

    assert list(pager.vcpus.map(work, range(16), timeout=SECONDS)) == [[0] * 100] * 16
    answering.join(SECONDS)
    assert pager.service.faults.empty()


def test_threads_that_are_answered_together_are_all_woken_and_lose_nothing_that_they_ask_for_next(pager: Pager) -> None:
    left = 16 * 100

    def answer_all() -> None:
        nonlocal left
        text = ""
        while left:
            text += pager.connection.recv(65536).decode()
            answers = []
            while text:
                try:
                    fault, end = json.JSONDecoder().raw_decode(text)
                except json.JSONDecodeError:
                    break
                answers.append(reply(fault))
                text = text[end:]
            left -= len(answers)
            pager.connection.sendall(b"".join(answers))

    answering = threading.Thread(target=answer_all)
    answering.start()

    def work(vcpu: int) -> list[int]:
        return [pager.forwarder.resolve(vcpu, page % 64 * PAGE).guest_address // PAGE for page in range(100)]

    assert list(pager.vcpus.map(work, range(16), timeout=SECONDS)) == [[page % 64 for page in range(100)]] * 16
    answering.join(SECONDS)
    assert left == 0
    assert pager.service.faults.empty()


class Interrupt(Exception):  # noqa: N818 - what a signal's handler raises, no failure
    """Takes a thread out of its wait."""


@pytest.mark.parametrize("reads", [True, False], ids=["it reads", "another reads"])
def test_a_thread_that_a_signal_takes_out_of_its_wait_leaves_the_others_to_theirs(pager: Pager, reads: bool) -> None:
    interrupted = threading.Event()

    def interrupt(_number: int, _frame: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise Interrupt

    def touch_around() -> tuple[list[dict[str, Any]], list[Future[Resolution]]]:
        """Interrupt the main thread's wait once others wait behind it."""
        faults = [pager.fault()]
        others = [pager.touch(page) for page in range(len(early) + 1, 4)]
        faults += [pager.fault() for _ in others]
        # One that comes just before a wait is only seen after it.
        while not interrupted.is_set():
            signal.pthread_kill(main, signal.SIGUSR1)
            interrupted.wait(0.1)
        return faults, others

    main = threading.get_ident()
    early = [] if reads else [pager.touch(1)]
    faults = [pager.fault() for _ in early]
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        around = pager.vcpus.submit(touch_around)
        with pytest.raises(Interrupt):
            pager.forwarder.resolve(0, 0)
        more, late = around.result(SECONDS)
    finally:
        signal.signal(signal.SIGUSR1, before)
    pager.connection.sendall(b"".join(reply(fault) for fault in faults + more))
    for page, other in enumerate(early + late, 1):
        assert other.result(SECONDS) == Resolution(page * PAGE, PAGE, Outcome.INSTALLED)
    assert pager.service.faults.empty()


@pytest.mark.parametrize(
    ("size", "address", "private"),
    [(2 * PAGE, 0, False), (PAGE, 0, True), (PAGE, 64 * PAGE, False), (PAGE, HIGH + 64 * PAGE, False)],
)
def test_larger_private_and_foreign_faults_go_to_the_service(
    pager: Pager, size: int, address: int, private: bool
) -> None:
    assert pager.forwarder.resolve(0, address, size, private=private).outcome is Outcome.INSTALLED
    assert pager.service.fault().guest_address == address


def test_a_future_is_the_services(pager: Pager) -> None:
    assert pager.forwarder.submit(0, PAGE).result(SECONDS) == Resolution(PAGE, PAGE, Outcome.INSTALLED)
    assert pager.service.fault().guest_address == PAGE


BREAKS = {
    "its end": lambda pager: pager.connection.shutdown(socket.SHUT_WR),
    "no JSON": lambda pager: pager.connection.sendall(b"x" * 5000),
    "no object": lambda pager: pager.connection.sendall(b"[1]"),
    "no token": lambda pager: pager.connection.sendall(b"{}"),
    "bytes that are no text": lambda pager: pager.connection.sendall(b"\xff"),
    "the link's close": lambda pager: pager.link.close(),
}


@pytest.mark.parametrize("case", BREAKS)
def test_what_a_broken_connection_has_not_answered_is_asked_of_the_service(pager: Pager, case: str) -> None:
    waiting = [pager.touch(page) for page in range(8)]
    faults = [pager.fault() for _ in waiting]
    answered = faults[0]["offset"] // PAGE - 64
    pager.answer(faults[0])
    assert waiting[answered].result(SECONDS).outcome is Outcome.INSTALLED

    BREAKS[case](pager)

    for page, future in enumerate(waiting):
        assert future.result(SECONDS) == Resolution(page * PAGE, PAGE, Outcome.INSTALLED)
    asked = sorted(pager.service.fault().guest_address // PAGE for _ in range(7))
    assert asked == [page for page in range(8) if page != answered]
    assert pager.touch(9).result(SECONDS).guest_address == 9 * PAGE
    assert pager.service.fault().guest_address == 9 * PAGE


def test_private_pages_that_the_service_delivers_end_the_wait_of_one_thread(pager: Pager) -> None:
    # The second waits for the first to read, or is the one that reads: either has to notice.
    waiting = [pager.touch(page) for page in (1, 2)]
    faults = {pager.fault()["offset"] // PAGE - 64: None for _ in waiting}
    assert sorted(faults) == [1, 2]
    for page, future in zip((1, 2), waiting, strict=True):
        pager.service.send(delivery(page))
        assert future.result(SECONDS).payload == b"secret"
    pager.service.send(delivery(3))
    assert pager.told.get(timeout=SECONDS).guest_address == 3 * PAGE


def test_the_answer_after_a_delivery_is_nobodys(pager: Pager) -> None:
    waiting = pager.touch(1)
    late = pager.fault()
    pager.service.send(delivery(1))
    assert waiting.result(SECONDS).outcome is Outcome.DELIVERED
    again = pager.touch(1)
    fault = pager.fault()
    pager.connection.sendall(reply(late, zero=True) + reply(fault))
    assert again.result(SECONDS).outcome is Outcome.INSTALLED


def test_another_connection_takes_the_place_of_the_first(pager: Pager) -> None:
    waiting = pager.touch(1)
    pager.fault()
    vmm, here = socket.socketpair()
    pager.forwarder.use_handoff(vmm, REGIONS)
    assert waiting.result(SECONDS).outcome is Outcome.INSTALLED
    assert pager.service.fault().guest_address == PAGE
    later = pager.touch(2)
    fault = json.loads(here.recv(65536))
    here.sendall(reply(fault, zero=True))
    assert later.result(SECONDS).outcome is Outcome.ZERO
    pager.forwarder.close()
    for end in (vmm, here):
        end.close()


def test_closed_all_that_wait_are_told_and_the_connection_stays_open(pager: Pager) -> None:
    waiting = [pager.touch(page) for page in range(4)]
    for _ in waiting:
        pager.fault()
    pager.forwarder.close()
    for future in [*waiting, pager.touch(5)]:
        with pytest.raises(FerryError) as caught:
            future.result(SECONDS)
        assert caught.value.reason is Reason.CANCELLED
    pager.connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        pager.connection.recv(1)
    pager.link.forward_through(pager.forwarder)
    with pytest.raises(FerryError):
        pager.forwarder.resolve(0, 0)


def delivery(page: int) -> pb.ResolveFaultsResponse:
    return pb.ResolveFaultsResponse(
        guest_address=page * PAGE,
        size=PAGE,
        outcome=pb.OUTCOME_DELIVERED,
        sharing=pb.SHARING_PRIVATE,
        payload=b"secret",
    )
