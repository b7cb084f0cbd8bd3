"""`python -m pageferry.guests.kvm`: run the KVM guest, or wait for one to come in."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
from collections.abc import Sequence

from pageferry.errors import FerryError
from pageferry.guests.control import run_control
from pageferry.guests.kvm.guest import KvmGuest
from pageferry.guests.kvm.program import Order
from pageferry.vmm import Backing, VmmServer

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to end; return the exit code: 2 when the guest cannot be started."""
    options = _parser().parse_args(arguments)
    try:
        asyncio.run(_serve(options))
    except FerryError as error:
        print(f"kvm guest: {error}", file=sys.stderr)
        return 2
    return 0


async def _serve(options: argparse.Namespace) -> None:
    guest = KvmGuest(options.memory, options.backing, on_kill=_end_this_process)
    server = VmmServer()
    if not options.incoming:
        guest.boot(options.seed, options.order)
    await server.start(guest, options.socket)
    await run_control(guest, server, detach=options.detach)


def _end_this_process() -> None:
    """End as by SIGTERM, which `run_control` obeys whatever the guest is doing."""
    os.kill(os.getpid(), signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pageferry.guests.kvm", description=__doc__)
    parser.add_argument("--socket", required=True, metavar="PATH", help="Unix socket to serve the VmmService on")
    parser.add_argument("--memory", type=_size, default=64 << 20, metavar="SIZE", help="bytes, or e.g. 64M (default)")
    parser.add_argument("--seed", type=int, default=7, help="decides the contents of memory; unused with --incoming")
    parser.add_argument("--order", type=Order, choices=list(Order), default=Order.RANDOM, help="order of the pages")
    parser.add_argument("--incoming", action="store_true", help="wait for a guest to come in")
    parser.add_argument(
        "--backing",
        type=Backing,
        choices=[Backing.ANONYMOUS, Backing.SHMEM, Backing.GUEST_MEMFD],
        default=Backing.ANONYMOUS,
    )
    parser.add_argument("--detach", action="store_true", help="go on after the end of stdin")
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 67108864, 65536K, 64M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


if __name__ == "__main__":
    sys.exit(main())
