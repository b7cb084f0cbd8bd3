"""Mutual TLS: the files, the credentials of both sides, and the names a peer has proved."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from pathlib import Path

    # The context of a call is generic in its request and its response, of which nothing here depends.
    from typing import Any

    AnyServicerContext = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)

# What identifies one state of a file: device, inode, size in bytes, modification and change time in nanoseconds.
Fingerprint = tuple[tuple[int, int, int, int, int], ...]


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the CA that both sides trust, this side's certificate chain, and its private key (not encrypted)."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class _Identity:
    ca: bytes
    certificate: bytes
    key: bytes

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], root_certificates=self.ca)


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Return a client's credentials from the files as they are now.

    Raises FerryError(CONFIG_INVALID) when a file cannot be read or is no PEM, or the key is not the certificate's.
    """
    identity = _load(files)
    return grpc.ssl_channel_credentials(
        root_certificates=identity.ca, private_key=identity.key, certificate_chain=identity.certificate
    )


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return a server's credentials, which ask every client for a certificate of the CA.

    The files are looked at again for each new connection; connections that exist keep what they began with. Files that
    do not fit together (half of a renewal) are logged, and the last good ones stay in use. Raises
    FerryError(CONFIG_INVALID) when they do not fit at the start.
    """
    renewal = _Renewal(files)
    return grpc.dynamic_ssl_server_credentials(
        renewal.identity.server_configuration(),
        renewal.fetch,  # type: ignore[arg-type]  # the stubs lack the None that grpc documents
        require_client_authentication=True,
    )


def peer_names(context: AnyServicerContext) -> frozenset[str]:
    """Return the names that an authenticated client has proved: the DNS and IP entries of its certificate's SAN.

    The CN counts only in a certificate without SAN, as when a client checks a server. Names are in lower case. Empty
    when the connection is not authenticated.
    """
    proved = context.auth_context()
    # The property names are those of gRPC's `grpc/grpc_security_constants.h`.
    names = [*proved.get("peer_dns", ()), *proved.get("peer_ip", ())]
    if "x509_subject_alternative_name" not in proved:
        names.extend(proved.get("x509_common_name", ()))
    return frozenset(name.decode(errors="replace").lower() for name in names)


class _Renewal:
    """Remembers which state of the files is in use. gRPC calls `fetch` from threads of its own."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen: Fingerprint | None = fingerprint(files)
        self.identity = _load(files)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return a new configuration when the files have changed and fit together; None keeps the one in use."""
        with self._lock:
            # Taken before the files are read: a change in between is then seen at the next connection.
            seen = fingerprint(self._files)
            if seen == self._seen:
                return None
            self._seen = seen
            try:
                identity = _load(self._files)
            except FerryError as error:
                _log.warning("certificates changed but cannot be used, keeping the last good ones: %s", error)
                return None
            if identity == self.identity:
                return None
            self.identity = identity
            _log.info("certificates renewed from %s", self._files.certificate)
            return identity.server_configuration()


def fingerprint(files: TlsFiles) -> Fingerprint | None:
    """Return what changes whenever one of the files does; None while one is absent."""
    try:
        stats = [path.stat() for path in (files.ca, files.certificate, files.key)]
    except OSError:
        # Absent for a moment while they are replaced; loading them then says which one.
        return None
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)


def _load(files: TlsFiles) -> _Identity:
    identity = _Identity(
        ca=_read(files.ca, "CA"),
        certificate=_read(files.certificate, "certificate"),
        key=_read(files.key, "private key"),
    )
    _check(identity, files)
    return identity


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FerryError(
            Reason.CONFIG_INVALID, f"cannot read the TLS {what} {path}: {error.strerror}; check its path and its mode"
        ) from error


def _check(identity: _Identity, files: TlsFiles) -> None:
    """Have OpenSSL parse the bytes that will be used: gRPC itself fails only at the first handshake, without a word."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Python takes PEM as ASCII only; a bundle's comments may hold the names of CAs in any script.
        context.load_verify_locations(cadata=identity.ca.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise FerryError(
            Reason.CONFIG_INVALID, f"the TLS CA {files.ca} holds no PEM certificate: {error}; give the CA's certificate"
        ) from error
    certificate = key = -1
    try:
        certificate = _memory_file(identity.certificate)
        key = _memory_file(identity.key)
        # The empty password keeps OpenSSL from asking for one on the terminal.
        context.load_cert_chain(f"/proc/self/fd/{certificate}", f"/proc/self/fd/{key}", password="")
    except (ssl.SSLError, ValueError) as error:
        raise FerryError(
            Reason.CONFIG_INVALID,
            f"the TLS certificate {files.certificate} and the private key {files.key} do not fit together: {error}; "
            "give a PEM certificate chain and its own unencrypted key",
        ) from error
    finally:
        for fd in (certificate, key):
            if fd >= 0:
                os.close(fd)


def _memory_file(data: bytes) -> int:
    """Return a file descriptor that reads as the given bytes, since Python's ssl takes a key from a path only."""
    fd = os.memfd_create("pageferry-tls", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return fd
