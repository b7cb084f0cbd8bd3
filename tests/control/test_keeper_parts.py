"""The keeper's pauses and its log lines."""

from __future__ import annotations

import json
from io import StringIO

from pageferryd.keeper.backoff import STEADY_SECONDS, Backoff
from pageferryd.keeper.lines import Lines


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Unwritable(StringIO):
    def write(self, _text: str, /) -> int:
        raise BrokenPipeError


def events(stream: StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_pauses_grow_to_the_most_and_stay_there() -> None:
    backoff = Backoff(first=0.5, most=10)

    assert [backoff.after(0) for _ in range(7)] == [0, 0.5, 1, 2, 4, 8, 10]
    assert {backoff.after(STEADY_SECONDS - 1) for _ in range(2000)} == {10}


def test_after_a_steady_life_the_first_pause_is_none_again() -> None:
    backoff = Backoff(first=0.5, most=10)
    for _ in range(5):
        backoff.after(0)

    assert [backoff.after(STEADY_SECONDS), backoff.after(0)] == [0, 0.5]


def test_lines_look_like_the_sidecars() -> None:
    stream = StringIO()

    Lines("json", stream).say("info", "sidecar_started", pid=7)

    [line] = events(stream)
    assert str(line.pop("timestamp")).endswith("Z")
    assert line == {"event": "sidecar_started", "level": "info", "logger": "pageferryd.keeper", "pid": 7}


def test_lines_for_a_terminal_are_no_json() -> None:
    stream = StringIO()

    Lines("console", stream).say("info", "sidecar_started", pid=7)

    assert stream.getvalue().endswith("Z [info] sidecar_started [pageferryd.keeper] pid=7\n")


def test_what_happens_often_is_said_once_a_minute_with_how_often() -> None:
    stream, clock = StringIO(), Clock()
    lines = Lines("json", stream, clock)

    for _ in range(100):
        lines.say_seldom("stranger_ignored", pid=7)
    lines.say_seldom("store_full")
    clock.now += 60
    lines.say_seldom("stranger_ignored", pid=8)

    said = [(line["event"], line.get("pid"), line["unsaid"]) for line in events(stream)]
    assert said == [("stranger_ignored", 7, 0), ("store_full", None, 0), ("stranger_ignored", 8, 99)]


def test_a_log_that_nobody_reads_any_more_stops_nothing() -> None:
    Lines("json", Unwritable()).say("info", "sidecar_started", pid=7)
