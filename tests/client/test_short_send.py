"""Short messages sent without letting go of the GIL: all of them, or an error."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pageferry.vmm.short_send import send_short

SECONDS = 20


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    there.settimeout(SECONDS)
    with here, there:
        yield here, there


def fill(connection: socket.socket) -> int:
    """Send until there is no room; return how many bytes went."""
    sent = 0
    while True:
        try:
            sent += connection.send(b"x" * 1000)
        except BlockingIOError:
            return sent


def test_what_is_sent_comes_out(ends: tuple[socket.socket, socket.socket]) -> None:
    send_short(ends[0], b"a\0b")
    send_short(ends[0], b"c")
    assert ends[1].recv(100) == b"a\0bc"


def test_where_there_is_no_room_it_waits_and_loses_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = ends
    here.setblocking(False)
    filled = fill(here)
    here.setblocking(True)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_short, here, b"y" * 500)
        came = b""
        while len(came) < filled + 500:
            came += there.recv(65536)
        sending.result(SECONDS)
    assert came == b"x" * filled + b"y" * 500


def test_to_nobody_and_on_a_closed_socket_it_fails_as_a_send_does(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = ends
    there.close()
    with pytest.raises(BrokenPipeError):
        send_short(here, b"x")
    here.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        send_short(here, b"x")
