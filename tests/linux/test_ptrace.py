"""The main thread of another process makes system calls, and knows nothing of it."""

from __future__ import annotations

import errno
import os
import platform
import signal
import socket
import threading

import pytest
from tracee import CLOCK_NANOSLEEP, DEADLINE, FUTEX, MADVISE, POLL, PPOLL, READ, Child, libc, until

from pageferry.errors import FerryError, Reason
from pageferryd.linux import ptrace
from pageferryd.linux.ptrace import Tracee, traced

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls are injected on x86-64 alone"),
]
NR_READ, NR_WRITE, NR_CLOSE, NR_GETPID, NR_KILL, NR_PIPE2, NR_GETTID = 0, 1, 3, 39, 62, 293, 186


def getpid(tracee: Tracee) -> int:
    return tracee.call(NR_GETPID)


def test_a_process_that_reads_says_its_id_and_then_reads_on() -> None:
    with Child("read") as child:
        child.await_call(READ)
        assert traced(child.pid, getpid) == child.pid
        assert child.ask("hello") == "6 0"
        assert child.status("TracerPid") == "0"


@pytest.mark.parametrize("what", ["poll", "read"])
def test_a_call_that_waits_for_input_is_restarted_and_gets_it(what: str) -> None:
    with Child(what) as child:
        child.await_call(POLL if what == "poll" else READ)
        for _ in range(3):
            assert traced(child.pid, getpid) == child.pid
        result = child.ask("input").split()
        assert result[:2] == (["1", "0"] if what == "poll" else ["6", "0"])


@pytest.mark.parametrize(
    ("what", "number", "said"),
    [
        ("nanosleep", CLOCK_NANOSLEEP, "0 0 True"),
        ("poll", POLL, "0 0 True"),
        ("futex", FUTEX, f"-1 {errno.ETIMEDOUT} True"),
    ],
)
def test_a_call_with_a_time_limit_goes_on_to_it(what: str, number: int, said: str) -> None:
    with Child(what) as child:
        child.await_call(number)
        for _ in range(3):
            assert traced(child.pid, getpid) == child.pid
        assert child.answer() == said


def test_several_calls_are_made_in_one_stop() -> None:
    def read_back(tracee: Tracee) -> bytes:
        numbers = tracee.put_bytes(bytes(8))
        tracee.call(NR_PIPE2, numbers, os.O_CLOEXEC)
        pair = tracee.get_bytes(numbers, 8)
        out, into = (int.from_bytes(pair[at : at + 4], "little") for at in (0, 4))
        assert tracee.call(NR_WRITE, into, tracee.put_bytes(b"a message"), 9) == 9
        space = tracee.put_bytes(bytes(16))
        assert tracee.call(NR_READ, out, space, 16) == 9
        tracee.call(NR_CLOSE, out)
        tracee.call(NR_CLOSE, into)
        return tracee.get_bytes(space, 9)

    with Child("read") as child:
        before = child.await_call(READ).descriptors()
        assert traced(child.pid, read_back) == b"a message"
        assert child.descriptors() == before
        assert child.ask("hello") == "6 0"


def test_a_call_that_fails_raises_its_errno_and_the_next_one_works() -> None:
    def fail(tracee: Tracee) -> int:
        with pytest.raises(OSError) as failed:
            tracee.call(NR_CLOSE, 9999)
        assert failed.value.errno == errno.EBADF
        return getpid(tracee)

    with Child("read") as child:
        assert traced(child.pid, fail) == child.pid
        assert child.ask("hello") == "6 0"


def test_what_was_written_below_the_stack_is_as_before() -> None:
    with Child("read") as child:
        child.await_call(READ)
        with Tracee(child.pid) as tracee:
            first, second = tracee.put_bytes(b"x" * 100), tracee.put_bytes(b"y" * 100)
            assert second + 100 <= first
            assert tracee.get_bytes(first, 100) == b"x" * 100
            with pytest.raises(ValueError, match="scratch"):
                tracee.put_bytes(bytes(4096))
            tracee._overwritten, overwritten = [], tracee._overwritten
            getpid(tracee)
        with Tracee(child.pid) as tracee:
            assert tracee.get_bytes(first, 100) == b"x" * 100
            tracee._overwritten = overwritten
            getpid(tracee)
        with Tracee(child.pid) as tracee:
            assert [tracee.get_bytes(address, len(data)) for address, data in overwritten] == [
                data for _, data in overwritten
            ]
            assert tracee.get_bytes(first, 100) != b"x" * 100


def test_two_hundred_stops_leave_a_calculation_right() -> None:
    with Child("spin") as child:
        for _ in range(200):
            assert traced(child.pid, getpid) == child.pid
        rounds, wrong = map(int, child.ask("enough").split())
        assert rounds > 0
        assert wrong == 0


