"""Where settings come from, and what is said about those that cannot be."""

from __future__ import annotations

import os
import tomllib
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError

from pageferry.errors import FerryError, Reason
from pageferryd.config.model import ENV_DELIMITER, ENV_PREFIX, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_PATH: Final = Path("/etc/pageferry/pageferryd.toml")


def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read the settings.

    `path` is the file that was asked for; without one, /etc/pageferry/pageferryd.toml is read if it exists.
    `overrides` come from the command line and win over the environment, which wins over the file. Raises
    FerryError(CONFIG_INVALID) with one line a problem.
    """
    if path is None and DEFAULT_PATH.exists():
        path = DEFAULT_PATH
    from_file = _read_file(path) if path is not None else {}
    from_environment = _read_environment()
    # Names with an underscore first are what BaseSettings itself is told by its caller.
    odd = [key for key in from_file if key.startswith("_")]
    if odd:
        raise _invalid([f"{key} ({path}): no such setting: correct its name or remove it" for key in odd])
    merged = _merge(_merge(from_file, from_environment), dict(overrides or {}))
    try:
        return Settings(**merged)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _describe(problem, path, from_file, from_environment)]
        raise _invalid(lines) from None


def unread_environment(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return variables named like ours that no setting reads: misspelt ones, or another program's.

    They are for a warning, not an error: Kubernetes, for one, sets PAGEFERRY_PORT beside a service named pageferry.
    """
    known = set(Settings.model_fields)
    prefixed = (name for name in environment if name.upper().startswith(ENV_PREFIX))
    return sorted(
        name for name in prefixed if name.upper().removeprefix(ENV_PREFIX).lower().split(ENV_DELIMITER)[0] not in known
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise _invalid([f"{path}: cannot be read: {error.strerror}; give the path of a readable file"]) from error
    except (ValueError, RecursionError) as error:
        raise _invalid([f"{path}: is not TOML: {error}; correct it there"]) from error


def _read_environment() -> dict[str, Any]:
    try:
        return EnvSettingsSource(Settings)()
    except SettingsError as error:
        raise _invalid([f"environment: {error}; lists are written a,b and tables one variable a key"]) from error


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _describe(
    problem: Mapping[str, Any],
    path: Path | None,
    from_file: Mapping[str, Any],
    from_environment: Mapping[str, Any],
) -> list[str]:
    """Return a validation error as lines of `name (where it was set): what is wrong`."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    keys = [str(part) for part in problem["loc"]]
    if not keys:
        # A check of several settings together names them itself, one a line.
        return message.splitlines()
    if problem["type"] == "extra_forbidden":
        message = "no such setting: correct its name or remove it"
    origin = ""
    if _holds(from_environment, keys):
        # One variable holds a whole list.
        names = list(takewhile(lambda key: not key.isdigit(), keys))
        origin = f" (environment variable {ENV_PREFIX}{ENV_DELIMITER.join(names).upper()})"
    elif _holds(from_file, keys):
        origin = f" ({path})"
    return [f"{'.'.join(keys)}{origin}: {message}"]


def _holds(values: Mapping[str, Any], keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(values, dict):
            return True
        if key not in values:
            return False
        values = values[key]
    return True


def _invalid(lines: Sequence[str]) -> FerryError:
    return FerryError(Reason.CONFIG_INVALID, "the configuration cannot be used:\n" + "\n".join(f"  {x}" for x in lines))
