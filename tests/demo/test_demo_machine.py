"""What the demonstration takes from a machine: a kind of guest, and memory that is free."""

from __future__ import annotations

import pytest

from pageferry.demo.guests import Kind
from pageferry.demo.machine import Memory, available_memory, choose_kind, choose_memory, kind_for, parse_memory
from pageferry.errors import FerryError
from pageferry.vmm import Backing

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("256M", Memory(256 * MIB)),
        ("guest_memfd", Memory(None, Backing.GUEST_MEMFD)),
        ("guest_memfd:64MiB", Memory(64 * MIB, Backing.GUEST_MEMFD)),
        (" shmem:1G", Memory(1024 * MIB, Backing.SHMEM)),
    ],
)
def test_memory_is_a_size_or_what_backs_it_or_both(text, memory):
    assert parse_memory(text) == memory


@pytest.mark.parametrize("text", ["much", "guest_memfd:", "guest_memfd:much", "hugetlbfs", "256M:shmem", ""])
def test_what_is_neither_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_memory(text)


def test_a_guest_memfd_needs_a_virtual_machine():
    assert kind_for(None, Backing.GUEST_MEMFD) is Kind.KVM
    assert kind_for(Kind.PROCESS, Backing.SHMEM) is Kind.PROCESS
    with pytest.raises(FerryError, match="--guest kvm"):
        kind_for(Kind.PROCESS, Backing.GUEST_MEMFD)


def test_a_device_that_can_be_opened_gives_a_virtual_machine(tmp_path):
    device = tmp_path / "kvm"
    device.touch()

    assert choose_kind(device) is Kind.KVM


def test_an_absent_device_gives_a_process(tmp_path):
    assert choose_kind(tmp_path / "kvm") is Kind.PROCESS


@pytest.mark.parametrize(
    ("available", "chosen"),
    [(24_000, 512), (1_792, 512), (1_791, 256), (1_200, 128), (900, 64), (10, 64)],
)
def test_the_guest_is_smaller_where_little_is_free(available, chosen):
    assert choose_memory(available * MIB) == chosen * MIB


def test_what_is_free_is_what_the_machine_has(tmp_path):
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal:       9 kB\nMemAvailable:    2048 kB\n")

    assert available_memory(proc, tmp_path) == 2 * MIB


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("max", "5", 2 * MIB), ("1048576", "48576", 1_000_000), ("10", "20", 0)]
)
def test_a_container_may_have_less(tmp_path, limit, used, free):
    proc = tmp_path / "meminfo"
    proc.write_text("MemAvailable:    2048 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")

    assert available_memory(proc, tmp_path) == free
