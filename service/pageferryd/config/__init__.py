"""The sidecar's settings: a TOML file, the environment above it, the command line above both."""

from pageferryd.config.guests import GUEST_ID, ConfiguredGuest, Template
from pageferryd.config.model import ENV_PREFIX, Limits, Settings, Tls
from pageferryd.config.reading import DEFAULT_PATH, load, unread_environment

__all__ = [
    "DEFAULT_PATH",
    "ENV_PREFIX",
    "GUEST_ID",
    "ConfiguredGuest",
    "Limits",
    "Settings",
    "Template",
    "Tls",
    "load",
    "unread_environment",
]
