"""Take the examples out of a page of docs/, so that tests can run what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def examples(page: str, language: str) -> list[str]:
    """Return the fenced blocks of that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
