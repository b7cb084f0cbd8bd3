"""Shared and private pages of a confidential guest: runs cut where one kind of sharing ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferryd.core.runs import PRIVATE, PRIVATE_ZERO, RAW, ZERO, Run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pageferryd.core.page_set import PageSet

_AS_PRIVATE = {RAW: PRIVATE, ZERO: PRIVATE_ZERO}


def mark_private(runs: Iterable[Run], private: PageSet) -> Iterator[Run]:
    """Yield the runs with those parts marked that are private; what cannot be read stays poisoned, whoever owns it."""
    for run in runs:
        if run.kind not in _AS_PRIVATE:
            yield run
            continue
        first, stop = run.first, run.first + run.pages
        while first < stop:
            if first in private:
                end, kind = private.next_absent(first, stop), _AS_PRIVATE[run.kind]
            else:
                end, kind = private.next_present(first, stop), run.kind
            yield Run(first, end - first, kind)
            first = end
