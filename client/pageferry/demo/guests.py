"""The guest of the demonstration, and the empty one that waits for it: processes with a line of JSON an event."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from pathlib import Path

    from pageferry.demo.scene import Child, Scene

READY_SECONDS: Final = 30.0
RUN_SECONDS: Final = 20.0
VERIFY_SECONDS: Final = 60.0
_MOST_FINDINGS: Final = 8


class Kind(StrEnum):
    """Which of the two guests: a virtual machine, or a process."""

    KVM = "kvm"
    PROCESS = "process"


MODULES = {Kind.KVM: "pageferry.guests.kvm", Kind.PROCESS: "pageferry.guests.process"}


@dataclass
class Guest:
    """What a guest has said so far, and what can be asked of it."""

    kind: Kind
    socket: Path
    ready: bool = False
    steps: int = 0
    errors: int = 0
    state: str = ""
    findings: list[str] = field(default_factory=list)
    """Wrong pages and other errors, in the guest's words."""
    verified: dict[str, Any] | None = None
    _child: Child | None = None

    @property
    def child(self) -> Child:
        """Its process."""
        if self._child is None:
            raise RuntimeError("the guest was not started")
        return self._child

    def hear(self, line: bytes) -> None:
        """Take one line of its stdout."""
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self._note(f"said something that is no event: {line[:200]!r}")
            return
        match event.get("event"):
            case "ready":
                self.ready = True
            case "progress" | "status":
                self.steps, self.errors, self.state = event["steps"], event["errors"], event["state"]
            case "error":
                self._note(str(event.get("message")))
            case "verified":
                self.verified = event

    def _note(self, finding: str) -> None:
        if len(self.findings) < _MOST_FINDINGS:
            self.findings.append(finding)

    async def runs_beyond(self, steps: int) -> None:
        """Wait until it runs, and has done more steps than that, or has found an error."""
        await self.child.until(
            lambda: (self.state == "running" and self.steps > steps) or bool(self.findings),
            RUN_SECONDS,
            f"its step {steps + 1}",
        )

    async def verify(self) -> tuple[int, int]:
        """Have it check every byte of its memory; return how many pages it checked, and how many were bad."""
        self.verified = None
        heard = len(self.findings)
        await self.child.say("verify")
        await self.child.until(
            lambda: self.verified is not None or len(self.findings) > heard, VERIFY_SECONDS, "the check of its memory"
        )
        # What a running guest finds wrong meanwhile comes as an error too; the check's own answer is still to come.
        if self.verified is None:
            raise FerryError(Reason.VMM_FAILED, f"{self.child.name} found errors: {'; '.join(self.findings)}")
        return int(self.verified["pages"]), int(self.verified["bad"])


async def start_guest(
    scene: Scene, name: str, kind: Kind, memory: int, seed: int, *, incoming: bool = False, backing: str | None = None
) -> Guest:
    """Start a guest that runs, or one that waits for its state and memory, and wait until it can be registered."""
    guest = Guest(kind, scene.directory / f"{name}.sock")
    arguments = ["-m", MODULES[kind], "--socket", str(guest.socket), "--memory", str(memory)]
    arguments += ["--backing", backing] if backing is not None else []
    arguments += ["--incoming"] if incoming else ["--seed", str(seed)]
    guest._child = await scene.spawn_python(name, arguments, guest.hear, heard="stdout", gone=Reason.VMM_GONE)  # noqa: SLF001
    await guest.child.until(lambda: guest.ready, READY_SECONDS, "it to be ready")
    return guest
