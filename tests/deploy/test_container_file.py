from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pageferryd import config

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "deploy" / "container"


@pytest.fixture(scope="module")
def instructions() -> list[list[str]]:
    joined = (DIRECTORY / "Containerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def test_everything_copied_from_the_checkout_exists_and_is_in_the_build_context(instructions: list[list[str]]) -> None:
    ignore = (DIRECTORY / "Containerfile.dockerignore").read_text().splitlines()
    copied = [
        name for word, *rest in instructions if word == "COPY" and "--from=build" not in rest for name in rest[:-1]
    ]

    assert {"client", "service", "constraints", "pyproject.toml"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignore


def test_everything_the_wheel_needs_is_copied(instructions: list[list[str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {name for word, *rest in instructions if word == "COPY" for name in rest}

    assert project["project"]["readme"] in copied
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert package.split("/")[0] in copied


def test_the_installation_is_pinned_and_not_editable(instructions: list[list[str]]) -> None:
    (install,) = [words for words in instructions if words[0] == "RUN" and "install" in words]

    assert "-e" not in install
    assert install[1:3] == ['PIP_CONSTRAINT="constraints/runtime.txt', 'constraints/build.txt"']
    assert "PIP_BUILD_CONSTRAINT=constraints/build.txt" in install


def test_both_stages_begin_with_one_pinned_slim_image(instructions: list[list[str]]) -> None:
    images = [words[1] for words in instructions if words[0] == "FROM"]

    assert len(images) == 2
    assert len(set(images)) == 1
    assert "-slim" in images[0]
    assert not images[0].endswith(":latest")


def test_the_image_runs_the_sidecar_and_names_its_ports(instructions: list[list[str]]) -> None:
    by_word = {words[0]: words[1:] for words in instructions}
    fields = config.Settings.model_fields
    ports = [fields["listen"].default[0].rpartition(":")[2], fields["http"].default.rpartition(":")[2]]

    assert by_word["ENTRYPOINT"] == ['["pageferryd"]']
    assert by_word["EXPOSE"] == ports
