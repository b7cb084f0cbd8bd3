"""The kill matrix: who is killed or cut, and at which step of a migration."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from dataclasses import dataclass

LONG = os.environ.get("PAGEFERRY_CHAOS") == "long"
"""Whether everything runs, and not a short choice."""


class Who(enum.StrEnum):
    """What happens, and to whom."""

    SOURCE_KILLED = "source-killed"
    SOURCE_TOLD = "source-told"
    DESTINATION_KILLED = "destination-killed"
    DESTINATION_TOLD = "destination-told"
    BOTH_KILLED = "both-killed"
    CUT = "cut"
    BLACK_HOLE = "black-hole"
    SOURCE_VMM = "source-vmm"
    SOURCE_VMM_SHARED = "source-vmm-shared"
    DESTINATION_VMM = "destination-vmm"

    @property
    def at_source(self) -> bool:
        """Whether the source's sidecar ends."""
        return self in (Who.SOURCE_KILLED, Who.SOURCE_TOLD, Who.BOTH_KILLED)

    @property
    def told(self) -> bool:
        """Whether the sidecar ends in its own time."""
        return self in (Who.SOURCE_TOLD, Who.DESTINATION_TOLD)

    @property
    def at_destination(self) -> bool:
        """Whether the destination's sidecar ends."""
        return self in (Who.DESTINATION_KILLED, Who.DESTINATION_TOLD, Who.BOTH_KILLED)


class Place(enum.Enum):
    """Where a step can be held."""

    WIRE = enum.auto()
    SOURCE_VMM = enum.auto()
    DESTINATION_VMM = enum.auto()


class Stage(enum.IntEnum):
    """How far the guest has gone at a step."""

    BEFORE = 0
    """The destination has not been told to run it."""
    AT = 1
    """The destination is being told."""
    AFTER = 2
    """The destination knows that the guest is its own."""
    WHOLE = 3
    """Every page is there."""


@dataclass(frozen=True)
class Step:
    """A message or a call, before it is delivered ("request", "before") or its answer is ("answer", "after")."""

    place: Place
    call: str
    phase: str
    stage: Stage
    nth: int = 1
    lanes_over_grpc: bool = False

    @property
    def name(self) -> str:
        return f"{'grpc-' if self.lanes_over_grpc else ''}{self.call}-{self.phase}".lower()

    @property
    def to_source(self) -> bool:
        """Whether what is held is on its way to the source's sidecar."""
        pages = self.call in ("GetLayout", "FetchPages", "PushPages", "Complete")
        return self.place is Place.WIRE and pages == (self.phase == "request")

    @property
    def to_destination(self) -> bool:
        """Whether what is held is on its way to the destination's sidecar."""
        return self.place is Place.WIRE and not self.to_source


def _wire(call: str, phase: str, stage: Stage, nth: int = 1, *, lanes_over_grpc: bool = False) -> Step:
    return Step(Place.WIRE, call, phase, stage, nth, lanes_over_grpc)


_A, _B = Place.SOURCE_VMM, Place.DESTINATION_VMM
STEPS: tuple[Step, ...] = (
    _wire("Probe", "request", Stage.BEFORE),
    _wire("Probe", "answer", Stage.BEFORE),
    _wire("Prepare", "request", Stage.BEFORE),
    _wire("GetLayout", "answer", Stage.BEFORE),
    Step(_B, "AttachPager", "before", Stage.BEFORE),
    Step(_B, "AttachPager", "after", Stage.BEFORE),
    _wire("Prepare", "answer", Stage.BEFORE),
    Step(_A, "Pause", "before", Stage.BEFORE),
    Step(_A, "Pause", "after", Stage.BEFORE),
    Step(_A, "SaveState", "before", Stage.BEFORE),
    Step(_A, "SaveState", "after", Stage.BEFORE),
    _wire("HandOver", "request", Stage.BEFORE),
    Step(_B, "LoadState", "before", Stage.BEFORE),
    Step(_B, "LoadState", "after", Stage.BEFORE),
    _wire("HandOver", "answer", Stage.BEFORE),
    _wire("Commit", "request", Stage.AT),
    Step(_B, "Resume", "before", Stage.AFTER),
    Step(_B, "Resume", "after", Stage.AFTER),
    _wire("Commit", "answer", Stage.AFTER),
    _wire("FetchPages", "request", Stage.AFTER),
    _wire("FetchPages", "answer", Stage.AFTER),
    _wire("FetchPages", "answer", Stage.AFTER, lanes_over_grpc=True),
    _wire("PushPages", "answer", Stage.AFTER, nth=3),
    _wire("PushPages", "answer", Stage.AFTER, nth=3, lanes_over_grpc=True),
    _wire("Complete", "request", Stage.WHOLE),
    _wire("Complete", "answer", Stage.WHOLE),
    Step(_B, "DetachPager", "before", Stage.WHOLE),
    Step(_B, "DetachPager", "after", Stage.WHOLE),
    Step(_A, "Kill", "before", Stage.WHOLE),
)


@dataclass(frozen=True)
class Cell:
    """One failure at one step. What is held is then delivered, or lost with the connection that it was on.

    `late`: a call that a VMM holds goes on when the sidecar that ended runs again already.
    """

    who: Who
    step: Step
    deliver: bool = True
    late: bool = False

    @property
    def name(self) -> str:
        variant = "" if self.deliver else "-lost"
        return f"{self.who}:{self.step.name}{variant}{'-late' if self.late else ''}"


def _variants(who: Who, step: Step) -> Iterator[Cell]:
    if who is Who.CUT:
        yield Cell(who, step, deliver=step.place is not Place.WIRE)
        return
    ends = who.at_source or who.at_destination
    receiver_ends = (who.at_source and step.to_source) or (who.at_destination and step.to_destination)
    # Who was killed gets no answer to what it asked before.
    if who.told or not (receiver_ends and step.phase == "answer"):
        yield Cell(who, step)
    if ends and step.place is Place.WIRE:
        yield Cell(who, step, deliver=False)
    of_its_own = (who.at_source and step.place is Place.SOURCE_VMM) or (
        who.at_destination and step.place is Place.DESTINATION_VMM
    )
    if of_its_own and not who.told:
        yield Cell(who, step, late=True)


CELLS: tuple[Cell, ...] = tuple(cell for who in Who for step in STEPS for cell in _variants(who, step))
"""The whole matrix."""

_SHORT = (
    "source-killed:prepare-answer-lost",
    "source-killed:pause-after",
    "source-killed:handover-request",
    "source-killed:commit-request",
    "source-killed:commit-request-lost",
    "source-killed:pushpages-answer-lost",
    "source-killed:complete-request",
    "source-told:handover-answer-lost",
    "source-told:pushpages-answer",
    "destination-killed:attachpager-after",
    "destination-killed:handover-answer",
    "destination-killed:commit-request",
    "destination-killed:resume-before",
    "destination-killed:pushpages-answer-lost",
    "destination-killed:complete-answer-lost",
    "destination-told:commit-answer-lost",
    "destination-told:fetchpages-answer",
    "both-killed:commit-request",
    "both-killed:pushpages-answer-lost",
    "cut:commit-request-lost",
    "cut:commit-answer-lost",
    "cut:grpc-pushpages-answer-lost",
    "black-hole:handover-request",
    "source-vmm:pushpages-answer",
    "source-vmm-shared:pushpages-answer",
    "destination-vmm:loadstate-after",
)


def short() -> list[Cell]:
    """Return what stands for the whole where time is short."""
    by_name = {cell.name: cell for cell in CELLS}
    return [by_name[name] for name in _SHORT]
