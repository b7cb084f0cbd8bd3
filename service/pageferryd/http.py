"""The sidecar's HTTP port: /metrics for Prometheus, /healthz and /readyz for whoever keeps the sidecar running."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from aiohttp import web
from prometheus_client.exposition import choose_encoder

from pageferry import address as addresses
from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prometheus_client import CollectorRegistry

# A scrape under way may end; nothing else on this port takes longer than a moment.
_SHUTDOWN_SECONDS: Final = 2.0


class HttpServer:
    """Serves the three paths on one TCP address, in the event loop that starts it.

    `unready` returns why the sidecar takes no migrations now, one reason an entry; ready when there are none.
    """

    def __init__(self, registry: CollectorRegistry, unready: Callable[[], Sequence[str]]) -> None:
        self._registry = registry
        self._unready = unready
        self._runner: web.AppRunner | None = None

    async def start(self, address: str) -> str:
        """Listen, and return the address with the port that was taken (they differ for port 0).

        Raises FerryError: ADDRESS_IN_USE, PERMISSION_MISSING, CONFIG_INVALID when the host is not one of this machine.
        """
        host, port = addresses.split(addresses.normalise(address))
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
            ]
        )
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_SHUTDOWN_SECONDS)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, reuse_port=False).start()
        except OSError as error:
            await runner.cleanup()
            raise bind_error(address, error) from error
        self._runner = runner
        return addresses.join(host, int(runner.addresses[0][1]))

    async def stop(self) -> None:
        """Stop listening. Harmless when it never started."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        # In the loop, not in a thread: what is counted here is counted without locks.
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _healthz(self, _request: web.Request) -> web.Response:
        # That it answers is the proof: the same loop serves the guests.
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        reasons = self._unready()
        if not reasons:
            return web.Response(text="ok\n")
        return web.Response(status=503, text="".join(f"{reason}\n" for reason in reasons))


def bind_error(address: str, error: OSError) -> FerryError:
    """Return the error for an address that cannot be listened on."""
    number, text = error.errno, error.strerror or str(error)
    if number == errno.EADDRINUSE:
        return FerryError(
            Reason.ADDRESS_IN_USE,
            f"{address} is in use: stop what listens there (`ss -lntp` names it), or configure another address",
        )
    if number in (errno.EACCES, errno.EPERM):
        return FerryError(
            Reason.PERMISSION_MISSING,
            f"may not listen on {address}: {text}; take a port above 1023 or another directory, "
            "or give CAP_NET_BIND_SERVICE",
        )
    return FerryError(Reason.CONFIG_INVALID, f"cannot listen on {address}: {text}; give an address of this host")
