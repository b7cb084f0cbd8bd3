"""The push share: what the guests that come to one host at once may push, each by its weight, and all together.

Each guest has a virtual time, which goes on by the bytes it asks for, divided by its weight. A guest may ask while its
own is not too far ahead of the least of those that push too; the others are told when they may go on. A guest that has
nothing to ask is no measure for others and saves nothing up: it comes back at the time that the others have reached.
Nor is one that cannot use what the others leave to it, because its own source is slow: see HoldGauge.

Faults go first across guests: each fault that its pacer finds slow halves the part of its window that any guest may
have under way, down to a least that it always may, and what arrives lets it grow back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferryd.core.hold_gauge import HoldGauge
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.rate import RateLimit

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_WEIGHT = 100
MAX_WEIGHT = 1000
SLACK = 1 << 20
"""Bytes that a guest of the default weight may be ahead of the least served one when it asks."""
MAX_REQUEST = 320 << 10
"""Most bytes of one request while several push: one message of the source."""
LEAST_UNDER_WAY = 64 << 10
"""Bytes that every guest may have under way, however slow the faults of others are."""
_GROWTH = 1 / 64
"""Most that the part of its window that each guest may use grows by with one message."""
_LEAST_PART = 1 / 64
_SLOW_SECONDS = 1.0
"""How long a guest with a slow source is no measure for others, until it is tried again."""


class PushShare:
    """What all guests of a host push together; 0 bytes a second is unlimited. Times are seconds of any one clock.

    Nothing here waits or calls later: a member that is held back is told by its `wake`, or asks `wake_at` for a time.
    """

    def __init__(self, bytes_per_second: int, now: float) -> None:
        self._rate = RateLimit(bytes_per_second, now)
        self._gauge = HoldGauge(now)
        # Those that push or want to; a few tens, so that looking at all of them costs less than keeping them sorted.
        self._active: dict[ShareMember, None] = {}
        # Of these, who is held back: for being ahead of others, or by the rate.
        self._ahead: dict[ShareMember, None] = {}
        self._queued: dict[ShareMember, None] = {}
        self._time = 0.0
        self._part = 1.0
        self._gave_way_to: ShareMember | None = None
        self._joined = 0

    def join(self, weight: int, wake: Callable[[], None]) -> ShareMember:
        """Return a new member. `wake` is called when it may go on after it was held back; it must not ask at once."""
        self._joined += 1
        return ShareMember(self, weight, wake, self._joined)

    @property
    def pushing(self) -> int:
        """How many members push, or want to."""
        return len(self._active)

    @property
    def part(self) -> float:
        """Which part of its window each member may have under way while others push too."""
        return self._part

    # For members

    def ask(self, member: ShareMember, credit: int, under_way: int, window: int, now: float) -> int:
        """Return how much of `credit` a member may ask for now."""
        if member not in self._active:
            self._enter(member)
        gives_way = len(self._active) > 1 or not (self._part == 1 or member is self._gave_way_to)
        if not gives_way and not self._rate.bytes_per_second:
            return credit
        self._look(now)
        self._go_on_from_slow(member, now)
        if gives_way:
            credit = self._within_part(credit, under_way, window)
        if not credit:
            # What is under way will come, and has it ask again.
            self._forget(member)
            self._tell_firsts()
            return 0
        return credit if self._may_go(member, now) else 0

    def grant(self, member: ShareMember, size: int) -> None:
        """A member asks its source for bytes."""
        member.time += size * DEFAULT_WEIGHT / member.weight
        self._rate.spend(size)
        self._forget(member)
        self._release()

    def unspent(self, size: int) -> None:
        """Bytes that were granted will not come: they count no more against the rate."""
        self._rate.spend(-size)

    def arrived(self, size: int, now: float) -> None:
        """Bytes of push came in."""
        if len(self._active) > 1 or self._part < 1:
            self._part = min(1.0, self._part + _GROWTH * min(1.0, size / LEAST_UNDER_WAY))
            self._gauge.arrived(size)
            self._look(now)

    def give_way(self, member: ShareMember) -> None:
        """A member's guest waits for a fault for too long. Where it alone pushes, its pacer sees to that."""
        self._part = max(_LEAST_PART, self._part / 2)
        self._gave_way_to = member

    def leave(self, member: ShareMember) -> None:
        """A member has nothing to ask for now."""
        if member not in self._active:
            return
        del self._active[member]
        self._forget(member)
        if not self._active:
            self._time = max(self._time, member.time)
        self._release()

    def weigh(self, member: ShareMember, weight: int) -> None:
        """Put another weight into force: one that rises shortens what its member is ahead."""
        lead = member.time - self._reference()
        if lead > 0 and weight > member.weight:
            member.time -= lead * (1 - member.weight / weight)
        member.weight = weight
        self._release()

    def wake_at(self, member: ShareMember, now: float) -> float | None:
        """Return when a member that is held back is to ask again; None when it is told, or not held back."""
        due = None
        if member in self._ahead and member is _first(self._ahead):
            # Whoever holds it back may be silent, and then nothing else would end that.
            due = max(self._gauge.due, now)
        elif member in self._queued and member is _first(self._queued):
            due = self._rate.open_at(now) or now
        member.timed = due is not None
        return due

    # Who may go

    def _enter(self, member: ShareMember) -> None:
        member.time = max(member.time, self._reference())
        self._active[member] = None

    def _within_part(self, credit: int, under_way: int, window: int) -> int:
        most = max(LEAST_UNDER_WAY, int(window * self._part))
        credit = min(credit, most - under_way, MAX_REQUEST)
        credit -= credit % PAGE_SIZE
        # As the pacer does: no small change while more is under way.
        return credit if credit >= LEAST_UNDER_WAY or (credit > 0 and not under_way) else 0

    def _may_go(self, member: ShareMember, now: float) -> bool:
        self._forget(member)
        if member.time > self._limit():
            self._ahead[member] = None
            self._tell_first(self._queued)
            return False
        self._tell_first(self._ahead)
        if self._rate.is_over(now) or any(other.time < member.time for other in self._queued):
            self._queued[member] = None
            return False
        return True

    def _reference(self) -> float:
        """Return the virtual time of the least served member, or the last one known."""
        self._time = max(self._time, min((one.time for one in self._active if not one.slow), default=self._time))
        return self._time

    def _limit(self) -> float:
        return float("inf") if self._gauge.free else self._reference() + SLACK

    def _forget(self, member: ShareMember) -> None:
        member.told = member.timed = False
        self._ahead.pop(member, None)
        self._queued.pop(member, None)

    def _release(self) -> None:
        """Tell all that are no longer too far ahead, and whoever is first of those that still wait."""
        if self._ahead:
            limit = self._limit()
            for member in self._ahead:
                if member.time <= limit:
                    member.tell()
        self._tell_firsts()

    def _tell_firsts(self) -> None:
        self._tell_first(self._ahead)
        self._tell_first(self._queued)

    def _tell_first(self, waiting: dict[ShareMember, None]) -> None:
        # It asks again, and then has a time to do so once more.
        if waiting and not (first := _first(waiting)).timed:
            first.tell()

    # Slow sources

    def _look(self, now: float) -> None:
        was_free = self._gauge.free
        if self._gauge.look(now, held=bool(self._ahead)):
            self._leave_slow_behind(now)
        elif self._gauge.free and not was_free:
            self._release()

    def _leave_slow_behind(self, now: float) -> None:
        """Those for whom others were held back did not make use of it."""
        if not self._ahead:
            return
        limit = _first(self._ahead).time - SLACK
        for member in self._active:
            if member.time < limit and member not in self._queued:
                member.slow, member.slow_until = True, now + _SLOW_SECONDS
        self._release()

    def _go_on_from_slow(self, member: ShareMember, now: float) -> None:
        if member.slow:
            member.slow = now < member.slow_until
            member.time = max(member.time, self._reference())


