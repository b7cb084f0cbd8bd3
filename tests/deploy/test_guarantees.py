"""docs/guarantees.md names tests, and they are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)[^`]*`")
PROMISE = re.compile(r"(?ms)^## (\d+\. [^\n]+)\n(.*?)(?=^## |\Z)")
MENTIONED = re.compile(r"`(tests/[\w./]+)`")
LINK = re.compile(r"\]\(([^)\s]*)\)")

PROMISES: dict[str, str] = dict(PROMISE.findall(TEXT))
TESTS: list[tuple[str, str]] = sorted(set(NAMED.findall(TEXT)))


@cache
def names_in(file: str) -> frozenset[str]:
    """Return the names of all tests of a file, whether they stand in a class or not."""
    tree = ast.parse((ROOT / file).read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


@pytest.mark.parametrize(("file", "name"), TESTS, ids=[name for _, name in TESTS])
def test_a_test_that_is_named_is_there(file: str, name: str) -> None:
    assert (ROOT / file).is_file()
    assert name in names_in(file)


def test_promises_are_numbered_in_their_order() -> None:
    assert [int(title.split(".")[0]) for title in PROMISES] == list(range(1, len(PROMISES) + 1))


@pytest.mark.parametrize("title", PROMISES)
def test_a_promise_is_shown_by_a_test(title: str) -> None:
    assert NAMED.search(PROMISES[title])


def test_every_name_of_a_test_is_understood() -> None:
    assert TEXT.count(".py::") == len(NAMED.findall(TEXT))


def test_files_and_links_lead_somewhere() -> None:
    named = [ROOT / name for name in MENTIONED.findall(TEXT)]
    linked = [ROOT / "docs" / file for target in LINK.findall(TEXT) if (file := target.partition("#")[0])]
    assert [path for path in named + linked if not path.exists()] == []


def anchors(text: str) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_anchors_lead_to_headings() -> None:
    for target in LINK.findall(TEXT):
        file, _, anchor = target.partition("#")
        text = (ROOT / "docs" / file).read_text() if file else TEXT
        assert not anchor or anchor in anchors(text), target
