"""What a line of the log looks like, how long it gets, and what never gets into it."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
import structlog

from pageferry.v1 import incoming_pb2
from pageferryd import logs


@pytest.fixture
def stream() -> Iterator[StringIO]:
    """What is logged goes here; afterwards logging is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(stream: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_json_object_a_line(stream: StringIO) -> None:
    logs.configure("json", "info", stream)
    structlog.get_logger("pageferryd.test").info("ready", listen=["127.0.0.1:1"], pages=3)
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "ready",
        "level": "info",
        "logger": "pageferryd.test",
        "listen": ["127.0.0.1:1"],
        "pages": 3,
    }


def test_the_standard_library_logs_alike(stream: StringIO) -> None:
    logs.configure("json", "info", stream)
    logging.getLogger("aiohttp.server").warning("%d bytes\nlost", 7)
    (line,) = lines(stream)
    assert (line["event"], line["level"], line["logger"]) == ("7 bytes\nlost", "warning", "aiohttp.server")


def test_bound_values_are_on_each_line(stream: StringIO) -> None:
    logs.configure("json", "info", stream)
    with structlog.contextvars.bound_contextvars(migration_id="m1"):
        logging.getLogger("a").info("one")
        structlog.get_logger("b").info("two")
    assert [line["migration_id"] for line in lines(stream)] == ["m1", "m1"]


def test_events_below_the_level_are_left_out(stream: StringIO) -> None:
    logs.configure("json", "warning", stream)
    structlog.get_logger("a").info("quiet")
    logging.getLogger("a").info("quiet")
    structlog.get_logger("a").warning("loud")
    assert [line["event"] for line in lines(stream)] == ["loud"]


def test_configuring_again_replaces_what_was(stream: StringIO) -> None:
    first = StringIO()
    logs.configure("json", "info", first)
    logs.configure("json", "info", stream)
    structlog.get_logger("a").info("once")
    assert first.getvalue() == ""
    assert len(lines(stream)) == 1


def test_a_traceback_is_part_of_its_line(stream: StringIO) -> None:
    logs.configure("json", "info", stream)
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        structlog.get_logger("a").exception("broken")
    (line,) = lines(stream)
    assert "ZeroDivisionError: division by zero" in line["exception"]


def test_warnings_of_python_are_logged(stream: StringIO) -> None:
    logs.configure("json", "info", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old thing", stacklevel=1)
    assert "old thing" in lines(stream)[0]["event"]


def test_the_console_format_is_plain_text_where_there_is_no_terminal(stream: StringIO) -> None:
    logs.configure("console", "info", stream)
    structlog.get_logger("a").info("ready", host="b")
    assert "ready" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    "event",
    [
        {"token": "5EC2E7"},
        {"lane_token": "5EC2E7"},
        {"Password": "5EC2E7"},
        {"private_key": "5EC2E7"},
        {"state": b"5EC2E7"},
        {"state": bytearray(b"5EC2E7")},
        {"state": memoryview(b"5EC2E7")},
        {"request": incoming_pb2.PrepareRequest(token=b"5EC2E7", guest_id="5EC2E7")},
        {"nested": {"token": "5EC2E7"}},
        {"nested": [{"secret": "5EC2E7"}, b"5EC2E7"]},
        {"deep": {"a": {"b": {"c": {"token": "5EC2E7"}}}}},
    ],
    ids=lambda event: re.sub(" at 0x[0-9a-f]+", "", str(event)),
)
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_secrets_are_withheld(event: dict[str, Any], log_format: Any, stream: StringIO) -> None:
    logs.configure(log_format, "info", stream)
    structlog.get_logger("a").info("something", **event)
    assert "something" in stream.getvalue()
    assert "5EC2E7" not in stream.getvalue()


def test_a_line_is_bounded_whatever_is_logged(stream: StringIO) -> None:
    logs.configure("json", "info", stream)
    values = {f"key{i}": "v" * 100_000 for i in range(200)}
    structlog.get_logger("a").info("e" * 100_000, **values)
    logging.getLogger("a").warning("w" * 100_000)
    assert all(len(line) < 40 * 1024 for line in stream.getvalue().splitlines())
    first, second = lines(stream)
    assert first["event"].startswith("eee")
    assert first["level"] == "info"
    assert first["dropped_keys"] > 100
    assert second["event"].startswith("www")


def test_a_traceback_without_end_is_cut(stream: StringIO) -> None:
    logs.configure("json", "info", stream)
    try:
        raise ValueError("x" * 100_000)
    except ValueError:
        structlog.get_logger("a").exception("broken")
    (line,) = lines(stream)
    assert len(line["exception"]) < 9_000


def test_grpc_never_logs_at_debug_level_for_its_records_outlive_what_they_name(stream: StringIO) -> None:
    logs.configure("json", "debug", stream)
    assert not logging.getLogger("grpc._cython.cygrpc").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("pageferryd").isEnabledFor(logging.DEBUG)
