"""How a migration looks while it goes on: the map, the panel, the lines."""

from __future__ import annotations

import io

import pytest
from fake_sidecar import example, failed, queued
from rich.console import Console

from pageferry.cli import live, memory_map, progress
from pageferry.cli.memory_map import DEMAND_COLOUR, PUSH_COLOUR, Cell, cells, glyph, picture
from pageferry.cli.output import console
from pageferry.v1 import migration_pb2 as pb


def rendered(what, width: int = 100) -> list[str]:
    out = Console(file=io.StringIO(), width=width, color_system=None)
    out.print(what)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("cell", "character", "style"),
    [
        (Cell(256, 0, 0), "·", "dim"),
        (Cell(256, 1, 0), "▁", DEMAND_COLOUR),
        (Cell(256, 0, 128), "▄", PUSH_COLOUR),
        (Cell(256, 20, 235), "▇", PUSH_COLOUR),
        (Cell(256, 0, 256), "█", PUSH_COLOUR),
        (Cell(256, 256, 0), "█", DEMAND_COLOUR),
        (Cell(256, 1, 255), "▁", f"{DEMAND_COLOUR} on {PUSH_COLOUR}"),
        (Cell(256, 255, 1), "▇", f"{DEMAND_COLOUR} on {PUSH_COLOUR}"),
        (Cell(0, 0, 0), "·", "dim"),
    ],
)
def test_a_cell_fills_in_the_colours_of_its_lanes(cell, character, style):
    assert glyph(cell, colours=True) == (character, style)


@pytest.mark.parametrize(
    ("cell", "character"),
    [(Cell(8, 0, 0), "·"), (Cell(8, 1, 3), "▄"), (Cell(8, 3, 5), "█"), (Cell(8, 5, 3), "▓")],
)
def test_a_cell_without_colours_still_tells_the_lanes_apart(cell, character):
    assert glyph(cell, colours=False) == (character, "")


def test_the_map_of_half_a_migration():
    found = example(percent=53)

    text = picture(found.memory_map, found.progress.pages_total, colours=False, width=8)

    assert text.plain.splitlines()[:2] == ["████████", "▄·······"]
    assert "missing" in text.plain


def test_a_finer_map_is_laid_together():
    fine = pb.MemoryMap(pages_per_cell=10, demand_pages=[10] * 10, push_pages=[0] * 10)

    assert cells(fine, 95, most=4) == [Cell(30, 30, 0), Cell(30, 30, 0), Cell(30, 30, 0), Cell(5, 10, 0)]


def test_a_map_never_outgrows_its_place():
    fine = pb.MemoryMap(pages_per_cell=1, demand_pages=[0] * 1025, push_pages=[1] * 1025)

    text = picture(fine, 1025, colours=True, width=64)

    assert max(map(len, text.plain.splitlines()[:-1])) == 64
    assert len(text.plain.splitlines()) <= memory_map.ROWS + 1


def test_a_migration_without_a_map_has_no_picture():
    assert not picture(pb.MemoryMap(), 100, colours=True)


def test_the_panel_of_a_migration_under_way():
    lines = rendered(progress.panel(example(), colours=False))

    assert lines[0] == "web  alpha to beta  postcopy"
    assert lines[1] == "the guest runs at the destination, its memory follows"
    assert lines[2] == "44 %, 7.2 MiB of 16.0 MiB, 2,253 pages left"
    assert lines[3] == "push 200.0 MiB/s, pages by demand 112 and by push 1,731"
    assert lines[4] == "1,234 faults (3 waiting)"
    assert lines[5] == "███████▂········"
    assert [line.split() for line in lines[7:]] == [
        ["fault", "latency", "p50", "p90", "p99", "longest"],
        ["read", "25", "us", "80", "us", "250", "us", "900", "us"],
        ["fetched", "200", "us", "640", "us", "2.00", "ms", "7.20", "ms"],
        ["total", "250", "us", "800", "us", "2.50", "ms", "9.00", "ms"],
    ]


def test_the_panel_before_there_is_memory_to_tell_of():
    found = example(pb.MIGRATION_STATE_PREPARING)
    for field in ("progress", "memory_map", "fault_latencies"):
        found.ClearField(field)

    lines = rendered(progress.panel(found))

    assert lines == ["web  alpha to beta  preparing", progress.meaning(pb.MIGRATION_STATE_PREPARING)]


