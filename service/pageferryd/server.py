"""The sidecar's gRPC server: where it listens, who may call what, and how errors reach the caller."""

from __future__ import annotations

import errno
import inspect
import os
import socket
import stat
import time
from contextlib import aclosing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from pageferry import address as addresses
from pageferry.channel import SERVER_OPTIONS
from pageferry.errors import FerryError, Reason, to_status
from pageferry.tls import peer_names, server_credentials
from pageferryd.core.errors import CoreError
from pageferryd.http import bind_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from pageferryd.config import Settings

    # Handlers of all message types pass through here.
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

_log = structlog.get_logger(__name__)

_PACKAGE: Final = "pageferry.v1."
_OPERATORS_SERVICE: Final = _PACKAGE + "MigrationService"
_PEERS_SERVICES: Final = (_PACKAGE + "IncomingService", _PACKAGE + "PageService")
SERVICES: Final = (_OPERATORS_SERVICE, *_PEERS_SERVICES)
"""Full names of the services that a sidecar serves beside health and reflection."""

_SECONDS_BETWEEN_REFUSALS: Final = 60.0
_MAX_REMEMBERED_NAMES: Final = 256
# A status travels in HTTP/2 trailers, of which a peer takes 8 KiB; the message is in them twice.
_MAX_MESSAGE_BYTES: Final = 1_024
_SOCKET_PROBE_SECONDS: Final = 1.0
# Read and write for the owner, nothing for anybody else.
_PRIVATE_UMASK: Final = 0o177


class GrpcServer:
    """The server with health and reflection, to whose `server` the servicers are added before it starts.

    To be made in the event loop that it runs in. Handlers are coroutines or async generators; what they raise becomes
    a status with its reason.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._health = health.aio.HealthServicer()
        self.server = grpc.aio.server(interceptors=[Guard(settings)], options=SERVER_OPTIONS)
        """The gRPC server that servicers and generic handlers are added to."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME),
            self.server,
        )

    async def start(self) -> list[str]:
        """Serve, and return the addresses of `listen` with the ports that were taken, in its order.

        Raises FerryError: ADDRESS_IN_USE, PERMISSION_MISSING, CONFIG_INVALID for an address that this host has not or
        for certificates that cannot be used. Nothing is served then.
        """
        files = self._settings.tls_files()
        try:
            credentials = server_credentials(files) if files is not None else None
            bound = [self._bind(address, credentials) for address in self._settings.listen]
            if self._settings.api_socket is not None:
                self._bind(f"{addresses.UNIX_PREFIX}{self._settings.api_socket}", None)
            await self.server.start()
        except BaseException:
            await self.server.stop(None)
            raise
        await self.set_serving(True)
        return bound

    async def set_serving(self, serving: bool) -> None:
        """Tell whoever asks for health, of the server and of each service, whether new work is taken."""
        statuses = health_pb2.HealthCheckResponse
        for name in ("", *SERVICES):
            await self._health.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those under way `grace` seconds, and stop."""
        await self.set_serving(False)
        await self.server.stop(grace)

    def _bind(self, address: str, credentials: grpc.ServerCredentials | None) -> str:
        if addresses.is_unix(address):
            _ready_unix_path(address)
        else:
            _refuse_taken_port(address)
        # What is not authenticated is guarded by the socket's mode.
        with _umask(_PRIVATE_UMASK) if credentials is None else nullcontext():
            try:
                if credentials is None:
                    port = self.server.add_insecure_port(address)
                else:
                    port = self.server.add_secure_port(address, credentials)
            except RuntimeError as error:
                raise _bind_failure(address) from error
        return address if addresses.is_unix(address) else addresses.join(addresses.split(address)[0], port)


class Guard(grpc.aio.ServerInterceptor):
    """Stands around each handler of ours: checks who calls before it, and turns what it raises into a status.

    It adds nothing to single messages of a stream.
    """

    def __init__(self, settings: Settings) -> None:
        self._insecure = settings.insecure
        self._operators = frozenset(settings.operators)
        self._peers = frozenset(settings.peers)
        self._refusals = _Seldom()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler of a call with the guard around it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        # Health and reflection tell nothing of guests: they are open to whoever gets a connection.
        if handler is None or not method.startswith(f"/{_PACKAGE}"):
            return handler
        kind, behaviour = _behaviour(handler)
        return getattr(grpc, f"{kind}_rpc_method_handler")(  # type: ignore[no-any-return]
            self._guarded(method, behaviour),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, method: str, behaviour: Callable[[Any, Context], Any]) -> Callable[[Any, Context], Any]:
        generates = inspect.isasyncgenfunction(behaviour)

        async def guarded(request: Any, context: Context) -> Any:
            try:
                self._authorise(method, context)
                if not generates:
                    return await behaviour(request, context)
                # Written here instead of yielded on: one generator less for each message.
                async with aclosing(behaviour(request, context)) as messages:
                    async for message in messages:
                        await context.write(message)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                if context.cancelled():
                    # Nobody is left to be told; gRPC has closed the call.
                    raise
                await context.abort_with_status(rpc_status.to_status(to_status(_as_ferry_error(error, method))))

        return guarded

    def _authorise(self, method: str, context: Context) -> None:
        """Raise FerryError(PEER_NOT_ALLOWED) unless the caller may use the method's service."""
        if self._insecure:
            return
        service = method[1:].partition("/")[0]
        for_peers = service in _PEERS_SERVICES
        if context.auth_context().get("transport_security_type") != [b"ssl"]:
            # Without TLS there is only the operators' socket; whoever may open it is trusted as one, but is no peer.
            if for_peers:
                raise self._refusal("an operator at the local socket", service)
            return
        allowed = self._peers if for_peers else self._operators
        names = peer_names(context)
        if allowed and not names & allowed:
            raise self._refusal(", ".join(sorted(names)) or "a certificate without names", service)

    def _refusal(self, who: str, service: str) -> FerryError:
        who = who[:256]
        setting = "peers" if service in _PEERS_SERVICES else "operators"
        if self._refusals.allow(who):
            _log.warning("caller refused", caller=who, service=service, setting=setting)
        return FerryError(
            Reason.PEER_NOT_ALLOWED, f"{who} may not call {service} here: add a name of its certificate to {setting}"
        )


