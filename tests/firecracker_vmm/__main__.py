"""Run one stand-in: `python -m firecracker_vmm --api-sock PATH [--boot 64]`, with tests/ on the path."""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures.thread  # noqa: F401 - nothing can be imported any more from inside a jail
import ctypes
import encodings.idna  # noqa: F401
import json
import os
import sys

from firecracker_vmm.guest import Kind
from firecracker_vmm.http import ApiServer
from firecracker_vmm.memory import MIB
from firecracker_vmm.vmm import Vmm
from pageferry.guests.control import run_control

_PR_SET_DUMPABLE = 4


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--api-sock", required=True)
    parser.add_argument("--id", default="anonymous-instance")
    parser.add_argument("--release", default="1.16.0")
    parser.add_argument("--boot", type=int, default=0, metavar="MIB", help="run a guest; otherwise wait for one")
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--guarded", action="store_true", help="guard pages around regions, as old releases")
    parser.add_argument("--track-dirty-pages", action="store_true")
    parser.add_argument("--working-set", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--config", type=json.loads, default={}, help="more of GET /vm/config, as JSON")
    parser.add_argument("--behave", default="")
    parser.add_argument("--device", type=int, default=-1, help="an open /dev/userfaultfd")
    parser.add_argument("--jail", default="", help="a root directory, in which the API socket's path is")
    parser.add_argument("--uid", type=int, default=-1, help="whom to become, in the jail")
    return parser.parse_args()


def _enter_jail(arguments: argparse.Namespace) -> None:
    """As the jailer does: a root of its own, a user without privileges, and then as if freshly executed."""
    if arguments.jail:
        os.chroot(arguments.jail)
        os.chdir("/")
    if arguments.uid >= 0:
        os.setgroups([])
        os.setresgid(arguments.uid, arguments.uid, arguments.uid)
        os.setresuid(arguments.uid, arguments.uid, arguments.uid)
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


async def _serve(arguments: argparse.Namespace) -> None:
    vmm = Vmm(arguments.id, arguments.release, arguments.behave, arguments.device)
    if arguments.boot:
        kind = Kind(
            arguments.boot * MIB,
            (2 * MIB) if arguments.huge_pages else 4096,
            arguments.guarded,
            arguments.seed,
            arguments.working_set,
        )
        vmm.boot(kind, tracks=arguments.track_dirty_pages, extra=arguments.config)
    server = ApiServer(vmm)
    await server.start(arguments.api_sock)
    await run_control(vmm, server)
    os._exit(0)


def main() -> None:
    sys.setswitchinterval(0.0005)
    arguments = _arguments()
    _enter_jail(arguments)
    asyncio.run(_serve(arguments))


main()
