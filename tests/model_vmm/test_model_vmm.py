"""Hundreds of migrations of a confidential guest, both doors open. A failing seed replays with
`python -m tests.model_vmm SEED`, a long run is `python -m tests.model_vmm --seeds 10000`; `--file` for the other kind.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pageferryd.core.pager import Pager
from pageferryd.core.runs import RAW, ZERO, Run
from pageferryd.destination.installer import Placed
from pageferryd.destination.intake import FaultIntake
from pageferryd.destination.memfd_installer import MemfdInstaller
from pageferryd.destination.placer import Placer
from pageferryd.destination.session import Session

from . import world
from .memory_file import FileWorld
from .oracle import Register, Side, Violation

BLOCK = 100
BROKEN_SEEDS = 120
MOST_BROKEN_SECONDS = 1.0


def run_seeds(seeds: range, kind: type[world.World], deadline: float = world.DEADLINE) -> Counter[str]:
    total: Counter[str] = Counter()
    for seed in seeds:
        try:
            total += world.run(seed, kind=kind, deadline=deadline)
        except Exception as error:
            option = " --file" if kind is FileWorld else ""
            pytest.fail(f"python -m tests.model_vmm {seed}{option}: {type(error).__name__}: {error}")
    return total


@pytest.mark.userfaultfd
@pytest.mark.parametrize("first", range(0, 5 * BLOCK, BLOCK))
def test_no_access_sees_a_byte_that_it_must_not(first: int) -> None:
    total = run_seeds(range(first, first + BLOCK), world.World)
    # A block in which nothing ever went wrong would prove little.
    for what in ("exits", "imports", "conversions", "discards", "failed", "shared_accesses"):
        assert total[what] > BLOCK // 4, (what, total)
    for what in ("demand_pages", "push_pages", "streams", "reconnects"):
        assert total[what] > BLOCK, (what, total)


@pytest.mark.parametrize("first", range(0, 3 * BLOCK, BLOCK))
def test_no_access_to_a_memory_file_sees_a_byte_that_it_must_not(first: int) -> None:
    total = run_seeds(range(first, first + BLOCK), FileWorld)
    for what in ("imports", "conversions", "discards", "failed"):
        assert total[what] > BLOCK // 4, (what, total)


def test_what_a_read_may_see_is_the_last_write_or_one_under_way() -> None:
    register = Register(b"old")
    first = register.begin(b"first", 10)
    assert register.allowed(11, 12) == {b"old", b"first"}
    first.end = 20
    assert register.allowed(21, 22) == {b"first"}
    assert register.allowed(15, 22) == {b"old", b"first"}
    register.begin(b"second", 23)
    assert register.allowed(21, 22) == {b"first"}
    assert register.allowed(24, 25) == {b"first", b"second"}


def test_a_page_that_becomes_zero_may_be_seen_in_parts_and_no_other() -> None:
    content, zeroes = world.stamp(1, 0), bytes(4096)
    side = Side(content)
    mixed = content[:2048] + zeroes[2048:]
    with pytest.raises(Violation):
        side.check(mixed, 1, 2, "a read")
    change = side.zero(3)
    side.check(mixed, 4, 5, "a read")
    change.done(6)
    for seen in (mixed, content, world.stamp(2, 0)):
        with pytest.raises(Violation):
            side.check(seen, 7, 8, "a read")
    side.check(zeroes, 7, 8, "a read")


# A model that finds nothing may be blind: each of these breaks one rule on purpose.


def run_some(kind: type[world.World]) -> None:
    for seed in range(BROKEN_SEEDS):
        world.run(seed, kind=kind, deadline=MOST_BROKEN_SECONDS)


def nothing(*_arguments: Any) -> None:
    pass


def into_the_shared_mapping(self: Placer, run: Run, data: bytes, offset: int, lane: Any) -> None:
    self._put(Run(run.first, run.pages, RAW if len(data) > offset else ZERO), data, offset, lane)


def settled_when_delivered(self: Placer, run: Run, data: bytes, offset: int, lane: Any) -> None:
    _hand_out(self, run, data, offset, lane)
    self._note(run, lane)


def told_as_zero(self: Placer, page: int) -> None:
    self.shared_accesses += 1
    self.serve_zero(page)


def known_until_asked_again(self: Pager, first: int, pages: int, now: float) -> list[Any]:
    return self._ended(first, pages, now)


def bits_first(self: MemfdInstaller, first: int, pages: int, _data: bytes, _offset: int) -> Any:
    self._bitmap.clear(first, pages)
    return pages, Placed.DONE


_hand_out = Placer._hand_out

BREAKS: list[tuple[type, str, Any, type[world.World]]] = [
    (FaultIntake, "discard", nothing, world.World),
    (Placer, "_hand_out", into_the_shared_mapping, world.World),
    (Placer, "_hand_out", settled_when_delivered, world.World),
    (Placer, "serve_shared_side", told_as_zero, world.World),
    (Placer, "serve_shared_side", nothing, world.World),
    (Placer, "_refused", nothing, world.World),
    (Pager, "discard", known_until_asked_again, world.World),
    (MemfdInstaller, "let_through", nothing, FileWorld),
    (MemfdInstaller, "raw", bits_first, FileWorld),
    (Session, "convert", nothing, FileWorld),
]


@pytest.mark.userfaultfd
@pytest.mark.parametrize(
    ("owner", "name", "broken", "kind"),
    BREAKS,
    ids=[f"{owner.__name__}.{name}-{broken.__name__}" for owner, name, broken, _ in BREAKS],
)
def test_what_is_broken_on_purpose_is_found(
    owner: type, name: str, broken: Any, kind: type[world.World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(Violation):
        run_some(kind)
