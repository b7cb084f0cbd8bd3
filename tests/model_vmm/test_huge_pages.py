"""Dozens of migrations of a confidential guest on real huge pages, and rules of it that are broken on purpose."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pageferryd.core.pager import Lane
from pageferryd.destination.answering import Answering
from pageferryd.destination.placer import Placer
from pageferryd.destination.staging import Staging

from . import world
from .huge_pages import HugeWorld
from .oracle import Violation

pytestmark = [
    pytest.mark.userfaultfd,
    pytest.mark.hugetlb,
    pytest.mark.root,
    pytest.mark.usefixtures("huge_pages"),
]

SEEDS = 60
BROKEN_SEEDS = 60


def test_no_access_to_huge_pages_sees_a_byte_that_it_must_not() -> None:
    total: Counter[str] = Counter()
    for seed in range(SEEDS):
        try:
            total += world.run(seed, kind=HugeWorld)
        except Exception as error:
            pytest.fail(f"world.run({seed}, print, kind=HugeWorld) shows it: {type(error).__name__}: {error}")
    for what in ("exits", "imports", "conversions", "discards", "failed", "demand_pages", "push_pages", "reconnects"):
        assert total[what] > SEEDS // 2, (what, total)
    assert total["shared_accesses"] > 0


def zero_at_once(self: Answering, page: int) -> int | None:
    return None if page in self.private else page


def never_blank(_self: Staging, _first: int, _pages: int) -> list[int]:
    return []


def nothing_there(_self: Answering, _first: int, _pages: int) -> bool:
    return False


def all_is_in_place(self: Placer, start: int, lane: Lane) -> None:
    whole = self._staging.whole(start)
    if whole is not None:
        self._staging.finish(start)
        self._put(whole.run, whole.data, 0, lane)


def nothing(*_arguments: Any) -> None:
    pass


BREAKS: list[tuple[type, str, Any]] = [
    (Placer, "waits_for", zero_at_once),
    (Placer, "touched_before", nothing),
    (Placer, "_has_content", nothing_there),
    (Placer, "_put_granule", all_is_in_place),
    (Staging, "blank", never_blank),
]


def run_some() -> None:
    for seed in range(BROKEN_SEEDS):
        world.run(seed, kind=HugeWorld, deadline=2.0)


@pytest.mark.parametrize(
    ("owner", "name", "broken"), BREAKS, ids=[f"{owner.__name__}.{name}" for owner, name, _ in BREAKS]
)
def test_what_is_broken_on_purpose_is_found_on_huge_pages(
    owner: type, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(Violation):
        run_some()
