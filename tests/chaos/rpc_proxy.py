"""A gRPC proxy that knows nothing of the messages and holds them at steps: between a sidecar and those who call it."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Any, Self

import grpc
from holds import Holds

from pageferry.channel import CHANNEL_OPTIONS, SERVER_OPTIONS

STREAMED_ANSWERS = ("Report",)
LANES = ("FetchPages", "PushPages")
# A sidecar that has just been started again is found at once.
QUICK = {
    "grpc.initial_reconnect_backoff_ms": 50,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 100,
}
Context = grpc.aio.ServicerContext[Any, Any]


class RpcProxy(grpc.GenericRpcHandler):
    """Forwards every call to `target`. A request that is held may still arrive when who sent it is gone."""

    def __init__(self, target: str) -> None:
        self.holds = Holds()
        self.address = ""
        self._target = target
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((self,))
        self._work: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(
            self._target, options=tuple({**dict(CHANNEL_OPTIONS), **QUICK}.items())
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.holds.clear()
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await self._server.stop(0)
        await self._channel.close()

    def service(self, call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """Return a handler for any method at all."""
        path = str(call_details.method)
        name = path.rpartition("/")[2]
        if name in LANES:
            return grpc.stream_stream_rpc_method_handler(partial(self._lane, path, name))
        if name in STREAMED_ANSWERS:
            return grpc.unary_stream_rpc_method_handler(partial(self._answers, path))
        return grpc.unary_unary_rpc_method_handler(partial(self._unary, path, name))

    async def _unary(self, path: str, name: str, request: bytes, context: Context) -> bytes:
        carrying = asyncio.create_task(self._carry(path, name, request, _metadata(context), under_way := []))
        self._work.add(carrying)
        carrying.add_done_callback(self._work.discard)
        try:
            answer, error = await asyncio.shield(carrying)
        except asyncio.CancelledError:
            # Whoever called is gone: so the one that is called learns it too.
            for call in under_way:
                call.cancel()
            raise
        if answer is None:
            await _abort(context, error)
            raise AssertionError
        return answer

    async def _carry(
        self, path: str, name: str, request: bytes, metadata: Any, under_way: list[Any]
    ) -> tuple[bytes | None, grpc.aio.AioRpcError | None]:
        if not await self.holds.passes(name, "request"):
            return None, None
        call = self._channel.unary_unary(path)(request, metadata=metadata)
        under_way.append(call)
        answer: bytes | None = None
        error: grpc.aio.AioRpcError | None = None
        try:
            answer = await call
        except grpc.aio.AioRpcError as failed:
            error = failed
        except asyncio.CancelledError:
            return None, None
        under_way.clear()
        if not await self.holds.passes(name, "answer"):
            return None, None
        return answer, error

    async def _answers(self, path: str, request: bytes, context: Context) -> None:
        call = self._channel.unary_stream(path)(request, metadata=_metadata(context))
        try:
            while isinstance(message := await call.read(), bytes):
                await context.write(message)
        except grpc.aio.AioRpcError as error:
            await _abort(context, error)
        finally:
            call.cancel()

    async def _lane(self, path: str, name: str, _requests: Any, context: Context) -> None:
        call = self._channel.stream_stream(path)(metadata=_metadata(context))
        await context.send_initial_metadata(())
        up = asyncio.create_task(self._lane_up(name, context, call))
        try:
            while isinstance(message := await call.read(), bytes):
                if not await self.holds.passes(name, "answer"):
                    await _abort(context, None)
                await context.write(message)
        except grpc.aio.AioRpcError as error:
            await _abort(context, error)
        finally:
            call.cancel()
            up.cancel()
            await asyncio.gather(up, return_exceptions=True)

    async def _lane_up(self, name: str, context: Context, call: Any) -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            while isinstance(message := await context.read(), bytes):
                if not await self.holds.passes(name, "request"):
                    call.cancel()
                    return
                await call.write(message)
            await call.done_writing()


def _metadata(context: Context) -> tuple[tuple[str, Any], ...]:
    """Return what the caller sent along, without what belongs to its connection."""
    return tuple((key, value) for key, value in context.invocation_metadata() or () if key.startswith("pageferry-"))


async def _abort(context: Context, error: grpc.aio.AioRpcError | None) -> None:
    if error is None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
        return
    trailing = tuple(error.trailing_metadata() or ())
    await context.abort(error.code(), error.details() or "", trailing)
