"""The sidecar's settings: a TOML file, the environment above it, the command line above both."""

from __future__ import annotations

import json
import os
import socket
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pageferry import address as addresses
from pageferry.errors import FerryError, Reason
from pageferry.tls import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_PATH: Final = Path("/etc/pageferry/pageferryd.toml")
ENV_PREFIX: Final = "PAGEFERRY_"
_ENV_DELIMITER: Final = "__"
# A socket's path has at most 107 bytes, and a hand-off socket is named after a migration's id.
_MAX_RUNTIME_DIR: Final = 60
_KIB: Final = 1024


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


Address = Annotated[str, AfterValidator(_address)]
TcpAddress = Annotated[str, AfterValidator(_tcp_address)]
Name = Annotated[str, BeforeValidator(_lower), Field(min_length=1, max_length=253)]
Names = Annotated[list[Name], NoDecode, BeforeValidator(_list)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Tls(BaseModel):
    """PEM files for mutual TLS: the CA, this host's certificate chain, and its key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ca: Path
    certificate: Path
    key: Path


class Limits(BaseModel):
    """What migrations may take where they do not say otherwise, and how long the sidecar waits for others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    push_bytes_per_second: int = Field(default=0, ge=0)
    """Most bytes a second that the push lane of one migration moves; 0 is unlimited."""
    push_window_bytes: int = Field(default=1024 * _KIB, ge=64 * _KIB, le=1024 * _KIB * _KIB)
    """Most bytes that the push lane of one migration has under way."""
    fault_objective_us: int = Field(default=1_000, ge=1, le=10_000_000)
    """Fault latency, in microseconds, above which push gives way."""
    demand_window: int = Field(default=16, ge=1, le=1024)
    """Most requests under way on the demand lane of one migration."""
    reconnect_initial_seconds: Seconds = 0.1
    """First wait before lost lanes are opened again; it doubles with each failure."""
    reconnect_max_seconds: Seconds = 5.0
    """Longest wait before lost lanes are opened again."""
    lane_silence_timeout: Seconds = 5.0
    """Seconds without an answer after which a lane counts as lost."""
    prepare_timeout: Seconds = 30.0
    """Seconds that the destination may take to ready its VMM."""
    handover_timeout: Seconds = 30.0
    """Seconds that the handover may take before it is undone."""
    max_migrations: int = Field(default=64, ge=1, le=4096)
    """Most migrations under way at once, of both roles."""

    @model_validator(mode="after")
    def _check_backoff(self) -> Limits:
        if self.reconnect_initial_seconds > self.reconnect_max_seconds:
            raise ValueError("reconnect_initial_seconds is above reconnect_max_seconds: make it smaller")
        return self


class Settings(BaseSettings):
    """Everything the sidecar can be told. `load` reads it; the constructor takes values only from its arguments."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter=_ENV_DELIMITER, extra="forbid", frozen=True, validate_default=False
    )

    host: str = Field(default_factory=socket.gethostname, min_length=1, max_length=253)
    """This host's name, as its certificate bears it."""
    listen: Annotated[list[Address], NoDecode, BeforeValidator(_list), Field(min_length=1)] = ["127.0.0.1:7443"]
    """Where gRPC is served."""
    advertise: Address | None = None
    """Where destinations reach this sidecar's page service, when that is not the first of `listen`."""
    api_socket: Annotated[Path, AfterValidator(_socket_path)] | None = None
    """A Unix socket for this host's operators: without TLS, guarded by its mode 0600."""
    http: TcpAddress = "127.0.0.1:9743"
    """Where /metrics, /healthz and /readyz are served."""
    runtime_dir: Annotated[Path, AfterValidator(_runtime_dir)] = Path("/run/pageferry")
    """Directory of the hand-off sockets, mode 0700."""
    insecure: bool = False
    """No TLS at all. Then everything of `listen` must be loopback."""
    tls: Tls | None = None
    """Certificates; needed unless insecure."""
    peers: Names = []
    """Names in certificates that may call the incoming and the page service; empty allows any of the CA."""
    operators: Names = []
    """Names in certificates that may call the migration service; empty allows any of the CA."""
    log_format: Annotated[Literal["json", "console"], BeforeValidator(_lower)] = "json"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = "info"
    limits: Limits = Limits()
    collapse_memory: bool = True
    """After a guest's last page, have its memory mapped by huge pages again where it was before."""
    drain_seconds: float = Field(default=30.0, ge=0, le=86_400, allow_inf_nan=False)
    """How long SIGTERM waits for migrations under way."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave the environment to `load`, which knows what came from where."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        problems = [*_security_problems(self), *_advertise_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def tls_files(self) -> TlsFiles | None:
        """Return the certificates' files, or None in insecure mode."""
        return TlsFiles(self.tls.ca, self.tls.certificate, self.tls.key) if self.tls is not None else None

    def page_address(self, bound: Sequence[str]) -> str:
        """Return where destinations reach the page service; `bound` is what `listen` was bound to, in its order."""
        if self.advertise is not None:
            return self.advertise
        return next((address for address in bound if not addresses.is_unix(address)), bound[0])


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
        name for name in prefixed if name.upper().removeprefix(ENV_PREFIX).lower().split(_ENV_DELIMITER)[0] not in known
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise _invalid([f"{path}: cannot be read: {error.strerror}; give the path of a readable file"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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


def _security_problems(settings: Settings) -> list[str]:
    if not settings.insecure:
        if settings.tls is None:
            ways = (
                "give tls.ca, tls.certificate and tls.key, or insecure = true (--insecure) with loopback addresses only"
            )
            return [f"tls: no certificates: {ways}"]
        return []
    problems = [
        f"listen: {address} is not loopback, and insecure mode would show guest memory to the network: "
        "listen on 127.0.0.1, [::1] or unix:, or give certificates instead of insecure"
        for address in settings.listen
        if not addresses.is_loopback(address)
    ]
    if settings.tls is not None:
        problems.append("tls: certificates and insecure exclude each other: remove one of them")
    problems.extend(
        f"{field}: names cannot be checked in insecure mode: remove them, or give certificates"
        for field in ("peers", "operators")
        if getattr(settings, field)
    )
    return problems


def _advertise_problems(settings: Settings) -> list[str]:
    if settings.advertise is not None:
        if addresses.is_wildcard(settings.advertise) or settings.advertise.endswith(":0"):
            return [f"advertise: {settings.advertise} is nothing to connect to: give a host and a port"]
        return []
    first = next((address for address in settings.listen if not addresses.is_unix(address)), None)
    if first is not None and addresses.is_wildcard(first):
        return [f"advertise: destinations cannot connect to {first}: give the HOST:PORT at which they reach this host"]
    return []


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
        names = [key for key in keys if not key.isdigit()]
        origin = f" (environment variable {ENV_PREFIX}{_ENV_DELIMITER.join(names).upper()})"
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
