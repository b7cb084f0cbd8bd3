"""What comes over the lanes: requests and hellos at the source, answers and refusals at the destination."""

from __future__ import annotations

import asyncio
import os

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from mutated import pieces
from target import Target, in_loop

from pageferry.errors import FerryError, Reason, from_rpc, from_status, to_status
from pageferry.v1 import memory_pb2, page_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.core.errors import MalformedPagesError
from pageferryd.core.frames import HEAD_SIZE, MAX_ANSWER, MAX_REQUEST, REFUSAL, RequestFrames, framed, refusal
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pager import Answer, Pager, PagerOptions
from pageferryd.core.requests import (
    MAX_CREDIT,
    MAX_FETCH_PAGES,
    MAX_PUSH_RUNS,
    decode_fetch,
    decode_push,
    encode_request,
)
from pageferryd.core.runs import MAX_RUNS, POISONED, PRIVATE, RAW, ZERO, Run, decode, encode, raw_pages
from pageferryd.destination.page_calls import Source
from pageferryd.destination.socket_lanes import MAX_UNREAD, _Lane
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_sockets import PageLane
from pageferryd.source.served import Served

PAGES = 16
TOKEN = b"t" * 32
LAYOUT = Layout([Region(0, 10 * PAGE_SIZE), Region(1 << 30, 6 * PAGE_SIZE)])
PAGE = bytes(range(256)) * 16


def request_frames(data: bytes) -> None:
    """Whatever the pieces, the same frames come out, in order and within bounds."""
    cutter, frames = RequestFrames(), []
    rest = data[1:]
    for piece in pieces(data):
        frames += cutter.take(piece)
        assert len(cutter._buffer) <= MAX_REQUEST + HEAD_SIZE
    assert all(len(frame) <= MAX_REQUEST for frame in frames)
    assert rest == b"".join(map(framed, frames)) + bytes(cutter._buffer)


def pages(data: bytes) -> None:
    """A message that is read can be written again; its bytes are those of its raw pages."""
    batch = decode(data)
    assert len(batch.runs) <= MAX_RUNS
    size = raw_pages(batch.runs) * PAGE_SIZE
    assert batch.offset + size <= len(data)
    content = data[batch.offset : batch.offset + size]
    again = decode(encode(batch.runs, [content], last=batch.last))
    assert (again.runs, again.last) == (batch.runs, batch.last)
    assert again.message[again.offset : again.offset + size] == content


def demand_answer(data: bytes) -> None:
    """What a pager takes on the demand lane is what it asked for, inside of its guest."""
    pager = Pager(LAYOUT, PagerOptions(fault_around=0), 0.0)
    for page in (3, 7):
        assert pager.fault(page, 0.0) is Answer.FETCH
    assert pager.next_fetch(0.0) == ((3, 1), (7, 1))
    runs = pager.demand_arrived(decode(data).runs, 1.0)
    assert {page for run in runs for page in range(run.first, run.first + run.pages)} == {3, 7}


def push_answers(data: bytes) -> None:
    """What a pager takes on the push lane is inside of its guest, and no more than it granted."""
    pager = Pager(LAYOUT, PagerOptions(), 0.0)
    request = pager.next_push(0.0)
    assert request is not None
    batch = decode(data)
    runs = pager.push_arrived(batch.runs, 1.0, last=batch.last)
    assert sum(run.pages for run in runs) <= PAGES
    assert all(run.first + run.pages <= PAGES for run in runs)
    assert raw_pages(runs) * PAGE_SIZE <= request.credit


def requests(data: bytes) -> None:
    """A request that is read is within its bounds, and can be written again."""
    try:
        fetch = decode_fetch(data)
    except MalformedPagesError:
        pass
    else:
        assert fetch.runs
        assert sum(pages for _, pages in fetch.runs) <= MAX_FETCH_PAGES
        assert decode_fetch(encode_request(fetch.runs)).runs == fetch.runs
    push = decode_push(data)
    assert 0 < len(push.runs) <= MAX_PUSH_RUNS
    assert PAGE_SIZE <= push.credit <= MAX_CREDIT
    assert decode_push(encode_request(push.runs, push.credit)) == push


