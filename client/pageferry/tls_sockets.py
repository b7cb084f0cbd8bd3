"""Mutual TLS on bare sockets: the contexts of both sides, and the names that a peer has proved."""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING, Any

from pageferry.errors import FerryError, Reason
from pageferry.tls import fingerprint

if TYPE_CHECKING:
    from pageferry.tls import TlsFiles

_log = logging.getLogger(__name__)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a client's context from the files as they are now: the server must prove the name that is asked for.

    FerryError(CONFIG_INVALID) where a file cannot be used.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, files)


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a server's context from the files as they are now, which asks every client for a certificate of the CA.

    FerryError(CONFIG_INVALID) where a file cannot be used.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, files)
    context.verify_mode = ssl.CERT_REQUIRED
    # A session that is taken up again shows no certificate: one that has expired since would do.
    context.num_tickets = 0
    return context


class RenewedContext:
    """A server's context that follows its files: those of each moment count for connections that begin then.

    Files that do not fit together (half of a renewal) are logged, and the last good ones stay in use.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raise FerryError(CONFIG_INVALID) where a file cannot be used."""
        self._files = files
        self._seen = fingerprint(files)
        self._context = server_context(files)

    def now(self) -> ssl.SSLContext:
        """Return the context for a connection that begins now. The files are read only when they have changed."""
        # Taken before the files are read: a change in between is then seen at the next connection.
        seen = fingerprint(self._files)
        if seen != self._seen:
            self._seen = seen
            try:
                self._context = server_context(self._files)
            except FerryError as error:
                _log.warning("certificates changed but cannot be used, keeping the last good ones: %s", error)
        return self._context


def proved_names(connection: Any) -> frozenset[str]:
    """Return the names in the certificate of the peer of an SSLObject: DNS and IP entries of its SAN, lower case.

    The CN counts only in a certificate without SAN.
    """
    certificate = connection.getpeercert() or {}
    names = [name for kind, name in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    if "subjectAltName" not in certificate:
        names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return frozenset(name.lower() for name in names)


def _context(side: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    # Sessions of earlier ones can be taken up again whatever the server says.
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # Python takes PEM as ASCII only; a bundle's comments may hold the names of CAs in any script.
        context.load_verify_locations(cadata=files.ca.read_bytes().decode("ascii", errors="ignore"))
        context.load_cert_chain(files.certificate, files.key, password="")
    except (OSError, ValueError) as error:
        raise FerryError(
            Reason.CONFIG_INVALID,
            f"the TLS files {files.ca}, {files.certificate} and {files.key} cannot be used: {error}",
        ) from error
    return context
