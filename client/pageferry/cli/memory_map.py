"""The map of a guest's memory: one character a cell, that fills as the cell's pages come, by demand or by push."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferry.v1 import migration_pb2 as pb

DEMAND_COLOUR: Final = "bright_yellow"
PUSH_COLOUR: Final = "blue"
WIDTH: Final = 64
ROWS: Final = 4
_MISSING: Final = "·"
_LEVELS: Final = " ▁▂▃▄▅▆▇█"
_FULL: Final = "█"
_FULL_BY_DEMAND: Final = "▓"


class Cell(NamedTuple):
    """Pages of one cell of the picture: all, come by demand, come by push."""

    pages: int
    demand: int
    push: int


def cells(memory_map: pb.MemoryMap, pages_total: int, most: int = WIDTH * ROWS) -> list[Cell]:
    """Return the map's cells in order, with as many neighbours laid together as leaves at most `most` of them."""
    per_cell = memory_map.pages_per_cell
    if not per_cell:
        return []
    fine = [
        Cell(min(per_cell, max(pages_total - number * per_cell, 0)), demand, push)
        for number, (demand, push) in enumerate(zip(memory_map.demand_pages, memory_map.push_pages, strict=False))
    ]
    together = -(-len(fine) // most) or 1
    return [_joined(fine[at : at + together]) for at in range(0, len(fine), together)]


def _joined(group: Sequence[Cell]) -> Cell:
    return Cell(sum(cell.pages for cell in group), sum(cell.demand for cell in group), sum(cell.push for cell in group))


def glyph(cell: Cell, *, colours: bool) -> tuple[str, str]:
    """Return the character of a cell and its style.

    A cell fills from below in the colour of the lane that brought most of it. A full one shows both lanes in their
    proportion: demand below, push above. Without colours only the lane that brought most of a full cell is told.
    """
    come = cell.demand + cell.push
    if not come or not cell.pages:
        return _MISSING, "dim" if colours else ""
    mostly_demand = cell.demand > cell.push
    if come < cell.pages:
        style = DEMAND_COLOUR if mostly_demand else PUSH_COLOUR
        return _LEVELS[_eighths(come, cell.pages)], style if colours else ""
    if not colours:
        return (_FULL_BY_DEMAND if mostly_demand else _FULL), ""
    if not cell.push:
        return _FULL, DEMAND_COLOUR
    if not cell.demand:
        return _FULL, PUSH_COLOUR
    return _LEVELS[_eighths(cell.demand, come)], f"{DEMAND_COLOUR} on {PUSH_COLOUR}"


def _eighths(part: int, whole: int) -> int:
    """Return the share in eighths, from 1 to 7: something is never shown as nothing, and a part never as the whole."""
    return max(1, min(7, round(part * 8 / whole)))


def picture(memory_map: pb.MemoryMap, pages_total: int, *, colours: bool, width: int = WIDTH) -> Text:
    """Return the map as lines of `width` characters, and a line that explains it; empty where there is no map."""
    shown = cells(memory_map, pages_total, width * ROWS)
    text = Text(no_wrap=True)
    for at in range(0, len(shown), width):
        glyphs = [glyph(cell, colours=colours) for cell in shown[at : at + width]]
        # Neighbours of one style go out together: a terminal gets a frame several times a second.
        for style, run in groupby(glyphs, key=itemgetter(1)):
            text.append("".join(character for character, _ in run), style)
        text.append("\n")
    if shown:
        text.append_text(_legend(colours=colours))
    return text


def _legend(*, colours: bool) -> Text:
    if not colours:
        return Text(f"{_MISSING} missing  ▄ partly in  {_FULL_BY_DEMAND} in, most by demand  {_FULL} in, most by push")
    demand, push = (_FULL, DEMAND_COLOUR), (_FULL, PUSH_COLOUR)
    return Text.assemble((_MISSING, "dim"), " missing  ", demand, " came by demand  ", push, " came by push")
