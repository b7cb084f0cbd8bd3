"""Mutual TLS on bare sockets: the contexts of both sides, and the names that a peer has proved."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from pageferry.tls import TlsFiles


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
    return context


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
    context.minimum_version = ssl.TLSVersion.TLSv1_2
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
