"""The demo command."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Annotated

import typer
from rich.console import Console

from pageferry.cli.options import Json
from pageferry.cli.output import console, print_json
from pageferry.demo.guests import Kind
from pageferry.demo.machine import Memory, parse_memory
from pageferry.demo.report import Result
from pageferry.demo.run import Options, run
from pageferry.errors import FerryError, Reason


def _parsed(value: str) -> Memory:
    try:
        return parse_memory(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


DemoMemory = Annotated[
    Memory | None,
    typer.Option(
        "--memory",
        parser=_parsed,
        metavar="SIZE|BACKING[:SIZE]",
        help="Memory of the guest, in whole pages of 4 KiB, and what backs it: anonymous, shmem or guest_memfd, as in "
        "guest_memfd:256M. Default: 512M, or less where little is free, of anonymous memory.",
    ),
]


def demo(
    guest: Annotated[
        Kind | None, typer.Option(help="Which guest. Default: kvm where /dev/kvm can be used, else process.")
    ] = None,
    memory: DemoMemory = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Decides what the guest's memory holds.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the logs, and say where.")] = False,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Give up after so long.")] = 120,
    as_json: Json = False,
) -> None:
    """Move a running guest between two sidecars on this machine.

    Needs no sidecar: it starts two, and a guest, and ends them all. Exit status 0 only when the guest went on running
    at its destination, and every byte of its memory is intact.
    """
    # The story goes to stderr when stdout is for a program.
    out = console(sys.stderr if as_json else None)
    result = asyncio.run(_run(Options(guest, memory, seed, keep, timeout), out))
    if as_json:
        print_json(result.document())
    if not result.ok:
        raise typer.Exit(1)


async def _run(options: Options, out: Console) -> Result:
    """Run it so that SIGTERM and a closed terminal end it as Ctrl-C does: with everything that it has started."""
    loop = asyncio.get_running_loop()
    demonstration = asyncio.create_task(run(options, out))
    told: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        told.append(number)
        demonstration.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    try:
        return await demonstration
    except asyncio.CancelledError:
        if told:
            raise FerryError(Reason.CANCELLED, f"ended by {told[0].name}") from None
        raise
