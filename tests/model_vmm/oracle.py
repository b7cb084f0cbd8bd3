"""Which bytes an access may see: those of the last write before it, or of one that happens meanwhile."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from pageferryd.core.layout import PAGE_SIZE

WORD = 8
ZERO_PAGE = bytes(PAGE_SIZE)
_ZERO_BODY = bytes(PAGE_SIZE - WORD)


class Violation(Exception):
    """Something was seen that must not be."""


class Ticks:
    """The order of what happens."""

    def __init__(self) -> None:
        self._count = itertools.count(1)

    def next(self) -> int:
        return next(self._count)


@dataclass(slots=True)
class Write:
    value: bytes
    start: int
    end: int | None = None


class Register:
    """One value that is written and read by several at once."""

    def __init__(self, value: bytes) -> None:
        self._writes = [Write(value, 0, 0)]

    def begin(self, value: bytes, now: int) -> Write:
        self._writes.append(Write(value, now))
        return self._writes[-1]

    def allowed(self, start: int, end: int) -> set[bytes]:
        """Return what a read from `start` to `end` may see."""
        # A write is over once another that began after its end had ended before the read.
        latest = max((one.start for one in self._writes if one.end is not None and one.end < start), default=-1)
        return {one.value for one in self._writes if one.start <= end and (one.end is None or one.end >= latest)}


@dataclass(slots=True)
class Change:
    """Writes that happen together, and take effect at some moment until `done`."""

    writes: list[Write] = field(default_factory=list)

    def done(self, now: int) -> None:
        for write in self.writes:
            write.end = now


class Side:
    """The shared or the private side of one page: its first word, which the guest writes, and the rest."""

    def __init__(self, content: bytes) -> None:
        self._word = Register(content[:WORD])
        self._body = Register(content[WORD:])

    def write(self, word: bytes, now: int) -> Change:
        return Change([self._word.begin(word, now)])

    def zero(self, now: int) -> Change:
        return Change([self._word.begin(bytes(WORD), now), self._body.begin(_ZERO_BODY, now)])

    def check(self, content: bytes, start: int, end: int, what: str) -> None:
        words = self._word.allowed(start, end)
        if content[:WORD] not in words:
            raise Violation(f"{what}: first word {show(content)}, allowed {[show(word) for word in words]}")
        bodies = self._body.allowed(start, end)
        body = content[WORD:]
        if body not in bodies and not _is_mixture(body, bodies):
            raise Violation(f"{what}: body {show(body)}, allowed {[show(one) for one in bodies]}")


def _is_mixture(body: bytes, bodies: set[bytes]) -> bool:
    """Say whether each word comes from one of the bodies: a read while the page becomes zero may see both."""
    return len(bodies) > 1 and all(
        any(body[at : at + WORD] == one[at : at + WORD] for one in bodies) for at in range(0, len(body), WORD)
    )


def show(content: bytes) -> str:
    return content[:WORD].hex()
