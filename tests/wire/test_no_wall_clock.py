"""Clocks may jump: nothing that the sidecar decides depends on the time of day, which is only shown."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVICE = Path(__file__).resolve().parents[2] / "service" / "pageferryd"
SHOWN = {
    "control/record.py": "when a migration was created and when it ended, for whoever looks",
    "keeper/lines.py": "the time of a line in the log",
    "control/note_files.py": "in which order notes are read, and which are forgotten when there are too many",
}
"""Where the time of day is taken, and for what."""
READERS = frozenset({"control/view.py", "control/book.py"})
"""Who reads when a migration began or ended: for its description, and for which is the newest in the metrics."""
WALL_CLOCKS = frozenset({
    "time.time", "time.time_ns", "time.ctime", "time.gmtime", "time.localtime", "time.strftime", "time.asctime",
    "time.clock_gettime", "time.clock_gettime_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today",
    "datetime.datetime.now", "datetime.datetime.utcnow", "datetime.datetime.today", "datetime.date.today",
    "time.CLOCK_REALTIME", "st_mtime", "st_ctime", "st_atime", "st_mtime_ns", "st_ctime_ns", "GetCurrentTime",
})  # fmt: skip


def wall_clocks(source: str) -> Iterator[str]:
    """Yield each use of a clock that somebody may set, whatever it was imported as."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            written = ast.unparse(node)
            first, _, rest = written.partition(".")
            whole = f"{names.get(first, first)}.{rest}"
            if {whole, whole.removeprefix("datetime."), node.attr} & WALL_CLOCKS:
                yield written
        elif isinstance(node, ast.Name) and names.get(node.id, "") in WALL_CLOCKS:
            yield node.id


def test_the_time_of_day_is_taken_only_where_it_is_shown() -> None:
    found = {str(path.relative_to(SERVICE)): list(wall_clocks(path.read_text())) for path in SERVICE.rglob("*.py")}
    assert {name for name, uses in found.items() if uses} <= SHOWN.keys(), found
    assert found["control/record.py"]


def test_what_is_shown_is_shown_and_no_more() -> None:
    readers = {
        str(path.relative_to(SERVICE))
        for path in SERVICE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("created", "ended") and "record" in ast.unparse(node.value)
    }
    assert readers <= READERS


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.time()",
        "import time as t\nt.time_ns()",
        "from time import time\ntime()",
        "from time import time as now\nnow()",
        "import time\nkeep(clock=time.time)",
        "from datetime import datetime\ndatetime.now()",
        "import datetime\ndatetime.datetime.now(tz)",
        "import datetime as d\nd.date.today()",
        "path.stat().st_mtime",
        "stamp.GetCurrentTime()",
    ],
)
def test_a_planted_clock_is_found(source: str) -> None:
    assert list(wall_clocks(source))


@pytest.mark.parametrize(
    "source", ["import time\ntime.monotonic()", "loop.time()", "from datetime import timedelta\ntimedelta(seconds=1)"]
)
def test_a_clock_that_nobody_sets_is_allowed(source: str) -> None:
    assert list(wall_clocks(source)) == []
