"""What has become of a guest: it must be whole and run at one host, or its own VMM was taken from it."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from chaos_cells import Cell, Stage
from held_guest import HeldGuest
from trial import Trial, eventually

from pageferry.errors import FerryError
from pageferry.v1 import migration_pb2 as pb

SETTLE_SECONDS = 25.0
HOMELESS_SECONDS = 3.0
"""How long nobody may run a guest while no sidecar has anything to do."""
VMM_REASONS = {"VMM_GONE", "VMM_UNREACHABLE", "VMM_FAILED", "SOURCE_LOST"}


class End(enum.StrEnum):
    """The ends that a guest may come to."""

    ARRIVED = "arrived"
    STAYED = "stayed"
    WAITS = "waits"
    """At its destination, for pages that are gone with its source's VMM: it never reads others."""
    GONE = "gone"
    """With its own VMM, and its sidecar says so."""


class Kind(enum.StrEnum):
    """The ways to fail."""

    LOST = "LOST"
    """Nobody runs it, or two did, or a byte of it is wrong."""
    HUNG = "HUNG"
    """It has not settled in time."""
    WRONG = "WRONG"
    """It is whole, and something is not as it should be beside."""


class BadEndError(AssertionError):
    """A cell has failed."""

    def __init__(self, kind: Kind, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


@dataclass
class Judge:
    """Looks at one trial after what happened to it."""

    trial: Trial
    _homeless_since: float | None = None

    async def settles(self) -> End:
        """Wait until nothing is under way any more, and somebody runs the guest."""
        found: list[End] = []

        async def look() -> bool:
            if await self.busy():
                self._homeless_since = None
                return False
            found[:] = [end for end in (await self._where(),) if end is not None]
            await self._note_homeless(found=bool(found))
            return bool(found)

        if not await eventually(look, SETTLE_SECONDS):
            raise BadEndError(Kind.HUNG, f"not settled within {SETTLE_SECONDS:g} s: {await self.picture()}")
        return found[0]

    async def settled(self) -> bool:
        """Say whether nothing is under way, and somebody runs the guest."""
        return not await self.busy() and await self._where() is not None

    async def busy(self) -> bool:
        """Say whether a migration is under way at either end, or cannot be asked for."""
        for host in self.trial.pair.hosts:
            try:
                if await host.active():
                    return True
            except FerryError:
                return True
        return False

    async def _where(self) -> End | None:
        if await self.trial.waiting.state() == "running":
            return End.ARRIVED
        if await self.trial.guest.state() == "running":
            return End.STAYED
        return None

    async def _note_homeless(self, *, found: bool) -> None:
        now = asyncio.get_running_loop().time()
        if found:
            self._homeless_since = None
        elif self._homeless_since is None:
            self._homeless_since = now
        elif now - self._homeless_since > HOMELESS_SECONDS:
            trial = self.trial
            raise BadEndError(
                Kind.LOST,
                f"both sidecars are idle and nobody runs the guest: {await trial.guest.state()} at its source, "
                f"{await trial.waiting.state()} at its destination",
            )

    async def picture(self) -> str:
        """Tell where everything stands."""
        told = [f"guest {await self.trial.guest.state()}", f"waiting {await self.trial.waiting.state()}"]
        for host in self.trial.pair.hosts:
            shown = await host.shown(self.trial.migration_id)
            state = "unknown" if shown is None else pb.MigrationState.Name(shown.state).removeprefix("MIGRATION_STATE_")
            told.append(f"{host.name} {state}")
            if shown is not None and shown.error.reason:
                told[-1] += f" ({shown.error.reason}: {shown.error.message})"
        return ", ".join(told)

    def one_owner(self) -> None:
        """The source never ran the guest again once the destination had, and both never did at once."""
        there = self.trial.waiting.spans
        if not there:
            return
        first = there[0].begin
        for span in self.trial.guest.spans:
            if span.begin > first or span.end is None or span.end > first:
                raise BadEndError(Kind.LOST, f"the source ran the guest ({span}) after the destination had ({first})")

    async def whole(self, guest: HeldGuest) -> None:
        """It runs on, and every byte is right."""
        try:
            await guest.runs_on()
            await guest.is_intact()
        except AssertionError as error:
            raise BadEndError(Kind.LOST, f"it does not run on whole: {error}") from error

    def never_wrong(self) -> None:
        for guest in self.trial.guests:
            if guest.wrongs:
                raise BadEndError(Kind.LOST, f"the guest read what is not its own: {guest.wrongs[:3]}")

    async def tidy(self, *kept: str) -> None:
        """Both sidecars are well, idle, and have left nothing behind but notes that are `kept` by right."""

        def left() -> dict[str, list[str]]:
            found = {host.name: host.leftovers() for host in self.trial.pair.hosts}
            return {name: [one for one in names if not one.endswith(kept)] for name, names in found.items()}

        async def look() -> bool:
            return not any(left().values())

        for host in self.trial.pair.hosts:
            if not host.sidecar.alive:
                raise BadEndError(Kind.WRONG, f"the sidecar {host.name} has ended by itself")
        if not await eventually(look, 3.0):
            raise BadEndError(Kind.WRONG, f"left behind: {left()}")


async def judge_cell(trial: Trial, cell: Cell) -> End:
    """Return what has become of a guest whose VMMs live. BadEndError where that is not what may be."""
    judge = Judge(trial)
    end = await judge.settles()
    await check(judge, end)
    if end is End.STAYED and cell.step.stage >= Stage.AFTER:
        raise BadEndError(Kind.LOST, "the source runs a guest that was its destination's already")
    await check_both(judge)
    if end is End.STAYED:
        await crosses_after_all(trial)
    return end


async def crosses_after_all(trial: Trial) -> None:
    """A guest that has stayed is not stuck: it crosses to another VMM."""
    await trial.another_vmm()
    await trial.start()
    await trial.hurry()
    judge = Judge(trial)
    end = await judge.settles()
    if end is not End.ARRIVED:
        raise BadEndError(Kind.WRONG, f"it cannot be moved any more: {await judge.picture()}")
    await check(judge, end)
    await check_both(judge)


async def check(judge: Judge, end: End) -> None:
    """Have the guest looked at where it is, and the VMM that it has left."""
    trial = judge.trial
    await judge.whole(trial.waiting if end is End.ARRIVED else trial.guest)
    if end is End.ARRIVED and not await eventually(_is_gone(trial.guest), 8.0):
        raise BadEndError(Kind.WRONG, f"the VMM that the guest has left is {await trial.guest.state()}")


async def check_both(judge: Judge, *kept: str) -> None:
    """Have looked at what must be so after any end; notes that end in one of `kept` may stay."""
    judge.one_owner()
    judge.never_wrong()
    await judge.tidy(*kept)


def _is_gone(guest: HeldGuest) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return not guest.alive

    return look
