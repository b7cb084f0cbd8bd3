"""TLS files: what is accepted, what is refused and with which words, and when a renewal takes effect."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority
from pageferry import tls
from pageferry.errors import FerryError, Reason
from pageferry.tls import TlsFiles, channel_credentials, peer_names, server_credentials


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> TlsFiles:
    return authority.write(tmp_path / "tls", "host-a")


class Connection:
    """Stands for a call's context: gRPC shows what a peer proved as lists of bytes."""

    def __init__(self, **proved: list[bytes]) -> None:
        self._proved = proved

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._proved


def test_files_that_fit_together_make_credentials_for_both_sides(files: TlsFiles) -> None:
    channel_credentials(files)
    server_credentials(files)


def test_a_bundle_of_cas_may_hold_comments_in_any_script(files: TlsFiles) -> None:
    files.ca.write_bytes("# Türkische CA\n".encode() + files.ca.read_bytes() + Authority("second CA").certificate)
    channel_credentials(files)


def test_reading_them_leaves_no_file_open(files: TlsFiles) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    channel_credentials(files)
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("make", [channel_credentials, server_credentials])
@pytest.mark.parametrize(
    ("which", "content", "what"),
    [
        ("ca", None, "cannot read the TLS CA"),
        ("certificate", None, "cannot read the TLS certificate"),
        ("key", None, "cannot read the TLS private key"),
        ("ca", b"no PEM", "holds no PEM certificate"),
        ("ca", b"", "holds no PEM certificate"),
        ("ca", b"\xff\xfe", "holds no PEM certificate"),
        ("certificate", b"no PEM", "do not fit together"),
        ("key", b"", "do not fit together"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    make: Any, which: str, content: bytes | None, what: str, files: TlsFiles
) -> None:
    path: Path = getattr(files, which)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(FerryError, match=what) as raised:
        make(files)
    assert raised.value.reason is Reason.CONFIG_INVALID
    assert str(path) in raised.value.message


def test_the_key_of_another_certificate_is_refused(files: TlsFiles, authority: Authority) -> None:
    files.key.write_bytes(authority.issue("host-b").key)
    with pytest.raises(FerryError, match="do not fit together"):
        channel_credentials(files)


def test_an_encrypted_key_is_refused_without_asking_for_its_password(files: TlsFiles) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with pytest.raises(FerryError, match="unencrypted key"):
        channel_credentials(files)


# Renewal


def test_unchanged_files_are_not_read_again(files: TlsFiles) -> None:
    renewal = tls._Renewal(files)
    assert renewal.fetch() is None


def test_changed_files_are_taken_once(files: TlsFiles, tmp_path: Path, authority: Authority) -> None:
    renewal = tls._Renewal(files)
    authority.write(tmp_path / "tls", "renamed")
    assert renewal.fetch() is not None
    assert renewal.fetch() is None


def test_touched_files_of_the_same_content_change_nothing(files: TlsFiles) -> None:
    renewal = tls._Renewal(files)
    files.key.write_bytes(files.key.read_bytes())
    assert renewal.fetch() is None


def test_half_a_renewal_keeps_the_last_good_ones_until_the_other_half_comes(
    files: TlsFiles, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    renewal = tls._Renewal(files)
    good = renewal.identity
    leaf = authority.issue("renamed")
    with caplog.at_level(logging.WARNING):
        files.certificate.write_bytes(leaf.certificate)
        assert renewal.fetch() is None
        assert renewal.fetch() is None
    assert renewal.identity == good
    assert len([r for r in caplog.records if "keeping the last good ones" in r.getMessage()]) == 1
    files.key.write_bytes(leaf.key)
    assert renewal.fetch() is not None
    assert renewal.identity.key == leaf.key


def test_files_that_are_gone_for_a_moment_keep_the_last_good_ones(files: TlsFiles) -> None:
    renewal = tls._Renewal(files)
    key = files.key.read_bytes()
    files.key.unlink()
    assert renewal.fetch() is None
    files.key.write_bytes(key)
    assert renewal.fetch() is None


def test_files_replaced_by_a_renamed_link_are_seen(tmp_path: Path, authority: Authority) -> None:
    """As Kubernetes mounts secrets: all files change at once, behind a link to their directory."""
    authority.write(tmp_path / "one", "host-a")
    authority.write(tmp_path / "two", "host-a")
    link = tmp_path / "current"
    link.symlink_to("one")
    renewal = tls._Renewal(TlsFiles(link / "ca.pem", link / "cert.pem", link / "key.pem"))
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(link)
    assert renewal.fetch() is not None


# Names


def test_names_are_the_alternative_ones_in_lower_case() -> None:
    context: Any = Connection(
        peer_dns=[b"Host-B", b"b.example.org"],
        peer_ip=[b"10.0.0.1"],
        x509_subject_alternative_name=[b"Host-B", b"b.example.org", b"10.0.0.1"],
        x509_common_name=[b"somebody"],
    )
    assert peer_names(context) == {"host-b", "b.example.org", "10.0.0.1"}


def test_the_common_name_counts_only_where_there_are_no_others() -> None:
    context: Any = Connection(x509_common_name=[b"Host-B"])
    assert peer_names(context) == {"host-b"}


def test_a_connection_without_tls_proves_no_name() -> None:
    context: Any = Connection(transport_security_type=[b"insecure"])
    assert peer_names(context) == frozenset()
