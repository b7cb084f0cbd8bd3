"""vCPU faults as JSON on the hand-off's socket, as Firecracker's branch for guest_memfd sends them.

Objects stand back to back without a delimiter. A request is `{"vcpu", "offset", "flags", "token"}`, where `offset` is
in the flat space of all regions, in bytes; its reply is `{"vcpu", "token", "offset", "len", "flags", "zero"}`, with
vcpu, token and flags as they came.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.door import Settled

if TYPE_CHECKING:
    import socket

    from pageferryd.core.layout import Layout
    from pageferryd.destination.exit_door import ExitDoor

_log = structlog.get_logger(__name__)

_CHUNK = 64 << 10
MAX_REQUEST = 4 << 10
MAX_UNSENT = 1 << 20
"""Bytes of replies that a VMM may leave unread before it is no longer listened to."""
_MAX_U32 = (1 << 32) - 1
_MAX_U64 = (1 << 64) - 1


class JsonFaults:
    """Reads a connection until it ends. What cannot be a request ends it; faults that wait are not lost by that."""

    def __init__(self, connection: socket.socket, door: ExitDoor, layout: Layout) -> None:
        self._connection = connection
        self._door = door
        self._layout = layout
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._unsent = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._connection.fileno(), self._readable)

    def close(self) -> None:
        """Stop listening; the connection stays open. Twice does nothing."""
        if self._loop is not None:
            self._loop.remove_reader(self._connection.fileno())
            self._loop.remove_writer(self._connection.fileno())
            self._loop = None

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
        except (OSError, ValueError, RecursionError, FerryError) as error:
            _log.warning("vmm_fault_refused", detail=str(error))
            self.close()

    def _take_requests(self) -> None:
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
            self._take(request)
        self._text = text[at:]

    def _take(self, request: dict[str, Any]) -> None:
        offset, flags = (_number(request, name, _MAX_U64) for name in ("offset", "flags"))
        vcpu = _number(request, "vcpu", _MAX_U32)
        token = None if request.get("token") is None else _number(request, "token", _MAX_U32)
        page = offset // PAGE_SIZE
        if page >= self._layout.page_count:
            raise FerryError(Reason.PAGE_OUT_OF_RANGE, f"a fault at offset {offset:#x} is outside the guest's memory")
        reply = {"vcpu": vcpu, "token": token, "offset": page * PAGE_SIZE, "len": PAGE_SIZE, "flags": flags}
        self._door.fault(page, 1, lambda how: self._answer(reply, how))

    def _answer(self, reply: dict[str, Any], how: Settled) -> None:
        if self._loop is None or how is Settled.POISONED:
            # This wire knows no memory error: a guest that waits is better than one that reads what is not its own.
            return
        self._unsent += json.dumps(reply | {"zero": how is Settled.ZERO}, separators=(",", ":")).encode()
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
            _log.warning("vmm_unreachable", detail=str(error))
            self.close()
            return
        if len(self._unsent) > MAX_UNSENT:
            _log.warning("vmm_reads_no_answers", unsent=len(self._unsent))
            self.close()
        elif self._unsent:
            self._loop.add_writer(self._connection.fileno(), self._send)
        else:
            self._loop.remove_writer(self._connection.fileno())


def _number(request: dict[str, Any], name: str, largest: int) -> int:
    value = request.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest:
        return value
    raise FerryError(Reason.INVALID_ARGUMENT, f"a fault on the hand-off's socket has no usable {name}")
