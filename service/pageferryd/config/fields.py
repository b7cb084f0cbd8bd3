"""Kinds of values that settings have, each checked as it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from pageferry import address as addresses
from pageferry.errors import FerryError

# A socket's path has at most 107 bytes, and a hand-off socket is named after a migration's id.
_MAX_RUNTIME_DIR: Final = 60


def _address(value: str) -> str:
    try:
        return addresses.normalise(value)
    except FerryError as error:
        raise ValueError(error.message) from None


def _tcp_address(value: str) -> str:
    value = _address(value)
    if addresses.is_unix(value):
        raise ValueError("this one is served over TCP only: give HOST:PORT")
    return value


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError(f"{str(value)!r} is a relative path: give an absolute one")
    return value


def _socket_path(value: Path) -> Path:
    _address(addresses.UNIX_PREFIX + str(_absolute(value)))
    return value


def _runtime_dir(value: Path) -> Path:
    if len(os.fsencode(_absolute(value))) > _MAX_RUNTIME_DIR:
        raise ValueError(
            f"its path is longer than {_MAX_RUNTIME_DIR} bytes, and sockets are made in it: give a shorter one"
        )
    return value


def _list(value: object) -> object:
    """Accept `a,b` from the environment beside a JSON or TOML list."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"it begins like a JSON list, but is none: {error}") from None
    return [part.strip() for part in value.split(",") if part.strip()]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


InLowerCase = BeforeValidator(_lower)
Address = Annotated[str, AfterValidator(_address)]
Addresses = Annotated[list[Address], NoDecode, BeforeValidator(_list), Field(min_length=1)]
TcpAddress = Annotated[str, AfterValidator(_tcp_address)]
SocketPath = Annotated[Path, AfterValidator(_socket_path)]
RuntimeDir = Annotated[Path, AfterValidator(_runtime_dir)]
Name = Annotated[str, InLowerCase, Field(min_length=1, max_length=253)]
Names = Annotated[list[Name], NoDecode, BeforeValidator(_list)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
