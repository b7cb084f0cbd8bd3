"""What the documents promise is there, and what is there is in the documents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pageferryd import config

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ROOT / "docs" / "operations.md"
EXAMPLE = ROOT / "deploy" / "pageferryd.toml"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
TABLES: dict[str, type[BaseModel]] = {"tls": config.Tls, "limits": config.Limits}
LISTS_OF_TABLES: dict[str, type[BaseModel]] = {"guests": config.ConfiguredGuest, "templates": config.Template}
WITHOUT_A_FIXED_DEFAULT = {"host": "the system's host name"}


def table(text: str, first_column: str) -> list[list[str]]:
    """Return the rows of the Markdown table whose first heading is `first_column`."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {first_column} |"):
            next(lines)
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def settings() -> dict[str, str]:
    """Return every setting, tables' keys with a dot, and its default as the document writes it."""
    found: dict[str, str] = {}
    for name, field in config.Settings.model_fields.items():
        nested = TABLES.get(name)
        if nested is None:
            found[name] = WITHOUT_A_FIXED_DEFAULT.get(name) or written(field.default)
        else:
            found.update({f"{name}.{key}": written(inner.default) for key, inner in nested.model_fields.items()})
    return found


def written(default: Any) -> str:
    if default is None or default is PydanticUndefined:
        return "none"
    return f"`{default}`" if isinstance(default, (str, Path)) else f"`{json.dumps(default)}`"


def test_every_setting_is_documented_with_its_variable_and_its_default() -> None:
    rows = {
        name.strip("`"): (variable, default) for name, variable, default, _ in table(OPERATIONS.read_text(), "setting")
    }

    assert rows == {
        name: (f"`{config.ENV_PREFIX}{name.replace('.', '__').upper()}`", default)
        for name, default in settings().items()
    }


def test_no_table_of_settings_is_forgotten() -> None:
    tables = {
        name
        for name, field in config.Settings.model_fields.items()
        if any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in (field.annotation, *args_of(field)))
    }
    assert tables == {*TABLES, *LISTS_OF_TABLES}


@pytest.mark.parametrize("name", LISTS_OF_TABLES)
def test_every_key_of_a_list_of_tables_is_documented_with_its_default(name: str) -> None:
    rows = {key.strip("`"): default for key, default, _ in table(OPERATIONS.read_text(), f"key of `{name}`")}

    fields = LISTS_OF_TABLES[name].model_fields
    assert rows == {
        key: "none" if field.is_required() else f"`{json.dumps(field.default)}`" for key, field in fields.items()
    }


def test_every_driver_is_documented_with_its_endpoint() -> None:
    rows = [driver.strip("`") for driver, _ in table(OPERATIONS.read_text(), "driver")]
    assert rows == list(get_args(config.ConfiguredGuest.model_fields["driver"].annotation))


def load(directory: Path, text: str) -> config.Settings:
    path = directory / "pageferryd.toml"
    path.write_text(text)
    return config.load(path)


def test_the_tables_that_operators_are_shown_are_accepted(tmp_path: Path) -> None:
    shown = re.findall(r"(?s)```toml\n(\[\[.*?)```", OPERATIONS.read_text())
    settings = load(tmp_path, "insecure = true\n" + "\n".join(shown))
    assert (len(settings.guests), len(settings.templates)) == (1, 1)


def test_the_tables_that_the_example_comments_out_are_accepted(tmp_path: Path) -> None:
    settings = load(tmp_path, re.sub(r"(?m)^#( {3}[a-z]| \[\[)", r"\1", EXAMPLE.read_text()))
    assert (len(settings.guests), len(settings.templates)) == (1, 1)
    assert settings.templates[0].start_timeout == config.Template.model_fields["start_timeout"].default


def args_of(field: Any) -> tuple[Any, ...]:
    return getattr(field.annotation, "__args__", ())


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as they are made from them on the usual forges."""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", ["docs/operations.md", "docs/metrics.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_within_the_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https:"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


@pytest.mark.parametrize("document", ["docs/operations.md", "docs/metrics.md"])
def test_files_that_the_documents_name_exist(document: str) -> None:
    named = re.findall(r"\b(?:deploy|docs|constraints|tools|tests)/[\w./-]*\w", (ROOT / document).read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_directory_that_contributors_are_shown_exists() -> None:
    tree = re.search(r"(?s)## Find your way\n\n```\n(.*?)```", CONTRIBUTING.read_text())
    assert tree is not None
    top, missing = ROOT, []
    for line in tree[1].splitlines():
        name = line.split()[0]
        directory = (top if line.startswith(" ") else ROOT) / name
        if not line.startswith(" "):
            top = directory
        if not directory.is_dir():
            missing.append(str(directory.relative_to(ROOT)))
    assert missing == []


def test_every_interface_and_conformance_suite_that_contributors_are_shown_exists() -> None:
    missing = []
    for _, where, interface, suite in table(CONTRIBUTING.read_text(), "what"):
        file, names = interface.partition(": ")[0].strip("`"), re.findall(r"\b[A-Z]\w+", interface)
        path = ROOT / where.strip("`") / file
        source = path.read_text() if path.exists() else ""
        missing += [f"{name} in {path.relative_to(ROOT)}" for name in names if f"class {name}(Protocol" not in source]
        missing += [suite] if not (ROOT / suite.strip("`")).exists() else []
    assert missing == []


def test_every_target_that_contributors_are_shown_is_in_the_makefile() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    shown = set(re.findall(r"(?m)^make ([a-z]+)", CONTRIBUTING.read_text()))
    assert shown
    assert shown <= targets
