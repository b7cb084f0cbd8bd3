"""What every reader of a guest's memory does alike, and what becomes of each when its memory goes away."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from held_memory import DATA, HOLE, LATE, PAGE, READ, ZERO, Held, InFile, InMemfd, InProcess, content

from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2
from pageferryd.core.errors import PageRangeError
from pageferryd.core.layout import Layout, Region
from pageferryd.core.runs import POISONED, RAW, Run
from pageferryd.core.runs import ZERO as ZERO_RUN
from pageferryd.linux import holes
from pageferryd.source import mappings, readers
from pageferryd.source.memory import LARGEST_READ, MOST_RUNS, SourceMemory

pytestmark = pytest.mark.root
Hold = Callable[[str], Held]
Open = Callable[..., SourceMemory]


@pytest.fixture(params=["process", "process, pagemap only", "shared process memory", "memfd", "file"])
def hold(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Hold a plan's pages in one of the ways that a VMM may."""
    held: list[Held] = []
    if request.param == "process, pagemap only":
        monkeypatch.setattr(holes.ProcessPages, "_try_scan", lambda _: False)
    makers: dict[str, Hold] = {
        "shared process memory": lambda plan: InProcess(plan, "shared"),
        "memfd": InMemfd,
        "file": lambda plan: InFile(plan, tmp_path / "memory"),
    }

    def make(plan: str) -> Held:
        held.append(makers.get(request.param, InProcess)(plan))
        return held[-1]

    yield make
    for one in held:
        one.close()


@pytest.fixture
def opened() -> Iterator[Open]:
    memories: list[SourceMemory] = []

    def open_memory(held: Held, *sizes_in_pages: int) -> SourceMemory:
        layout = Layout([Region(number << 32, pages * PAGE) for number, pages in enumerate(sizes_in_pages)])
        locations = [held.location(start * PAGE) for start in layout.starts]
        memories.append(SourceMemory.open(layout, locations, held.pid))
        return memories[-1]

    yield open_memory
    for memory in memories:
        memory.close()


def collect_all(memory: SourceMemory, first: int, pages: int, credit: int = 1 << 20) -> tuple[list[Run], bytes]:
    """Collect until the end; returns all runs and the bytes that they stand for."""
    runs: list[Run] = []
    found = bytearray()
    end = first + pages
    while first < end:
        collected = memory.collect(first, end - first, credit)
        assert collected.next_page > first, "a collect with credit gets on"
        assert sum(run.pages for run in collected.runs) == collected.next_page - first
        raw = b"".join(collected.data)
        assert len(raw) <= credit
        for run in collected.runs:
            assert run.first == first
            first += run.pages
            if run.kind == RAW:
                found += raw[: run.pages * PAGE]
                raw = raw[run.pages * PAGE :]
            else:
                assert run.kind == ZERO_RUN
                found += bytes(run.pages * PAGE)
        assert not raw
        assert first == collected.next_page
        runs += collected.runs
    return runs, bytes(found)


def test_holes_zeroes_and_data_cross_as_what_they_are(hold: Hold, opened: Open) -> None:
    plan = HOLE * 20 + DATA * 3 + ZERO * 2 + LATE + READ * 4 + HOLE * 4 + DATA + HOLE * 30
    memory = opened(hold(plan), len(plan))

    runs, found = collect_all(memory, 0, len(plan))

    assert runs == [Run(0, 20, ZERO_RUN), Run(20, 3, RAW), Run(23, 2, ZERO_RUN), Run(25, 1, RAW), Run(26, 8, ZERO_RUN),
                    Run(34, 1, RAW), Run(35, 30, ZERO_RUN)]  # fmt: skip
    assert found == content(plan)


@pytest.mark.parametrize("kind", [HOLE, ZERO, DATA, LATE, READ])
def test_one_page_crosses_as_what_it_is(hold: Hold, opened: Open, kind: str) -> None:
    plan = DATA + kind + DATA
    memory = opened(hold(plan), 3)

    raw = kind in (DATA, LATE)
    runs, found = collect_all(memory, 1, 1, PAGE)
    assert runs == [Run(1, 1, RAW if raw else ZERO_RUN)]
    assert found == content(plan)[PAGE : 2 * PAGE]


