"""The slots that leave out missing pages, and what a vCPU's exits on these lead to, without a vCPU."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from pageferry.abi import kvm as abi
from pageferry.errors import FerryError, Reason
from pageferry.guests.kvm.absent import AbsentPages
from pageferry.guests.kvm.slots import CHUNK_PAGES, SparseSlots
from pageferry.guests.kvm.vm import ALL_MEMORY_SLOT, FIRST_FREE_SLOT, Vm
from pageferry.vmm import (
    Access,
    GuestMemfd,
    GuestMemory,
    Import,
    ImportResult,
    Outcome,
    Resolution,
    UserfaultBitmap,
)

PAGE = 4096
PAGES = 3 * CHUNK_PAGES + 100


class RecordingVm:
    """Slots as pages, checked as KVM checks them; `userfault` is whether it takes userfault bitmaps."""

    def __init__(self, *, userfault: bool = False) -> None:
        self.userfault = userfault
        self.slots: dict[int, range] = {}
        self.private: list[tuple[int, int]] = []

    def add_slot(
        self,
        slot: int,
        memory: GuestMemfd,
        guest_address: int = 0,
        offset: int = 0,
        size: int | None = None,
        *,
        userfault_bitmap: int = 0,
    ) -> None:
        if userfault_bitmap and not self.userfault:
            raise FerryError(Reason.VMM_FAILED, "KVM refused it")
        pages = range(offset // PAGE, (offset + (memory.size - offset if size is None else size)) // PAGE)
        assert slot not in self.slots
        assert guest_address == offset
        assert len(pages)
        assert all(pages.stop <= other.start or other.stop <= pages.start for other in self.slots.values())
        self.slots[slot] = pages

    def remove_slot(self, slot: int) -> None:
        del self.slots[slot]

    def make_private(self, guest_address: int, size: int) -> None:
        self.private.append((guest_address, size))

    def reaches(self, page: int) -> bool:
        return any(page in pages for pages in self.slots.values())


class Pager:
    """Stands for the forwarder: installs at once, by clearing bits, unless `answer` says otherwise."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.faults: list[tuple[int, int, Access, bool, int]] = []
        self.reported: list[Import] = []
        self.answer: Callable[[int, int], Resolution | FerryError] = self.install

    def submit(
        self, vcpu: int, address: int, size: int, access: Access, *, private: bool = False, exit_flags: int = 0
    ) -> Future[Resolution]:
        self.faults.append((address, size, access, private, exit_flags))
        outcome, future = self.answer(address, size), Future[Resolution]()
        if isinstance(outcome, FerryError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return future

    def resolve(
        self, vcpu: int, address: int, size: int, access: Access, *, private: bool = False, exit_flags: int = 0
    ) -> Resolution:
        return self.submit(vcpu, address, size, access, private=private, exit_flags=exit_flags).result()

    def install(self, address: int, size: int) -> Resolution:
        for page in range(address // PAGE, (address + size) // PAGE):
            self.guest.memory.write(page * PAGE, page.to_bytes(8, "little") * 512)
        self.guest.clear(*range(address // PAGE, (address + size) // PAGE))
        return Resolution(address, size, Outcome.INSTALLED)

    def report_imports(self, imports: list[Import]) -> None:
        self.reported += imports

    def close(self) -> None:
        pass


class Guest:
    def __init__(self, *, userfault: bool = False) -> None:
        memfd = os.memfd_create("guest")
        os.ftruncate(memfd, PAGES * PAGE)
        self.memory = GuestMemfd(memfd, PAGES * PAGE)
        self.bitmap = UserfaultBitmap(PAGES)
        self.vm: Any = RecordingVm(userfault=userfault)
        self.pager: Any = Pager(self)
        self._bits = mmap.mmap(self.bitmap.memfd, self.bitmap.size)

    def clear(self, *pages: int) -> None:
        for page in pages:
            self._bits[page // 8] &= ~(1 << page % 8) & 0xFF

    def absent(self) -> AbsentPages:
        return AbsentPages(self.vm, self.memory, self.bitmap, self.pager)

    def close(self) -> None:
        self._bits.close()
        self.bitmap.close()
        self.memory.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def read_exit(address: int, length: int = 8) -> abi.RunMmio:
    return abi.RunMmio(phys_addr=address, len=length)


def test_whatever_comes_in_whatever_order_is_reached_and_what_is_missing_is_not(guest: Guest) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        guest.bitmap.set_all()
        vm: Any = RecordingVm()
        slots = SparseSlots(vm, guest.memory, guest.bitmap)
        present: set[int] = set()
        for _ in range(300):
            first = rng.randrange(PAGES)
            came = range(first, min(first + rng.choice((1, 1, 1, 40, 600)), PAGES))
            guest.clear(*came)
            present.update(came)
            page = rng.choice(came)

            end = slots.let_in(page)

            assert vm.reaches(page)
            assert page < end
            assert all(vm.reaches(one) for one in range(page, end))
        assert all(set(pages) <= present for pages in vm.slots.values())
        assert slots.count == len(vm.slots)

        guest.clear(*range(PAGES))
        slots.let_in_all()
        assert vm.slots == {ALL_MEMORY_SLOT: range(PAGES)}


def test_a_chunk_that_is_whole_has_one_slot(guest: Guest) -> None:
    slots = SparseSlots(guest.vm, guest.memory, guest.bitmap)
    for page in range(0, CHUNK_PAGES, 2):
        guest.clear(page)
        slots.let_in(page)
    assert slots.count == CHUNK_PAGES // 2

    guest.clear(*range(CHUNK_PAGES))
    assert slots.let_in(1) == CHUNK_PAGES

    assert list(guest.vm.slots.values()) == [range(CHUNK_PAGES)]
    # Numbers are used again: KVM has only so many.
    assert max(guest.vm.slots) < FIRST_FREE_SLOT + CHUNK_PAGES


def test_slots_do_not_outgrow_their_bound(guest: Guest) -> None:
    absent = guest.absent()
    absent.slots = SparseSlots(guest.vm, guest.memory, guest.bitmap, most_small_slots=10)

    for page in range(0, PAGES, 2):
        assert absent.complete(read_exit(page * PAGE))

    assert absent.slots.count <= 10 + PAGES // CHUNK_PAGES + 1
    assert all(guest.vm.reaches(page) for page in range(0, PAGES, 2))


def test_a_read_is_completed_with_the_pages_own_bytes(guest: Guest) -> None:
    absent, mmio = guest.absent(), read_exit(7 * PAGE + 16)

    assert absent.complete(mmio)

    assert bytes(mmio.data) == (7).to_bytes(8, "little")
    assert guest.pager.faults == [(7 * PAGE, PAGE, Access.READ, False, 0)]
    assert guest.vm.reaches(7)
    assert not guest.vm.reaches(8)


def test_a_write_is_applied_to_the_page_that_came(guest: Guest) -> None:
    absent = guest.absent()
    mmio = abi.RunMmio(phys_addr=9 * PAGE + 4, len=2, is_write=1)
    mmio.data[:2] = b"\xaa\xbb"

    assert absent.complete(mmio)

    assert guest.memory.read(9 * PAGE, 8) == b"\x09\0\0\0\xaa\xbb\0\0"
    assert guest.pager.faults[0][2] is Access.WRITE


def test_a_page_that_was_pushed_is_not_asked_for(guest: Guest) -> None:
    absent = guest.absent()
    guest.pager.install(5 * PAGE, 3 * PAGE)

    assert absent.complete(read_exit(6 * PAGE))

    assert guest.pager.faults == []
    assert [guest.vm.reaches(page) for page in (4, 5, 6, 7, 8)] == [False, True, True, True, False]


def test_an_access_beyond_memory_is_none_to_a_page(guest: Guest) -> None:
    assert not guest.absent().complete(read_exit(PAGES * PAGE))


def test_what_is_brought_in_beforehand_is_asked_for_in_pieces_and_reached(guest: Guest) -> None:
    absent = guest.absent()
    guest.clear(10)

    absent.bring_in(2 * PAGE, 700 * PAGE)

    assert [(address // PAGE, size // PAGE) for address, size, *_ in guest.pager.faults] == [
        (2, 8), (11, 503), (514, 188),
    ]  # fmt: skip
    assert all(guest.vm.reaches(page) for page in range(2, 702))


def test_a_page_whose_answer_is_lost_has_come_all_the_same(guest: Guest) -> None:
    absent = guest.absent()
    lost = FerryError(Reason.CANCELLED, "closed")

    def install_and_lose(address: int, size: int) -> FerryError:
        guest.pager.install(address, size)
        return lost

    guest.pager.answer = install_and_lose
    assert absent.complete(read_exit(PAGE))
    guest.pager.answer = lambda address, size: lost

    with pytest.raises(FerryError) as failed:
        absent.complete(read_exit(2 * PAGE))
    assert failed.value is lost
    assert not guest.vm.reaches(2)


def test_a_kvm_with_userfault_bitmaps_is_used_as_such() -> None:
    guest = Guest(userfault=True)
    absent = guest.absent()
    assert guest.vm.slots == {ALL_MEMORY_SLOT: range(PAGES)}

    absent.bring_in(0, PAGES * PAGE)
    assert guest.pager.faults == []
    flags = abi.KVM_MEMORY_EXIT_FLAG_USERFAULT
    absent.resolve_exit(abi.RunMemoryFault(flags=flags, gpa=3 * PAGE + 8, size=PAGE))
    # The same again is spurious: the page is here.
    absent.resolve_exit(abi.RunMemoryFault(flags=flags, gpa=3 * PAGE, size=PAGE))

    assert guest.pager.faults == [(3 * PAGE, PAGE, Access.UNKNOWN, False, flags)]
    assert not absent.complete(read_exit(4 * PAGE))
    absent.settle()
    assert guest.vm.slots == {ALL_MEMORY_SLOT: range(PAGES)}
    guest.close()


@pytest.mark.parametrize("payload", [b"\x5a" * PAGE, b""], ids=["bytes", "pending"])
def test_a_private_page_is_imported_flipped_and_reported(guest: Guest, payload: bytes) -> None:
    absent = guest.absent()
    guest.pager.answer = lambda address, size: Resolution(address, size, Outcome.DELIVERED, True, payload, b"mac")
    flags = abi.KVM_MEMORY_EXIT_FLAG_PRIVATE

    absent.resolve_exit(abi.RunMemoryFault(flags=flags, gpa=6 * PAGE, size=PAGE))

    assert guest.pager.faults == [(6 * PAGE, PAGE, Access.UNKNOWN, True, flags)]
    assert guest.memory.read(6 * PAGE, PAGE) == (payload or bytes(PAGE))
    assert guest.vm.private == [(6 * PAGE, PAGE)]
    assert guest.pager.reported == [Import(6 * PAGE, PAGE, ImportResult.DONE)]


def test_an_exit_for_another_cause_is_an_error(guest: Guest) -> None:
    with pytest.raises(FerryError, match="not for want of a page"):
        guest.absent().resolve_exit(abi.RunMemoryFault(flags=0, gpa=0, size=PAGE))


@pytest.mark.kvm
def test_a_real_kvm_makes_guest_memfds_and_takes_and_drops_slots_of_them() -> None:
    vm = Vm()
    memory = vm.create_guest_memfd(16 * PAGE)
    memory.write(3 * PAGE, b"through the map")

    vm.add_slot(2, memory, 3 * PAGE, 3 * PAGE, PAGE)
    vm.remove_slot(2)
    vm.add_slot(0, memory)

    assert memory.read(3 * PAGE, 15) == b"through the map"
    memory.discard(3 * PAGE, PAGE)
    assert memory.read(3 * PAGE, 15) == bytes(15)
    with pytest.raises(FerryError, match="refused slot 5"):
        vm.add_slot(5, memory, 3 * PAGE, 3 * PAGE, PAGE)
    vm.close()
    vm.close()
    memory.close()


@pytest.mark.kvm
def test_a_kvm_without_memory_attributes_says_so() -> None:
    vm = Vm()
    plain = GuestMemory(PAGE)
    vm.add_slot(0, plain)
    if vm.offers(233):
        pytest.skip("this KVM has memory attributes")

    with pytest.raises(FerryError, match="did not make"):
        vm.make_private(0, PAGE)
    vm.close()
    plain.close()
