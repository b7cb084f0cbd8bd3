"""The parts of the KVM guest that need no vCPU: its layout, its contents, its state, and how it begins or does not."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from pageferry.abi import kvm as abi
from pageferry.errors import FerryError, Reason
from pageferry.guests.kvm.layout import LARGEST, SMALLEST, Layout
from pageferry.guests.kvm.machine import Machine
from pageferry.guests.kvm.program import CODE, HOLE_PERIOD, QWORD_STEP, Order, Work, is_hole
from pageferry.guests.kvm.state import STATE_BYTES, State
from pageferry.vmm import Backing

PAGE = 4096
MIB = 1 << 20


def planned(size: int = MIB, order: Order = Order.RANDOM) -> tuple[Layout, Work]:
    layout = Layout.of(size)
    return layout, Work.plan(7, layout.data_pages, layout.data_address, order)


def saved(size: int = MIB) -> bytes:
    layout, work = planned(size)
    return State(size, work.registers(layout.entry), abi.Sregs()).pack()


def with_crc(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def test_structs_have_the_sizes_of_the_kernel() -> None:
    sizes = {
        abi.Regs: 144,
        abi.Sregs: 312,
        abi.Segment: 24,
        abi.UserspaceMemoryRegion: 32,
        abi.UserspaceMemoryRegion2: 160,
        abi.CreateGuestMemfd: 64,
        abi.MemoryAttributes: 32,
        abi.EnableCap: 104,
        abi.SignalMask: 12,
    }

    assert {struct_type: ctypes.sizeof(struct_type) for struct_type in sizes} == sizes
    assert abi.Run.mmio.offset == 32
    assert abi.Run.memory_fault.offset == 32
    assert (abi.UserspaceMemoryRegion2.guest_memfd.offset, abi.UserspaceMemoryRegion2.userfault_bitmap.offset) == (
        40,
        48,
    )
    assert abi.KVM_CREATE_GUEST_MEMFD == 0xC040AED4
    assert abi.KVM_SET_USER_MEMORY_REGION2 == 0x40A0AE49
    assert abi.KVM_SET_MEMORY_ATTRIBUTES == 0x4020AED2
    assert abi.KVM_GET_SREGS == 0x8138AE83
    assert abi.KVM_SET_SIGNAL_MASK == 0x4004AE8B


@pytest.mark.parametrize("size", [SMALLEST, MIB, 512 * MIB, 3 << 30, LARGEST])
def test_code_tables_and_data_fill_memory_without_overlap(size: int) -> None:
    layout = Layout.of(size)

    assert layout.entry + PAGE == layout.root_table
    assert layout.entry + len(layout.fixed_part()) <= layout.data_address
    assert len(CODE) <= PAGE
    assert 0.7 * layout.pages < layout.first_data_page + layout.data_pages < layout.pages


@pytest.mark.parametrize("size", [SMALLEST, MIB, 5 * MIB + PAGE, 2 << 30])
def test_the_page_tables_map_each_data_page_to_itself_and_nothing_else(size: int) -> None:
    layout = Layout.of(size)
    memory = bytes(layout.entry) + layout.fixed_part().ljust(layout.data_address - layout.entry, b"\0")

    def translate(linear: int) -> int | None:
        address = layout.root_table
        for shift in (39, 30, 21, 12):
            (entry,) = struct.unpack_from("<Q", memory, address + 8 * (linear >> shift & 511))
            if not entry & 1:
                return None
            address = entry & ~0xFFF
        return address

    last = layout.data_address + (layout.data_pages - 1) * PAGE
    for linear in (layout.entry, layout.data_address, last):
        assert translate(linear) == linear
    assert [translate(0), translate(PAGE)] == [size, size + PAGE]
    for unmapped in (layout.root_table, layout.data_address - PAGE, last + PAGE):
        assert translate(unmapped) is None


@pytest.mark.parametrize("size", [0, SMALLEST - PAGE, MIB + 1, LARGEST + PAGE])
def test_a_memory_that_no_guest_can_have_is_refused(size: int) -> None:
    with pytest.raises(FerryError) as refused:
        Layout.of(size)

    assert refused.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("order", list(Order))
def test_a_pass_reaches_each_page_once_and_says_when(order: Order) -> None:
    _, work = planned(4 * MIB, order)

    pages = [work.page_at(step) for step in range(work.pages)]

    assert sorted(pages) == list(range(work.pages))
    assert [work.steps_before(page) for page in pages] == list(range(work.pages))


def test_contents_are_what_the_program_computes() -> None:
    _, work = planned()
    page = next(page for page in range(work.pages) if not is_hole(page, 3))

    qwords = struct.unpack("<512Q", work.contents(page, 3))

    assert list(qwords) == [work.base(page, 3) ^ index * QWORD_STEP for index in range(512)]
    assert all(qwords)


def test_each_page_is_a_hole_at_one_version_of_a_period() -> None:
    for page in (0, 15, 16, 77, 1000):
        assert sum(is_hole(page, version) for version in range(HOLE_PERIOD)) == 1


@pytest.mark.parametrize(
    ("seed", "pages", "stride"), [(-1, 10, 1), (1 << 63, 10, 1), (7, 1, 1), (7, 1 << 25, 1), (7, 10, 5), (7, 10, 0)]
)
def test_work_that_the_program_cannot_do_is_refused(seed: int, pages: int, stride: int) -> None:
    with pytest.raises(FerryError) as refused:
        Work(seed, pages, 0, stride).checked()

    assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_a_state_survives_the_journey() -> None:
    layout, work = planned()

    state = State.unpack(saved(), layout)

    assert bytes(state.regs) == bytes(work.registers(layout.entry))
    assert Work.from_registers(state.regs) == work


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (b"", "it has 0 bytes"),
        (saved() + b"\0", f"not {STATE_BYTES}"),
        (b"FOREIGN!" + saved()[8:], "another VMM or version"),
        (saved()[:100] + b"\xff" + saved()[101:], "checksum"),
        (with_crc(saved()[:16] + bytes(456)), "data pages"),
    ],
    ids=["empty", "too-long", "foreign", "damaged", "no-program"],
)
def test_a_state_that_is_no_state_is_refused(state: bytes, words: str) -> None:
    with pytest.raises(FerryError, match=words) as refused:
        State.unpack(state, Layout.of(MIB))

    assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_a_state_of_a_guest_with_other_memory_is_refused() -> None:
    with pytest.raises(FerryError, match="--memory") as refused:
        State.unpack(saved(2 * MIB), Layout.of(MIB))

    assert refused.value.reason is Reason.LAYOUT_MISMATCH


@pytest.mark.parametrize(
    ("device", "words"),
    [("/nowhere/kvm", "No such file.*kvm_intel or kvm_amd.*process guest"), ("/dev/null", "is it the device of KVM")],
)
def test_a_host_without_kvm_is_told_what_to_do(device: str, words: str) -> None:
    with pytest.raises(FerryError, match=f"{device}.*{words}") as refused:
        Machine(MIB, Backing.ANONYMOUS, lambda _: None, device)

    assert refused.value.reason is Reason.VMM_FAILED


@pytest.mark.root
@pytest.mark.kvm
def test_a_user_without_permission_is_told_so_in_one_line(short_path: Path) -> None:
    # The imports come first: nobody may not be able to read them.
    as_nobody = (
        "import os, shutil, sys; from pageferry.guests.kvm.__main__ import main; "
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", as_nobody, "--socket", str(short_path / "kvm.sock"), "--memory", "1M"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "may not open /dev/kvm" in line
    assert "group" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory", "3"), "guest memory of 3 bytes"),
        (("--memory", "much"), "is not a size"),
        (("--order", "odd"), "invalid"),
        (("--backing", "hugetlbfs"), "invalid"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(short_path: Path, options: tuple[str, ...], words: str) -> None:
    command = [sys.executable, "-m", "pageferry.guests.kvm", "--socket", str(short_path / "kvm.sock"), *options]

    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 2
    assert words in done.stderr
