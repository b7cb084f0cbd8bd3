"""The kill matrix as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from campaign import Outcome
from chaos_cells import STEPS, Cell, Who

LEGEND = (
    "ok: whole where it belongs (a arrived, s stayed, w waits, g gone with its own VMM); several cells share a field"
)


def table(outcomes: Mapping[str, Outcome], cells: Mapping[str, Cell]) -> str:
    """Return who is killed by row and the step by column, and the totals below."""
    fields: dict[tuple[Who, str], list[str]] = {}
    for name, outcome in outcomes.items():
        cell = cells[name]
        word = outcome.end[0] if outcome.end is not None else str(outcome.kind)
        fields.setdefault((cell.who, cell.step.name), []).append(word)
    names = [step.name for step in STEPS]
    rows = [["", *(str(number + 1) for number in range(len(names)))]]
    rows += [[str(who), *(_field(fields.get((who, name), [])) for name in names)] for who in Who]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    steps = [f"{number + 1} {name}" for number, name in enumerate(names)]
    key = ["  ".join(one.ljust(24) for one in steps[start : start + 5]).rstrip() for start in range(0, len(steps), 5)]
    return "\n".join([*lines, "", *key, "", LEGEND, summary(outcomes)])


def _field(words: list[str]) -> str:
    if not words:
        return "."
    bad = sorted(word for word in words if len(word) > 1)
    return bad[0] if bad else "".join(sorted(set(words)))


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """Return the totals in a line."""
    total = len(outcomes)
    counts = Counter(str(one.kind) if one.kind is not None else "ok" for one in outcomes.values())
    others = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()) if word != "ok")
    share = 100 * counts["ok"] / total if total else 0.0
    return f"kill matrix {share:.4g} %: {counts['ok']} of {total} cells ok{', ' + others if others else ''}"