def test_other_threads_run_while_the_main_thread_stands() -> None:
    here, there = socket.socketpair()
    with here, there, Child("threads", there.fileno(), fds=(there.fileno(),)) as child:
        here.settimeout(DEADLINE)
        with Tracee(child.pid) as tracee:
            assert tracee.call(NR_GETTID) == child.pid
            here.sendall(b"run")
            assert here.recv(64) == b"run"
            assert child.status("State") == "t"
        assert tracee.stopped_seconds > 0
        assert child.ask("hello") == "6 0"


def test_signals_that_come_meanwhile_are_handled_afterwards_each_one() -> None:
    with Child("handler") as child:
        child.await_call(READ)
        with Tracee(child.pid) as tracee:
            os.kill(child.pid, signal.SIGUSR1)
            for _ in range(3):
                os.kill(child.pid, signal.SIGRTMIN)
            assert getpid(tracee) == child.pid
            # Of the kind that cannot be kept from a thread with changed registers by blocking it.
            os.kill(child.pid, signal.SIGSEGV)
            assert getpid(tracee) == child.pid
        assert child.ask("which") == "SIGUSR1=1 SIGSEGV=1 SIGRTMIN=3"


def test_signals_before_the_stop_are_handled_too() -> None:
    with Child("handler") as child:
        child.await_call(READ)
        for count in range(1, 51):
            os.kill(child.pid, signal.SIGRTMIN)
            assert traced(child.pid, getpid) == child.pid
            assert child.ask("which") == f"SIGRTMIN={count}"


def test_a_signal_that_only_the_interrupted_call_lets_in_comes_within_it() -> None:
    with Child("within") as child:
        child.await_call(PPOLL)
        with Tracee(child.pid) as tracee:
            getpid(tracee)
            os.kill(child.pid, signal.SIGUSR1)
            getpid(tracee)
        assert child.answer() == f"{errno.EINTR} 1 True"


def test_a_process_stopped_by_job_control_stays_so_until_it_is_continued() -> None:
    with Child("read") as child:
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: child.status("State") == "T")
        assert traced(child.pid, getpid) == child.pid
        until(lambda: child.status("State") == "T")
        os.kill(child.pid, signal.SIGCONT)
        assert child.ask("hello") == "6 0"


def test_a_stop_signal_between_calls_takes_effect_at_the_end() -> None:
    with Child("read") as child:
        child.await_call(READ)
        with Tracee(child.pid) as tracee:
            getpid(tracee)
            os.kill(child.pid, signal.SIGSTOP)
            assert getpid(tracee) == child.pid
        until(lambda: child.status("State") == "T")
        os.kill(child.pid, signal.SIGCONT)
        assert child.ask("hello") == "6 0"


def test_an_error_half_way_leaves_the_process_as_it_was() -> None:
    def fail(tracee: Tracee) -> None:
        tracee.put_bytes(b"text")
        getpid(tracee)
        raise RuntimeError("half-way")

    with Child("read") as child:
        before = child.await_call(READ).descriptors()
        with pytest.raises(RuntimeError, match="half-way"):
            traced(child.pid, fail)
        assert child.descriptors() == before
        assert child.status("TracerPid") == "0"
        assert child.ask("hello") == "6 0"


def test_an_error_while_a_call_is_under_way_leaves_the_process_as_it_was() -> None:
    """The call reads from a pipe where nothing comes, and is given up by what is done meanwhile."""

    def give_up() -> None:
        raise FerryError(Reason.CANCELLED, "given up")

    def read_nothing(tracee: Tracee) -> None:
        numbers = tracee.put_bytes(bytes(8))
        tracee.call(NR_PIPE2, numbers, 0)
        out = int.from_bytes(tracee.get_bytes(numbers, 4), "little")
        tracee.call(NR_READ, out, tracee.put_bytes(bytes(8)), 8, meanwhile=give_up)

    with Child("read") as child:
        child.await_call(READ)
        with pytest.raises(FerryError, match="given up"):
            traced(child.pid, read_nothing)
        assert child.status("TracerPid") == "0"
        assert child.ask("hello") == "6 0"


def test_a_call_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptrace, "_CALL_SECONDS", 0.05)
    with Child("read") as child:
        child.await_call(READ)
        with Tracee(child.pid) as tracee:
            with pytest.raises(FerryError, match=r"system call 0 .* took over") as refused:
                tracee.call(NR_READ, 0, tracee.put_bytes(bytes(8)), 8)
            assert refused.value.reason is Reason.VMM_FAILED
            with pytest.raises(FerryError, match="does not stand"):
                getpid(tracee)
        assert child.ask("hello") == "6 0"


@pytest.mark.parametrize("called", [False, True])
def test_a_tracer_that_ends_lets_the_process_go_unless_its_registers_are_changed(called: bool) -> None:
    def end_half_way(pid: int) -> None:
        tracee = Tracee(pid)
        tracee.__enter__()
        if called:
            getpid(tracee)
        os.close(tracee._memory)

    with Child("read") as child:
        child.await_call(READ)
        tracer = threading.Thread(target=end_half_way, args=(child.pid,))
        tracer.start()
        tracer.join(DEADLINE)
        if called:
            assert child.process.wait(DEADLINE) == -signal.SIGKILL
        else:
            assert child.ask("hello") == "6 0"


