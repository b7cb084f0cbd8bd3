"""What a fuzz target is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from pageferry.errors import FerryError
from pageferryd.core.errors import CoreError

EFFORT = 50 if os.environ.get("PAGEFERRY_CHAOS") == "long" else 1
"""How many times the usual examples are tried."""
REFUSALS = (FerryError, CoreError)


@dataclass(frozen=True)
class Target:
    """One parser: `run` reads bytes, checks what it made of them, and raises `refusals` alone for those it refuses.

    `seeds` are valid messages, and those that were read wrongly once. Called, it passes over refusals, and any other
    exception is a hole.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Sequence[bytes]
    refusals: tuple[type[Exception], ...] = REFUSALS
    examples: int = 400
    """How many in the short mode."""

    def __call__(self, data: bytes) -> None:
        try:
            self.run(data)
        except self.refusals:
            return


def in_loop(run: Callable[[bytes], Coroutine[Any, Any, None]]) -> Callable[[bytes], None]:
    """Make a plain function of one that needs an event loop, with a new one each time."""

    def run_it(data: bytes) -> None:
        failures: list[dict[str, Any]] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
            async with asyncio.timeout(20):
                await run(data)

        with asyncio.Runner() as runner:
            runner.run(watched())
        assert not failures, failures

    return run_it
