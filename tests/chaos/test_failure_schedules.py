"""Several failures in one migration lose no guest either: random schedules, each of them by its seed.

Some, with PAGEFERRY_CHAOS=long many; `--chaos-seed N` runs one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio
from campaign import Campaign, chosen
from chaos_cells import LONG
from kill_table import summary
from schedule import Schedule, run_schedule

PAIRS = 4
SEEDS = range(1, 151) if LONG else range(1, 6)

pytestmark = [
    pytest.mark.root,
    pytest.mark.userfaultfd,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "schedule" in metafunc.fixturenames:
        seed = metafunc.config.getoption("chaos_seed", None)
        schedules = [Schedule.drawn(one) for one in ([seed] if seed is not None else SEEDS)]
        metafunc.parametrize("schedule", schedules, ids=lambda schedule: schedule.name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def campaign(request: pytest.FixtureRequest, tables: list[str]) -> AsyncIterator[Campaign]:
    """Works off the schedules that were chosen, while their tests wait for them in the same order."""
    schedules: dict[str, Schedule] = chosen(request, "schedule")
    works = [(name, partial(run_schedule, schedule)) for name, schedule in schedules.items()]
    async with Campaign(works, PAIRS) as running:
        yield running
        outcomes = {name: future.result() for name, future in running.outcomes.items() if future.done()}
    tables.append(f"random schedules, {summary(outcomes)}")


async def test_several_failures_lose_no_guest(campaign: Campaign, schedule: Schedule) -> None:
    outcome = await campaign.outcome(schedule.name)
    assert outcome.kind is None, f"--chaos-seed {schedule.seed}: {outcome.detail}"
