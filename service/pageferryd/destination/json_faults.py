"""vCPU faults as JSON on the hand-off's socket, as Firecracker's branch for guest_memfd sends them.

Objects stand back to back without a delimiter. A request is `{"vcpu", "offset", "flags", "token"}`, where `offset` is
in the flat space of all regions, in bytes; its reply is `{"vcpu", "token", "offset", "len", "flags", "zero"}`, with
vcpu, token and flags as they came. Ours beside these: a request with `"poison": true` is answered for a page that the
source could not read as well, with `"poisoned": true` in the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.core.errors import CoreError
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.door import Settled

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferryd.core.layout import Layout
    from pageferryd.destination.exit_door import ExitDoor

_log = structlog.get_logger(__name__)

_CHUNK = 64 << 10
MAX_REQUEST = 4 << 10
MAX_UNSENT = 1 << 20
"""Bytes of replies that a VMM may leave unread before it is no longer listened to."""
_MAX_U32 = (1 << 32) - 1
_MAX_U64 = (1 << 64) - 1
_REPLY = '{"vcpu":%d,"token":%s,"offset":%d,"len":%d,"flags":%d,"zero":'
_ENDS = {
    Settled.INSTALLED: "false}",
    Settled.ZERO: "true}",
    Settled.PRESENT: "false}",
    Settled.POISONED: 'false,"poisoned":true}',
}


class JsonFaults:
    """Reads a connection until it ends. What cannot be a request ends it; faults that wait are not lost by that."""

    def __init__(self, connection: socket.socket, door: ExitDoor, layout: Layout) -> None:
        self._connection = connection
        self._door = door
        self._layout = layout
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._unsent = bytearray()
        self._sends_later = self._waits_for_room = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._connection.fileno(), self._readable)

    def close(self) -> None:
        """Stop listening, once what can be sent has been; the connection stays open. Twice does nothing."""
        if self._loop is not None:
            with contextlib.suppress(OSError):
                self._connection.send(self._unsent)
            self._loop.remove_reader(self._connection.fileno())
            self._loop.remove_writer(self._connection.fileno())
            self._loop = None

    def _give_up(self, event: str, **details: object) -> None:
        """Stop listening and end this direction of the connection: the VMM sees that no answers come any more."""
        _log.warning(event, **details)
        self.close()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _readable(self) -> None:
        try:
            data = self._connection.recv(_CHUNK)
            if not data:
                self.close()
                return
            self._text += data.decode("ascii")
            self._take_requests()
        except BlockingIOError:
            return
        except (OSError, ValueError, RecursionError, FerryError, CoreError) as error:
            self._give_up("vmm_fault_refused", detail=str(error))

    def _take_requests(self) -> None:
        asked: list[tuple[int, Callable[[Settled], None]]] = []
        try:
            self._read_requests(asked)
        finally:
            # Before one that is refused, too.
            if asked:
                self._door.faults(asked)

    def _read_requests(self, asked: list[tuple[int, Callable[[Settled], None]]]) -> None:
        """Add what each whole request asks for, and how it is answered."""
        text, at = self._text, 0
        while at < len(text):
            if text[at].isspace():
                at += 1
                continue
            if text[at] != "{":
                raise FerryError(Reason.INVALID_ARGUMENT, "a fault on the hand-off's socket is no JSON object")
            try:
                request, end = self._decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                if len(text) - at > MAX_REQUEST:
                    raise
                # The rest of it has yet to come.
                break
            at = end
            asked.append(self._read(request))
        self._text = text[at:]

    def _read(self, request: dict[str, Any]) -> tuple[int, Callable[[Settled], None]]:
        vcpu = _number(request, "vcpu", _MAX_U32)
        offset = _number(request, "offset", _MAX_U64)
        flags = _number(request, "flags", _MAX_U64)
        token = "null" if request.get("token") is None else _number(request, "token", _MAX_U32)
        poison = request.get("poison", False)
        if poison is not True and poison is not False:
            raise FerryError(Reason.INVALID_ARGUMENT, "a fault on the hand-off's socket has no usable poison")
        page = offset // PAGE_SIZE
        if page >= self._layout.page_count:
            raise FerryError(Reason.PAGE_OUT_OF_RANGE, f"a fault at offset {offset:#x} is outside the guest's memory")
        reply = _REPLY % (vcpu, token, page * PAGE_SIZE, PAGE_SIZE, flags)
        return page, partial(self._answer, reply, poison)

    def _answer(self, reply: str, poison: bool, how: Settled) -> None:
        if self._loop is None or (how is Settled.POISONED and not poison):
            # Without the word for it: a guest that waits is better than one that reads what is not its own.
            return
        self._unsent += (reply + _ENDS[how]).encode()
        if len(self._unsent) > MAX_UNSENT:
            self._give_up("vmm_reads_no_answers", unsent=len(self._unsent))
        elif self._sends_later:
            return
        elif self._door.waiting:
            # What else is answered in this turn of the loop goes along.
            self._sends_later = True
            self._loop.call_soon(self._send)
        else:
            self._send()

    def _send(self) -> None:
        if self._loop is None:
            return
        try:
            sent = self._connection.send(self._unsent)
            del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self._give_up("vmm_unreachable", detail=str(error))
            return
        if self._unsent and not self._waits_for_room:
            self._loop.add_writer(self._connection.fileno(), self._send)
        elif self._waits_for_room and not self._unsent:
            self._loop.remove_writer(self._connection.fileno())
        self._sends_later = self._waits_for_room = bool(self._unsent)


def _number(request: dict[str, Any], name: str, largest: int) -> int:
    value = request.get(name)
    if type(value) is int and 0 <= value <= largest:
        return value
    raise FerryError(Reason.INVALID_ARGUMENT, f"a fault on the hand-off's socket has no usable {name}")
