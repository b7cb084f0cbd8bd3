"""What the settings say of guests: those that a host has, and how a VMM is started for one that comes."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pageferryd.config.fields import SocketPath

GUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_PATTERN: Final = re.compile(r"[A-Za-z0-9._*?\[\]!-]{1,256}")
# Braces of JSON and of a shell's ${name} are the command's own.
_PLACEHOLDER: Final = re.compile(r"(?<!\$)\{([a-z_]+)\}")
_PLACEHOLDERS: Final = frozenset({"guest", "socket"})
_MAX_ARGUMENTS: Final = 1024
# What a guest's name that another host sends may not do: read as an option, or lead out of a directory.
_ODD_BEGINNINGS: Final = ("-", ".")

Driver = Literal["vmm", "qemu", "cloud-hypervisor", "firecracker"]


def _guest_id(value: str) -> str:
    if not GUEST_ID.fullmatch(value):
        raise ValueError(f"{value!r} is no guest id: use 1 to 128 letters, digits, '.', '_' or '-'")
    return value


def _pattern(value: str) -> str:
    if not _PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} is no pattern of guest ids: use their characters and *, ?, [abc] or [!abc]")
    return value


def _command(value: list[str]) -> list[str]:
    if not value[0]:
        raise ValueError("its first argument, the program, is empty")
    if any("\0" in argument for argument in value):
        raise ValueError("an argument holds a zero byte")
    named = {name for argument in value for name in _PLACEHOLDER.findall(argument)}
    if named - _PLACEHOLDERS:
        raise ValueError(f"there is no placeholder {{{min(named - _PLACEHOLDERS)}}}: use {{guest}} and {{socket}}")
    if "socket" not in named:
        raise ValueError("no argument holds {socket}, where the VMM has to serve its API")
    return value


class ConfiguredGuest(BaseModel):
    """A guest of this host, or a VMM that waits for one: registered at every start, and for as long as it lasts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(_guest_id)]
    """The guest's id, the same on every host."""
    driver: Driver
    """The kind of its VMM."""
    endpoint: SocketPath
    """The Unix socket at which its VMM is reached."""


class Template(BaseModel):
    """How a VMM is started for a guest that comes here and has none registered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    driver: Driver
    """The kind of VMM that the command starts."""
    guests: Annotated[str, AfterValidator(_pattern)] = "*"
    """Which guests it is for, as a shell's pattern."""
    command: Annotated[list[str], Field(min_length=1, max_length=_MAX_ARGUMENTS), AfterValidator(_command)]
    """The program and its arguments, run without a shell; {guest} and {socket} are filled in."""
    start_timeout: Annotated[float, Field(gt=0, le=3_600, allow_inf_nan=False)] = 10.0
    """Seconds until the VMM has to answer."""

    def fits(self, guest_id: str) -> bool:
        """Say whether it is for this guest."""
        sound = GUEST_ID.fullmatch(guest_id) is not None and not guest_id.startswith(_ODD_BEGINNINGS)
        return sound and fnmatchcase(guest_id, self.guests)

    def arguments(self, guest_id: str, socket_path: str) -> list[str]:
        """Return the command for a guest whose VMM has to serve `socket_path`."""
        values = {"guest": guest_id, "socket": socket_path}
        return [_PLACEHOLDER.sub(lambda found: values[found[1]], argument) for argument in self.command]


def guest_problems(guests: list[ConfiguredGuest]) -> list[str]:
    """Return what is wrong with them together, a line each."""
    problems = []
    for what in ("name", "endpoint"):
        values = [str(getattr(guest, what)) for guest in guests]
        twice = sorted({value for value in values if values.count(value) > 1})
        problems += [f"guests: two have the {what} {value}: give each its own" for value in twice]
    return problems
