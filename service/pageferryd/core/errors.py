"""What the core refuses. Each error carries the stable reason that the sidecar reports it with."""

from __future__ import annotations


class CoreError(Exception):
    """Something the core refuses; `reason` is the name of a `pageferry.errors.Reason`."""

    reason = "INTERNAL"


class LayoutError(CoreError):
    """A memory layout that cannot be."""

    reason = "LAYOUT_INVALID"


class PageRangeError(CoreError):
    """A page number outside the layout."""

    reason = "PAGE_OUT_OF_RANGE"


class MalformedPagesError(CoreError):
    """A message of pages that does not add up: short, too long, or of an unknown form."""

    reason = "MALFORMED_PAGES"


class UnrequestedPagesError(CoreError):
    """Pages that nobody asked for, or an answer that skips some that were."""

    reason = "UNREQUESTED_PAGES"


class IllegalTransitionError(CoreError):
    """A change of state that the lifecycle does not know."""

    reason = "ILLEGAL_STATE"