class ShareMember:
    """One guest's part of a share: see PushShare."""

    def __init__(self, share: PushShare, weight: int, wake: Callable[[], None], number: int) -> None:
        self.weight = weight
        self.number = number
        """Who goes first of those at one time."""
        self.time = 0.0
        """Virtual: bytes asked for, at the default weight."""
        self.told = False
        """Whether it was told to go on, and has not asked since."""
        self.timed = False
        """Whether it will ask again by itself."""
        self.slow = False
        self.slow_until = 0.0
        self._share = share
        self._wake = wake

    def ask(self, credit: int, under_way: int, window: int, now: float) -> int:
        """Return how many of `credit` bytes may be asked for now; 0 when this member is held back.

        `under_way` and `window` are its bytes under way, and the most that its own limits allow.
        """
        return self._share.ask(self, credit, under_way, window, now)

    def granted(self, size: int) -> None:
        """It has asked for `size` bytes."""
        self._share.grant(self, size)

    def unspent(self, size: int) -> None:
        """Of what it asked for, these bytes will not come."""
        self._share.unspent(size)

    def arrived(self, size: int, now: float) -> None:
        """Bytes that it had asked for came in."""
        self._share.arrived(size, now)

    def rest(self) -> None:
        """It has nothing to ask for now: all is under way, its lanes are lost, or its own pacer holds it back."""
        self._share.leave(self)

    def give_way(self) -> None:
        """Its guest waits for a fault for too long."""
        self._share.give_way(self)

    def set_weight(self, weight: int) -> None:
        """Put another weight into force at once."""
        if weight != self.weight:
            self._share.weigh(self, weight)

    def wake_at(self, now: float) -> float | None:
        """Return when to ask again although nobody says so, or None. To be looked at after each `ask` that gave 0."""
        return self._share.wake_at(self, now)

    def tell(self) -> None:
        """Have it ask again."""
        if not self.told:
            self.told = True
            self._wake()


def _first(waiting: dict[ShareMember, None]) -> ShareMember:
    return min(waiting, key=lambda member: (member.time, member.number))
