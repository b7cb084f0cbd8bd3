"""Unix sockets: who is there, and what descriptors come through."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.linux.unix_peer import listener_pid, peer_credentials, recv_with_fds

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with here, there:
        yield here, there


def send(sender: socket.socket, data: bytes, fds: list[int]) -> None:
    sender.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_the_peer_is_known_by_its_credentials(pair: Pair) -> None:
    assert peer_credentials(pair[0]) == (os.getpid(), os.getuid(), os.getgid())


def test_who_listens_is_found_by_connecting(tmp_path: Path) -> None:
    path = str(tmp_path / "vmm.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        assert listener_pid(path, 5) == os.getpid()


def test_a_socket_where_nobody_listens_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "vmm.sock")
    with pytest.raises(FerryError, match=r"vmm\.sock") as refused:
        listener_pid(path, 5)
    assert refused.value.reason is Reason.VMM_UNREACHABLE


def test_bytes_and_descriptors_come_together(pair: Pair) -> None:
    memfd = os.memfd_create("handed over")
    os.write(memfd, b"content")
    send(pair[1], b"here it is", [memfd])

    received = recv_with_fds(pair[0], 64, 1)

    assert (received.data, received.truncated) == (b"here it is", False)
    (fd,) = received.fds
    assert fd != memfd
    assert os.pread(fd, 64, 0) == b"content"
    assert not os.get_inheritable(fd)
    os.close(fd)
    os.close(memfd)


def test_descriptors_beyond_those_expected_are_closed_and_that_is_told(pair: Pair) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    send(pair[1], b"three", [0, 1, 2])

    received = recv_with_fds(pair[0], 64, 1)

    assert received.truncated
    assert len(received.fds) == 1
    os.close(received.fds[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_message_without_descriptors_is_just_bytes(pair: Pair) -> None:
    pair[1].sendall(b"none")
    assert recv_with_fds(pair[0], 64, 4) == (b"none", [], False)


def test_the_end_of_a_connection_is_an_empty_message(pair: Pair) -> None:
    pair[1].close()
    assert recv_with_fds(pair[0], 64, 4) == (b"", [], False)
