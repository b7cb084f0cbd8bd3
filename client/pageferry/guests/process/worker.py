"""The thread that is the guest's vCPU: it checks and rewrites page after page, and stands still when held."""

from __future__ import annotations

import asyncio
import os
import threading
import traceback
from collections import deque
from time import perf_counter_ns

from pageferry.guests.process.plan import Plan, Progress
from pageferry.vmm import GuestMemory
from pageferry.vmm.regions import PAGE_SIZE

KEPT_FINDINGS = 8


class Worker:
    """Runs a plan over memory from `progress` on, from the first `let_go` and while nobody holds it.

    `hold` and `let_go` belong to one event loop; the rest may be asked from anywhere.
    """

    def __init__(self, memory: GuestMemory, plan: Plan, progress: Progress) -> None:
        self.plan = plan
        self.steps = progress.steps
        self.errors = progress.errors
        self._memory = memory
        self._findings: deque[str] = deque(maxlen=KEPT_FINDINGS)
        self._longest_stall_ns = 0
        self._reading_since = 0
        self._holders: set[str] = set()
        self._held = False
        self._still = True
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._changed = threading.Condition()
        # A daemon: a worker that waits for a page in a fault cannot be joined.
        self._thread = threading.Thread(target=self._run, name="vcpu", daemon=True)

    async def hold(self, holder: str) -> None:
        """Make the worker stand between two steps; wait until it does. A cancelled hold is let go again."""
        with self._changed:
            self._holders.add(holder)
            self._held = True
            if self._still:
                return
            loop = asyncio.get_running_loop()
            still: asyncio.Future[None] = loop.create_future()
            self._waiting.append((loop, still))
        try:
            await still
        except asyncio.CancelledError:
            self.let_go(holder)
            raise

    def let_go(self, holder: str) -> None:
        """Let the worker run as far as this holder is concerned."""
        with self._changed:
            self._holders.discard(holder)
            self._held = bool(self._holders)
            self._changed.notify_all()
        if self._thread.ident is None:
            self._thread.start()

    def progress(self) -> Progress:
        """Return how far it is; exact while it is held."""
        return Progress(self.steps, self.errors)

    def longest_stall_ms(self) -> float:
        """Return how long a read of a page took at most, the one under way included. Since its first step."""
        since = self._reading_since
        under_way = perf_counter_ns() - since if since else 0
        return max(self._longest_stall_ns, under_way) / 1e6

    def take_findings(self) -> list[str]:
        """Return the newest findings since the last call, in words."""
        taken = []
        while self._findings:
            taken.append(self._findings.popleft())
        return taken

    def _run(self) -> None:
        try:
            while True:
                self._wait_until_free()
                while not self._held:
                    self._step()
        except BaseException:
            # A guest whose vCPU died must not look alive.
            traceback.print_exc()
            os._exit(1)

    def _wait_until_free(self) -> None:
        with self._changed:
            self._still = True
            for loop, still in self._waiting:
                loop.call_soon_threadsafe(_settle, still)
            self._waiting.clear()
            self._changed.wait_for(lambda: not self._held)
            self._still = False

    def _step(self) -> None:
        pattern = self.plan.pattern
        page, version = self.plan.page_at(self.steps), self.steps // self.plan.working
        if not pattern.untouched(page, version + 1):
            found = self._read(page)
            if found != pattern.page(page, version):
                self.errors += 1
                self._findings.append(pattern.explain(page, version, found))
            self._memory.write(page * PAGE_SIZE, pattern.page(page, version + 1))
        self.steps += 1

    def _read(self, page: int) -> bytes:
        started = self._reading_since = perf_counter_ns()
        found = self._memory.read(page * PAGE_SIZE, PAGE_SIZE)
        self._reading_since = 0
        self._longest_stall_ns = max(self._longest_stall_ns, perf_counter_ns() - started)
        return found


def _settle(still: asyncio.Future[None]) -> None:
    if not still.done():
        still.set_result(None)
