"""Processes held by a descriptor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.linux.pidfd import PidFd

DEADLINE = 10.0


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_process_that_runs_has_not_exited_until_it_is_killed(child: subprocess.Popen[bytes]) -> None:
    with PidFd(child.pid) as held:
        assert held.pid == child.pid
        assert not held.exited

        held.send_signal(signal.SIGKILL)

        assert held.wait(DEADLINE)
        assert held.exited
        child.wait()
        assert held.exited


def test_no_signal_can_be_sent_once_the_process_is_reaped(child: subprocess.Popen[bytes]) -> None:
    with PidFd(child.pid) as held:
        child.kill()
        child.wait()
        with pytest.raises(FerryError, match=f"process {child.pid}") as refused:
            held.send_signal(signal.SIGTERM)
        assert refused.value.reason is Reason.VMM_GONE


def test_a_process_that_is_not_there_cannot_be_opened(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    with pytest.raises(FerryError) as refused:
        PidFd(child.pid)
    assert refused.value.reason is Reason.VMM_GONE


@pytest.mark.root
def test_a_descriptor_of_a_process_can_be_taken() -> None:
    memfd = os.memfd_create("shared")
    os.write(memfd, b"of the child")
    command = [sys.executable, "-c", "print(flush=True); input()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, pass_fds=[memfd], stdin=pipe, stdout=pipe) as child, PidFd(child.pid) as held:
        assert child.stdout is not None
        child.stdout.readline()
        taken = held.get_fd(memfd)

        assert os.pread(taken, 64, 0) == b"of the child"
        assert os.path.samestat(os.fstat(taken), os.fstat(memfd))
        assert not os.get_inheritable(taken)

        with pytest.raises(FerryError, match="file descriptor 9999") as refused:
            held.get_fd(9999)
        assert refused.value.reason is Reason.INVALID_ARGUMENT
        child.kill()
    os.close(taken)
    os.close(memfd)


def test_it_can_be_closed_twice(child: subprocess.Popen[bytes]) -> None:
    held = PidFd(child.pid)
    held.close()
    held.close()
    assert held.fileno() == -1
