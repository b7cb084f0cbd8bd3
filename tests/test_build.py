"""What a fresh checkout is built from: pinned releases, and scripts that say what they do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "tools").glob("*.sh")), ROOT / ".ci" / "run"]
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+]+)")


def pins(*names: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        for line in (ROOT / "constraints" / f"{name}.txt").read_text().splitlines():
            match = PIN.fullmatch(line)
            if match is not None:
                found[canonicalize_name(match[1])] = match[2]
    return found


def needed(*extras: str) -> set[str]:
    """Return the names of everything that pageferry, with the extras, brings in here, however indirectly."""
    found: set[str] = set()
    waiting = [("pageferry", extra) for extra in ("", *extras)]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            found.add(canonicalize_name(requirement.name))
            new = {(requirement.name, wanted) for wanted in ("", *requirement.extras)} - seen
            seen |= new
            waiting += sorted(new)
    return found


@pytest.mark.parametrize("name", ["build", "runtime", "dev"])
def test_constraints_hold_pins_and_no_place_to_download_from(name: str) -> None:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()

    assert [line for line in lines if not line.startswith("# ") and not PIN.fullmatch(line)] == []
    assert not any("://" in line or "--" in line for line in lines)


def test_whatever_runs_is_pinned() -> None:
    assert needed() - set(pins("runtime")) == set()


def test_whatever_tests_is_pinned() -> None:
    assert needed("dev") - set(pins("runtime", "dev")) == set()


def test_nothing_is_pinned_twice_differently() -> None:
    runtime, dev, build = pins("runtime"), pins("dev"), pins("build")

    assert set(runtime) & set(dev) == set()
    for name in set(build) & (set(runtime) | set(dev)):
        assert build[name] == {**runtime, **dev}[name]


def test_what_is_installed_is_what_is_pinned() -> None:
    installed = {}
    for name in needed("dev"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is needed and not installed")

    pinned = pins("runtime", "dev")
    assert installed == {name: pinned[name] for name in installed}


def imported(path: Path) -> set[str]:
    """Return the top-level names of what a file imports absolutely."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    return names


def test_what_people_run_imports_only_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked_for = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    brought_by = packages_distributions()
    own = {"pageferry", "pageferryd"}

    undeclared = {
        f"{path.relative_to(ROOT)} imports {name}"
        for top in ("client", "service")
        for path in (ROOT / top).rglob("*.py")
        for name in imported(path) - own - set(sys.stdlib_module_names)
        if not {canonicalize_name(brings) for brings in brought_by.get(name, ())} & asked_for
    }
    assert undeclared == set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell_that_parses(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)

    assert (checked.returncode, checked.stderr) == (0, "")


def test_without_the_means_to_install_each_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    # A machine with the shell's own tools, and nothing else: not Debian, and no program that tests use.
    for name in ("bash", "dirname", "id"):
        found = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True, check=True)
        (tmp_path / name).symlink_to(found.stdout.strip())
    checkout = tmp_path / "checkout"
    (checkout / "tools").mkdir(parents=True)
    for name in ("system_packages.sh", "python.sh"):
        text = (ROOT / "tools" / name).read_text().replace(":/usr/sbin:/sbin", "")
        (checkout / "tools" / name).write_text(text)

    said = subprocess.run(
        ["bash", str(checkout / "tools" / "system_packages.sh")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert said.stderr == ""
    for program, package in (("promtool", "prometheus"), ("ip", "iproute2"), ("systemd-analyze", "systemd")):
        assert re.search(rf"(?m)^skipped: .+ \({program} is missing; it is in the package {package}\)$", said.stdout)


def test_the_help_names_every_target_that_people_type() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    for target in ("demo", "test", "lint", "bench", "proto", "pin", "clean"):
        assert re.search(rf"(?m)^make {target} +\S", shown), target
