"""Fault-around: windows that grow along a walk, and an account of what they were good for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pageferryd.core.prefetch import FaultAround

FAR = 1 << 40


def walk(around: FaultAround, first: int, faults: int) -> list[int]:
    """Touch memory in order as a guest does that faults only behind what it was given."""
    windows = []
    for _ in range(faults):
        window = around.touched(first, FAR)
        if window:
            around.issued(first + 1 + window, window)
        windows.append(window)
        first += 1 + window
    return windows


def test_the_window_doubles_with_each_hit_up_to_its_bound() -> None:
    assert walk(FaultAround(), 100, 7) == [0, 4, 8, 16, 32, 64, 64]


def test_a_guest_that_jumps_about_gets_no_window() -> None:
    around = FaultAround()
    assert not any(around.touched(page, FAR) for page in range(0, 1_000_000, 997))
    assert around.counts.issued == 0


def test_streams_do_not_disturb_one_another() -> None:
    around = FaultAround()
    for first in (0, 1000, 2000):
        around.touched(first, FAR)
    assert [around.touched(first + 1, FAR) for first in (0, 1000, 2000)] == [4, 4, 4]


def test_the_stream_hit_longest_ago_is_forgotten_first() -> None:
    around = FaultAround(streams=2)
    for page in (0, 1000, 2000):
        around.touched(page, FAR)
    assert [around.touched(page, FAR) for page in (2001, 1001, 1)] == [4, 4, 0]


def test_a_small_jump_ahead_stays_in_its_stream() -> None:
    around = FaultAround(slack=3)
    around.touched(10, FAR)
    assert around.touched(14, FAR) == 4
    assert around.touched(23, FAR) == 0


def test_a_window_ends_with_the_room_there_is() -> None:
    around = FaultAround()
    around.touched(10, FAR)
    assert around.touched(11, 2) == 2
    assert around.touched(14, 0) == 0


def test_a_walk_uses_every_window_but_the_last() -> None:
    around = FaultAround()
    windows = walk(around, 0, 6)
    assert around.counts.issued == sum(windows)
    assert around.counts.used == sum(windows[:-1])
    assert around.counts.late == 0


def test_a_page_touched_early_is_used_once_and_late_once() -> None:
    around = FaultAround()
    walk(around, 0, 2)
    around.touched_early(3)
    assert (around.counts.issued, around.counts.used, around.counts.late) == (4, 1, 1)
    around.touched(6, FAR)
    assert around.counts.used == 4


def test_only_pages_that_were_asked_for_count_as_used() -> None:
    around = FaultAround()
    around.touched(0, FAR)
    assert around.touched(1, FAR) == 4
    # The rest of the window was there already.
    around.issued(6, 1)
    around.touched(6, FAR)
    assert (around.counts.issued, around.counts.used) == (1, 1)


@given(
    st.integers(1, 64),
    st.integers(1, 4),
    st.lists(
        st.tuples(st.sampled_from(["touch", "early", "next"]), st.integers(0, 60), st.integers(0, 70)), max_size=60
    ),
)
def test_windows_and_streams_are_bounded_and_nothing_is_used_that_was_not_issued(
    most: int, streams: int, steps: list[tuple[str, int, int]]
) -> None:
    around = FaultAround(max_window=most, streams=streams)
    last = 0
    for what, page, room in steps:
        if what == "early":
            around.touched_early(page)
            continue
        at = last if what == "next" else page
        window = around.touched(at, room)
        assert 0 <= window <= min(most, room)
        if window:
            around.issued(at + 1 + window, window - page % window)
        last = at + 1 + window
        assert len(around._streams) <= streams
        assert set(around._unproved) <= set(around._streams)
        assert 0 <= around.counts.used <= around.counts.issued
