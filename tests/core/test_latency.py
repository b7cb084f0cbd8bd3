"""What the latency recorder reports, against the same durations sorted in a list."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferryd.core.latency import STAGES, FaultLatencies, LatencyRecorder

# 100 ns to 1000 s: what a fault can take.
durations = st.floats(min_value=1e-7, max_value=1e3, allow_nan=False)
many = st.lists(durations, min_size=1, max_size=300)


def recorder_of(values: list[float]) -> LatencyRecorder:
    recorder = LatencyRecorder()
    for value in values:
        recorder.observe(value)
    return recorder


def exact_percentile(values: list[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[max(1, math.ceil(fraction * len(ordered))) - 1]


@given(many, st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_within_five_percent(values: list[float], fraction: float) -> None:
    assert recorder_of(values).percentile(fraction) == pytest.approx(exact_percentile(values, fraction), rel=0.05)


@given(many)
def test_the_summary_has_exact_count_mean_and_maximum(values: list[float]) -> None:
    summary = recorder_of(values).summary()
    assert summary.count == len(values)
    assert summary.mean == pytest.approx(math.fsum(values) / len(values))
    assert summary.max == max(values)


@given(many)
def test_percentiles_never_fall_and_never_exceed_the_maximum(values: list[float]) -> None:
    summary = recorder_of(values).summary()
    assert summary.p50 <= summary.p90 <= summary.p99 <= summary.max


@given(many, many)
def test_adding_two_recorders_equals_recording_everything_in_one(left: list[float], right: list[float]) -> None:
    added = recorder_of(left)
    added.add(recorder_of(right))
    together = recorder_of(left + right)
    bounds = [1e-6, 1e-3, 1.0, 1e3]
    assert added.counts_up_to(bounds) == together.counts_up_to(bounds)
    assert added.summary().p99 == together.summary().p99
    assert added.max == together.max
    assert added.sum == pytest.approx(together.sum)


@given(many, st.lists(durations, min_size=1, max_size=20))
def test_counts_up_to_a_bound_are_off_only_by_what_lies_next_to_it(values: list[float], bounds: list[float]) -> None:
    for bound, count in zip(bounds, recorder_of(values).counts_up_to(bounds), strict=True):
        assert sum(value <= bound / 1.07 for value in values) <= count
        assert count <= sum(value <= bound * 1.07 for value in values)


@given(many, st.lists(durations, min_size=2, max_size=20))
def test_counts_up_to_rising_bounds_rise(values: list[float], bounds: list[float]) -> None:
    counts = recorder_of(values).counts_up_to(sorted(bounds))
    assert counts == sorted(counts)


def test_counts_up_to_infinity_is_the_count() -> None:
    assert recorder_of([1e-6, 1.0, 1e9]).counts_up_to([math.inf]) == [3]


def test_nothing_recorded_is_all_zeroes() -> None:
    summary = LatencyRecorder().summary()
    assert (summary.count, summary.mean, summary.p50, summary.p99, summary.max) == (0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e-12, 1e6])
def test_durations_outside_the_range_are_counted_at_its_ends(seconds: float) -> None:
    recorder = recorder_of([seconds])
    assert recorder.count == 1
    assert recorder.sum >= 0.0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_percentile_outside_nought_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        LatencyRecorder().percentile(fraction)


def test_fault_latencies_keep_their_stages_apart() -> None:
    latencies = FaultLatencies()
    latencies.observe(read=0.001, queued=0.002, fetched=0.003, installed=0.004, total=0.010)
    maxima = {stage: summary.max for stage, summary in latencies.summaries()}
    assert tuple(maxima) == STAGES
    assert maxima == {"read": 0.001, "queued": 0.002, "fetched": 0.003, "installed": 0.004, "total": 0.010}


def test_fault_latencies_add_up_by_stage() -> None:
    one, other = FaultLatencies(), FaultLatencies()
    one.observe(0.001, 0.001, 0.001, 0.001, 0.004)
    other.observe(0.001, 0.001, 0.001, 0.001, 0.008)
    one.add(other)
    assert one.by_stage["total"].count == 2
    assert one.by_stage["total"].max == 0.008
    assert other.by_stage["total"].count == 1
