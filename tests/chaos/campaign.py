"""Many cells at once: some pairs of sidecars, each of which works off one cell after another."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from chaos_hosts import Pair
from verdict import BadEndError, End, Kind

WAITING_THREADS = 96
"""Each wait for a line of a process takes a thread."""

Work = Callable[[Pair, Path], Awaitable[End]]


@dataclass(frozen=True)
class Outcome:
    """What a cell came to: its end, or what was wrong, with the logs of both sidecars."""

    end: End | None = None
    kind: Kind | None = None
    detail: str = ""


@dataclass
class Campaign:
    """Runs named pieces of work. `async with` begins; each outcome is awaited by name, in any order."""

    works: Sequence[tuple[str, Work]]
    pairs: int
    outcomes: dict[str, asyncio.Future[Outcome]] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(WAITING_THREADS)
        loop.set_default_executor(self._threads)
        self.outcomes = {name: loop.create_future() for name, _ in self.works}
        self._left = list(reversed(self.works))
        # All at once they would keep each other waiting for too long.
        self._starting = asyncio.Lock()
        self._cells: set[asyncio.Task[Outcome]] = set()
        self._directory = tempfile.TemporaryDirectory(prefix="ferry-")
        self._tasks = [asyncio.create_task(self._work(number)) for number in range(min(self.pairs, len(self.works)))]
        return self

    async def __aexit__(self, *_: object) -> None:
        # Those that are under way end; what they have started is taken down in peace.
        self._left.clear()
        for cell in self._cells:
            cell.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for outcome in self.outcomes.values():
            outcome.cancel()
        self._directory.cleanup()

    async def _work(self, number: int) -> None:
        generation = 0
        while self._left:
            # A pair that something went wrong with is not used again.
            generation += 1
            async with AsyncExitStack() as stack:
                pair = Pair(Path(self._directory.name), number * 1000 + generation)
                async with self._starting:
                    await stack.enter_async_context(pair)
                while self._left:
                    name, work = self._left.pop()
                    cell = asyncio.create_task(self._one(work, pair))
                    self._cells.add(cell)
                    cell.add_done_callback(self._cells.discard)
                    await asyncio.wait([cell])
                    if cell.cancelled():
                        return
                    self.outcomes[name].set_result(cell.result())
                    if cell.result().kind is not None:
                        break

    async def _one(self, work: Work, pair: Pair) -> Outcome:
        try:
            return Outcome(end=await work(pair, Path(self._directory.name)))
        except BadEndError as error:
            return Outcome(kind=error.kind, detail=_with_logs(str(error), pair))
        except Exception as error:
            # A step that is never reached, a sidecar that does not start: told as the cell's failure.
            return Outcome(kind=Kind.HUNG, detail=_with_logs(f"{type(error).__name__}: {error}", pair))

    async def outcome(self, name: str) -> Outcome:
        """Wait for a piece of work."""
        waiting = [self.outcomes[name], *self._tasks]
        while not self.outcomes[name].done():
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                # A worker that broke takes the others' waiting with it.
                task.result()
            waiting = [one for one in waiting if not one.done()]
        return self.outcomes[name].result()


def chosen(request: pytest.FixtureRequest, argument: str) -> dict[str, Any]:
    """Return what the tests of the asking module are given as `argument`, by name, in their order."""
    here = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    values = [item.callspec.params[argument] for item in here if hasattr(item, "callspec")]
    return {value.name: value for value in values}


def _with_logs(what: str, pair: Pair) -> str:
    return "\n".join([what, *(host.log() for host in pair.hosts)])
