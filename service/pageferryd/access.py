"""Who may call what: the roles of callers, and the refusals of those who have not the one they need."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import grpc
import structlog

from pageferry.errors import FerryError, Reason
from pageferry.tls import peer_names
from pageferry.v1 import migration_pb2
from pageferryd.core import refusals
from pageferryd.core.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pageferryd.config import Settings
    from pageferryd.core.refusals import Refusal

    Context = grpc.aio.ServicerContext[Any, Any]

_log = structlog.get_logger(__name__)

PACKAGE: Final = "pageferry.v1."
_OPERATORS_SERVICE: Final = PACKAGE + "MigrationService"
_PEERS_SERVICES: Final = (PACKAGE + "IncomingService", PACKAGE + "PageService")
_VMMS_SERVICE: Final = PACKAGE + "FaultService"
SERVICES: Final = (_OPERATORS_SERVICE, *_PEERS_SERVICES)
"""Full names of the services that a sidecar serves beside health and reflection."""

# What changes nothing. ResolveMigration does with a decision, which is in its request.
_LOOKING: Final = frozenset(
    f"/{_OPERATORS_SERVICE}/{name}"
    for name in ("Preflight", "ListGuests", "GetMigration", "ListMigrations", "WatchMigration", "ResolveMigration")
)

MAX_CALLS_OF_ONE: Final = 2048
"""Most calls that one caller has under way: a peer needs two for each guest whose pages it gets over gRPC."""

_NOTED: Final = frozenset({
    Reason.PEER_NOT_ALLOWED, Reason.ROLE_MISSING, Reason.TOKEN_INVALID, Reason.MALFORMED_PAGES,
    Reason.PAGE_OUT_OF_RANGE, Reason.MEMORY_NOT_ITS_OWN, Reason.TOO_MANY_MIGRATIONS,
})  # fmt: skip


class Caller(NamedTuple):
    """Who is at the other end of a connection; `local` where that has no TLS, and the socket's mode is its guard."""

    names: frozenset[str]
    local: bool

    @property
    def who(self) -> str:
        """The caller in words, of bounded length."""
        if self.local:
            return "an operator at the local socket"
        return ", ".join(sorted(self.names))[:256] or "a certificate without names"


def caller_of(context: Context) -> Caller:
    """Return who makes a call."""
    local = context.auth_context().get("transport_security_type") != [b"ssl"]
    return Caller(frozenset() if local else peer_names(context), local)


def service_of(method: str) -> str:
    """Return the full name of the service of a method, as `/package.Service/Method`."""
    return method[1:].partition("/")[0]


def place_of(method: str, reason: Reason) -> str:
    """Return where a refusal belongs, of PLACES: what a VMM says of its memory is its own, whoever asked for it."""
    service = service_of(method)
    if service == _VMMS_SERVICE or reason is Reason.MEMORY_NOT_ITS_OWN:
        return refusals.VMM
    return refusals.PEER if service in _PEERS_SERVICES else refusals.API


class Access:
    """What the settings allow. Every check raises FerryError: PEER_NOT_ALLOWED, ROLE_MISSING."""

    def __init__(self, settings: Settings) -> None:
        self._insecure = settings.insecure
        self._operators = frozenset(settings.operators)
        self._viewers = frozenset(settings.viewers)
        self._peers = frozenset(settings.peers)

    def check(self, method: str, caller: Caller) -> None:
        """Let a caller use a method, as far as that can be said without its request."""
        service = service_of(method)
        if self._insecure:
            return
        if service in _PEERS_SERVICES:
            self._check_peer(caller, service)
        elif service == _OPERATORS_SERVICE:
            self._check_operator(caller, method)
        elif not caller.local:
            # A VMM's socket belongs to its user, and what is served there asks for a secret beside.
            raise FerryError(Reason.PEER_NOT_ALLOWED, f"{caller.who} may not call {service} over the network")

    def check_request(self, method: str, caller: Caller, request: Any) -> None:
        """Let a caller that may use the method have this request carried out."""
        if isinstance(request, migration_pb2.ResolveMigrationRequest) and request.decision:
            self._check_decides(method, caller)

    def _check_decides(self, method: str, caller: Caller) -> None:
        if not self._insecure and not self._is_operator(caller):
            raise _only_looks(caller, method, "operators")

    def _check_operator(self, caller: Caller, method: str) -> None:
        if self._is_operator(caller):
            return
        if not caller.names & self._viewers:
            raise FerryError(
                Reason.PEER_NOT_ALLOWED,
                f"{caller.who} may not call {_OPERATORS_SERVICE} here: add a name of its certificate to operators, or "
                "to viewers if it shall only look",
            )
        if method not in _LOOKING:
            raise _only_looks(caller, method, "operators")

    def _check_peer(self, caller: Caller, service: str) -> None:
        if not caller.local and (caller.names & self._peers or (not self._peers and not self._only_views(caller))):
            return
        if self._peers or caller.local:
            raise FerryError(
                Reason.PEER_NOT_ALLOWED,
                f"{caller.who} may not call {service} here: add a name of its certificate to peers",
            )
        raise _only_looks(caller, service, "peers")

    def _is_operator(self, caller: Caller) -> bool:
        if caller.local or caller.names & self._operators:
            return True
        # With viewers named, who is not named at all must not have more rights than they.
        return not self._operators and not self._viewers

    def _only_views(self, caller: Caller) -> bool:
        return bool(caller.names & self._viewers) and not caller.names & self._operators


class Throng:
    """Counts the calls under way of each caller, so that none keeps the others out."""

    def __init__(self, most: int = MAX_CALLS_OF_ONE) -> None:
        self._most = most
        self._under_way: Counter[Caller] = Counter()

    @contextmanager
    def one_more(self, caller: Caller) -> Iterator[None]:
        """Have one more call under way. FerryError(TOO_MANY_MIGRATIONS) where the caller has too many."""
        if self._under_way[caller] >= self._most:
            raise FerryError(
                Reason.TOO_MANY_MIGRATIONS,
                f"{caller.who} has {self._most} calls under way here, which is the limit: try again later",
            )
        self._under_way[caller] += 1
        try:
            yield
        finally:
            self._under_way[caller] -= 1
            if not self._under_way[caller]:
                del self._under_way[caller]


def note_refusal(noted: Refusals, method: str, who: str, error: FerryError) -> None:
    """Count what a call ended with, if it is a refusal and not a mere failure."""
    if error.reason in _NOTED:
        noted.note(place_of(method, error.reason), error.reason, who, error.message)


def make_refusals() -> Refusals:
    """Return refusals that go to the log."""
    return Refusals(time.monotonic, _tell)


def _tell(refusal: Refusal) -> None:
    _log.warning(
        "caller refused", where=refusal.where, reason=refusal.reason, caller=refusal.who, detail=refusal.detail[:512]
    )


def _only_looks(caller: Caller, what: str, setting: str) -> FerryError:
    return FerryError(
        Reason.ROLE_MISSING,
        f"{caller.who} is named in viewers and may only look, not call {what}: add a name of its certificate to "
        f"{setting}",
    )