def test_any_layout_with_any_credit_comes_whole(hold: Hold, opened: Open) -> None:
    dice = random.Random(20)
    plan = "".join(dice.choice([HOLE, HOLE, ZERO, DATA, DATA, LATE]) * dice.randint(1, 90) for _ in range(40))
    borders = sorted(dice.sample(range(1, len(plan)), 3))
    sizes = [stop - start for start, stop in zip([0, *borders], [*borders, len(plan)], strict=True)]
    memory = opened(hold(plan), *sizes)
    expected = content(plan)

    for _ in range(60):
        first = dice.randrange(len(plan))
        pages = dice.randint(1, len(plan) - first)
        credit = dice.choice([PAGE, 2 * PAGE + 1, 64 << 10, LARGEST_READ, 3 * LARGEST_READ, 1 << 30])
        runs, found = collect_all(memory, first, pages, credit)
        assert found == expected[first * PAGE : (first + pages) * PAGE]
        kinds = [run.kind for run in runs for _ in range(run.pages)]
        expected_kinds = [RAW if kind in (DATA, LATE) else ZERO_RUN for kind in plan[first : first + pages]]
        assert kinds == expected_kinds


def test_credit_is_for_raw_pages_alone(hold: Hold, opened: Open) -> None:
    plan = HOLE * 40 + DATA * 4 + ZERO * 3 + DATA
    memory = opened(hold(plan), len(plan))

    # Without any credit nothing is read: only holes are known then, where they can be looked up.
    assert memory.collect(0, len(plan), 0).runs in ([], [Run(0, 40, ZERO_RUN)])
    spent = memory.collect(0, len(plan), 2 * PAGE + 100)
    assert spent.runs == [Run(0, 40, ZERO_RUN), Run(40, 2, RAW)]
    assert spent.next_page == 42
    assert memory.collect(40, 1, PAGE - 1) == ([], [], 40)
    assert memory.collect(44, 1, 0).next_page == 45


def test_pages_outside_the_guest_are_refused(hold: Hold, opened: Open) -> None:
    memory = opened(hold(DATA * 4), 2, 2)
    for first, pages in [(4, 1), (3, 2), (-1, 1), (0, 0), (0, 5)]:
        with pytest.raises(PageRangeError):
            memory.collect(first, pages, PAGE)


def test_a_region_larger_than_what_holds_it_is_refused(hold: Hold, opened: Open) -> None:
    # Not a power of two, so that no neighbour in the child's address space fits it by chance.
    held = hold(DATA * 4)
    with pytest.raises(FerryError) as refused:
        opened(held, 1 << 28)
    assert refused.value.reason is Reason.LAYOUT_MISMATCH