def test_a_process_killed_while_it_stands_is_gone_and_its_end_is_its_parents_to_see() -> None:
    with Child("read") as child:
        with Tracee(child.pid) as tracee:
            getpid(tracee)
            child.process.kill()
            until(lambda: child.status("State") == "Z")
            with pytest.raises(FerryError, match=f"process {child.pid} ended") as refused:
                getpid(tracee)
        assert refused.value.reason is Reason.VMM_GONE
        assert child.process.wait(DEADLINE) == -signal.SIGKILL


def test_a_process_that_ends_itself_is_gone() -> None:
    with Child("read") as child:
        with pytest.raises(FerryError) as refused:
            traced(child.pid, lambda tracee: tracee.call(NR_KILL, child.pid, signal.SIGKILL))
        assert refused.value.reason is Reason.VMM_GONE


def test_a_strangers_child_killed_while_it_stands_is_told_to_its_parent() -> None:
    with Child("parent") as middle:
        pid = int(middle.first)
        with pytest.raises(FerryError) as refused, Tracee(pid):
            os.kill(pid, signal.SIGKILL)
        assert refused.value.reason is Reason.VMM_GONE
        assert middle.answer() == str(-signal.SIGKILL)


def test_a_process_that_is_not_there_or_has_ended_is_gone() -> None:
    with Child("read") as child:
        child.process.kill()
        until(lambda: child.status("State") == "Z")
        for ended in (False, True):
            if ended:
                child.process.wait()
            with pytest.raises(FerryError, match=f"process {child.pid}") as refused:
                traced(child.pid, getpid)
            assert refused.value.reason is Reason.VMM_GONE


def test_a_process_that_another_one_traces_is_refused_with_the_others_name() -> None:
    with Child("read") as child, Child("tracer", child.pid) as tracer:
        with pytest.raises(FerryError, match=f"traced by process {tracer.pid}") as refused:
            traced(child.pid, getpid)
        assert refused.value.reason is Reason.VMM_FAILED


def test_without_the_right_to_trace_it_says_what_gives_it() -> None:
    refused: list[FerryError] = []

    def as_nobody(pid: int) -> None:
        # The bare call changes this thread alone.
        assert libc.syscall(117, 65534, 65534, 65534, None, None) == 0
        with pytest.raises(FerryError, match=r"CAP_SYS_PTRACE.* kernel\.yama\.ptrace_scope") as error:
            traced_here(pid)
        refused.append(error.value)

    def traced_here(pid: int) -> None:
        with Tracee(pid):
            pass

    with Child("read") as child:
        thread = threading.Thread(target=as_nobody, args=(child.pid,))
        thread.start()
        thread.join(DEADLINE)
        assert [error.reason for error in refused] == [Reason.PERMISSION_MISSING]
        assert child.ask("hello") == "6 0"


def test_a_process_in_32_bit_code_is_refused_and_goes_on() -> None:
    refused: list[FerryError] = []

    def in_32_bits(pid: int) -> bool:
        try:
            traced(pid, getpid)
        except FerryError as error:
            refused.append(error)
        return bool(refused)

    with Child("bits_32") as child:
        until(lambda: in_32_bits(child.pid))
        assert refused[0].reason is Reason.VMM_FAILED
        assert "32-bit" in refused[0].message
        assert child.status("TracerPid") == "0"
        assert child.status("State") == "R"


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(FerryError, match="riscv64") as refused:
        traced(os.getpid(), getpid)
    assert refused.value.reason is Reason.VMM_FAILED


@pytest.mark.userfaultfd
def test_a_thread_that_cannot_be_stopped_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptrace, "_STOP_SECONDS", 0.05)
    with Child("stuck") as child:
        child.await_call(MADVISE)
        with pytest.raises(FerryError, match=r"did not stop .* signals do not interrupt \(state D") as refused:
            traced(child.pid, getpid)
        assert refused.value.reason is Reason.VMM_FAILED
        until(lambda: child.status("TracerPid") == "0")
        assert child.ask("go on") == "0"


def test_a_stop_that_somebody_else_in_this_program_waits_for_is_said_to_be_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ptrace, "_STOP_SECONDS", 0.05)
    with Child("read") as child:
        child.await_call(READ)
        # Stands for whoever was quicker.
        monkeypatch.setattr(ptrace, "_waitid", waited_for_elsewhere)
        with pytest.raises(FerryError, match=r"has stopped, which something else .* \(state t") as refused:
            traced(child.pid, getpid)
        assert refused.value.reason is Reason.VMM_FAILED
        monkeypatch.undo()
        until(lambda: child.status("TracerPid") == "0")
        assert child.ask("hello") == "6 0"


def waited_for_elsewhere(_kind: int, _pid: int, _info: object, _options: int) -> int:
    return 0
