"""Memory slots that leave out what has not come yet, so that a vCPU's access to it exits.

A slot is added for each run of pages that has come around a page which the vCPU touched, within its chunk: an aligned
piece of memory. Once a chunk is whole, one slot takes the place of all in it. That bounds their number, which KVM
limits to 32,764 and which makes each further one dearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pageferry.guests.kvm.vm import ALL_MEMORY_SLOT, FIRST_FREE_SLOT, Vm
from pageferry.vmm import GuestMemfd, UserfaultBitmap
from pageferry.vmm.regions import PAGE_SIZE

CHUNK_PAGES: Final = 512
MOST_SMALL_SLOTS: Final = 8192
"""With one more a chunk of the largest guest, 32 GiB, they stay below KVM's limit."""


@dataclass(frozen=True)
class _Slot:
    number: int
    first: int
    end: int


class SparseSlots:
    """The slots over `memory`, from guest address 0. The vCPU stands still in every call, or makes it itself."""

    def __init__(
        self, vm: Vm, memory: GuestMemfd, bitmap: UserfaultBitmap, most_small_slots: int = MOST_SMALL_SLOTS
    ) -> None:
        self._vm = vm
        self._memory = memory
        self._bitmap = bitmap
        self._most = most_small_slots
        self._chunks: dict[int, list[_Slot]] = {}
        self._free: list[int] = []
        self._next = FIRST_FREE_SLOT
        self.count = 0

    @property
    def crowded(self) -> bool:
        """Whether there are so many slots that only whole chunks should be let in."""
        return self.count >= self._most

    def chunk_of(self, page: int) -> tuple[int, int]:
        """Return the first page and the end of the chunk that holds `page`."""
        first = page - page % CHUNK_PAGES
        return first, min(first + CHUNK_PAGES, self._bitmap.pages)

    def let_in(self, page: int) -> int:
        """Let the vCPU reach `page`, which has come, and those around it; return the end of that run."""
        first, end = self.chunk_of(page)
        slots = self._chunks.setdefault(first, [])
        for slot in slots:
            if slot.first <= page < slot.end:
                return slot.end
        low, high = self._bitmap.clear_run_around(page, first, end)
        if (low, high) == (first, end):
            self._remove(slots)
        else:
            low = max([low, *(slot.end for slot in slots if slot.end <= page)])
            high = min([high, *(slot.first for slot in slots if slot.first > page)])
        slots.append(self._add(low, high))
        return high

    def let_in_all(self) -> None:
        """Put one slot over all memory in the place of all of them."""
        for slots in self._chunks.values():
            self._remove(slots)
        self._vm.add_slot(ALL_MEMORY_SLOT, self._memory)
        self.count = 1

    def _add(self, first: int, end: int) -> _Slot:
        if self._free:
            number = self._free.pop()
        else:
            number = self._next
            self._next += 1
        start = first * PAGE_SIZE
        self._vm.add_slot(number, self._memory, start, start, (end - first) * PAGE_SIZE)
        self.count += 1
        return _Slot(number, first, end)

    def _remove(self, slots: list[_Slot]) -> None:
        for slot in slots:
            self._vm.remove_slot(slot.number)
            self._free.append(slot.number)
            self.count -= 1
        slots.clear()