class Transport:
    """Takes what a protocol says to its transport."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, parts: list[bytes]) -> None:
        self.written += b"".join(parts)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, _name: str) -> None:
        return None

    def set_write_buffer_limits(self, _high: int) -> None:
        pass

    pause_reading = resume_reading = lambda self: None


async def page_lane(data: bytes) -> None:
    """A source answers each good request in whole frames of pages, and says why before it hangs up on a bad one."""
    memory = GuestMemory(PAGES * PAGE_SIZE)
    memory.write(0, b"\7" * 5 * PAGE_SIZE)
    places = [memory.address, memory.address + 10 * PAGE_SIZE]
    locations = [memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=place)) for place in places]
    served = Served("m", TOKEN, "d", SourceMemory.open(LAYOUT, locations, os.getpid()), LAYOUT, lambda: None)
    served.open()
    try:
        await _ask(served, data)
    finally:
        served.close()
        memory.close()


async def _ask(served: Served, data: bytes) -> None:
    def authorise(hello: page_pb2.LaneHello, _names: frozenset[str]) -> Served:
        if hello.migration_id != "m":
            raise FerryError(Reason.UNKNOWN_MIGRATION, "another")
        served.check_token(hello.token)
        return served

    transport, gone = Transport(), []
    lane = PageLane(authorise, gone.append)
    lane.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces(data):
        if transport.closed:
            break
        lane.data_received(piece)
    while lane._pumping:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0)
    frames = _frames(bytes(transport.written))
    for head, message in frames[:-1] if transport.closed else frames:
        assert not head & REFUSAL
        for run in decode(message).runs:
            assert run.first + run.pages <= PAGES
    if transport.closed:
        refused = from_status(status_pb2.Status.FromString(frames[-1][1]), Reason.LANE_LOST)
        assert frames[-1][0] & REFUSAL
        assert refused.reason not in (Reason.LANE_LOST, Reason.INTERNAL), refused
    lane.connection_lost(None)
    assert gone == [lane]


def _frames(written: bytes) -> list[tuple[int, bytes]]:
    frames, at = [], 0
    while at < len(written):
        head = int.from_bytes(written[at : at + HEAD_SIZE], "little")
        size = head & ~REFUSAL
        assert size <= MAX_ANSWER
        frames.append((head, written[at + HEAD_SIZE : at + HEAD_SIZE + size]))
        at += HEAD_SIZE + size
    assert at == len(written)
    return frames


async def lane_answers(data: bytes) -> None:
    """A destination takes frames out of any pieces as they are, until one cannot be."""
    source = Source("m", "127.0.0.1:1", "source", TOKEN, LAYOUT, "127.0.0.1:2")
    lane, transport = _Lane(source, MAX_UNREAD), Transport()
    lane.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces(data):
        rest = memoryview(piece)
        while rest and not transport.closed:
            place = lane.get_buffer(-1)
            size = min(len(place), len(rest))
            assert size
            place[:size] = rest[:size]
            rest = rest[size:]
            lane.buffer_updated(size)
    found = [await lane.receive() for _ in range(len(lane._messages))]
    sent = b"".join(map(framed, found))
    assert data[1:].startswith(sent)
    if lane._failure is None:
        # What is left is one frame that has yet to come.
        rest_size = len(data[1:]) - len(sent)
        assert rest_size < HEAD_SIZE + (int.from_bytes(data[1 + len(sent) :][:HEAD_SIZE], "little") & ~REFUSAL)
    lane.close()


def status(data: bytes) -> None:
    """What a peer says of an error is a FerryError, whatever it is."""
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("grpc-status-details-bin", data)),
        "the source is away",
    )
    assert from_rpc(error, Reason.LANE_LOST).reason in Reason
    try:
        said = status_pb2.Status.FromString(data)
    except DecodeError:
        return
    assert from_status(said, Reason.LANE_LOST).reason in Reason


RUNS = [Run(3, 1, RAW), Run(7, 1, RAW)]
ANSWERS = [
    encode([Run(3, 1, RAW)], [PAGE]),
    encode(RUNS, [PAGE, PAGE]),
    encode([Run(3, 1, ZERO), Run(7, 1, POISONED)], []),
    encode([Run(0, 4, RAW), Run(4, 12, ZERO)], [4 * PAGE], last=True),
    encode([Run(0, 1, PRIVATE)], [PAGE], last=True),
    encode([], [], last=True),
    b"",
]
REQUESTS = [
    encode_request([(3, 1)]),
    encode_request([(0, 4), (9, 2)]),
    encode_request([(0, 16)], 1 << 20),
    encode_request([(15, 1), (0, 3)], PAGE_SIZE),
]
HELLOS = [
    framed(page_pb2.LaneHello(migration_id="m", token=TOKEN, lane=lane).SerializeToString())
    for lane in (page_pb2.LANE_DEMAND, page_pb2.LANE_PUSH)
]
REFUSED = to_status(FerryError(Reason.TOKEN_INVALID, "no")).SerializeToString()


def _with_wrong_detail() -> bytes:
    said = status_pb2.Status.FromString(REFUSED)
    said.details[0].value = b"\xff\xff"
    return said.SerializeToString()


BAD_STATUS = [_with_wrong_detail(), b"\xff\xff", REFUSED]

LANE_TARGETS = (
    Target("request frames", request_frames, [b"\x05" + b"".join(map(framed, REQUESTS)), b"\1" + HELLOS[0]]),
    Target("pages", pages, ANSWERS),
    Target("demand answer", demand_answer, ANSWERS),
    Target("push answers", push_answers, ANSWERS),
    Target("requests", requests, REQUESTS),
    Target(
        "page lane",
        in_loop(page_lane),
        [
            b"\5" + HELLOS[0] + framed(REQUESTS[0]) + framed(REQUESTS[1]),
            b"\0" + HELLOS[1] + framed(REQUESTS[2]) + framed(REQUESTS[3]),
            b"\1" + HELLOS[1],
        ],
        (),
    ),
    Target(
        "lane answers",
        in_loop(lane_answers),
        [b"\7" + framed(b"") + framed(ANSWERS[0]) + framed(ANSWERS[3]), b"\1" + framed(b"") + refusal(REFUSED), b"\0"]
        + [b"\0" + refusal(one) for one in BAD_STATUS],
        (),
    ),
    Target("status", status, BAD_STATUS, ()),
)
