"""Which page each step takes, and from that the version of every page after any number of steps.

With W pages in the working set, step n takes page `page_at(n)` from version n div W to the next. Pages outside it stay
at version 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from struct import Struct
from struct import error as struct_error
from typing import Final

from pageferry.errors import FerryError, Reason
from pageferry.guests.pattern import HOLE_BLOCK, Pattern

LOCAL_PAGES: Final = 256
"""The order `local` stays within so many pages before it goes elsewhere."""

_STATE: Final = Struct("<8sHHHxxQQQQQ")
_MAGIC: Final = b"ferryprc"
_STATE_VERSION: Final = 1


class Order(StrEnum):
    """In which order a pass takes the pages."""

    RANDOM = "random"
    """Each far from the one before."""
    SEQUENTIAL = "sequential"
    """Upwards."""
    LOCAL = "local"
    """All of LOCAL_PAGES neighbours, then others far away."""


_ORDERS: Final = tuple(Order)


@dataclass(frozen=True)
class _Cycle:
    """A permutation of range(count) with its inverse: i -> first + i * stride."""

    count: int
    stride: int
    first: int

    @classmethod
    def shuffled(cls, count: int, seed: int) -> _Cycle:
        stride = max(1, int(count * 0.6180339887) + seed % max(1, count // 8))
        while math.gcd(stride, count) != 1:
            stride += 1
        return cls(count, stride, seed % count)

    def at(self, index: int) -> int:
        return (self.first + index * self.stride) % self.count

    @cached_property
    def _inverse(self) -> int:
        return pow(self.stride, -1, self.count)

    def index(self, value: int) -> int:
        return (value - self.first) * self._inverse % self.count


@dataclass(frozen=True)
class Plan:
    """What a guest does from its first step on. `working` pages, the first ones, are worked on; the others stand."""

    seed: int
    pages: int
    working: int
    holes: int
    order: Order

    def __post_init__(self) -> None:
        if not 1 <= self.working <= self.pages:
            raise FerryError(
                Reason.INVALID_ARGUMENT, f"a working set of {self.working} pages does not fit {self.pages} pages"
            )

    @cached_property
    def pattern(self) -> Pattern:
        """The contents that go with the plan."""
        return Pattern(self.seed, self.holes)

    def page_at(self, step: int) -> int:
        """Return the page that a step works on."""
        block, inner = divmod(step % self.working, self._inner.count)
        return self._outer.at(block) * self._inner.count + self._inner.at(inner)

    def version(self, page: int, steps: int) -> int:
        """Return the version of a page after `steps` steps."""
        if page >= self.working:
            return 0
        passes, into = divmod(steps, self.working)
        block, inner = divmod(page, self._inner.count)
        position = self._outer.index(block) * self._inner.count + self._inner.index(inner)
        return passes + (position < into)

    @cached_property
    def _inner(self) -> _Cycle:
        if self.order is not Order.LOCAL:
            return _Cycle(1, 1, 0)
        return _Cycle.shuffled(math.gcd(self.working, LOCAL_PAGES), self.seed)

    @cached_property
    def _outer(self) -> _Cycle:
        count = self.working // self._inner.count
        return _Cycle(count, 1, 0) if self.order is Order.SEQUENTIAL else _Cycle.shuffled(count, self.seed)


@dataclass(frozen=True)
class Progress:
    """How far a guest is: all of its state beside the plan."""

    steps: int = 0
    errors: int = 0


def pack_state(plan: Plan, progress: Progress) -> bytes:
    """Return the device state of a guest."""
    return _STATE.pack(
        _MAGIC,
        _STATE_VERSION,
        _ORDERS.index(plan.order),
        plan.holes,
        plan.seed,
        plan.pages,
        plan.working,
        progress.steps,
        progress.errors,
    )


def unpack_state(state: bytes) -> tuple[Plan, Progress]:
    """Read what `pack_state` gave; FerryError INVALID_ARGUMENT where it is anything else."""
    try:
        magic, version, order, holes, seed, pages, working, steps, errors = _STATE.unpack(state)
    except struct_error:
        raise _foreign(f"{len(state)} bytes, not {_STATE.size}") from None
    if magic != _MAGIC or version != _STATE_VERSION:
        raise _foreign(f"it begins with {state[:10].hex()}")
    if order >= len(_ORDERS) or holes > HOLE_BLOCK:
        raise _foreign(f"order {order} and {holes} holes make no sense")
    return Plan(seed, pages, working, holes, _ORDERS[order]), Progress(steps, errors)


def _foreign(what: str) -> FerryError:
    return FerryError(
        Reason.INVALID_ARGUMENT,
        f"this is not the state of a process guest of format {_STATE_VERSION}: {what}; the guests on both sides must "
        "be of the same kind and version",
    )
