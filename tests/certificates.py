"""Certificates for tests, made on the spot: a CA, and leaves that it signs."""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pageferry.tls import TlsFiles

if TYPE_CHECKING:
    from pathlib import Path

_HOUR = dt.timedelta(hours=1)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@dataclass(frozen=True)
class Leaf:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass
class Authority:
    """A CA of its own."""

    name: str = "test CA"
    _key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    certificate: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.certificate = self._sign(_name(self.name), self._key.public_key(), ca=True, names=())

    def issue(self, *dns_names: str, common_name: str = "", expired: bool = False) -> Leaf:
        """Sign a certificate for both client and server use, with the names as SAN DNS names and 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(common_name or (dns_names[0] if dns_names else "nameless"))
        certificate = self._sign(subject, key.public_key(), ca=False, names=dns_names, expired=expired)
        return Leaf(certificate, _key_pem(key))

    def write(self, directory: Path, *dns_names: str, common_name: str = "", expired: bool = False) -> TlsFiles:
        """Issue a certificate and write it with its key and the CA into a directory (made when absent)."""
        directory.mkdir(parents=True, exist_ok=True)
        files = TlsFiles(ca=directory / "ca.pem", certificate=directory / "cert.pem", key=directory / "key.pem")
        leaf = self.issue(*dns_names, common_name=common_name, expired=expired)
        files.ca.write_bytes(self.certificate)
        files.certificate.write_bytes(leaf.certificate)
        files.key.write_bytes(leaf.key)
        files.key.chmod(0o600)
        return files

    def _sign(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        *,
        ca: bool,
        names: tuple[str, ...],
        expired: bool = False,
    ) -> bytes:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(_name(self.name))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * _HOUR)
            .not_valid_after(now - _HOUR if expired else now + 24 * _HOUR)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
            alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
