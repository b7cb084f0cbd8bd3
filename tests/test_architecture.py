"""The house's import rules, read from the source with `ast`: nothing is imported, so broken code is judged as well."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE = 400

CLIENT, CORE, LINUX, CONTROL, KEEPER, SIDECAR = "client", "core", "linux", "control", "keeper", "sidecar"
SIDES = frozenset({"destination", "source", "vmm"})
# The files beside the packages of pageferryd that any sidecar needs and no single side does.
SHARED = frozenset({"access", "config", "logs", "http", "metrics", "preflight", "server"})
FOUNDATION = frozenset({CORE, LINUX, CLIENT})

MAY_IMPORT: dict[str, frozenset[str]] = {
    CLIENT: frozenset({CLIENT}),
    CORE: frozenset({CORE}),
    LINUX: FOUNDATION,
    **{side: FOUNDATION | {side} for side in SIDES},
    **dict.fromkeys(SHARED, FOUNDATION | SHARED),
    CONTROL: FOUNDATION | SIDES | SHARED | {CONTROL},
    # It outlives sidecars, and starts them as processes: it knows nothing of how they are made.
    KEEPER: FOUNDATION | {"logs", "config", KEEPER},
    SIDECAR: FOUNDATION | SIDES | SHARED | {CONTROL, KEEPER},
}
# What the core must not see, so that time and the outside are its caller's and a simulation can stand in for both.
CLOCKS_AND_IO = frozenset({
    "asyncio", "ctypes", "datetime", "fcntl", "grpc", "io", "mmap", "multiprocessing", "os", "pathlib", "select",
    "signal", "socket", "ssl", "subprocess", "threading", "time", "uvloop",
})  # fmt: skip


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    at_run_time: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


class House:
    """The modules below client/ and service/ of a checkout, and who imports whom."""

    def __init__(self, root: Path) -> None:
        self.files: dict[str, Path] = {}
        for top in (root / "client", root / "service"):
            for path in sorted(top.rglob("*.py")):
                parts = path.relative_to(top).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                if not name.startswith("pageferry.v1"):
                    self.files[name] = path
        self.imports = [found for name in self.files for found in self._imports_of(name)]

    def _imports_of(self, name: str) -> Iterator[Import]:
        tree = ast.parse(self.files[name].read_text(), filename=str(self.files[name]))
        only_for_types = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            for imported in self._targets(name, node):
                yield Import(name, imported, getattr(node, "lineno", 0), id(node) not in only_for_types)

    def _targets(self, name: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = self._absolute(name, node)
            for alias in node.names:
                # `from package import thing` means the module where there is one of that name.
                module = f"{base}.{alias.name}"
                yield module if module in self.files else base

    def _absolute(self, name: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = name.split(".")
        is_package = self.files[name].name == "__init__.py"
        kept = parts[: len(parts) - node.level + is_package]
        return ".".join([*kept, *([node.module] if node.module else [])])

    def of_ours(self) -> list[Import]:
        return [found for found in self.imports if found.imported.split(".")[0] in {"pageferry", "pageferryd"}]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def layer(module: str) -> str:
    package, _, rest = module.partition(".")
    if package == "pageferry":
        return CLIENT
    # The bare package holds a docstring and is anybody's.
    return rest.split(".")[0] or CLIENT


def forbidden_imports(house: House) -> list[str]:
    return [
        str(found)
        for found in house.of_ours()
        if layer(found.imported) not in MAY_IMPORT.get(layer(found.importer), frozenset())
    ]


def modules_without_a_layer(house: House) -> list[str]:
    return [name for name in house.files if layer(name) not in MAY_IMPORT]


def clocks_and_io_in_the_core(house: House) -> list[str]:
    return [
        str(found)
        for found in house.imports
        if layer(found.importer) == CORE and found.imported.split(".")[0] in CLOCKS_AND_IO
    ]


def import_cycles(house: House) -> list[str]:
    """Return each cycle of imports that happen at run time, as `a -> b -> a`."""
    edges: dict[str, set[str]] = {name: set() for name in house.files}
    for found in house.of_ours():
        if found.at_run_time and found.imported in edges and found.imported != found.importer:
            edges[found.importer].add(found.imported)
    # What is left, after modules that import nothing left were taken away again and again, contains only cycles and
    # what leads to them.
    while leaves := {name for name, imported in edges.items() if not imported}:
        edges = {name: imported - leaves for name, imported in edges.items() if name not in leaves}
    return [_cycle_from(next(iter(sorted(edges))), edges)] if edges else []


def _cycle_from(start: str, edges: dict[str, set[str]]) -> str:
    way = [start]
    while (step := min(edges[way[-1]])) not in way:
        way.append(step)
    return " -> ".join([*way[way.index(step) :], step])


def long_files(house: House) -> list[str]:
    lengths = {name: len(path.read_text().splitlines()) for name, path in house.files.items()}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > LONGEST_FILE]


RULES = [forbidden_imports, modules_without_a_layer, clocks_and_io_in_the_core, import_cycles, long_files]


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(house: House, rule: object) -> None:
    assert callable(rule)
    assert rule(house) == []


def test_both_packages_are_looked_at(house: House) -> None:
    assert "pageferry.errors" in house.files
    assert any(name.startswith("pageferryd.core.") for name in house.files)
    assert any(found.imported.startswith("pageferry.") for found in house.imports)


def plant(root: Path, files: dict[str, str]) -> House:
    """Build a house below `root` from module names and their source."""
    for name, source in files.items():
        top = "client" if name.partition(".")[0] == "pageferry" else "service"
        path = root / top / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return House(root)


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("pageferryd.core.pager", "from pageferry.errors import FerryError"),
        ("pageferryd.core.pager", "import pageferryd.linux.userfaultfd"),
        ("pageferryd.linux.userfaultfd", "from pageferryd.source import memory"),
        ("pageferryd.source.memory", "from pageferryd.destination.session import Session"),
        ("pageferryd.destination.session", "from ..vmm import driver"),
        ("pageferryd.vmm.driver", "from pageferryd.control.outgoing import start"),
        ("pageferryd.destination.session", "from pageferryd.metrics import FAULTS"),
        ("pageferryd.metrics", "from pageferryd.source.memory import Source"),
        ("pageferryd.control.outgoing", "def late():\n    import pageferryd.sidecar"),
        ("pageferryd.keeper.keeper", "from pageferryd.control.journal import Journal"),
        ("pageferryd.control.outgoing", "from pageferryd.keeper.running import run"),
        ("pageferry.cli.main", "import pageferryd.config"),
        ("pageferry.client", "if TYPE_CHECKING:\n    from pageferryd.core.layout import Layout"),
    ],
)
def test_a_planted_import_against_the_arrows_is_found(tmp_path: Path, importer: str, source: str) -> None:
    found = forbidden_imports(plant(tmp_path, {importer: source}))

    assert len(found) == 1
    assert found[0].startswith(f"{importer}:")


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("pageferryd.sidecar", "from pageferryd.control import outgoing"),
        ("pageferryd.sidecar", "from pageferryd.keeper.running import become"),
        ("pageferryd.keeper.held", "from pageferryd.linux import notify_wire"),
        ("pageferryd.control.outgoing", "from pageferryd.source.memory import Source\nimport pageferryd.config"),
        ("pageferryd.destination.session", "from pageferryd.core.pager import Pager\nimport pageferry.errors"),
        ("pageferryd.preflight", "from pageferryd.config import Settings\nimport pageferryd.linux.userfaultfd"),
        ("pageferryd.core.pager", "from . import layout\nimport dataclasses"),
    ],
)
def test_a_planted_import_along_the_arrows_is_allowed(tmp_path: Path, importer: str, source: str) -> None:
    house = plant(tmp_path, {importer: source})

    assert house.of_ours()
    assert forbidden_imports(house) == []


def test_a_planted_module_outside_every_layer_is_found(tmp_path: Path) -> None:
    assert modules_without_a_layer(plant(tmp_path, {"pageferryd.helpers": ""})) == ["pageferryd.helpers"]


@pytest.mark.parametrize("source", ["import time", "from asyncio import sleep", "import os.path"])
def test_a_planted_clock_or_io_in_the_core_is_found(tmp_path: Path, source: str) -> None:
    assert len(clocks_and_io_in_the_core(plant(tmp_path, {"pageferryd.core.pager": source}))) == 1


def test_a_planted_import_cycle_is_found(tmp_path: Path) -> None:
    house = plant(
        tmp_path,
        {
            "pageferryd.core.entry": "from pageferryd.core import pager",
            "pageferryd.core.pager": "from pageferryd.core.demand import Demand",
            "pageferryd.core.demand": "from .layout import Layout",
            "pageferryd.core.layout": "import pageferryd.core.pager",
        },
    )

    assert import_cycles(house) == [
        "pageferryd.core.demand -> pageferryd.core.layout -> pageferryd.core.pager -> pageferryd.core.demand"
    ]


def test_an_import_for_types_alone_makes_no_cycle(tmp_path: Path) -> None:
    house = plant(
        tmp_path,
        {
            "pageferry.client": "import pageferry.channel",
            "pageferry.channel": "if TYPE_CHECKING:\n    import pageferry.client",
        },
    )

    assert import_cycles(house) == []


def test_a_planted_long_file_is_found_but_not_a_generated_one(tmp_path: Path) -> None:
    text = "pass\n" * (LONGEST_FILE + 1)
    house = plant(tmp_path, {"pageferry.client": text, "pageferry.v1.page_pb2": text})

    assert long_files(house) == [f"pageferry.client has {LONGEST_FILE + 1} lines"]
