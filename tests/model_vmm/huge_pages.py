"""The model with memory of real huge pages, whose shared side a userfaultfd gets only whole."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from guarded import Guarded

from pageferry.vmm.memory import Backing
from pageferryd.core.layout import PAGE_SIZE

from .world import Memory, World

MOST_HUGE_PAGES = 3
_MADV_REMOVE = 9


class HugeMemory(Memory):
    """Guest and balloon take 4 KiB for a page, whatever lies below."""

    def discarding(self, page: int, pages: int) -> Future[None]:
        memory, offset = self._at(page)
        return self._threads.submit(self._discard, memory, offset, pages * PAGE_SIZE)

    @staticmethod
    def _discard(memory: Any, offset: int, length: int) -> None:
        # The kernel drops what is whole of this, and overwrites the rest with zeroes where it is there.
        assert memory.advise(offset, length, _MADV_REMOVE) == 0


class HugeWorld(World):
    """The same guest on huge pages: some all shared, some all private, most of them mixed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # With a thousand pages to import, fewer at once would only take long.
        self.unreported = self.rng.choice([64, 1024])

    def make_memory(self, sizes: list[int]) -> Guarded:
        counts = [min(2, 1 + size % 2) for size in sizes][:MOST_HUGE_PAGES]
        return HugeMemory(*counts[: 1 if sum(counts) > MOST_HUGE_PAGES else 2], backing=Backing.HUGETLBFS)

    def _page(self) -> int:
        # Near the ends of huge pages as often as elsewhere: the first page stands for all of one in a userfault.
        count, granule = self.guarded.layout.page_count, self.guarded.granule
        if self.rng.random() < 0.5:
            return self.rng.randrange(0, count, granule) + self.rng.choice([0, 0, 1, 2, granule - 1])
        return self.rng.randrange(count)

    def _run(self, *, of_one_kind: bool) -> tuple[int, int] | None:
        granule = self.guarded.granule
        start = self.rng.randrange(0, self.guarded.layout.page_count, granule)
        whole = range(start, start + granule)
        kinds = {self.vmm.is_private[page] for page in whole}
        if self.rng.random() < 0.1 and not self.vmm.busy.intersection(whole) and not (of_one_kind and len(kinds) > 1):
            return start, granule
        return super()._run(of_one_kind=of_one_kind)
