"""What a VMM and its pager say to each other about faults, as values: the enums and messages of fault.proto."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2 as pb


@dataclass(frozen=True)
class FaultEndpoint:
    """Where the FaultService of one guest answers: the path of its Unix socket, and the secret to show there."""

    socket_path: str
    token: bytes

    def __repr__(self) -> str:
        return f"FaultEndpoint({self.socket_path!r})"


class Access(enum.Enum):
    """What a vCPU was about to do."""

    UNKNOWN = pb.ACCESS_UNSPECIFIED
    READ = pb.ACCESS_READ
    WRITE = pb.ACCESS_WRITE
    EXEC = pb.ACCESS_EXEC


class Outcome(enum.Enum):
    """How a fault was resolved."""

    INSTALLED = pb.OUTCOME_INSTALLED
    """The page's bytes are in place, and its userfault bit is clear."""
    ZERO = pb.OUTCOME_ZERO
    """The page is in place and zero."""
    DELIVERED = pb.OUTCOME_DELIVERED
    """The bytes are in the resolution, for the VMM to import and to report."""
    POISONED = pb.OUTCOME_POISONED
    """The source could not read the page: the guest must get a memory error, never zeroes."""
    SPURIOUS = pb.OUTCOME_SPURIOUS
    """The page was in place already."""


class ImportResult(enum.Enum):
    """How the import of a delivered page ended."""

    DONE = pb.IMPORT_RESULT_DONE
    STALE = pb.IMPORT_RESULT_STALE
    """The guest has moved on from this version of the page: harmless."""
    DUPLICATE = pb.IMPORT_RESULT_DUPLICATE
    """The page was imported before: harmless."""
    FAILED = pb.IMPORT_RESULT_FAILED
    """The page is fetched again."""


@dataclass(frozen=True)
class Resolution:
    """What became of `size` bytes of the guest from `guest_address` on.

    The others matter with DELIVERED: what the pages are, their bytes as the source's VMM exported them (empty for a
    page that is only pending), and the source's opaque metadata. `bundle_addresses` are the guest addresses of all
    pages of a bundle, which is imported whole, `stream` and `epoch` its own; `guest_address` is its first page then.
    """

    guest_address: int
    size: int
    outcome: Outcome
    private: bool = False
    payload: bytes = b""
    metadata: bytes = b""
    bundle_addresses: tuple[int, ...] = ()
    stream: int = 0
    epoch: int = 0


@dataclass(frozen=True)
class Import:
    """The end of the import of delivered pages; address and size in bytes."""

    guest_address: int
    size: int
    result: ImportResult


_OUTCOMES: Final[dict[int, Outcome]] = {outcome.value: outcome for outcome in Outcome}


def sharing(*, private: bool) -> pb.Sharing.ValueType:
    """Return the wire's word for pages that are the guest's alone, or shared with the host."""
    return pb.SHARING_PRIVATE if private else pb.SHARING_SHARED


def read_resolution(response: pb.ResolveFaultsResponse) -> Resolution:
    """Return what a response says. FerryError with the pager's reason where it refused the fault."""
    if response.outcome == pb.OUTCOME_REFUSED:
        reason = Reason(response.reason) if response.reason in Reason.__members__ else Reason.INTERNAL
        raise FerryError(
            reason, f"the pager refused the fault at {response.guest_address:#x}: {response.message or response.reason}"
        )
    outcome = _OUTCOMES.get(response.outcome)
    if outcome is None:
        raise FerryError(
            Reason.PROTOCOL_MISMATCH,
            f"the pager gave the fault at {response.guest_address:#x} the unknown outcome {response.outcome}: it is of "
            "another release",
        )
    return Resolution(
        response.guest_address,
        response.size,
        outcome,
        response.sharing == pb.SHARING_PRIVATE,
        response.payload,
        response.metadata,
        tuple(response.bundle_addresses),
        response.stream,
        response.epoch,
    )
