"""What comes from a guest's VMM to its pager, and back: the hand-off, and faults that are forwarded."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

from google.protobuf.message import DecodeError, Message
from mutated import pieces
from target import REFUSALS, Target, in_loop

from forwarding_vmm import HandSession
from pageferry.abi import userfaultfd as abi
from pageferry.v1 import fault_pb2 as pb
from pageferry.vmm.fault_messages import Outcome, read_resolution
from pageferry.vmm.handoff import HandoffRegion, encode_table
from pageferry.vmm.json_faults import JsonFaults as VmmFaults
from pageferry.vmm.json_faults import _Waiting
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.door import Settled
from pageferryd.destination.exit_door import MAX_FAULT_BYTES, ExitDoor
from pageferryd.destination.fault_service import MAX_IMPORTS, TOKEN_KEY, FaultServicer
from pageferryd.destination.fault_stream import FaultStream
from pageferryd.destination.handoff import MAX_TABLE_BYTES, _receive_table, read_table
from pageferryd.destination.json_faults import MAX_REQUEST, JsonFaults
from pageferryd.linux.userfault_events import Fault, parse_events

LAYOUT = Layout([Region(1 << 32, 16 * PAGE_SIZE), Region(0, 48 * PAGE_SIZE)])
TABLE = [
    HandoffRegion(0x7F0000000000, 16 * PAGE_SIZE, 0, gpa_start=1 << 32),
    HandoffRegion(0x7F1000000000, 48 * PAGE_SIZE, 16 * PAGE_SIZE, gpa_start=0),
]


async def handoff(data: bytes) -> None:
    """A table that is taken places every page of the guest at an address of its own."""
    here, vmm = socket.socketpair()
    fds: list[int] = []
    with here, vmm:
        here.setblocking(False)
        vmm.setblocking(False)
        for piece in pieces(data):
            try:
                vmm.send(piece)
            except BlockingIOError:
                break
        vmm.close()
        table = await _receive_table(here, fds)
    assert not fds
    assert len(json.dumps(table)) <= 8 * MAX_TABLE_BYTES
    placed = read_table(table, LAYOUT)
    addresses = [placed.address_of(page) for page in range(LAYOUT.page_count)]
    assert len(set(addresses)) == LAYOUT.page_count
    assert all(not address % PAGE_SIZE and placed.page_at(address) == page for page, address in enumerate(addresses))


async def json_faults(data: bytes) -> None:
    """Each whole request is answered once, for the page it names; what cannot be one ends the listening."""
    here, vmm = socket.socketpair()
    with here, vmm:
        here.setblocking(False)
        vmm.settimeout(10)
        door = ExitDoor(LAYOUT)
        session = HandSession(door)
        faults = JsonFaults(here, door, LAYOUT)
        faults.open()
        for piece in pieces(data):
            if faults._loop is None:
                break
            vmm.sendall(piece)
            while faults._loop is not None and _has_more(here):
                faults._readable()
            assert len(faults._text) <= MAX_REQUEST or faults._loop is None
        listening = faults._loop is not None
        door.settled(0, LAYOUT.page_count, Settled.ZERO)
        faults.close()
        assert all(0 <= page < LAYOUT.page_count for page in session.faults)
        assert not door._waiting
        here.close()
        replies = b"".join(iter(lambda: vmm.recv(1 << 20), b""))
    if listening:
        said = json.loads(b"[" + replies.replace(b"}{", b"},{") + b"]")
        assert [reply["offset"] // PAGE_SIZE for reply in said] == session.faults or len(said) == len(session.faults)


def _has_more(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def _messages(data: bytes, kind: type[Message]) -> list[Any]:
    """Read messages, each behind its length in two bytes."""
    found, at = [], 0
    while at + 2 <= len(data) and len(found) < 64:
        size = int.from_bytes(data[at : at + 2], "little")
        with contextlib.suppress(DecodeError):
            found.append(kind.FromString(data[at + 2 : at + 2 + size]))
        at += 2 + size
    return found


def _joined(*messages: Message) -> bytes:
    return b"".join(len(one.SerializeToString()).to_bytes(2, "little") + one.SerializeToString() for one in messages)


async def fault_stream(data: bytes) -> None:
    """Each fault is answered once, refused or settled, and nothing of it is kept."""
    door = ExitDoor(LAYOUT)
    session = HandSession(door)
    stream = FaultStream(door)
    asked = _messages(data, pb.ResolveFaultsRequest)
    for request in asked:
        stream.take(request)
    refused = [one for one in stream._unsent if one.outcome == pb.OUTCOME_REFUSED]
    assert all(one.reason and len(one.message) <= 512 for one in refused)
    assert len(refused) == len(stream._unsent)
    assert all(0 <= page < LAYOUT.page_count for page in session.faults)
    door.settled(0, LAYOUT.page_count, Settled.INSTALLED)
    assert len(stream._unsent) == len(asked)
    assert (stream._waiting, stream._tokens, door._waiting) == ({}, {}, {})
    answered = sorted((one.token, one.size) for one in stream._unsent)
    assert answered == sorted((one.token, one.size) for one in asked)
    assert all(one.size <= MAX_FAULT_BYTES for one in stream._unsent if one.outcome == pb.OUTCOME_INSTALLED)


class _Call:
    """The part of a call's context that tells who calls."""

    def __init__(self, token: bytes) -> None:
        self._token = token

    def invocation_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((TOKEN_KEY, self._token),)


