"""Where QEMU's RAM is: its lists read, and its claims checked against the memory of the process."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
from qemu_process import needs_qemu_and_root, running_qemu

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.qemu.blocks import FoundBlocks, RamBlock, find_blocks, parse_ramblocks
from pageferryd.vmm.qemu.mapped import Mapped, like_ram, mapped, whole
from pageferryd.vmm.qemu.movable import unfillable

MIB = 1 << 20
OF_7_2 = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000
    /rom@etc/acpi/tables    4 KiB  0x0000000008080000 0x0000000000020000 0x0000000000200000
0000:00:02.0/virtio-net-pci.rom    4 KiB  0x00000000082c0000 0x0000000000040000 0x0000000000040000
"""
OF_10 = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                     mem    2 MiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007f0000000000  rw
                 pc.bios    4 KiB  0x0000000008000000 0x0000000000040000 0x0000000000040000 0x00007f1000000000  ro
"""


def test_the_list_of_qemu_7_2_has_no_addresses() -> None:
    blocks = parse_ramblocks(OF_7_2)
    assert [block.name for block in blocks] == ["pc.ram", "/rom@etc/acpi/tables", "0000:00:02.0/virtio-net-pci.rom"]
    tables = blocks[1]
    assert (tables.offset, tables.size, tables.page_size, tables.host_address) == (0x8080000, 2 * MIB, 4096, None)


def test_the_list_of_qemu_10_has_addresses() -> None:
    memory, bios = parse_ramblocks(OF_10)
    assert (memory.name, memory.size, memory.page_size, memory.host_address) == ("mem", 128 * MIB, 2 * MIB, 0x7F << 40)
    assert bios.host_address == 0x7F1 << 36


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unknown command: 'info ramblock'",
        OF_7_2.splitlines()[0],
        OF_7_2 + "pc.ram    4 KiB  0x10000000 0x1000 0x1000\n",
        OF_7_2 + "x    4 KiB  0x10000000 0x1000\n",
        OF_7_2 + "x    4 KiB  0x10000000 0x1000 0x0\n",
        OF_7_2 + "x    4 KiB  0x10000000 0x1000 0x1001\n",
        OF_7_2 + "x    0 KiB  0x10000000 0x1000 0x1000\n",
        OF_7_2 + "x    4 Kilo 0x10000000 0x1000 0x1000\n",
        OF_7_2 + "x    4 KiB  0x1ffffffffffffffff000 0x1000 0x1000\n",
        OF_7_2 + "x    4 KiB  none 0x1000 0x1000\n",
        OF_7_2 + "".join(f"x{number} 4 KiB 0x0 0x1000 0x1000\n" for number in range(5000)),
    ],
)
def test_a_list_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(FerryError) as caught:
        parse_ramblocks(text)
    assert caught.value.reason is Reason.VMM_FAILED


def mapping(start: int, end: int, rights: str = "rw-p", flags: str = "dc", inode: int = 0) -> Mapped:
    return Mapped(start, end, rights, inode, frozenset(flags.split()))


def test_a_block_in_several_mappings_of_one_kind_is_whole() -> None:
    both = [mapping(0x1000, 0x2000), mapping(0x2000, 0x4000)]
    assert whole(both, 0x1000, 0x3000) == both[0]


def test_a_block_with_a_gap_or_two_kinds_is_not_whole() -> None:
    assert whole([mapping(0x1000, 0x2000), mapping(0x3000, 0x5000)], 0x1000, 0x3000) is None
    assert whole([mapping(0x1000, 0x2000), mapping(0x2000, 0x4000, "rw-s", inode=7)], 0x1000, 0x3000) is None
    assert whole([mapping(0x1000, 0x2000)], 0x1000, 0x3000) is None


def test_ram_is_not_inherited_and_has_a_guard_behind() -> None:
    ram = mapping(0x1000, 0x2000)
    guard = mapping(0x2000, 0x3000, "---p", "")
    assert like_ram([ram, guard]) == [ram]
    assert like_ram([mapping(0x1000, 0x2000, flags="rd wr"), guard]) == []
    assert like_ram([ram, mapping(0x3000, 0x4000, "---p", "")]) == []
    assert like_ram([ram, mapping(0x2000, 0x3000)]) == []


def test_mappings_of_a_process_that_is_gone_are_an_error() -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    with pytest.raises(FerryError) as caught:
        mapped(child)
    assert caught.value.reason is Reason.VMM_GONE


class Listing:
    """A monitor of a QEMU that tells addresses: of one block, in this process."""

    def __init__(self, address: int, size: int) -> None:
        self._text = f"Block Name PSize Offset Used Total HVA RO\nmem 4 KiB 0x0 0x1000 {size:#x} {address:#x} rw\n"

    async def hmp(self, line: str) -> str:
        assert line == "info ramblock"
        return self._text


async def test_an_address_that_qemu_tells_is_taken_and_checked() -> None:
    with mmap.mmap(-1, 4 * 4096) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        (block,) = (await find_blocks(Listing(address, 4 * 4096), os.getpid())).located  # type: ignore[arg-type]
        assert (block.host_address, block.size, block.is_shared) == (address, 4 * 4096, True)
        with pytest.raises(FerryError) as caught:
            await find_blocks(Listing(0x1000, 4096), os.getpid())  # type: ignore[arg-type]
    assert caught.value.reason is Reason.VMM_FAILED


def located(found: FoundBlocks) -> dict[str, RamBlock]:
    return {block.name: block for block in found.located}


class TestWithQemu:
    pytestmark = needs_qemu_and_root

    @pytest.mark.parametrize("machine", ["pc", "q35"])
    async def test_every_block_of_a_plain_machine_is_found(self, tmp_path: Path, machine: str) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", machine, "-m", "64") as qemu:
            found = await find_blocks(qemu.monitor, qemu.pid)
        assert not found.missing
        memory = located(found)["pc.ram"]
        assert (memory.size, memory.page_size, memory.is_shared, memory.is_anonymous) == (64 * MIB, 4096, False, True)
        assert len({block.host_address for block in found.located}) == len(found.located) >= 6

    async def test_blocks_hold_what_the_guest_sees_and_what_qemu_loaded(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", "q35", "-m", "64") as qemu:
            await qemu.bios_ran()
            await qemu.monitor.execute("stop")
            blocks = located(await find_blocks(qemu.monitor, qemu.pid))
            seen = tmp_path / "seen"
            await qemu.monitor.execute("pmemsave", {"val": 0, "size": 0x1000, "filename": str(seen)})
            assert seen.read_bytes() == qemu.read(blocks["pc.ram"].host_address, 0x1000) != bytes(0x1000)
            await qemu.monitor.execute("pmemsave", {"val": 0xFFFC0000, "size": 0x40000, "filename": str(seen)})
            assert seen.read_bytes() == qemu.read(blocks["pc.bios"].host_address, 0x40000)
            qemu.write(blocks["pc.ram"].host_address + 0x2000000, b"ferry")
            assert "0x66 0x65 0x72 0x72 0x79" in (await qemu.monitor.hmp("xp /5xb 0x2000000")).replace("'", "")
            # Blobs that the guest does not see in its memory, found by their size.
            assert b"RSD PTR " in qemu.read(blocks["/rom@etc/acpi/rsdp"].host_address, 0x1000)
            assert b"FACP" in qemu.read(blocks["/rom@etc/acpi/tables"].host_address, 0x20000)
            assert b"etc/acpi/rsdp" in qemu.read(blocks["/rom@etc/table-loader"].host_address, 0x1000)

    @pytest.mark.parametrize("state", [[], ["-S", "-incoming", "defer"]], ids=["running", "incoming"])
    async def test_memory_of_displays_and_roms_of_devices_are_found_before_and_after_the_bios_ran(
        self, tmp_path: Path, state: list[str]
    ) -> None:
        devices = ["-vga", "std", "-device", "virtio-balloon-pci", "-nic", "user,model=virtio-net-pci"]
        async with running_qemu(tmp_path / "qmp", "-machine", "pc", "-m", "64", *devices, *state) as qemu:
            if not state:
                await qemu.bios_ran()
            found = await find_blocks(qemu.monitor, qemu.pid)
        sizes = {name.rpartition("/")[2]: block.size for name, block in located(found).items()}
        assert sizes["vga.vram"] == 16 * MIB
        assert sizes["virtio-net-pci.rom"] == 256 << 10
        assert sizes["pc.ram"] == 64 * MIB

    async def test_blocks_that_cannot_be_told_apart_are_named_with_the_reason(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", "pc", "-m", "64", "-vga", "std", "-S") as qemu:
            if "HVA" in await qemu.monitor.hmp("info ramblock"):
                pytest.skip("this QEMU tells the address of every block")
            found = await find_blocks(qemu.monitor, qemu.pid)
        assert {name.rpartition("/")[2] for name, _, _ in found.missing} == {"vga.rom", "table-loader"}
        assert all("2 such blocks and 2 mappings of 65536 bytes" in reason for _, _, reason in found.missing)

    async def test_memory_around_the_hole_below_4_gib_is_one_block(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", "-machine", "pc", "-m", "5G") as qemu:
            await qemu.bios_ran()
            memory = located(await find_blocks(qemu.monitor, qemu.pid))["pc.ram"]
            assert memory.size == 5 << 30
            qemu.write(memory.host_address + (3 << 30) + 0x5000, b"ferry")
            assert "0x66 0x65 0x72 0x72 0x79" in await qemu.monitor.hmp("xp /5xb 0x100005000")

    @pytest.mark.parametrize(
        ("backend", "is_shared", "fillable"),
        [
            ("memory-backend-ram", False, True),
            ("memory-backend-ram,prealloc=on", False, True),
            ("memory-backend-ram,share=on", True, True),
            ("memory-backend-memfd,share=on", True, True),
            ("memory-backend-memfd,share=on,prealloc=on", True, True),
            ("memory-backend-file,share=on,mem-path=/dev/shm", True, True),
            ("memory-backend-file,share=off,mem-path=/dev/shm", False, False),
        ],
    )
    async def test_memory_of_every_backend_is_found(
        self, tmp_path: Path, backend: str, *, is_shared: bool, fillable: bool
    ) -> None:
        arguments = ["-machine", "pc,memory-backend=mem", "-m", "32", "-object", f"{backend},id=mem,size=32M"]
        async with running_qemu(tmp_path / "qmp", *arguments) as qemu:
            await qemu.bios_ran()
            memory = located(await find_blocks(qemu.monitor, qemu.pid))["mem"]
            assert (memory.size, memory.is_shared, memory.is_anonymous) == (
                32 * MIB,
                is_shared,
                "-ram" in backend and not is_shared,
            )
            assert len(unfillable([memory])) == (not fillable)
            qemu.write(memory.host_address + 0x1000000, b"ferry")
            assert "0x66 0x65 0x72 0x72 0x79" in await qemu.monitor.hmp("xp /5xb 0x1000000")

    @pytest.mark.hugetlb
    @pytest.mark.usefixtures("huge_pages")
    async def test_memory_in_huge_pages_says_so(self, tmp_path: Path) -> None:
        backend = "memory-backend-memfd,id=mem,size=8M,share=on,hugetlb=on,hugetlbsize=2M"
        arguments = ["-machine", "pc,memory-backend=mem", "-m", "8", "-object", backend, "-S"]
        async with running_qemu(tmp_path / "qmp", *arguments) as qemu:
            memory = located(await find_blocks(qemu.monitor, qemu.pid))["mem"]
        assert (memory.size, memory.page_size, memory.is_shared) == (8 * MIB, 2 * MIB, True)