class _Seldom:
    """Allows something once a minute for each key, and forgets the oldest of too many keys."""

    def __init__(self) -> None:
        self._allowed_at: dict[str, float] = {}

    def allow(self, key: str) -> bool:
        now = time.monotonic()
        last = self._allowed_at.get(key)
        if last is not None and now - last < _SECONDS_BETWEEN_REFUSALS:
            return False
        self._allowed_at.pop(key, None)
        if len(self._allowed_at) >= _MAX_REMEMBERED_NAMES:
            del self._allowed_at[next(iter(self._allowed_at))]
        self._allowed_at[key] = now
        return True


def _behaviour(handler: Handler) -> tuple[str, Callable[[Any, Context], Any]]:
    """Return a handler's kind, as in the names of gRPC's constructors, and its function."""
    kind = "_".join(
        "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
    )
    return kind, getattr(handler, kind)


def _as_ferry_error(error: Exception, method: str) -> FerryError:
    """Return what the caller is told about an exception; the log gets the traceback of one that nobody foresaw."""
    if isinstance(error, FerryError):
        reason, message = error.reason, error.message
    elif isinstance(error, CoreError):
        reason, message = Reason[error.reason], str(error)
    else:
        _log.error("call failed", method=method, exc_info=error)
        reason, message = Reason.INTERNAL, f"{method} failed with {type(error).__name__}: see this host's log"
    return FerryError(reason, message.encode(errors="replace")[:_MAX_MESSAGE_BYTES].decode(errors="ignore"))


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _ready_unix_path(address: str) -> None:
    """Remove the socket that a sidecar left behind at a path. FerryError when the path is not to be had."""
    path = Path(address.removeprefix(addresses.UNIX_PREFIX))
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise FerryError(
                Reason.CONFIG_INVALID, f"cannot listen on {address}: {path.parent} is no directory; create it"
            ) from None
        return
    except OSError as error:
        raise bind_error(address, error) from error
    if not stat.S_ISSOCK(mode):
        raise FerryError(
            Reason.CONFIG_INVALID, f"cannot listen on {address}: a file that is no socket is there; move it away"
        )
    # gRPC itself would take the path away from a sidecar that is alive.
    if _answers(path):
        raise bind_error(address, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))
    path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_SOCKET_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            # It is too busy to accept, or does not let this process in; it lives.
            return True
    return True


def _refuse_taken_port(address: str) -> None:
    """Raise FerryError(ADDRESS_IN_USE) when any address of a name is taken: gRPC is content with the others."""
    for error in _bind_errors(address):
        if error.errno == errno.EADDRINUSE:
            raise bind_error(address, error)


def _bind_failure(address: str) -> FerryError:
    """Return why gRPC could not listen: it does not say so itself."""
    errors = [] if addresses.is_unix(address) else _bind_errors(address)
    return bind_error(address, next(iter(errors), OSError(errno.EACCES, "gRPC refused it without a reason")))


def _bind_errors(address: str) -> list[OSError]:
    host, port = addresses.split(address)
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return [error]
    errors = []
    for family, kind, protocol, _, to in resolved:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does: connections that linger from an earlier sidecar do not count.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(to)
        except OSError as error:
            errors.append(error)
    return errors
