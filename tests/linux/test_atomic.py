"""AND of a word that another process changes at the same time: nobody's bit is lost."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from other_side import OtherSide

from pageferry.errors import FerryError, Reason
from pageferryd.linux import atomic
from pageferryd.linux.atomic import AtomicAnd, atomic_and

ODD = 0xAAAA_AAAA_AAAA_AAAA
WORDS = st.integers(0, 2**64 - 1)


@given(before=WORDS, mask=WORDS)
def test_a_word_becomes_itself_and_the_mask_and_its_neighbours_stay(before: int, mask: int) -> None:
    words = (ctypes.c_uint64 * 3)(7, before, 9)
    atomic_and().word(ctypes.addressof(words) + 8, mask)
    assert list(words) == [7, before & mask, 9]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other side speaks x86-64")
def test_no_bit_that_another_process_sets_meanwhile_is_lost() -> None:
    fd = os.memfd_create("bits")
    os.ftruncate(fd, 4096)
    bits = mmap.mmap(fd, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(bits))
    words = 2
    word = atomic_and().word
    other = OtherSide(fd, words, 100_000)
    other.go()
    mine = 0
    while other.runs or mine < 100_000:
        # Clears what nobody sets: every store it makes beside the other's would undo one of them.
        for index in range(words):
            word(address + 8 * index, (1 << 64) - 1 & ~ODD)
        mine += words
    assert other.lost() == 0
    os.close(fd)


def test_there_is_one_for_the_process() -> None:
    assert atomic_and() is atomic_and()


def test_its_code_cannot_be_written() -> None:
    own = AtomicAnd()._code
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= own < end:
            assert line.split()[1].startswith("r-x")
            return
    raise AssertionError("its code is not mapped")


WITHOUT_EXEC_GAIN = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
# PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN: what MemoryDenyWriteExecute asks for
if libc.prctl(65, 1, 0, 0, 0):
    sys.exit(77)
from pageferryd.linux.atomic import atomic_and
word = ctypes.c_uint64(7)
atomic_and().word(ctypes.addressof(word), 5)
sys.exit(word.value)
"""


def test_it_works_where_no_memory_may_become_executable() -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT_EXEC_GAIN], timeout=30, check=False).returncode
    if ended == 77:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    assert ended == 5


def test_a_machine_that_it_was_not_written_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(FerryError, match="vax") as refused:
        AtomicAnd()
    assert refused.value.reason is Reason.USERFAULTFD_UNAVAILABLE


def test_where_no_code_of_its_own_may_run_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.mmap, "MAP_PRIVATE", 0)
    with pytest.raises(FerryError, match="system call filter") as refused:
        AtomicAnd()
    assert refused.value.reason is Reason.PERMISSION_MISSING
