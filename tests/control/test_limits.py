"""Limits: what a caller gives goes over the settings, and what cannot be is refused."""

from __future__ import annotations

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.config import Limits
from pageferryd.control.limits import check_limits, pacing_options, session_options

SETTINGS = Limits(
    push_bytes_per_second=1000,
    push_window_bytes=128 << 10,
    fault_objective_us=2000,
    demand_window=5,
    lane_silence_timeout=3,
    reconnect_initial_seconds=0.25,
    reconnect_max_seconds=7,
)


@pytest.mark.parametrize("window", [1, (64 << 10) - 1, (1 << 30) + 1])
def test_a_window_that_cannot_be_is_refused(window: int) -> None:
    with pytest.raises(FerryError, match=str(window)) as refused:
        check_limits(migration_pb2.Limits(push_window_bytes=window))
    assert refused.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("window", [0, 64 << 10, 1 << 30])
def test_a_window_within_its_bounds_is_taken(window: int) -> None:
    check_limits(migration_pb2.Limits(push_window_bytes=window))


def test_a_weight_above_its_bounds_is_refused() -> None:
    with pytest.raises(FerryError, match="1001") as refused:
        check_limits(migration_pb2.Limits(push_weight=1001))
    assert refused.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize(("given", "weight"), [(0, 100), (1, 1), (1000, 1000)])
def test_a_weight_within_its_bounds_is_taken(given: int, weight: int) -> None:
    limits = migration_pb2.Limits(push_weight=given)
    check_limits(limits)
    assert pacing_options(limits, SETTINGS).weight == weight


def test_what_is_not_given_is_as_in_the_settings() -> None:
    pacing = pacing_options(migration_pb2.Limits(), SETTINGS)
    assert pacing.max_window == 128 << 10
    assert pacing.objective == pytest.approx(2e-3)
    assert pacing.bytes_per_second == 1000
    assert not pacing.disabled


def test_what_is_given_goes_over_the_settings() -> None:
    given = migration_pb2.Limits(
        push_window_bytes=1 << 20, fault_objective_us=500, push_bytes_per_second=5_000_000, push_disabled=True
    )
    pacing = pacing_options(given, SETTINGS)
    assert pacing.max_window == 1 << 20
    assert pacing.objective == pytest.approx(5e-4)
    assert pacing.bytes_per_second == 5_000_000
    assert pacing.disabled


def test_a_session_is_bounded_by_the_settings() -> None:
    options = session_options(migration_pb2.Limits(push_disabled=True), SETTINGS)
    assert options.pager.demand_window == 5
    assert options.pager.silence == 3
    assert options.pager.pacing.disabled
    assert (options.backoff_initial, options.backoff_max) == (0.25, 7)
