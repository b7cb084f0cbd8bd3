"""The sidecar's gRPC server: where it listens, what stands around its handlers, and how errors reach the caller."""

from __future__ import annotations

import errno
import inspect
import os
import socket
import stat
from contextlib import aclosing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from pageferry import address as addresses
from pageferry.channel import SERVER_OPTIONS
from pageferry.errors import FerryError, Reason, to_status
from pageferry.tls import server_credentials
from pageferryd.access import PACKAGE, SERVICES, Access, Throng, caller_of, make_refusals, note_refusal
from pageferryd.core.errors import CoreError
from pageferryd.http import bind_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from pageferryd.access import Caller
    from pageferryd.config import Settings
    from pageferryd.core.refusals import Refusals

    # Handlers of all message types pass through here.
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

_log = structlog.get_logger(__name__)

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

    def __init__(self, settings: Settings, refusals: Refusals | None = None) -> None:
        """`refusals` is where callers that are refused are counted."""
        self._settings = settings
        self._health = health.aio.HealthServicer()
        self.server = grpc.aio.server(interceptors=[Guard(settings, refusals)], options=SERVER_OPTIONS)
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

    Nothing of a call is received, let alone parsed, before its caller was let in. It adds nothing to single messages of
    a stream.
    """

    def __init__(self, settings: Settings, refusals: Refusals | None = None) -> None:
        self._access = Access(settings)
        self._throng = Throng()
        self._refusals = refusals if refusals is not None else make_refusals()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler of a call with the guard around it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        # Health and reflection tell nothing of guests: they are open to whoever gets a connection.
        if handler is None or not method.startswith(f"/{PACKAGE}"):
            return handler
        # On the wire all kinds are one. gRPC would take in a lone request, however large, before it asks the guard.
        return grpc.stream_stream_rpc_method_handler(
            self._guarded(method, handler),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, method: str, handler: Handler) -> Callable[[Any, Context], Any]:
        async def guarded(requests: Any, context: Context) -> None:
            caller = caller_of(context)
            try:
                self._access.check(method, caller)
                with self._throng.one_more(caller):
                    request = requests if handler.request_streaming else await self._only(method, caller, context)
                    await _run(handler, request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                told = _as_ferry_error(error, method)
                note_refusal(self._refusals, method, caller.who, told)
                if context.cancelled():
                    # Nobody is left to be told; gRPC has closed the call.
                    raise
                await context.abort_with_status(rpc_status.to_status(to_status(told)))

        return guarded

    async def _only(self, method: str, caller: Caller, context: Context) -> Any:
        """Receive the one request of a call that has one, and check it against the caller."""
        try:
            request = await context.read()
        except DecodeError as error:
            raise FerryError(Reason.INVALID_ARGUMENT, f"the request of {method} cannot be parsed") from error
        if request is grpc.aio.EOF:
            raise FerryError(Reason.INVALID_ARGUMENT, f"{method} was called without a request")
        self._access.check_request(method, caller, request)
        return request


async def _run(handler: Handler, request: Any, context: Context) -> None:
    """Have a handler of any kind answer."""
    kind = "_".join(
        "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
    )
    behaviour: Callable[[Any, Context], Any] = getattr(handler, kind)
    if inspect.isasyncgenfunction(behaviour):
        # Written here instead of yielded on: one generator less for each message.
        async with aclosing(behaviour(request, context)) as messages:
            async for message in messages:
                await context.write(message)
    elif handler.response_streaming:
        await behaviour(request, context)
    else:
        await context.write(await behaviour(request, context))


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
