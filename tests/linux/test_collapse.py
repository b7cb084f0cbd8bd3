"""Memory that came page by page is mapped big again, in another process, without a byte of it changing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from collapsible import Collapsible
from structlog.testing import capture_logs

from pageferry.vmm.memory import GuestMemory
from pageferryd.linux import collapse as subject
from pageferryd.linux.collapse import HUGE, big_bytes, collapse
from pageferryd.linux.userfaultfd import Userfaultfd

SIZE = 16 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.root,
    # With "always" the kernel maps memory big by itself, at the first touch or behind one's back.
    pytest.mark.skipif(not THP.exists() or "[madvise]" not in THP.read_text(), reason="huge pages are not by madvise"),
]


@pytest.fixture
def child() -> Iterator[Collapsible]:
    with Collapsible(SIZE) as one:
        yield one


def whole_pieces(span: tuple[int, int]) -> int:
    """Bytes of a span in whole, aligned huge pages."""
    start, stop = -(-span[0] // HUGE), (span[0] + span[1]) // HUGE
    return (stop - start) * HUGE


def test_memory_that_was_filled_page_by_page_is_mapped_big(child: Collapsible) -> None:
    assert big_bytes(child.pid, [child.span]) == 0
    gained = collapse(child.pid, [child.span])
    assert gained == whole_pieces(child.span) == big_bytes(child.pid, [child.span])
    assert child.is_intact()


def test_what_is_big_already_is_no_gain(child: Collapsible) -> None:
    collapse(child.pid, [child.span])
    assert collapse(child.pid, [child.span]) == 0


def test_only_what_lies_in_the_spans_is_touched(child: Collapsible) -> None:
    address = -(-child.span[0] // HUGE) * HUGE
    # Whole pieces only: the last span has none.
    spans = [(address + 4096, 2 * HUGE), (address + 4 * HUGE, HUGE), (address + 5 * HUGE + 4096, HUGE)]
    assert collapse(child.pid, spans) == 2 * HUGE
    assert big_bytes(child.pid, [child.span]) == 2 * HUGE


def test_the_process_runs_between_two_pieces(child: Collapsible, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    advise = subject._advise

    def advised(pidfd: int, piece: int) -> int:
        done.append("piece")
        return advise(pidfd, piece)

    monkeypatch.setattr(subject, "_advise", advised)
    monkeypatch.setattr(subject.time, "sleep", lambda _seconds: done.append("pause"))
    assert collapse(child.pid, [child.span]) == whole_pieces(child.span)
    pieces = whole_pieces(child.span) // HUGE
    assert done == ["piece", *["pause", "piece"] * (pieces - 1)]


def test_pauses_are_bounded(child: Collapsible, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr(subject, "_LONGEST_PAUSE", 1e-9)
    monkeypatch.setattr(subject.time, "sleep", paused.append)
    collapse(child.pid, [child.span])
    assert set(paused) == {1e-9}


def test_a_kernel_that_touches_no_page_ahead_collapses_all_the_same(
    child: Collapsible, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_advice = 1 << 20
    monkeypatch.setattr(subject, "_MADV_POPULATE_WRITE", no_advice)
    assert collapse(child.pid, [child.span]) == whole_pieces(child.span)
    assert child.is_intact()


def test_a_span_that_cannot_be_does_not_keep_the_next_one_from_it(child: Collapsible) -> None:
    nothing_there = (1 << 32, 2 * HUGE)
    with capture_logs() as logged:
        gained = collapse(child.pid, [nothing_there, child.span])
    assert gained == whole_pieces(child.span)
    assert [entry["event"] for entry in logged] == ["memory_not_collapsed"]


def test_pieces_in_use_are_skipped_and_too_many_of_them_end_it(
    child: Collapsible, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def busy(_pidfd: int, piece: int) -> int:
        asked.append(piece)
        return errno.EAGAIN

    monkeypatch.setattr(subject, "_advise", busy)
    monkeypatch.setattr(subject, "_MAX_SKIPPED", 3)
    with capture_logs() as logged:
        assert collapse(child.pid, [child.span]) == 0
    assert len(asked) == 3 * 3
    assert len(set(asked)) == 3
    assert len(logged) == 1


def test_pieces_that_were_in_use_are_tried_again(child: Collapsible, monkeypatch: pytest.MonkeyPatch) -> None:
    advise = subject._advise
    refusals = [errno.EAGAIN, errno.EBUSY, errno.EAGAIN]

    def busy_at_first(pidfd: int, piece: int) -> int:
        return refusals.pop() if refusals else advise(pidfd, piece)

    monkeypatch.setattr(subject, "_advise", busy_at_first)
    assert collapse(child.pid, [child.span]) == whole_pieces(child.span)


def test_memory_under_a_userfaultfd_with_holes_is_left_alone() -> None:
    memory = GuestMemory(4 * HUGE)
    memory.advise(0, memory.size, 14)
    with Userfaultfd.open() as uffd:
        uffd.register(memory.address, memory.size)
        uffd.zero(memory.address, 4096)
        assert collapse(os.getpid(), [(memory.address, memory.size)]) == 0
        # Nothing was filled by it: every other page is missing still.
        assert uffd.zero(memory.address + 4096, memory.size - 4096)[0] == memory.size - 4096
    memory.close()


def test_a_process_that_is_gone_is_no_error(child: Collapsible) -> None:
    child.end()
    with capture_logs() as logged:
        assert collapse(child.pid, [child.span]) == 0
        assert big_bytes(child.pid, [child.span]) == 0
    assert {entry["log_level"] for entry in logged} == {"info"}


WITHOUT_NICE = """
import sys
from pageferryd.linux.collapse import collapse
print(collapse(int(sys.argv[1]), [(int(sys.argv[2]), int(sys.argv[3]))]))
"""


def test_without_the_capability_the_memory_stays_as_it_is(child: Collapsible) -> None:
    if not Path("/usr/bin/setpriv").exists():
        pytest.skip("setpriv is not installed")
    command = ["setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice", sys.executable, "-c", WITHOUT_NICE]
    done = subprocess.run(
        [*command, str(child.pid), *map(str, child.span)], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert "not permitted" in done.stdout
    assert big_bytes(child.pid, [child.span]) == 0
