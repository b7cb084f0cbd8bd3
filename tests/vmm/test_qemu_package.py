"""What crosses beside a QEMU guest's RAM, as bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.qemu.package import (
    MAX_BLOB_BYTES,
    Blob,
    Package,
    digest_of,
    pack,
    pack_blob,
    unpack,
    unpack_blob,
    without_zeroes,
)

blobs = st.dictionaries(st.text(max_size=20), st.builds(pack_blob, st.binary(max_size=200)), max_size=5)


def read_or_refused(data: bytes) -> Package | None:
    try:
        return unpack(data)
    except FerryError as error:
        if error.reason is Reason.VMM_FAILED:
            return None
        raise


@given(st.binary(max_size=300), blobs)
def test_what_is_packed_is_unpacked(state: bytes, content: dict[str, Blob]) -> None:
    assert unpack(pack(Package(state, content))) == Package(state, content)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    read_or_refused(data)


@given(st.binary(min_size=1, max_size=50), blobs, st.data())
def test_a_changed_package_is_refused_or_read_within_its_bounds(
    state: bytes, content: dict[str, Blob], data: st.DataObject
) -> None:
    changed = bytearray(pack(Package(state, content)))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    found = read_or_refused(bytes(changed))
    assert found is None or len(found.blobs) == len(content)


@given(st.binary(max_size=300), st.integers(0, 100))
def test_a_blob_is_unpacked_up_to_the_zeroes_at_its_end(content: bytes, zeroes: int) -> None:
    blob = pack_blob(bytearray(content + bytes(zeroes)))
    assert blob.length == len(content) + zeroes
    assert unpack_blob("/rom@etc/acpi/rsdp", blob) == without_zeroes(content) == content.rstrip(b"\0")
    assert blob.digest == digest_of(without_zeroes(content))


def test_a_blob_above_the_limit_is_refused() -> None:
    with pytest.raises(FerryError, match="too large"):
        unpack(pack(Package(b"", {"/rom@etc/acpi/tables": pack_blob(bytes(MAX_BLOB_BYTES + 1))})))


def test_a_blob_that_is_damaged_or_would_grow_beyond_its_length_is_refused() -> None:
    blob = pack_blob(b"x" * 1000)
    for spoilt in (
        blob._replace(length=999),
        blob._replace(digest=bytes(32)),
        blob._replace(packed=blob.packed[:-1]),
        blob._replace(packed=b"no stream of zlib"),
    ):
        with pytest.raises(FerryError, match="/rom@etc/acpi/rsdp was damaged") as refused:
            unpack_blob("/rom@etc/acpi/rsdp", spoilt)
        assert refused.value.reason is Reason.VMM_FAILED
