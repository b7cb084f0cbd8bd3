"""The forwarder of a VMM's faults against a FaultService on a real socket: many at once, in any order, never lost."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import grpc
import pytest
from fault_service import FaultService, installed

from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2 as pb
from pageferry.vmm import Access, FaultEndpoint, FaultForwarder, Import, ImportResult, Outcome, Resolution
from pageferry.vmm import faults as faults_module

PAGE = 4096
SECONDS = 20


@pytest.fixture
def service(short_path: Path) -> Iterator[FaultService]:
    running = FaultService(short_path / "faults.sock")
    yield running
    running.stop()


@pytest.fixture
def forwarder(service: FaultService) -> Iterator[FaultForwarder]:
    with FaultForwarder(service.endpoint) as opened:
        yield opened


def never(request: pb.ResolveFaultsRequest) -> None:
    """Leave a fault unanswered."""


def test_a_fault_carries_all_that_the_exit_told(service: FaultService, forwarder: FaultForwarder) -> None:
    resolution = forwarder.resolve(3, 5 * PAGE, 2 * PAGE, Access.WRITE, private=True, exit_flags=8)

    assert resolution == Resolution(5 * PAGE, 2 * PAGE, Outcome.INSTALLED)
    fault = service.fault()
    assert fault.token != 0
    fault.ClearField("token")
    assert fault == pb.ResolveFaultsRequest(
        vcpu=3,
        guest_address=5 * PAGE,
        size=2 * PAGE,
        access=pb.ACCESS_WRITE,
        sharing=pb.SHARING_PRIVATE,
        exit_flags=8,
    )


def test_a_delivered_page_comes_with_its_bytes_and_metadata(service: FaultService, forwarder: FaultForwarder) -> None:
    service.answer = lambda request: pb.ResolveFaultsResponse(
        token=request.token,
        guest_address=request.guest_address,
        size=request.size,
        outcome=pb.OUTCOME_DELIVERED,
        sharing=pb.SHARING_PRIVATE,
        payload=b"ciphertext",
        metadata=b"mac",
        bundle_addresses=[PAGE, 9 * PAGE],
        stream=2,
        epoch=5,
    )

    resolution = forwarder.resolve(0, PAGE, private=True)

    assert resolution == Resolution(PAGE, PAGE, Outcome.DELIVERED, True, b"ciphertext", b"mac", (PAGE, 9 * PAGE), 2, 5)


def test_faults_are_answered_in_any_order(service: FaultService, forwarder: FaultForwarder) -> None:
    service.answer = never
    futures = [forwarder.submit(0, page * PAGE) for page in range(3)]
    asked = [service.fault() for _ in futures]

    for index in (2, 0, 1):
        service.send(installed(asked[index], pb.OUTCOME_ZERO))
        assert futures[index].result(SECONDS) == Resolution(index * PAGE, PAGE, Outcome.ZERO)


def test_many_threads_fault_at_once(service: FaultService, forwarder: FaultForwarder) -> None:
    seen: list[tuple[int, int]] = []

    def vcpu(number: int) -> None:
        for page in range(50):
            address = (number * 50 + page) * PAGE
            seen.append((forwarder.resolve(number, address).guest_address, address))

    threads = [threading.Thread(target=vcpu, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)

    assert len(seen) == 400
    assert all(resolved == asked for resolved, asked in seen)
    assert service.streams == 1


def test_a_refused_fault_has_the_pagers_reason_and_hurts_no_other(
    service: FaultService, forwarder: FaultForwarder
) -> None:
    def refuse(request: pb.ResolveFaultsRequest) -> pb.ResolveFaultsResponse:
        answer = installed(request, pb.OUTCOME_REFUSED)
        answer.reason, answer.message = "PAGE_OUT_OF_RANGE", "no such page"
        return answer

    service.answer = refuse
    with pytest.raises(FerryError, match="no such page") as refused:
        forwarder.resolve(0, 1 << 50)
    service.answer = installed

    assert refused.value.reason is Reason.PAGE_OUT_OF_RANGE
    assert forwarder.resolve(0, PAGE).outcome is Outcome.INSTALLED


def test_an_outcome_of_another_release_is_an_error(service: FaultService, forwarder: FaultForwarder) -> None:
    service.answer = lambda request: installed(request, pb.OUTCOME_UNSPECIFIED)

    with pytest.raises(FerryError) as failed:
        forwarder.resolve(0, PAGE)

    assert failed.value.reason is Reason.PROTOCOL_MISMATCH


def test_pages_that_come_ahead_of_their_faults_are_told(service: FaultService) -> None:
    told: queue.SimpleQueue[Resolution] = queue.SimpleQueue()
    with FaultForwarder(service.endpoint, told.put) as forwarder:
        forwarder.resolve(0, 0)

        service.send(pb.ResolveFaultsResponse(guest_address=7 * PAGE, size=9 * PAGE, outcome=pb.OUTCOME_INSTALLED))

        assert told.get(timeout=SECONDS) == Resolution(7 * PAGE, 9 * PAGE, Outcome.INSTALLED)


def test_a_callback_that_fails_stops_nothing(service: FaultService, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Resolution) -> None:
        raise ValueError("not mine")

    with FaultForwarder(service.endpoint, fail) as forwarder:
        forwarder.resolve(0, 0)
        service.send(pb.ResolveFaultsResponse(guest_address=0, size=PAGE, outcome=pb.OUTCOME_INSTALLED))

        assert forwarder.resolve(0, PAGE).outcome is Outcome.INSTALLED
    assert "was not taken" in caplog.text


@pytest.mark.parametrize("ending", ["dies", "ends the stream"])
def test_a_stream_that_breaks_is_opened_again_and_nothing_is_forgotten(
    service: FaultService, forwarder: FaultForwarder, ending: str
) -> None:
    service.answer = never
    waiting = [forwarder.submit(0, page * PAGE) for page in (1, 2)]
    first = [service.fault() for _ in waiting]
    if ending == "dies":
        service.stop()
    else:
        service.end_stream()
    service.answer = installed
    if ending == "dies":
        service.start()

    assert [future.result(SECONDS).guest_address for future in waiting] == [PAGE, 2 * PAGE]
    assert [service.fault() for _ in waiting] == first
    assert service.streams == 2


def test_a_pager_that_is_not_there_yet_is_waited_for(short_path: Path) -> None:
    endpoint = FaultEndpoint(str(short_path / "faults.sock"), b"\x00secret\xff")
    with FaultForwarder(endpoint) as forwarder:
        waiting = forwarder.submit(0, PAGE)
        late = FaultService(short_path / "faults.sock")

        assert waiting.result(SECONDS).outcome is Outcome.INSTALLED
        late.stop()


def test_a_pager_that_does_not_know_the_secret_is_final(short_path: Path) -> None:
    service = FaultService(short_path / "faults.sock")
    service.refusal = (grpc.StatusCode.PERMISSION_DENIED, "who are you?")
    with FaultForwarder(service.endpoint) as forwarder:
        waiting = forwarder.submit(0, PAGE)
        for attempt in (
            waiting.result,
            lambda: forwarder.resolve(0, PAGE),
            lambda: forwarder.convert(0, PAGE, private=True),
        ):
            with pytest.raises(FerryError, match="who are you"):
                attempt()
    service.stop()


def test_no_more_faults_are_under_way_than_allowed(service: FaultService) -> None:
    service.answer = never
    with FaultForwarder(service.endpoint, most_in_flight=2) as forwarder:
        for page in range(2):
            forwarder.submit(0, page * PAGE)
        third: Future[Future[Resolution]] = Future()
        thread = threading.Thread(target=lambda: third.set_result(forwarder.submit(0, 2 * PAGE)))
        thread.start()
        asked = [service.fault() for _ in range(2)]
        assert service.faults.empty()
        assert not third.done()

        service.send(installed(asked[0]))

        third.result(SECONDS)
        assert service.fault().guest_address == 2 * PAGE
        thread.join(SECONDS)


def test_conversions_and_imports_are_told(
    service: FaultService, forwarder: FaultForwarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults_module, "MOST_IMPORTS", 2)

    forwarder.convert(PAGE, 3 * PAGE, private=True)
    forwarder.convert(PAGE, PAGE, private=False)
    forwarder.report_imports([Import(page * PAGE, PAGE, ImportResult.STALE) for page in range(3)])

    to_private, to_shared, *reports = service.calls
    assert to_private == pb.ConvertRangeRequest(guest_address=PAGE, size=3 * PAGE, sharing=pb.SHARING_PRIVATE)
    assert to_shared.sharing == pb.SHARING_SHARED
    assert [[one.guest_address for one in report.imports] for report in reports] == [[0, PAGE], [2 * PAGE]]
    assert reports[0].imports[0].result == pb.IMPORT_RESULT_STALE


def test_a_refused_conversion_is_an_error(service: FaultService, forwarder: FaultForwarder) -> None:
    forwarder.resolve(0, 0)
    service.refusal = (grpc.StatusCode.INVALID_ARGUMENT, "half a page")

    with pytest.raises(FerryError, match="half a page"):
        forwarder.convert(1, PAGE, private=True)


def test_closing_ends_what_waits_and_takes_no_more(service: FaultService) -> None:
    service.answer = never
    forwarder = FaultForwarder(service.endpoint)
    waiting = forwarder.submit(0, PAGE)
    service.fault()

    forwarder.close()
    forwarder.close()

    for future in (waiting, forwarder.submit(0, PAGE)):
        error = future.exception(SECONDS)
        assert isinstance(error, FerryError)
        assert error.reason is Reason.CANCELLED


def test_the_secret_is_not_shown() -> None:
    assert "secret" not in repr(FaultEndpoint("/run/faults.sock", b"secret"))
