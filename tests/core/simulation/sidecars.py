"""The destination's sidecars, one after the other: each lives until its fate, and leaves the kernel and the journal."""

from __future__ import annotations

import random
from collections.abc import Callable

from .clock import Clock, Violation
from .fate import Fate, Hands, MortalJournal, MortalKernel
from .journal import Journal
from .kernel import LONGEST_REMOVAL, Kernel
from .shell import Shell
from .wire import Wire

LIVES = ("events", "steps", "recovery", "end")


class Sidecars:
    """`make` makes the shell of one life. All but `kills` lives end otherwise than by the migration's end."""

    def __init__(
        self,
        rng: random.Random,
        clock: Clock,
        kernel: Kernel,
        wire: Wire,
        journal: Journal,
        make: Callable[[Hands], Shell],
        kills: int,
    ) -> None:
        self._rng = rng
        self._clock = clock
        self._kernel = kernel
        self._wire = wire
        self._journal = journal
        self._make = make
        self._kills = kills
        self.killed = 0
        self.reconnects = 0
        self.up = False
        clock.killed = self._kill_in_the_midst
        self.shell = self._begin(Fate() if not kills else self._fate())
        self.up = True
        self.shell.begin()

    @property
    def done(self) -> bool:
        return self.up and self.shell.done

    def _fate(self) -> Fate:
        rng = self._rng
        self._kills -= 1
        kind = rng.choice(LIVES)
        if kind == "steps":
            return Fate(rng.randrange(rng.choice((20, 100, 400))))
        if kind == "recovery":
            return Fate(rng.randrange(10))
        if kind == "end":
            return Fate(completing=rng.randrange(10))
        self._clock.after(rng.random() * 0.1, self._kill_in_life, self.killed)
        return Fate()

    def _kill_in_life(self, life: int) -> None:
        if life == self.killed:
            self.kill()

    def kill(self) -> None:
        """End the sidecar between two events, unless it is gone, or needs no end."""
        if self.up and not self.shell.done:
            self._kill()

    def _kill_in_the_midst(self) -> None:
        self._kernel.reader_died()
        self._kill()

    def _kill(self) -> None:
        """The sidecar is gone at once, with all that it had in memory and on the wire."""
        self._clock.note("the destination's sidecar is killed")
        self.shell.done = True
        self.up = False
        self.killed += 1
        self.reconnects += self.shell.reconnects
        self._wire.drop()
        self._wire.lost = _nobody
        self._kernel.readable = _nobody
        self._clock.after(LONGEST_REMOVAL + self._rng.random() ** 3, self._start)

    def _start(self) -> None:
        self._clock.note("the destination's sidecar starts again")
        self.shell = self._begin(self._fate() if self._kills else Fate())
        self.up = True
        self.shell.recover()
        if self._kernel.unheard:
            raise Violation(f"threads wait for pages {self._kernel.unheard}, and no sidecar knows of them")
        self.shell.begin()

    def _begin(self, fate: Fate) -> Shell:
        kernel = self._kernel if fate.endless else MortalKernel(self._kernel, fate)
        return self._make((kernel, MortalJournal(self._rng, self._journal, self._kernel, fate)))


def _nobody() -> None:
    pass
