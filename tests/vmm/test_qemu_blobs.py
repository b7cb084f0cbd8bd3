"""Firmware blobs of a guest: those of its source, whatever the waiting QEMU has made."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.vmm.qemu.blobs import LeavingBlobs, WaitingBlobs, is_blob
from pageferryd.vmm.qemu.blocks import FoundBlocks, RamBlock
from pageferryd.vmm.qemu.package import unpack_blob

TABLES = "/rom@etc/acpi/tables"
PAGES = 8


class Blob:
    """Memory of this process that stands for a blob of QEMU's."""

    def __init__(self, name: str = TABLES) -> None:
        self.memory = mmap.mmap(-1, PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pin = ctypes.c_char.from_buffer(self.memory)
        block = RamBlock(name, 0, len(self.memory), PAGE_SIZE, ctypes.addressof(self._pin), False, True)
        self.found = FoundBlocks([block, replace(block, name="pc.ram")], [])

    def close(self) -> None:
        del self._pin
        self.memory.close()


@pytest.fixture
def source() -> Iterator[Blob]:
    one = Blob()
    yield one
    one.close()


@pytest.fixture
def waiting() -> Iterator[Blob]:
    one = Blob()
    yield one
    one.close()


def test_blobs_are_known_by_their_names() -> None:
    assert all(map(is_blob, (TABLES, "rom@etc/table-loader", "0000:00:02.0/virtio-net-pci.rom")))
    assert not any(map(is_blob, ("pc.ram", "pc.bios", "vga.vram", "mem")))


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (b"tables", b""),
        (b"tables", b"other tables"),
        (b"tables", b"tables" + bytes(5 * PAGE_SIZE) + b"and more"),
        (bytes(3 * PAGE_SIZE) + b"late", b"early"),
        (b"", b"here alone"),
        (b"x" * PAGES * PAGE_SIZE, b"y" * PAGE_SIZE),
    ],
)
def test_a_waiting_qemu_gets_the_blobs_of_the_source(source: Blob, waiting: Blob, there: bytes, here: bytes) -> None:
    source.memory[: len(there)] = there
    waiting.memory[: len(here)] = here
    leaving, coming = LeavingBlobs(os.getpid(), source.found), WaitingBlobs(os.getpid(), waiting.found)
    coming.become(leaving.as_they_are())
    assert waiting.memory[:] == source.memory[:]


def test_what_changes_after_it_was_read_crosses_as_it_is_then(source: Blob, waiting: Blob) -> None:
    leaving, coming = LeavingBlobs(os.getpid(), source.found), WaitingBlobs(os.getpid(), waiting.found)
    for text in (b"first", b"then", b"and again"):
        source.memory[PAGE_SIZE : PAGE_SIZE + len(text)] = text
        coming.become(leaving.as_they_are())
        assert waiting.memory[:] == source.memory[:]


def test_only_blobs_cross_and_what_is_the_same_is_not_packed_again(source: Blob) -> None:
    source.memory[:6] = b"tables"
    leaving = LeavingBlobs(os.getpid(), source.found)
    first = leaving.as_they_are()
    assert list(first) == [TABLES]
    assert unpack_blob(TABLES, first[TABLES]) == b"tables"
    assert leaving.as_they_are()[TABLES] is first[TABLES]


def test_pages_that_are_the_same_are_not_written(source: Blob, waiting: Blob) -> None:
    source.memory[: 3 * PAGE_SIZE] = b"s" * 3 * PAGE_SIZE
    waiting.memory[: 3 * PAGE_SIZE] = b"s" * PAGE_SIZE + b"w" * PAGE_SIZE + b"s" * PAGE_SIZE
    coming = WaitingBlobs(os.getpid(), waiting.found)
    # Were it written, this would go.
    waiting.memory[2 * PAGE_SIZE : 2 * PAGE_SIZE + 4] = b"kept"
    coming.become(LeavingBlobs(os.getpid(), source.found).as_they_are())
    assert waiting.memory[PAGE_SIZE : 2 * PAGE_SIZE] == b"s" * PAGE_SIZE
    assert waiting.memory[2 * PAGE_SIZE : 2 * PAGE_SIZE + 4] == b"kept"


def test_a_blob_that_is_not_located_here_is_left_as_qemu_made_it(source: Blob) -> None:
    source.memory[:6] = b"tables"
    with capture_logs() as logged:
        WaitingBlobs(os.getpid(), FoundBlocks([], [])).become(LeavingBlobs(os.getpid(), source.found).as_they_are())
    assert [(entry["event"], entry["block"]) for entry in logged] == [("qemu_block_not_located", TABLES)]


def test_a_blob_of_another_size_or_that_was_damaged_is_refused(source: Blob, waiting: Blob) -> None:
    source.memory[:6] = b"tables"
    blob = LeavingBlobs(os.getpid(), source.found).as_they_are()[TABLES]
    coming = WaitingBlobs(os.getpid(), waiting.found)
    for wrong, reason in (
        (blob._replace(length=PAGE_SIZE), Reason.VMM_MISMATCH),
        (blob._replace(digest=b"d" * 32), Reason.VMM_FAILED),
    ):
        with pytest.raises(FerryError, match=TABLES) as refused:
            coming.become({TABLES: wrong})
        assert refused.value.reason is reason
    assert not any(waiting.memory[:])


def test_a_process_that_is_gone_and_memory_that_is_not_there_are_errors(source: Blob) -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    nothing = FoundBlocks([replace(source.found.located[0], host_address=PAGE_SIZE)], [])
    for pid, found in ((child, source.found), (os.getpid(), nothing)):
        for kind in (LeavingBlobs, WaitingBlobs):
            with pytest.raises(FerryError) as refused:
                kind(pid, found)
            assert refused.value.reason is Reason.VMM_GONE
