"""Logs: one event a line on stderr, as JSON or for a terminal, of bounded length and without secrets.

`structlog` and the standard library's loggers (those of grpc and aiohttp) come out alike.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

import structlog
from google.protobuf.message import Message

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

# Lengths in characters; together they keep a line below 40 KiB, whatever is logged.
_MAX_VALUE: Final = 512
_MAX_EVENT: Final = 2_048
_MAX_TRACEBACK: Final = 8_192
_MAX_KEYS: Final = 32
_OWN_LIMITS: Final = {"event": _MAX_EVENT, "exception": _MAX_TRACEBACK}
_MAX_DEPTH: Final = 3
# Not even their length is said.
_SECRET_WORDS: Final = ("token", "password", "secret", "private_key", "authorization", "cookie")


def configure(
    log_format: Literal["json", "console"] = "json", level: str = "info", stream: TextIO | None = None
) -> None:
    """Send all logs of this process to `stream` (stderr when None). Calling it again replaces what was set up."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        withhold_secrets,
        bound_lengths,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    output = stream if stream is not None else sys.stderr
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(log_format, output)],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    # At debug level gRPC logs servers while they are being freed; whoever keeps such a record uses freed memory.
    logging.getLogger("grpc._cython").setLevel(max(logging.INFO, logging.getLogger().level))


def withhold_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace what sounds secret, all bytes, and messages of the API: they may hold tokens, device state, or memory."""
    for key, value in event.items():
        # structlog keeps its own things under such keys, and removes them before it renders.
        if not key.startswith("_"):
            event[key] = _without_secrets(key, value, _MAX_DEPTH)
    return event


def _without_secrets(key: str, value: Any, depth: int) -> Any:
    if any(word in key.lower() for word in _SECRET_WORDS):
        return "withheld"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes withheld"
    if isinstance(value, Message):
        return f"{type(value).__name__} withheld"
    if isinstance(value, Mapping):
        return {str(k): _without_secrets(str(k), v, depth - 1) for k, v in value.items()} if depth else "…"
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_without_secrets("", item, depth - 1) for item in value] if depth else "…"
    return value


def bound_lengths(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Cut long values, and drop keys beyond the 32nd: a line is never longer than a log shipper takes."""
    bounded = {key: _bounded(value, _OWN_LIMITS.get(key, _MAX_VALUE)) for key, value in list(event.items())[:_MAX_KEYS]}
    # What structlog adds for itself, and reads again when it renders, must stay whole.
    bounded.update({key: value for key, value in event.items() if key.startswith("_")})
    if len(event) > _MAX_KEYS:
        bounded["dropped_keys"] = len(event) - _MAX_KEYS
    for key in ("event", "level", "timestamp"):
        if key in event and key not in bounded:
            bounded[key] = _bounded(event[key], _OWN_LIMITS.get(key, _MAX_VALUE))
    return bounded


def _bounded(value: Any, limit: int) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else repr(value)
    if isinstance(value, list) and len(text) <= limit:
        return value
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _renderer(log_format: Literal["json", "console"], output: TextIO) -> Processor:
    if log_format == "json":
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(colors=output.isatty(), exception_formatter=structlog.dev.plain_traceback)
