"""An installer over a dict, that does what a test says before it goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.installer import Placed

ZEROES = bytes(PAGE_SIZE)
POISON = b"poison"

Script = tuple[int, Placed | Reason]


class ScriptedInstaller:
    """`script` says, call by call, how many pages are placed before what; without one all are."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.script: deque[Script] = deque()
        self.woken: list[tuple[int, int]] = []
        self.gone: list[tuple[int, int]] = []
        self.let: list[tuple[int, int]] = []
        self.calls: list[tuple[str, int, int]] = []
        self.released = self.abandoned = False

    def raw(self, first: int, pages: int, data: bytes, offset: int) -> tuple[int, Placed]:
        def at(number: int) -> bytes:
            return data[offset + number * PAGE_SIZE : offset + (number + 1) * PAGE_SIZE]

        return self._place("raw", first, pages, at)

    def zero(self, first: int, pages: int) -> tuple[int, Placed]:
        return self._place("zero", first, pages, lambda _: ZEROES)

    def poison(self, first: int, pages: int) -> tuple[int, Placed]:
        return self._place("poison", first, pages, lambda _: POISON)

    def touched_again(self, first: int, pages: int) -> tuple[int, Placed]:
        placed, how = self.zero(first, pages)
        if how is Placed.PRESENT:
            self.wake(first, pages)
        return placed, how

    def let_through(self, first: int, pages: int) -> None:
        self.let.append((first, pages))

    def given_away(self, first: int, pages: int) -> None:
        self.gone.append((first, pages))

    def wake(self, first: int, pages: int) -> None:
        self.woken.append((first, pages))

    def release(self) -> None:
        self.released = True

    def abandon(self) -> None:
        self.abandoned = True

    def _place(self, what: str, first: int, pages: int, content: Callable[[int], bytes]) -> tuple[int, Placed]:
        self.calls.append((what, first, pages))
        most, how = self.script.popleft() if self.script else (pages, Placed.DONE)
        for number in range(min(most, pages)):
            if first + number in self.pages:
                return number, Placed.PRESENT
            body = content(number)
            assert len(body) in (PAGE_SIZE, len(POISON))
            self.pages[first + number] = body
        if isinstance(how, Reason):
            raise FerryError(how, "as the test says")
        return min(most, pages), how
