"""The errors of pageferry: a stable reason, a sentence for a person, and the gRPC status that carries both.

On the wire an error is a gRPC status with one `google.rpc.ErrorInfo` (domain `pageferry`) in its details.
"""

from __future__ import annotations

import contextlib
from enum import StrEnum
from typing import TYPE_CHECKING

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

if TYPE_CHECKING:
    from collections.abc import Mapping

DOMAIN = "pageferry"


class Reason(StrEnum):
    """Why something failed. Values are part of the API and never change their meaning."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNKNOWN_GUEST = "UNKNOWN_GUEST"
    UNKNOWN_MIGRATION = "UNKNOWN_MIGRATION"
    GUEST_BUSY = "GUEST_BUSY"
    GUEST_EXISTS = "GUEST_EXISTS"
    GUEST_NOT_RUNNING = "GUEST_NOT_RUNNING"
    GUEST_NOT_INCOMING = "GUEST_NOT_INCOMING"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    TOO_MANY_MIGRATIONS = "TOO_MANY_MIGRATIONS"
    DESTINATION_UNREACHABLE = "DESTINATION_UNREACHABLE"
    DESTINATION_REFUSED = "DESTINATION_REFUSED"
    SOURCE_UNREACHABLE = "SOURCE_UNREACHABLE"
    SOURCE_LOST = "SOURCE_LOST"
    PROTOCOL_MISMATCH = "PROTOCOL_MISMATCH"
    LAYOUT_INVALID = "LAYOUT_INVALID"
    LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
    PAGE_OUT_OF_RANGE = "PAGE_OUT_OF_RANGE"
    MALFORMED_PAGES = "MALFORMED_PAGES"
    UNREQUESTED_PAGES = "UNREQUESTED_PAGES"
    LANE_LOST = "LANE_LOST"
    LANE_SILENT = "LANE_SILENT"
    HANDOFF_TIMEOUT = "HANDOFF_TIMEOUT"
    HANDOFF_NO_FD = "HANDOFF_NO_FD"
    HANDOFF_MALFORMED = "HANDOFF_MALFORMED"
    HANDOFF_REGIONS = "HANDOFF_REGIONS"
    HANDOFF_WRONG_PEER = "HANDOFF_WRONG_PEER"
    PEER_NOT_ALLOWED = "PEER_NOT_ALLOWED"
    ROLE_MISSING = "ROLE_MISSING"
    TOKEN_INVALID = "TOKEN_INVALID"  # noqa: S105 - a reason, not a secret
    ILLEGAL_STATE = "ILLEGAL_STATE"
    ALREADY_COMMITTED = "ALREADY_COMMITTED"
    ABORTED_BY_SOURCE = "ABORTED_BY_SOURCE"
    NEVER_RAN = "NEVER_RAN"
    INTERRUPTED = "INTERRUPTED"
    IN_DOUBT = "IN_DOUBT"
    GIVEN_UP = "GIVEN_UP"
    CANCELLED = "CANCELLED"
    VMM_UNREACHABLE = "VMM_UNREACHABLE"
    VMM_FAILED = "VMM_FAILED"
    VMM_GONE = "VMM_GONE"
    VMM_BUSY = "VMM_BUSY"
    VMM_MISMATCH = "VMM_MISMATCH"
    GUEST_NOT_MOVABLE = "GUEST_NOT_MOVABLE"
    MEMORY_UNREADABLE = "MEMORY_UNREADABLE"
    MEMORY_NOT_ITS_OWN = "MEMORY_NOT_ITS_OWN"
    PAGES_DAMAGED = "PAGES_DAMAGED"
    USERFAULTFD_UNAVAILABLE = "USERFAULTFD_UNAVAILABLE"
    USERFAULTFD_REFUSED = "USERFAULTFD_REFUSED"
    PERMISSION_MISSING = "PERMISSION_MISSING"
    NO_SPACE = "NO_SPACE"
    ADDRESS_IN_USE = "ADDRESS_IN_USE"
    CONFIG_INVALID = "CONFIG_INVALID"
    JOURNAL_UNREADABLE = "JOURNAL_UNREADABLE"
    SIDECAR_UNREACHABLE = "SIDECAR_UNREACHABLE"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    INTERNAL = "INTERNAL"


_STATUS: Mapping[Reason, grpc.StatusCode] = {
    Reason.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNKNOWN_GUEST: grpc.StatusCode.NOT_FOUND,
    Reason.UNKNOWN_MIGRATION: grpc.StatusCode.NOT_FOUND,
    Reason.GUEST_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Reason.REQUEST_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    Reason.TOO_MANY_MIGRATIONS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DESTINATION_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.SOURCE_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.LANE_LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.LANE_SILENT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.LAYOUT_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.PAGE_OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    Reason.MALFORMED_PAGES: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNREQUESTED_PAGES: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.HANDOFF_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.HANDOFF_NO_FD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.HANDOFF_MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.HANDOFF_REGIONS: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.HANDOFF_WRONG_PEER: grpc.StatusCode.PERMISSION_DENIED,
    Reason.PEER_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.ROLE_MISSING: grpc.StatusCode.PERMISSION_DENIED,
    Reason.TOKEN_INVALID: grpc.StatusCode.PERMISSION_DENIED,
    Reason.PERMISSION_MISSING: grpc.StatusCode.PERMISSION_DENIED,
    Reason.VMM_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.NO_SPACE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.SIDECAR_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.SHUTTING_DOWN: grpc.StatusCode.UNAVAILABLE,
    Reason.CANCELLED: grpc.StatusCode.CANCELLED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}


class FerryError(Exception):
    """Something pageferry could not do. `str()` is the sentence; `reason` is stable."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status that fits the reason; FAILED_PRECONDITION where no other does."""
        return _STATUS.get(self.reason, grpc.StatusCode.FAILED_PRECONDITION)


def to_status(error: FerryError) -> status_pb2.Status:
    """Return the `google.rpc.Status` of an error, with its ErrorInfo."""
    code: tuple[int, str] = error.code.value
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN))
    return status_pb2.Status(code=code[0], message=error.message, details=[detail])


def from_rpc(error: grpc.aio.AioRpcError, fallback: Reason) -> FerryError:
    """Return the FerryError that a call's error carries, or one with `fallback` where it carries none of ours."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except (DecodeError, ValueError):
        # What is no status, or says something else than the call's own: of that, the call's own is believed.
        status = None
    if status is None:
        status = status_pb2.Status()
    status.message = error.details() or ""
    return from_status(status, fallback, error.code().name)


def from_status(status: status_pb2.Status, fallback: Reason, code: str = "no code") -> FerryError:
    """Return the FerryError that a status carries, or one with `fallback` where it carries none of ours."""
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        with contextlib.suppress(DecodeError):
            if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
                return FerryError(Reason(info.reason), status.message or info.reason)
    return FerryError(fallback, f"{status.message or 'no details'} ({code})")