def test_the_panel_of_a_failed_migration_says_why():
    assert rendered(progress.panel(failed()))[-1].startswith("DESTINATION_REFUSED: beta refused doomed")


def test_the_panel_of_who_waits_for_a_turn_tells_its_place_alone():
    assert rendered(progress.panel(queued())) == ["queued  alpha to beta  pending", "waits for its turn: 3rd"]


def test_the_panel_of_a_migration_in_doubt_names_what_to_do():
    lines = rendered(progress.panel(example(pb.MIGRATION_STATE_IN_DOUBT)))

    assert lines[0].endswith("in doubt")
    assert lines[2] == "see what both ends know, and decide: pageferry resolve m-web"
    assert lines[3].startswith("44 %")


def test_a_line_of_a_migration_under_way():
    assert progress.line(example()) == (
        "postcopy: 44 %, 7.2 MiB of 16.0 MiB, 2,253 pages left, push 200.0 MiB/s, pages by demand 112 and by "
        "push 1,731, 1,234 faults (3 waiting), fault p50 250 us p99 2.50 ms"
    )


def test_every_state_has_a_name_and_a_meaning():
    for state in pb.MigrationState.values()[1:]:
        assert progress.state_name(state) in progress.line(pb.Migration(state=state))
        assert progress.meaning(state) != progress.meaning(99)


def test_a_state_of_a_later_release_is_shown_as_a_number():
    assert progress.state_name(99) == "state 99"


def test_plain_lines_come_with_each_state_and_each_second():
    lines = live.PlainLines()
    looks = [
        (pb.MIGRATION_STATE_PREPARING, 0.0, True),
        (pb.MIGRATION_STATE_PREPARING, 0.5, False),
        (pb.MIGRATION_STATE_POSTCOPY, 0.6, True),
        (pb.MIGRATION_STATE_POSTCOPY, 1.5, False),
        (pb.MIGRATION_STATE_POSTCOPY, 1.6, True),
        (pb.MIGRATION_STATE_COMPLETED, 1.7, True),
    ]

    for state, now, shown in looks:
        assert (lines.line(example(state), now) is not None) is shown


def test_a_plain_line_comes_with_each_place_in_the_queue():
    lines = live.PlainLines()

    shown = [lines.line(queued(position), 0.0) for position in (3, 3, 2)]

    assert shown == ["pending: waits for its turn: 3rd", None, "pending: waits for its turn: 2nd"]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


async def looks():
    yield example(pb.MIGRATION_STATE_PREPARING, 0)
    yield example()
    yield example(pb.MIGRATION_STATE_COMPLETED, 100)


async def test_on_a_terminal_the_picture_moves_in_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Terminal()

    last = await live.follow(looks(), console(screen))

    assert last.state == pb.MIGRATION_STATE_COMPLETED
    assert "\x1b[93;44m▁" in screen.getvalue()


async def test_on_a_terminal_the_place_in_the_queue_is_followed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Terminal()

    async def nearer():
        yield queued(3)
        yield queued(2)

    await live.follow(nearer(), console(screen))

    assert "waits for its turn: 2nd" in screen.getvalue()


async def test_no_color_leaves_the_picture_and_takes_its_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Terminal()

    await live.follow(looks(), console(screen))

    assert "████████████████" in screen.getvalue()
    assert "\x1b[93" not in screen.getvalue()
    assert "\x1b[32m" not in screen.getvalue()


@pytest.mark.parametrize("variable", ["", "FORCE_COLOR"])
async def test_what_is_no_terminal_gets_lines_without_escape_codes(monkeypatch, variable):
    if variable:
        monkeypatch.setenv(variable, "1")
    pipe = io.StringIO()

    await live.follow(looks(), console(pipe))

    assert "\x1b" not in pipe.getvalue()
    assert [line.split(":")[0] for line in pipe.getvalue().splitlines()] == ["preparing", "postcopy", "completed"]


async def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = Terminal()

    await live.follow(looks(), console(screen))

    assert "\x1b" not in screen.getvalue()
