"""A stand-in for Cloud Hypervisor: `python tests/cloud_hypervisor_vmm --api PATH --memory 16M [--incoming]`.

Its API, migration protocol and fault handling are written from its documentation, and share no code with the sidecar.
Its guest is the process guest's: it finds every wrong page. `--behave` names one way in which it is a bad VMM.
"""

from __future__ import annotations

import argparse
import asyncio

# Loaded when it is first used, when another user may not read it any more.
import concurrent.futures.thread  # noqa: F401
import os
import sys

from ch_api import ApiServer
from ch_memory import TwoRegions
from ch_vm import MIB, Vmm

from pageferry.guests.control import run_control
from pageferry.guests.pattern import HOLE_BLOCK
from pageferry.guests.process.plan import Order, Plan


def main() -> None:
    sys.setswitchinterval(0.0005)
    parser = argparse.ArgumentParser()
    parser.add_argument("--api", required=True)
    parser.add_argument("--memory", type=int, default=16, help="MiB")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--working-set", type=float, default=1.0)
    parser.add_argument("--incoming", action="store_true")
    parser.add_argument("--unshared", action="store_true")
    parser.add_argument("--answers-late", action="store_true", help="send-migration answers when it has ended")
    parser.add_argument("--uid", type=int, default=0, help="run as this user")
    parser.add_argument("--behave", default="")
    arguments = parser.parse_args()
    if arguments.uid:
        os.setresgid(arguments.uid, arguments.uid, arguments.uid)
        os.setresuid(arguments.uid, arguments.uid, arguments.uid)
    asyncio.run(serve(arguments))


async def serve(arguments: argparse.Namespace) -> None:
    vmm = Vmm(arguments.behave, arguments.answers_late)
    if not arguments.incoming:
        pages = arguments.memory * MIB // 4096
        working = max(1, round(pages * arguments.working_set))
        plan = Plan(arguments.seed, pages, working, HOLE_BLOCK // 4, Order.RANDOM)
        vmm.boot(TwoRegions.made(arguments.memory * MIB), plan, shared=not arguments.unshared)
    server = ApiServer(vmm)
    await server.start(arguments.api)
    await run_control(vmm, server)  # type: ignore[arg-type]
    os._exit(0)


if __name__ == "__main__":
    main()
