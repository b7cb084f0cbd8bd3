"""What may become of a guest whose VMM was killed: where it was, it ends; what is its own elsewhere, it keeps."""

from __future__ import annotations

from chaos_cells import Cell, Stage, Who
from trial import Trial, eventually
from verdict import SETTLE_SECONDS, VMM_REASONS, BadEndError, End, Judge, Kind, check, check_both

from pageferry.client import ended
from pageferry.v1 import migration_pb2 as pb

_PAUSED = pb.MIGRATION_STATE_POSTCOPY_PAUSED

ALLOWED = {
    Who.SOURCE_VMM: {
        # Nothing of it is left. Where its state had crossed by then, it may wait at the destination for its memory.
        Stage.BEFORE: {End.GONE, End.WAITS},
        Stage.AT: {End.GONE, End.WAITS, End.ARRIVED},
        Stage.AFTER: {End.WAITS, End.ARRIVED},
        Stage.WHOLE: {End.ARRIVED},
    },
    Who.SOURCE_VMM_SHARED: {
        Stage.BEFORE: {End.GONE, End.ARRIVED},
        Stage.AT: {End.GONE, End.ARRIVED},
        # The source's sidecar holds the memory itself.
        Stage.AFTER: {End.ARRIVED},
        Stage.WHOLE: {End.ARRIVED},
    },
    Who.DESTINATION_VMM: {
        Stage.BEFORE: {End.STAYED},
        Stage.AT: {End.STAYED, End.GONE},
        Stage.AFTER: {End.GONE},
        Stage.WHOLE: {End.GONE},
    },
}


async def judge_vmm_death(trial: Trial, cell: Cell) -> End:
    """Return what has become of it. BadEndError where that is not what may be."""
    judge = Judge(trial)
    found: list[End] = []

    async def look() -> bool:
        end = await _end(judge)
        found[:] = [] if end is None else [end]
        return end is not None

    if not await eventually(look, SETTLE_SECONDS):
        raise BadEndError(Kind.HUNG, f"not settled within {SETTLE_SECONDS:g} s: {await judge.picture()}")
    end = found[0]
    if end not in ALLOWED[cell.who][cell.step.stage]:
        raise BadEndError(Kind.LOST, f"the guest {end}: {await judge.picture()}")
    await _check(judge, end)
    # What is left of the guest stands still at its source, whose sidecar must not run it after a restart either.
    given_away = cell.who is Who.DESTINATION_VMM and end is End.GONE
    await check_both(judge, *((".given",) if given_away else ()))
    return end


async def _end(judge: Judge) -> End | None:
    trial = judge.trial
    if await judge.busy():
        # It waits for ever, unless somebody decides otherwise.
        return End.WAITS if await _both_lost_the_source(trial) else None
    if await trial.guest.state() == "running":
        return End.STAYED
    if await trial.waiting.state() == "running":
        return End.ARRIVED
    return End.GONE


async def _both_lost_the_source(trial: Trial) -> bool:
    shown = [await host.shown(trial.migration_id) for host in trial.pair.hosts]
    return all(one is not None and one.state == _PAUSED and one.error.reason == "SOURCE_LOST" for one in shown)


async def _check(judge: Judge, end: End) -> None:
    trial = judge.trial
    match end:
        case End.ARRIVED | End.STAYED:
            await check(judge, end)
        case End.GONE:
            await _both_say_so(judge)
        case End.WAITS:
            judge.never_wrong()
            # Nobody can complete it: what is left of it ends here.
            await trial.waiting.kill_now()

            async def idle() -> bool:
                return not await judge.busy()

            if not await eventually(idle, SETTLE_SECONDS):
                raise BadEndError(Kind.HUNG, f"both its VMMs are gone, and not both ends know: {await judge.picture()}")


async def _both_say_so(judge: Judge) -> None:
    trial = judge.trial
    for host in trial.pair.hosts:
        shown = await host.shown(trial.migration_id)
        # A destination that was never asked knows nothing.
        if shown is None and host is trial.pair.destination:
            continue
        if shown is None or not ended(shown):
            raise BadEndError(Kind.WRONG, f"{host.name} does not say that the guest has ended: {await judge.picture()}")
        told = shown.state == pb.MIGRATION_STATE_COMPLETED or shown.error.reason in VMM_REASONS
        if not told and host is trial.pair.source:
            raise BadEndError(Kind.WRONG, f"{host.name} gives another reason: {await judge.picture()}")
