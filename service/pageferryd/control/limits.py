"""Limits of a migration: what a caller gives, over the sidecar's own settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.pacing import MIN_WINDOW, PacingOptions
from pageferryd.core.pager import PagerOptions
from pageferryd.core.push_share import DEFAULT_WEIGHT, MAX_WEIGHT
from pageferryd.destination.session import SessionOptions

if TYPE_CHECKING:
    from pageferry.v1 import migration_pb2
    from pageferryd.config import Limits

_LARGEST_WINDOW = 1 << 30


def check_limits(given: migration_pb2.Limits) -> None:
    """Raise FerryError(INVALID_ARGUMENT) for limits that cannot be."""
    window = given.push_window_bytes
    if window and not MIN_WINDOW <= window <= _LARGEST_WINDOW:
        raise FerryError(
            Reason.INVALID_ARGUMENT,
            f"push_window_bytes is {window}: give {MIN_WINDOW} to {_LARGEST_WINDOW}, or 0 for the default",
        )
    if given.push_weight > MAX_WEIGHT:
        raise FerryError(
            Reason.INVALID_ARGUMENT,
            f"push_weight is {given.push_weight}: give 1 to {MAX_WEIGHT}, or 0 for {DEFAULT_WEIGHT}",
        )


def pacing_options(given: migration_pb2.Limits, settings: Limits) -> PacingOptions:
    """Return the pacer's bounds; zero in `given` means the setting."""
    return PacingOptions(
        max_window=given.push_window_bytes or settings.push_window_bytes,
        objective=(given.fault_objective_us or settings.fault_objective_us) / 1e6,
        bytes_per_second=given.push_bytes_per_second or settings.push_bytes_per_second,
        disabled=given.push_disabled,
        weight=given.push_weight or DEFAULT_WEIGHT,
    )


def session_options(given: migration_pb2.Limits, settings: Limits) -> SessionOptions:
    """Return the session's bounds."""
    return SessionOptions(
        pager=PagerOptions(
            demand_window=settings.demand_window,
            silence=settings.lane_silence_timeout,
            pacing=pacing_options(given, settings),
        ),
        backoff_initial=settings.reconnect_initial_seconds,
        backoff_max=settings.reconnect_max_seconds,
    )