def test_nothing_stays_open_after_a_refusal_or_a_close(hold: Hold, opened: Open) -> None:
    held = hold(DATA * 4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FerryError):
        opened(held, 1 << 28)
    memory = opened(held, 4)
    memory.close()
    memory.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_one_call_collects_a_bounded_number_of_runs(opened: Open, tmp_path: Path) -> None:
    plan = (DATA + HOLE) * (MOST_RUNS // 2 + 300)
    memory = opened(InFile(plan, tmp_path / "memory"), len(plan))

    collected = memory.collect(0, len(plan), 1 << 30)
    assert len(collected.runs) == MOST_RUNS
    assert collect_all(memory, 0, len(plan), 1 << 30)[1] == content(plan)


@pytest.fixture
def in_process() -> Iterator[Callable[..., InProcess]]:
    made: list[InProcess] = []

    def make(kind: type[InProcess], plan: str) -> InProcess:
        made.append(kind(plan))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(("first", "pages"), [(0, 1), (40, 1), (0, 80), (40, 40), (0, 4)])
def test_the_pages_of_a_dead_vmm_are_never_zeroes(
    in_process: Callable[..., InProcess], opened: Open, first: int, pages: int
) -> None:
    held = in_process(InProcess, DATA * 40 + HOLE * 40)
    memory = opened(held, 80)
    assert not memory.vmm_exited
    held.process.kill()
    held.process.wait()

    with pytest.raises(FerryError, match=str(held.pid)) as gone:
        memory.collect(first, pages, 1 << 20)
    assert gone.value.reason is Reason.VMM_GONE
    assert memory.vmm_exited


def test_without_a_scan_the_pages_of_a_dead_vmm_are_never_zeroes_either(
    in_process: Callable[..., InProcess], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holes.ProcessPages, "_try_scan", lambda _: False)
    test_the_pages_of_a_dead_vmm_are_never_zeroes(in_process, opened, 40, 40)


@pytest.mark.parametrize(("first", "pages"), [(0, 1), (0, 80), (40, 40)])
def test_pages_that_the_vmm_unmapped_are_never_zeroes(
    in_process: Callable[..., InProcess], opened: Open, first: int, pages: int
) -> None:
    held = in_process(InProcess, DATA * 40 + HOLE * 40)
    memory = opened(held, 80)
    held.tell()

    with pytest.raises(FerryError, match="unmapped") as refused:
        memory.collect(first, pages, 1 << 20)
    assert refused.value.reason is Reason.MEMORY_UNREADABLE


def test_a_memfd_outlives_its_vmm(in_process: Callable[..., InProcess], opened: Open) -> None:
    held = in_process(InMemfd, DATA * 4 + HOLE * 20)
    memory = opened(held, 24)
    held.process.kill()
    held.process.wait()

    assert collect_all(memory, 0, 24)[1] == content(DATA * 4 + HOLE * 20)
    assert memory.vmm_exited


@pytest.mark.parametrize(("first", "pages"), [(4, 1), (0, 24), (4, 20)])
def test_pages_cut_off_from_a_file_are_never_zeroes(opened: Open, tmp_path: Path, first: int, pages: int) -> None:
    held = InFile(DATA * 24, tmp_path / "memory")
    memory = opened(held, 24)
    os.truncate(held.path, 4 * PAGE)

    with pytest.raises(FerryError, match="cut short") as refused:
        memory.collect(first, pages, 1 << 20)
    assert refused.value.reason is Reason.MEMORY_UNREADABLE


class PoisonedReader:
    """A reader whose page at POISON fails like one that the memory controller gave up."""

    POISON = 5 * PAGE

    def __init__(self, inner: readers.RegionReader) -> None:
        self._inner = inner
        self.check, self.extents, self.close = inner.check, inner.extents, inner.close

    def read(self, at: int, length: int) -> bytes:
        if self.POISON <= at < self.POISON + PAGE:
            raise OSError(5, "Input/output error")
        return self._inner.read(at, min(length, self.POISON - at) if at < self.POISON else length)


def test_pages_that_cannot_be_read_cross_as_poisoned(opened: Open, tmp_path: Path) -> None:
    memory = opened(InFile(DATA * 40, tmp_path / "memory"), 40)
    memory._regions[0] = memory._regions[0]._replace(reader=PoisonedReader(memory._regions[0].reader))

    collected = memory.collect(0, 40, 1 << 20)
    assert collected.runs == [Run(0, 5, RAW), Run(5, 1, POISONED), Run(6, 34, RAW)]
    assert memory.collect(5, 1, PAGE) == ([Run(5, 1, POISONED)], [], 6)


def test_a_path_that_is_not_absolute_is_refused() -> None:
    location = memory_pb2.MemoryLocation(file=memory_pb2.FileMemory(path="memory"))
    with pytest.raises(FerryError, match="absolute") as refused:
        SourceMemory.open(Layout([Region(0, PAGE)]), [location], os.getpid())
    assert refused.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("path", ["/dev/zero", "/proc", "/there-is-no-such-file"])
def test_only_regular_files_are_memory(path: str) -> None:
    location = memory_pb2.MemoryLocation(file=memory_pb2.FileMemory(path=path))
    with pytest.raises(FerryError) as refused:
        SourceMemory.open(Layout([Region(0, PAGE)]), [location], os.getpid())
    assert refused.value.reason is Reason.MEMORY_UNREADABLE


def test_regions_and_locations_must_be_as_many() -> None:
    with pytest.raises(FerryError) as refused:
        SourceMemory.open(Layout([Region(0, PAGE)]), [], os.getpid())
    assert refused.value.reason is Reason.LAYOUT_MISMATCH
    with pytest.raises(FerryError) as refused:
        SourceMemory.open(Layout([Region(0, PAGE)]), [memory_pb2.MemoryLocation()], os.getpid())
    assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_a_vmm_that_is_not_there_is_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(FerryError) as gone:
        SourceMemory.open(Layout([Region(0, PAGE)]), [memory_pb2.MemoryLocation()], child.pid)
    assert gone.value.reason is Reason.VMM_GONE


def test_a_process_that_ended_is_dying_and_a_running_one_is_not() -> None:
    assert not mappings.is_dying(os.getpid())
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert mappings.is_dying(child.pid)
    child.wait()
    assert mappings.is_dying(child.pid)
