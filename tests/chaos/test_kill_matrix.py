"""No single failure loses a guest: who is killed or cut, at which step. See chaos_cells.py.

A short choice, or with PAGEFERRY_CHAOS=long or `-k CELL` all of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from campaign import Campaign, Work, chosen
from chaos_cells import CELLS, LONG, Cell, Who, short
from chaos_hosts import Pair
from kill_table import summary, table
from trial import run_cell
from verdict import End, judge_cell
from vmm_deaths import judge_vmm_death

PAIRS = 4
VMMS = (Who.SOURCE_VMM, Who.SOURCE_VMM_SHARED, Who.DESTINATION_VMM)

pytestmark = [
    pytest.mark.root,
    pytest.mark.userfaultfd,
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        cells = CELLS if LONG or metafunc.config.option.keyword else short()
        metafunc.parametrize("cell", cells, ids=lambda cell: cell.name)


def work(cell: Cell) -> Work:
    return partial(_run, cell)


async def _run(cell: Cell, pair: Pair, directory: Path) -> End:
    return await run_cell(pair, directory, cell, judge_vmm_death if cell.who in VMMS else judge_cell)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def campaign(request: pytest.FixtureRequest, tables: list[str]) -> AsyncIterator[Campaign]:
    """Works off the cells that were chosen, while their tests wait for them in the same order."""
    cells: dict[str, Cell] = chosen(request, "cell")
    async with Campaign([(name, work(cell)) for name, cell in cells.items()], PAIRS) as running:
        yield running
        outcomes = {name: future.result() for name, future in running.outcomes.items() if future.done()}
    tables.append(table(outcomes, cells) if LONG else summary(outcomes))


async def test_a_single_failure_loses_no_guest(campaign: Campaign, cell: Cell) -> None:
    outcome = await campaign.outcome(cell.name)
    assert outcome.kind is None, f"{cell.name}: {outcome.detail}"
