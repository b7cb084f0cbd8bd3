"""Run one process guest: `python -m pageferry.guests.process --socket PATH --memory 64M --seed 7`."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys

from pageferry.errors import FerryError
from pageferry.guests.control import run_control
from pageferry.guests.pattern import HOLE_BLOCK
from pageferry.guests.process.guest import ProcessGuest
from pageferry.guests.process.plan import Order, Plan
from pageferry.vmm import Backing, GuestMemory, VmmServer
from pageferry.vmm.regions import PAGE_SIZE

SWITCH_SECONDS = 0.0005
"""The event loop takes the GIL from the worker after so long: Python's own 5 ms would be felt in every pause."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main() -> None:
    """Run until told to end, and exit."""
    sys.setswitchinterval(SWITCH_SECONDS)
    arguments = _arguments()
    try:
        asyncio.run(_serve(arguments))
    except FerryError as error:
        print(f"pageferry process guest: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


async def _serve(arguments: argparse.Namespace) -> None:
    memory = GuestMemory(arguments.memory, arguments.backing)
    guest = ProcessGuest(memory) if arguments.incoming else ProcessGuest.started(memory, _plan(arguments))
    server = VmmServer()
    await server.start(guest, arguments.socket)
    await run_control(guest, server, detach=arguments.detach)
    # Not a return: a thread that waits for a page in a fault would hold the end of the interpreter up.
    os._exit(0)


def _plan(arguments: argparse.Namespace) -> Plan:
    pages = arguments.memory // PAGE_SIZE
    return Plan(
        seed=arguments.seed,
        pages=pages,
        working=max(1, round(pages * arguments.working_set)),
        holes=round(HOLE_BLOCK * arguments.sparse),
        order=arguments.order,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pageferry.guests.process",
        description="A guest that checks and rewrites its memory without stopping, and finds every wrong page.",
    )
    parser.add_argument("--socket", required=True, metavar="PATH", help="where to serve the VmmService")
    parser.add_argument("--memory", required=True, type=_size, metavar="SIZE", help="bytes, or with K, M or G: 64M")
    parser.add_argument("--seed", type=int, default=0, help="decides all contents and the order (default 0)")
    parser.add_argument("--incoming", action="store_true", help="wait for a guest, whose state then decides the rest")
    parser.add_argument(
        "--backing",
        type=Backing,
        choices=[one for one in Backing if one is not Backing.GUEST_MEMFD],
        default=Backing.ANONYMOUS,
    )
    parser.add_argument("--order", type=Order, choices=list(Order), default=Order.RANDOM)
    parser.add_argument("--sparse", type=_fraction, default=0.25, help="fraction of pages that are holes at first")
    parser.add_argument("--working-set", type=_fraction, default=1.0, help="fraction of pages that are worked on")
    parser.add_argument("--detach", action="store_true", help="go on after the end of stdin")
    return parser.parse_args()


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 67108864, 65536K, 64M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1")
    return value


if __name__ == "__main__":
    main()
