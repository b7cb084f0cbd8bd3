"""Staging against a plain model: granules come out once, whole, as their pages were."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.runs import POISONED, RAW, ZERO, Run
from pageferryd.destination.intake import whole_granules
from pageferryd.destination.staging import Staging, Whole

GRANULE = 16
HUGE = GRANULE * PAGE_SIZE
LAYOUT = Layout([Region(0, 2 * HUGE, HUGE), Region(1 << 32, 2 * HUGE, HUGE)])
KINDS = (RAW, RAW, ZERO, POISONED)


def page_bytes(page: int) -> bytes:
    return bytes([page + 1, 7]) * (PAGE_SIZE // 2)


class Model:
    """Pages one by one. The source stands still: a page that comes twice is the same both times."""

    def __init__(self) -> None:
        self.pages: dict[int, int] = {}
        self.blank: set[int] = set()
        self.out: set[int] = set()

    def add(self, run: Run) -> list[Whole]:
        pages = range(run.first, run.first + run.pages)
        self.pages.update(dict.fromkeys(pages, run.kind))
        return self._ready(pages)

    def make_blank(self, pages: range) -> list[Whole]:
        new = any(page not in self.pages and page not in self.blank and page not in self.out for page in pages)
        self.blank.update(pages)
        return self._ready(pages) if new else []

    def _ready(self, pages: range) -> list[Whole]:
        """A granule is out when its last page is here, unless all of them are blank."""
        out = []
        for start in range(pages.start - pages.start % GRANULE, pages.stop, GRANULE):
            members = range(start, start + GRANULE)
            here = {page: self.pages[page] for page in members if page in self.pages}
            if here and all(page in here or page in self.blank for page in members):
                out.append(self._whole(start, here))
        return out

    def _whole(self, start: int, kinds: dict[int, int]) -> Whole:
        members = range(start, start + GRANULE)
        data = b"".join(
            page_bytes(page) if kinds.get(page) == RAW and page not in self.blank else bytes(PAGE_SIZE)
            for page in members
        )
        for page in members:
            self.pages.pop(page, None)
        self.out.update(members)
        found = set(kinds.values())
        kind = POISONED if POISONED in found else RAW if RAW in found else ZERO
        return Whole(Run(start, GRANULE, kind), data if kind == RAW else b"")

    def drop(self, first: int, pages: int) -> None:
        for page in range(first, first + pages):
            self.pages.pop(page, None)
            self.blank.discard(page)
            self.out.discard(page)


def take(staging: Staging, starts: list[int]) -> list[Whole]:
    """Take granules out, as when the kernel takes them at once."""
    found = []
    for start in starts:
        whole = staging.whole(start)
        assert whole is not None
        found.append(whole)
        staging.finish(start)
        assert staging.whole(start) is None
    return found


@given(st.data(), st.lists(st.sampled_from(KINDS), min_size=LAYOUT.page_count, max_size=LAYOUT.page_count))
def test_granules_come_out_whole_and_once(data: st.DataObject, kinds: list[int]) -> None:
    staging, model = Staging(LAYOUT), Model()
    for _ in range(data.draw(st.integers(1, 30))):
        first = data.draw(st.integers(0, LAYOUT.page_count - 1))
        step = data.draw(st.integers(0, 9))
        if step == 0:
            # What is given away is whole granules.
            start = first - first % GRANULE
            staging.drop(start, GRANULE)
            model.drop(start, GRANULE)
            continue
        longest = next((n for n, kind in enumerate(kinds[first:]) if kind != kinds[first]), LAYOUT.page_count - first)
        pages = data.draw(st.integers(1, min(longest, next(LAYOUT.pieces(first, longest)).pages)))
        if step < 4:
            blank = range(first, first + pages)
            assert take(staging, staging.blank(first, pages)) == model.make_blank(blank)
        elif not model.out.intersection(range(first, first + pages)):
            # Nobody asks for what is in place.
            run = Run(first, pages, kinds[first])
            body = b"ahead"
            if run.kind == RAW:
                body += b"".join(map(page_bytes, range(first, first + pages)))
            assert take(staging, staging.add(run, body, len(b"ahead"))) == model.add(run)
        assert len(staging) == len({page // GRANULE for page in model.pages})
        known = {*model.pages, *model.blank, *model.out}
        to_come = next((page for page in range(LAYOUT.page_count) if page not in known), LAYOUT.page_count)
        assert staging.to_come(0, LAYOUT.page_count) == to_come


def test_what_was_dropped_is_asked_for_as_a_whole_again() -> None:
    staging = Staging(LAYOUT)
    assert staging.add(Run(0, GRANULE - 1, ZERO), b"", 0) == []
    staging.drop(0, GRANULE)
    assert len(staging) == 0
    assert staging.add(Run(GRANULE - 1, 1, ZERO), b"", 0) == []
    assert staging.add(Run(0, GRANULE - 1, ZERO), b"", 0) == [0]
    assert staging.whole(0) == Whole(Run(0, GRANULE, ZERO), b"")


def test_a_zero_page_between_raw_ones_is_zero_in_the_granule() -> None:
    staging = Staging(LAYOUT)
    staging.add(Run(0, 2, RAW), page_bytes(0) + page_bytes(1), 0)
    staging.add(Run(2, 1, ZERO), b"", 0)
    staging.add(Run(4, GRANULE - 4, ZERO), b"", 0)
    (whole,) = take(staging, staging.add(Run(3, 1, RAW), page_bytes(3), 0))
    assert whole.data == page_bytes(0) + page_bytes(1) + bytes(PAGE_SIZE) + page_bytes(3) + bytes(HUGE - 4 * PAGE_SIZE)


def test_a_part_that_was_given_away_is_zero_when_its_granule_comes() -> None:
    staging = Staging(LAYOUT)
    assert staging.blank(3, 2) == []
    data = b"".join(map(page_bytes, range(2 * GRANULE)))
    first, second = take(staging, staging.add(Run(0, 2 * GRANULE, RAW), data, 0))
    expected = [bytes(PAGE_SIZE) if page in (3, 4) else page_bytes(page) for page in range(GRANULE)]
    assert first.data == b"".join(expected)
    assert second.data == data[HUGE:]


def test_a_part_given_away_while_its_granule_cannot_be_put_in_place_is_zero_there() -> None:
    staging = Staging(LAYOUT)
    data = b"".join(map(page_bytes, range(GRANULE)))
    assert staging.add(Run(0, GRANULE, RAW), data, 0) == [0]
    assert staging.blank(3, 1) == []
    whole = staging.whole(0)
    assert whole is not None
    assert whole.data == data[: 3 * PAGE_SIZE] + bytes(PAGE_SIZE) + data[4 * PAGE_SIZE :]


def test_pages_that_are_all_private_make_no_granule_and_take_no_memory() -> None:
    staging = Staging(LAYOUT)
    assert staging.blank(0, 2 * GRANULE) == []
    assert len(staging) == 0
    assert staging.to_come(0, LAYOUT.page_count) == 2 * GRANULE


def test_the_last_page_of_a_granule_may_be_a_private_one() -> None:
    staging = Staging(LAYOUT)
    data = b"".join(map(page_bytes, range(GRANULE - 1)))
    assert staging.add(Run(0, GRANULE - 1, RAW), data, 0) == []
    (whole,) = take(staging, staging.blank(GRANULE - 1, 1))
    assert whole.data == data + bytes(PAGE_SIZE)


def test_pages_that_are_installed_by_themselves_are_not_staged() -> None:
    staging = Staging(Layout([Region(0, 4 * PAGE_SIZE), Region(1 << 32, HUGE, HUGE)]))
    assert staging.blank(0, 4) == []
    assert staging.to_come(0, 4) == 0


def test_a_run_is_cut_where_it_leaves_whole_granules() -> None:
    mixed = Layout([Region(0, 4 * PAGE_SIZE), Region(1 << 32, 2 * HUGE, HUGE)])
    assert list(whole_granules(mixed, 1, 3 + GRANULE + 5)) == [
        (1, 3, True),
        (4, GRANULE, True),
        (4 + GRANULE, 5, False),
    ]
    assert list(whole_granules(mixed, 6, 2)) == [(6, 2, False)]
