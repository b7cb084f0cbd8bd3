"""What the driver for Firecracker is made of: the state's file, and where guest memory is looked for."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.firecracker import memory, state_file

MIB = 1 << 20
GIB = 1 << 30


# Checksums and the state's file


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (bytes([1, 2, 3, 4, 5]), 0xFB0460DE06383654),
        (bytes([123] * 16), 0x29D5357216326566),
        (b"123456789", 0xE9C6D914C4B8D9CA),
        (b"", 0),
    ],
)
def test_the_checksum_is_firecrackers(data: bytes, checksum: int) -> None:
    assert state_file.crc64(data) == checksum


def test_a_state_without_its_end_is_not_complete() -> None:
    state = b"state" * 100
    whole = state + state_file.crc64(state).to_bytes(8, "little")
    assert state_file.is_complete(whole)
    assert not state_file.is_complete(whole[:-1])
    assert not state_file.is_complete(whole[1:])
    assert not state_file.is_complete(bytes(8))
    assert not state_file.is_complete(b"")


def test_a_link_instead_of_a_state_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "link").symlink_to(secret)
    os.link(secret, tmp_path / "second name")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "second name", "pipe"):
        with pytest.raises(FerryError) as refused:
            state_file.take(tmp_path / name)
        assert refused.value.reason is Reason.VMM_FAILED
    assert state_file.take(tmp_path / "nothing") == b""


@pytest.mark.root
def test_a_state_that_belongs_to_somebody_else_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("of another")
    os.chown(tmp_path / "state", 65534, 65534)
    with pytest.raises(FerryError, match="no file of its own"):
        state_file.take(tmp_path / "state")


def test_a_state_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FerryError, match="in the way"):
        state_file.put(tmp_path / "link", b"state")
    assert not (tmp_path / "elsewhere").exists()


# Where the memory lies


def test_the_ranges_are_those_of_the_releases() -> None:
    low, old_low = 3 * GIB, 4 * GIB - 768 * MIB
    assert memory.possible_ranges(64 * MIB, "x86_64") == [((0, 64 * MIB),)]
    assert memory.possible_ranges(low, "x86_64") == [((0, low),)]
    assert memory.possible_ranges(4 * GIB, "x86_64") == [
        ((0, low), (4 * GIB, GIB)),
        ((0, old_low), (4 * GIB, 768 * MIB)),
    ]
    assert memory.possible_ranges(300 * GIB, "x86_64")[0] == (
        (0, low),
        (4 * GIB, 252 * GIB),
        (512 * GIB, 45 * GIB),
    )
    assert memory.possible_ranges(300 * GIB, "aarch64") == [
        ((2 * GIB, 254 * GIB), (512 * GIB, 46 * GIB)),
        ((2 * GIB, 300 * GIB),),
    ]


PAGE = 4096
UNCOMMON = 12347 * PAGE


@pytest.fixture
def two_mappings() -> Iterator[list[memoryview]]:
    """Two anonymous mappings of one uncommon size, kept apart by pages that nobody may write to."""
    with mmap.mmap(-1, 2 * UNCOMMON + 3 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as around:
        start = address_of(around)
        for guard in (0, PAGE + UNCOMMON, 2 * (PAGE + UNCOMMON)):
            assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + guard), PAGE, mmap.PROT_READ)
        with memoryview(around) as whole:
            first, second = whole[PAGE : PAGE + UNCOMMON], whole[2 * PAGE + UNCOMMON : 2 * (PAGE + UNCOMMON)]
            yield [first, second]
            first.release()
            second.release()


def address_of(mapped: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def test_two_places_of_one_size_are_told_apart_by_what_was_put_there_at_boot(two_mappings: list[memoryview]) -> None:
    first, second = two_mappings
    with pytest.raises(FerryError, match="found nowhere"):
        memory.find_memory(os.getpid(), UNCOMMON, 4096)
    second[0xE0000 : 0xE0000 + 8] = b"RSD PTR "
    found = memory.find_memory(os.getpid(), UNCOMMON, 4096)
    assert found.locations[0].process.address == address_of(second)
    assert found.holder == os.getpid()
    first[0x9FC00 : 0x9FC00 + 4] = b"_MP_"
    with pytest.raises(FerryError, match="at several places") as refused:
        memory.find_memory(os.getpid(), UNCOMMON, 4096)
    assert refused.value.reason is Reason.LAYOUT_INVALID


LARGE = 3 * GIB + 17 * MIB


@pytest.fixture
def snapshot_file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.truncate(fd, LARGE)
    yield fd
    os.close(fd)


def test_memory_that_was_restored_from_a_file_is_told_by_its_offsets(snapshot_file: int) -> None:
    # Mapped downwards, in this order: the kernel would make one mapping of pieces that follow each other upwards, and
    # one could be the memory of a release without a hole there as well.
    with (
        mmap.mmap(snapshot_file, 3 * GIB, mmap.MAP_PRIVATE) as low,
        mmap.mmap(snapshot_file, 17 * MIB, mmap.MAP_PRIVATE, offset=3 * GIB) as high,
    ):
        found = memory.find_memory(os.getpid(), LARGE, PAGE)
        assert [one.process.address for one in found.locations] == [address_of(low), address_of(high)]


def test_pieces_of_a_file_in_another_order_are_no_guests_memory(snapshot_file: int) -> None:
    with (
        mmap.mmap(snapshot_file, 17 * MIB, mmap.MAP_PRIVATE, offset=GIB),
        mmap.mmap(snapshot_file, 3 * GIB, mmap.MAP_PRIVATE),
        pytest.raises(FerryError, match="found nowhere"),
    ):
        memory.find_memory(os.getpid(), LARGE, PAGE)


def test_a_process_that_is_gone_has_no_memory() -> None:
    with pytest.raises(FerryError) as refused:
        memory.find_memory(4_194_304, MIB, 4096)
    assert refused.value.reason is Reason.VMM_GONE
