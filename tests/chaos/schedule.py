"""Several failures, one after another, in one migration: drawn by a seed, so that each can be had again."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

from chaos_cells import STEPS, Cell, Place, Stage, Step, Who
from chaos_hosts import Pair
from holds import Hold
from trial import Trial
from verdict import End, Judge, check, check_both, crosses_after_all

MOST_FAILURES = 4
REACHED_SECONDS = 4.0
"""How long a step may take until it counts as one that does not come any more."""
FAILURES = tuple(who for who in Who if who not in (Who.SOURCE_VMM, Who.SOURCE_VMM_SHARED, Who.DESTINATION_VMM))
# Calls that are made only when something has gone wrong.
MORE_STEPS = (
    Step(Place.WIRE, "Abort", "request", Stage.BEFORE),
    Step(Place.WIRE, "Abort", "answer", Stage.BEFORE),
    Step(Place.WIRE, "Commit", "request", Stage.AT),
    Step(Place.WIRE, "Commit", "answer", Stage.AFTER),
    Step(Place.WIRE, "GetLayout", "request", Stage.AFTER),
)


@dataclass(frozen=True)
class Schedule:
    """What happens at which steps, in this order."""

    seed: int
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return f"seed-{self.seed}"

    @classmethod
    def drawn(cls, seed: int) -> Schedule:
        """Draw steps in the order of a migration; a step that is not come to any more is passed over."""
        draw = random.Random(seed)
        steps = sorted(draw.choices(STEPS + MORE_STEPS, k=draw.randint(2, MOST_FAILURES)), key=lambda step: step.stage)
        return cls(seed, tuple(_cell(draw, step) for step in steps))

    def __str__(self) -> str:
        return ", ".join(cell.name for cell in self.cells)


def _cell(draw: random.Random, step: Step) -> Cell:
    who = draw.choice(FAILURES)
    deliver = who is not Who.CUT and draw.random() < 0.5
    return Cell(who, step, deliver or step.place is not Place.WIRE, late=draw.random() < 0.3 and not who.told)


async def run_schedule(schedule: Schedule, pair: Pair, directory: Path) -> End:
    """Have it happen to a fresh guest; return what has become of it."""
    trial = await Trial.begin(pair, directory, schedule.name)
    judge = Judge(trial)
    try:
        holds = [trial.hold(schedule.cells[0].step, REACHED_SECONDS)]
        await trial.start()
        for number, cell in enumerate(schedule.cells):
            if number:
                holds.append(trial.hold(cell.step, REACHED_SECONDS))
            if not await _comes(holds[-1], judge):
                continue
            await trial.strike(cell, holds[-1])
        await trial.hurry()
        end = await judge.settles()
        await check(judge, end)
        await check_both(judge)
        if end is End.STAYED:
            await crosses_after_all(trial)
        return end
    except AssertionError as error:
        error.args = (f"{error} [{schedule}; done: {', '.join(trial.told) or 'nothing'}]",)
        raise
    finally:
        await trial.end()


async def _comes(hold: Hold, judge: Judge) -> bool:
    """Wait until the migration comes to a step; it does not when it is over before."""
    coming = asyncio.create_task(hold.reached())
    while not coming.done() and not await judge.settled():
        await asyncio.wait([coming], timeout=0.1)
    if coming.done() and coming.exception() is None:
        return True
    hold.release(deliver=True)
    coming.cancel()
    await asyncio.gather(coming, return_exceptions=True)
    return False