async def fault_calls(data: bytes) -> None:
    """Ranges that are converted, and imports that are reported, are whole pages of the guest."""
    reported: list[tuple[int, int]] = []
    door = ExitDoor(LAYOUT)
    session: Any = HandSession(door)
    session.report_import = lambda first, pages, _end: reported.append((first, pages))
    servicer = FaultServicer(b"s" * 32)
    servicer.connect(door, session)
    call: Any = _Call(b"s" * 32)
    for request in _messages(data, pb.ConvertRangeRequest):
        try:
            await servicer.ConvertRange(request, call)
        except REFUSALS:
            continue
    for imports in _messages(data, pb.ReportImportsRequest):
        try:
            await servicer.ReportImports(imports, call)
        except REFUSALS:
            continue
        assert len(imports.imports) <= MAX_IMPORTS
    for first, pages in session.converted + reported:
        LAYOUT.check(first, pages)


def resolution(data: bytes) -> None:
    """A VMM takes an answer whose outcome it knows, or an error with a reason that it knows."""
    try:
        response = pb.ResolveFaultsResponse.FromString(data)
    except DecodeError:
        return
    found = read_resolution(response)
    assert found.outcome in Outcome
    assert (found.guest_address, found.size) == (response.guest_address, response.size)


def vmm_replies(data: bytes) -> None:
    """Whatever a pager says, nobody who waits is forgotten: each is answered, or told to ask elsewhere."""
    here, pager = socket.socketpair()
    with here, pager:
        faults = VmmFaults(here, TABLE, 16)
        waiting = [_Waiting((1 << 32) + page * PAGE_SIZE) for page in range(3)]
        faults._waiting = dict(enumerate(waiting, start=1))
        faults._reader = waiting[0]
        for piece in pieces(data):
            if piece and not faults._ended:
                pager.sendall(piece)
                faults._read()
        pager.close()
        while not faults._ended:
            faults._read()
        assert all(one.over for one in waiting)
        faults._leave_reading()


def uffd_events(data: bytes) -> None:
    """Events are as many as messages came, and nothing of them is lost."""
    messages = [data[at : at + abi.UFFD_MSG_SIZE] for at in range(0, len(data) - abi.UFFD_MSG_SIZE + 1, 32)]
    # The kernel has opened the descriptor that this one names.
    messages = [one for one in messages if one[0] != abi.UFFD_EVENT_FORK]
    events = parse_events(b"".join(messages))
    assert len(events) == len(messages)
    assert all(one.thread < 1 << 32 for one in events if isinstance(one, Fault))


def _fault(token: int, address: int, size: int = PAGE_SIZE) -> pb.ResolveFaultsRequest:
    return pb.ResolveFaultsRequest(token=token, guest_address=address, size=size, access=pb.ACCESS_READ)


_ADDRESS = 1 << 32
_REPLIES = b'{"vcpu":0,"token":1,"offset":0,"len":4096,"flags":0,"zero":false}'
_REPLIES += b'{"vcpu":0,"token":2,"offset":4096,"len":4096,"flags":0,"zero":true}'
_POISONED = b'{"vcpu":0,"token":3,"offset":8192,"len":4096,"flags":0,"zero":false,"poisoned":true}'
_REQUESTS = b'{"vcpu":3,"offset":69632,"flags":16,"token":null}{"vcpu":1,"offset":0,"flags":0,"token":7,"poison":true} '
_IMPORT = pb.ReportImportsRequest(
    imports=[{"guest_address": _ADDRESS, "size": PAGE_SIZE, "result": pb.IMPORT_RESULT_DONE}]  # type: ignore[list-item]
)

DOOR_TARGETS = (
    Target(
        "hand-off",
        in_loop(handoff),
        [b"\5" + encode_table(TABLE), b"\0" + json.dumps(json.loads(encode_table(TABLE)), indent=1).encode()],
    ),
    Target("JSON faults", in_loop(json_faults), [b"\5" + _REQUESTS, b"\1" + _REQUESTS, b"\0" + _REQUESTS * 3], ()),
    Target(
        "fault stream",
        in_loop(fault_stream),
        [
            _joined(_fault(1, _ADDRESS), _fault(2, _ADDRESS, 8 * PAGE_SIZE), _fault(3, 0), _fault(1, 4096)),
            _joined(_fault(1, _ADDRESS), _fault(1, _ADDRESS), _fault(2, 1 << 50), _fault(0, 0, 48 * PAGE_SIZE)),
        ],
        (),
    ),
    Target(
        "fault calls",
        in_loop(fault_calls),
        [
            _joined(pb.ConvertRangeRequest(guest_address=_ADDRESS, size=2 * PAGE_SIZE, sharing=pb.SHARING_PRIVATE)),
            _joined(_IMPORT),
        ],
        (),
    ),
    Target(
        "resolution",
        resolution,
        [
            pb.ResolveFaultsResponse(token=1, guest_address=_ADDRESS, size=4096, outcome=one).SerializeToString()
            for one in (pb.OUTCOME_INSTALLED, pb.OUTCOME_DELIVERED, pb.OUTCOME_POISONED)
        ]
        + [pb.ResolveFaultsResponse(outcome=pb.OUTCOME_REFUSED, reason="X", message="no").SerializeToString()],
    ),
    Target(
        "replies at a VMM",
        vmm_replies,
        [b"\5" + _REPLIES + _POISONED, b"\0" + _REPLIES, b'\0{"token":1}', b'\0{"token":2}', b"\0x", b'\0{"token":{}}'],
        (),
    ),
    Target(
        "userfaultfd events",
        uffd_events,
        [abi.MSG.pack(kind, 1, 0x7F0000001000, 0x7F0000002000) for kind in (0x12, 0x14, 0x15, 0x16)],
    ),
)
