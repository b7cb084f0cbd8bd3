"""The demonstration from its start to its verdict."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pageferry.cli import live, tables
from pageferry.cli.progress import PAGE_BYTES
from pageferry.cli.units import bytes_text, count_text
from pageferry.demo.guests import Guest, Kind, start_guest
from pageferry.demo.machine import Memory, available_memory, choose_memory, kind_for
from pageferry.demo.report import Narrator, Proof, Result
from pageferry.demo.scene import Scene, together
from pageferry.demo.sidecars import Sidecar, start_sidecar
from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb
from pageferry.vmm.memory import Backing

if TYPE_CHECKING:
    from rich.console import Console

    from pageferry.client import SidecarClient

GUEST_ID: Final = "demo"
EXIT_SECONDS: Final = 10.0
_KINDS: Final = {
    Kind.KVM: "A virtual machine (KVM, one vCPU in 64-bit mode)",
    Kind.PROCESS: "A process",
}


@dataclass(frozen=True)
class Options:
    """What the person asked for; None leaves it to the machine."""

    kind: Kind | None = None
    memory: Memory | None = None
    seed: int = 1
    keep: bool = False
    timeout: float = 120.0


async def run(options: Options, out: Console) -> Result:
    """Run the demonstration, telling it on `out`. Raises FerryError where it could not come to a verdict."""
    wanted = options.memory or Memory()
    kind = kind_for(options.kind, wanted.backing)
    memory = wanted.size or choose_memory(available_memory())
    if memory % PAGE_BYTES:
        raise FerryError(Reason.INVALID_ARGUMENT, f"{memory} bytes of memory are not whole pages of {PAGE_BYTES}")
    result = Result(kind.value, memory, options.seed, wanted.backing)
    narrator = Narrator(out)
    narrator.title()
    async with Scene(keep=options.keep) as scene:
        if options.keep:
            narrator.line(f"Logs and sockets are kept in {scene.directory}")
        try:
            async with asyncio.timeout(options.timeout):
                await _Demonstration(scene, narrator, result, kind).play()
        except FerryError:
            narrator.last_words(scene.children)
            raise
        except TimeoutError:
            narrator.last_words(scene.children)
            raise FerryError(
                Reason.INTERNAL, f"the demonstration took longer than {options.timeout:g} s; give more with --timeout"
            ) from None
        if result.migration is not None and not result.ok:
            narrator.last_words(scene.children)
    narrator.verdict(result)
    return result


class _Demonstration:
    def __init__(self, scene: Scene, narrator: Narrator, result: Result, kind: Kind) -> None:
        self._scene = scene
        self._tell = narrator
        self._result = result
        self._kind = kind

    async def play(self) -> None:
        alpha, beta = await self._start_sidecars()
        async with AsyncExitStack() as clients:
            at_alpha = await clients.enter_async_context(alpha.client())
            at_beta = await clients.enter_async_context(beta.client())
            if not await self._preflight(at_alpha, beta):
                return
            source, destination = await self._start_guests(at_alpha, at_beta)
            running = await self._migrate(at_alpha, at_beta, beta, source, destination)
        if running is not None:
            await self._prove(alpha, beta, source, destination, running)
            self._result.complete = True

    async def _start_sidecars(self) -> tuple[Sidecar, Sidecar]:
        self._tell.section("Two sidecars, as on two hosts")
        # Together, since most of their time is Python's start.
        alpha, beta = await together(start_sidecar(self._scene, "alpha"), start_sidecar(self._scene, "beta"))
        for sidecar, role in ((alpha, "the guest leaves this host"), (beta, "the guest goes to this host")):
            self._tell.line(
                f"{sidecar.name:5}  gRPC {sidecar.address}, metrics http://{sidecar.http}/metrics, "
                f"pid {sidecar.child.pid}: {role}"
            )
        return alpha, beta

    async def _preflight(self, at_alpha: SidecarClient, beta: Sidecar) -> bool:
        """Tell whether this machine can do it."""
        self._tell.section("Preflight: what post-copy needs of this machine")
        found = await at_alpha.preflight(destination_address=beta.address, destination_name=beta.name)
        self._result.checks = [*found.checks, *found.destination_checks]
        self._tell.show(tables.checks(found.checks))
        failures = sum(check.status == pb.CHECK_STATUS_FAILED for check in found.destination_checks)
        self._tell.line(f"beta made {len(found.destination_checks)} checks of its own; {failures} failed.")
        # Both sidecars are on this machine and find much the same: each failure is told once.
        failed = {check.name: check for check in self._result.checks if check.status == pb.CHECK_STATUS_FAILED}
        for check in failed.values():
            self._prove_that(
                f"preflight {check.name}", ok=False, detail=f"{check.name}: {check.detail}; {check.remedy}"
            )
        return not failed

    async def _start_guests(self, at_alpha: SidecarClient, at_beta: SidecarClient) -> tuple[Guest, Guest]:
        memory, seed, backing = self._result.memory_bytes, self._result.seed, self._result.backing
        self._tell.section("A guest that runs on alpha, and an empty one that waits on beta")
        source, destination = await together(
            start_guest(self._scene, "guest", self._kind, memory, seed, backing=backing),
            start_guest(self._scene, "incoming", self._kind, memory, seed, incoming=True, backing=backing),
        )
        self._tell.line(f"{_KINDS[self._kind]} with {bytes_text(memory)} of memory, pid {source.child.pid}.")
        if backing is Backing.GUEST_MEMFD:
            self._tell.line(
                "Its memory is a guest_memfd, which no userfaultfd can watch: its vCPU exits on pages that are "
                "missing, and the VMM forwards these faults."
            )
        self._tell.line(
            "Step by step it checks a page and writes its next version: lost, old or foreign ones are seen."
        )
        await at_alpha.register_guest(GUEST_ID, str(source.socket))
        await at_beta.register_guest(GUEST_ID, str(destination.socket))
        await source.runs_beyond(source.steps)
        self._tell.line(f"It runs: {count_text(source.steps)} steps so far.")
        return source, destination

    async def _migrate(
        self, at_alpha: SidecarClient, at_beta: SidecarClient, beta: Sidecar, source: Guest, destination: Guest
    ) -> int | None:
        """Move the guest; return the steps it had done when it was first seen to run at beta, or None."""
        self._tell.section("Migration: it runs on beta at once, and each page that it touches comes first")
        started = await at_alpha.start_migration(
            GUEST_ID, beta.address, request_id=str(uuid.uuid4()), destination_name=beta.name
        )
        async with aclosing(at_alpha.watch_migration(started.migration_id)) as looks:
            ended = await live.follow(looks, self._tell.out)
        if ended.state != pb.MIGRATION_STATE_COMPLETED:
            self._result.migration = ended
            reason = f"{ended.error.reason}: {ended.error.message}"
            self._prove_that("completed", ok=False, detail=f"the migration did not complete: {reason}")
            return None
        # The destination saw the faults; only the source knows how long the guest stood still.
        self._result.migration = await at_beta.get_migration(started.migration_id)
        self._result.migration.downtime.CopyFrom(ended.downtime)
        self._tell.section("The figures of this migration")
        self._tell.figures(self._result.migration)
        self._tell.doors(self._result.migration.progress)
        await destination.runs_beyond(source.steps)
        return destination.steps

    async def _prove(self, alpha: Sidecar, beta: Sidecar, source: Guest, destination: Guest, running: int) -> None:
        self._tell.section("Proof")
        gone = await source.child.exited(EXIT_SECONDS)
        self._prove_that(
            "source_gone",
            ok=gone,
            detail=f"the guest's process on alpha (pid {source.child.pid}) {'has gone' if gone else 'is still there'}",
        )
        # Every page is here: a guest that still needed a sidecar would now stop.
        await alpha.child.end()
        await beta.child.end()
        await destination.runs_beyond(running)
        went_on = destination.steps > running >= source.steps
        self._prove_that(
            "went_on",
            ok=went_on,
            detail=f"on beta it ran on, from about step {count_text(source.steps)} to {count_text(destination.steps)}, "
            "the last of them with both sidecars stopped: it needs them no more",
        )
        pages, bad = await destination.verify()
        whole = pages * PAGE_BYTES == self._result.memory_bytes and not bad
        self._prove_that(
            "memory_intact",
            ok=whole,
            detail=f"every byte of {count_text(pages)} pages checked: {count_text(bad)} bad pages",
        )
        self._prove_that(
            "no_errors",
            ok=not destination.errors and not destination.findings,
            detail=f"the guest itself came across {count_text(destination.errors)} wrong pages while it ran",
        )
        for finding in (*(destination.verified or {}).get("first_bad", ()), *destination.findings):
            self._tell.line(str(finding))

    def _prove_that(self, name: str, *, ok: bool, detail: str) -> None:
        proof = Proof(name, ok, detail)
        self._result.proofs.append(proof)
        self._tell.proof(proof)
