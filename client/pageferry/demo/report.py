"""What the demonstration tells a person who sees it for the first time, and what it tells a program."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from rich.padding import Padding
from rich.text import Text

from pageferry.cli import progress, tables
from pageferry.cli.output import show, to_dict
from pageferry.cli.units import count_text
from pageferry.v1 import migration_pb2 as pb
from pageferry.vmm.memory import Backing

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from pageferry.demo.scene import Child


_UNSAID: Final = frozenset({"timestamp", "logger", "host"})


@dataclass(frozen=True)
class Proof:
    """One thing that has to hold: a short stable name, whether it does, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass
class Result:
    """The outcome of a demonstration."""

    guest: str
    memory_bytes: int
    seed: int
    backing: Backing | None = None
    checks: list[pb.Check] = field(default_factory=list)
    migration: pb.Migration | None = None
    proofs: list[Proof] = field(default_factory=list)
    complete: bool = False
    """Whether it came to its end, so that no proof is missing."""

    @property
    def ok(self) -> bool:
        """Whether the guest crossed whole."""
        return self.complete and bool(self.proofs) and all(proof.ok for proof in self.proofs)

    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "ok": self.ok,
            "guest": self.guest,
            "memory_bytes": self.memory_bytes,
            "backing": (self.backing or Backing.ANONYMOUS).value,
            "seed": self.seed,
            "checks": list(map(to_dict, self.checks)),
            "migration": to_dict(self.migration) if self.migration is not None else None,
            "proofs": list(map(asdict, self.proofs)),
        }


class Narrator:
    """Tells the demonstration in short sections."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self._sections = 0

    def title(self) -> None:
        """Say what is about to be seen."""
        self.out.print(Text("pageferry demo", style="bold"))
        self.line("A running guest moves from host alpha to host beta, here two sidecars on this machine.")
        self.line("It stands still only while its registers cross; then it runs on beta, and its memory follows.")

    def section(self, title: str) -> None:
        """Begin a section."""
        self._sections += 1
        self.out.print()
        self.out.print(Text(f"{self._sections}. {title}", style="bold"))

    def line(self, text: str) -> None:
        """Say one thing."""
        self.show(Text(text))

    def show(self, what: RenderableType) -> None:
        """Show a table or the like."""
        show(self.out, Padding(what, (0, 0, 0, 3), expand=False))

    def figures(self, migration: pb.Migration) -> None:
        """Show the figures of the migration, and how long faults took."""
        self.show(tables.figures(migration))
        if progress.total_latency(migration) is not None:
            self.out.print()
            self.show(progress.latencies(migration))
            self.line("read: until the sidecar saw the fault; queued: until its page was asked for; fetched: until the")
            self.line("page was here; installed: until the guest could go on. total: what the guest felt of it all.")

    def doors(self, progress: pb.Progress) -> None:
        """Say which way the faults came, where it was not the usual one alone."""
        if progress.exit_faults:
            by_userfault = progress.faults - progress.exit_faults
            self.line(
                f"{count_text(progress.exit_faults)} faults came as exits of the vCPU, {count_text(by_userfault)} by "
                "userfaultfd."
            )

    def proof(self, proof: Proof) -> None:
        """Show one proof."""
        mark = Text("ok    ", style="green") if proof.ok else Text("FAILED ", style="red")
        self.show(Text.assemble(mark, proof.detail))

    def verdict(self, result: Result) -> None:
        """Say how it ended."""
        self.out.print()
        if result.ok:
            self.out.print(Text("The guest crossed whole.", style="bold green"))
        else:
            self.out.print(Text("The demonstration failed: see above.", style="bold red"))

    def last_words(self, children: list[Child]) -> None:
        """Show the end of each process's log, for whoever has to find out what went wrong."""
        for child in children:
            words = child.last_words()
            if words:
                self.out.print()
                self.out.print(Text(f"The last lines of {child.name}:", style="bold"))
                for word in words:
                    self.line(readable(word))


def readable(line: str) -> str:
    """Return a line of a sidecar's log as a person reads it, and any other line as it is."""
    try:
        fields = json.loads(line)
        level, event = fields.pop("level"), fields.pop("event")
    except (ValueError, KeyError, TypeError, AttributeError):
        return line
    rest = " ".join(f"{name}={value}" for name, value in fields.items() if name not in _UNSAID)
    return f"{level}: {event} {rest}".rstrip()
