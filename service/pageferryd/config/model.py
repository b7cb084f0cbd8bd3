"""The settings, one field each, and what is checked of several together."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pageferry import address as addresses
from pageferry.tls import TlsFiles
from pageferryd.config.fields import (
    Address,
    Addresses,
    InLowerCase,
    Names,
    RuntimeDir,
    Seconds,
    SocketPath,
    TcpAddress,
)
from pageferryd.config.guests import ConfiguredGuest, Template, guest_problems

if TYPE_CHECKING:
    from collections.abc import Sequence

ENV_PREFIX: Final = "PAGEFERRY_"
ENV_DELIMITER: Final = "__"
MAX_GUESTS: Final = 4096
MAX_TEMPLATES: Final = 256
_KIB: Final = 1024


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
    max_migrations: int = Field(default=256, ge=1, le=4096)
    """Most migrations that are under way or wait for their turn, of both roles."""
    max_outgoing: int = Field(default=16, ge=1, le=4096)
    """Most guests that leave at once; others wait for their turn."""
    max_incoming: int = Field(default=16, ge=1, le=4096)
    """Most guests that come at once; others wait at their sources."""
    host_push_bytes_per_second: int = Field(default=0, ge=0)
    """Most bytes a second that the push lanes of all guests that come move together; 0 is unlimited."""
    on_loss: Annotated[Literal["wait", "kill"], InLowerCase] = "wait"
    """What becomes of a guest here whose missing pages cannot be had, where its migration does not say."""
    loss_seconds: int = Field(default=300, ge=1, le=31_536_000)
    """How long a source may be gone before that happens, where its migration does not say."""

    @model_validator(mode="after")
    def _check_backoff(self) -> Limits:
        if self.reconnect_initial_seconds > self.reconnect_max_seconds:
            raise ValueError("reconnect_initial_seconds is above reconnect_max_seconds: make it smaller")
        return self


class Settings(BaseSettings):
    """Everything the sidecar can be told. `load` reads it; the constructor takes values only from its arguments."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER, extra="forbid", frozen=True, validate_default=False
    )

    host: str = Field(default_factory=socket.gethostname, min_length=1, max_length=253)
    """This host's name, as its certificate bears it."""
    listen: Addresses = ["127.0.0.1:7443"]
    """Where gRPC is served."""
    advertise: Address | None = None
    """Where destinations reach this sidecar's page service, when that is not the first of `listen`."""
    api_socket: SocketPath | None = None
    """A Unix socket for this host's operators: without TLS, guarded by its mode 0600."""
    lane_sockets: bool = True
    """Serve pages over bare sockets as well, which take less of both hosts than gRPC: used where they are reached."""
    lane_listen: Address | None = None
    """Where these are; the port behind the first of `listen` when this is not given."""
    http: TcpAddress = "127.0.0.1:9743"
    """Where /metrics, /healthz and /readyz are served."""
    runtime_dir: RuntimeDir = Path("/run/pageferry")
    """Directory of the sockets that VMMs reach, a directory for each, and of what is noted of guests under way."""
    insecure: bool = False
    """No TLS at all. Then everything of `listen` must be loopback."""
    tls: Tls | None = None
    """Certificates; needed unless insecure."""
    peers: Names = []
    """Names in certificates that may call the incoming and the page service; empty allows any of the CA."""
    operators: Names = []
    """Names in certificates that may call the migration service; empty allows any of the CA where `viewers` is."""
    viewers: Names = []
    """Names in certificates that may look at migrations and guests, and change nothing."""
    log_format: Annotated[Literal["json", "console"], InLowerCase] = "json"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], InLowerCase] = "info"
    limits: Limits = Limits()
    collapse_memory: bool = True
    """After a guest's last page, have its memory mapped by huge pages again where it was before."""
    drain_seconds: float = Field(default=30.0, ge=0, le=86_400, allow_inf_nan=False)
    """How long SIGTERM waits for migrations under way."""
    guests: Annotated[list[ConfiguredGuest], Field(max_length=MAX_GUESTS)] = []
    """Guests of this host, registered at the start."""
    templates: Annotated[list[Template], Field(max_length=MAX_TEMPLATES)] = []
    """How VMMs are started for guests that come; of several that fit the first is taken."""

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
        problems = [
            *_security_problems(self),
            *_advertise_problems(self),
            *guest_problems(self.guests),
            *_template_problems(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def tls_files(self) -> TlsFiles | None:
        """Return the certificates' files, or None in insecure mode."""
        return TlsFiles(self.tls.ca, self.tls.certificate, self.tls.key) if self.tls is not None else None

    def page_address(self, bound: Sequence[str]) -> str:
        """Return where destinations reach the page service; `bound` is what `listen` was bound to, in its order."""
        return self.advertise if self.advertise is not None else self.page_bound(bound)

    def page_bound(self, bound: Sequence[str]) -> str:
        """Return which of `bound` destinations use: the first that is no Unix socket, if there is one."""
        return next((address for address in bound if not addresses.is_unix(address)), bound[0])


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
        for field in ("peers", "operators", "viewers")
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


def _template_problems(settings: Settings) -> list[str]:
    most = settings.limits.prepare_timeout
    return [
        f"templates.{number}: its start_timeout of {template.start_timeout:g} s is above limits.prepare_timeout, and "
        "the source waits no longer: make it smaller"
        for number, template in enumerate(settings.templates)
        if template.start_timeout > most
    ]
