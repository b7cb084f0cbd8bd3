"""Addresses of sidecars: `HOST:PORT`, `[IPV6]:PORT`, or `unix:/absolute/path`."""

from __future__ import annotations

import ipaddress
import re
from pathlib import PurePosixPath

from pageferry.errors import FerryError, Reason

UNIX_PREFIX = "unix:"
# sizeof(sockaddr_un.sun_path) in <linux/un.h>, with its closing zero.
_MAX_UNIX_PATH = 107
_MAX_PORT = 65535
# A host name of RFC 1123, with the underscores that container networks use.
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")


def normalise(address: str) -> str:
    """Return the one spelling of an address.

    Port 0 is allowed: a listener then picks a port. Raises FerryError(INVALID_ARGUMENT) for anything that is neither
    `HOST:PORT`, `[IPV6]:PORT` nor `unix:/absolute/path`.
    """
    address = address.strip()
    if address.startswith(UNIX_PREFIX):
        return UNIX_PREFIX + _unix_path(address)
    host, port = split(address)
    return join(host, port)


def split(address: str) -> tuple[str, int]:
    """Return host (without brackets, in lower case) and port of a TCP address. Raises FerryError(INVALID_ARGUMENT)."""
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise _invalid(address, "it needs a host and a port")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > _MAX_PORT:
        raise _invalid(address, f"its port is not a number from 0 to {_MAX_PORT}")
    return _host(address, host), int(port)


def join(host: str, port: int) -> str:
    """Return the TCP address of a host (an IPv6 one without brackets) and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_unix(address: str) -> bool:
    """Tell whether an address is that of a Unix socket."""
    return address.startswith(UNIX_PREFIX)


def is_loopback(address: str) -> bool:
    """Tell whether only this host can reach the address: a Unix socket, 127.0.0.0/8, ::1, or `localhost`.

    Names other than `localhost` count as reachable from outside, whatever they resolve to today. Raises
    FerryError(INVALID_ARGUMENT) when it is no address.
    """
    address = normalise(address)
    if is_unix(address):
        return True
    host, _ = split(address)
    ip = _ip(host)
    return host == "localhost" if ip is None else ip.is_loopback


def is_wildcard(address: str) -> bool:
    """Tell whether the address means every interface of a host: 0.0.0.0 or ::. Raises FerryError(INVALID_ARGUMENT)."""
    address = normalise(address)
    if is_unix(address):
        return False
    ip = _ip(split(address)[0])
    return ip is not None and ip.is_unspecified


def _host(address: str, host: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        ip = _ip(host[1:-1])
        if not isinstance(ip, ipaddress.IPv6Address):
            raise _invalid(address, "what stands in brackets is not an IPv6 address")
        return str(ip)
    if ":" in host:
        raise _invalid(address, "write an IPv6 address in brackets, as in [::1]:7443")
    if re.fullmatch(r"[0-9.]+", host) and _ip(host) is None:
        raise _invalid(address, "its host is not an IPv4 address")
    if not _HOST.fullmatch(host):
        raise _invalid(address, "its host is not a name")
    return host.lower()


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _unix_path(address: str) -> str:
    path = address.removeprefix(UNIX_PREFIX)
    # unix:///path is the same address in gRPC's naming.
    if path.startswith("///"):
        path = path[2:]
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise _invalid(address, "after unix: comes the absolute path of a socket")
    path = str(PurePosixPath("/" + path.lstrip("/")))
    if len(path.encode()) > _MAX_UNIX_PATH:
        raise _invalid(address, f"the path of a Unix socket has at most {_MAX_UNIX_PATH} bytes")
    return path


def _invalid(address: str, why: str) -> FerryError:
    return FerryError(
        Reason.INVALID_ARGUMENT,
        f"{address!r} is not an address: {why}; expected HOST:PORT, [IPV6]:PORT or unix:/absolute/path",
    )
