"""A VMM's HTTP API on a Unix socket: JSON goes in, and comes back."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import aiohttp

from pageferry import address as addresses
from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from typing import Final

QUICK_SECONDS: Final = 5.0
MAX_ANSWER_BYTES: Final = 4 << 20
_MAX_TOLD: Final = 500
# Small servers, as VMMs have, know few headers.
_UNASKED: Final = ("Accept-Encoding", "User-Agent")


class RefusedError(FerryError):
    """VMM_FAILED: the VMM answered with an error `status` of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(Reason.VMM_FAILED, message)
        self.status = status


class UnixHttp:
    """Calls one VMM. Each call has a connection of its own: a VMM may end between two."""

    def __init__(self, path: str) -> None:
        """Raise FerryError(INVALID_ARGUMENT) unless the path is absolute and fits a socket address."""
        self.path = addresses.normalise(f"unix:{path}").removeprefix(addresses.UNIX_PREFIX)

    async def call(self, method: str, path: str, body: object = None, seconds: float = QUICK_SECONDS) -> Any:
        """Return the JSON that the VMM answers with, or None where it has nothing to say.

        FerryError: VMM_UNREACHABLE where nobody answers within `seconds`, VMM_FAILED where the answer is an error
        (RefusedError), too long, or no JSON.
        """
        what = f"the VMM at {self.path}: {method} {path}"
        try:
            async with asyncio.timeout(seconds):
                status, answer = await self._exchange(method, path, body)
        except TimeoutError as error:
            raise FerryError(Reason.VMM_UNREACHABLE, f"{what}: no answer within {seconds:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise FerryError(
                Reason.VMM_UNREACHABLE, f"nobody listens at {self.path}: {error.strerror or error}; is the VMM running?"
            ) from error
        except aiohttp.ClientConnectionError as error:
            raise FerryError(Reason.VMM_UNREACHABLE, f"{what}: the VMM hung up without an answer") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise FerryError(Reason.VMM_FAILED, f"{what}: the answer is no HTTP: {error}"[:_MAX_TOLD]) from error
        if len(answer) > MAX_ANSWER_BYTES:
            raise FerryError(Reason.VMM_FAILED, f"{what}: the answer is longer than {MAX_ANSWER_BYTES} bytes")
        if not 200 <= status < 300:  # noqa: PLR2004
            told = answer[:_MAX_TOLD].decode("utf-8", "replace").strip()
            raise RefusedError(status, f"{what}: refused with status {status}: {told}")
        return _read(answer, what)

    async def _exchange(self, method: str, path: str, body: object) -> tuple[int, bytes]:
        """Return status and body; of a body that is too long one byte too many."""
        connector = aiohttp.UnixConnector(self.path, force_close=True)
        session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
            skip_auto_headers=_UNASKED,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        async with (
            session,
            session.request(
                method,
                f"http://localhost{path}",
                data=None if body is None else json.dumps(body).encode(),
                headers={"Accept": "application/json", "Content-Type": "application/json"},
                allow_redirects=False,
            ) as response,
        ):
            answer = bytearray()
            while len(answer) <= MAX_ANSWER_BYTES:
                part = await response.content.read(MAX_ANSWER_BYTES + 1 - len(answer))
                if not part:
                    break
                answer += part
            return response.status, bytes(answer)


def _read(answer: bytes, what: str) -> Any:
    if not answer.strip():
        return None
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise FerryError(Reason.VMM_FAILED, f"{what}: the answer is no JSON") from error
