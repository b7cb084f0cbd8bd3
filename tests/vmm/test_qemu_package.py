"""What crosses beside a QEMU guest's RAM, as bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.qemu.package import MAX_BLOB_BYTES, Package, pack, unpack

blobs = st.dictionaries(st.text(max_size=20), st.binary(max_size=200), max_size=5)


def read_or_refused(data: bytes) -> Package | None:
    try:
        return unpack(data)
    except FerryError as error:
        if error.reason is Reason.VMM_FAILED:
            return None
        raise


@given(st.binary(max_size=300), blobs)
def test_what_is_packed_is_unpacked(state: bytes, content: dict[str, bytes]) -> None:
    assert unpack(pack(Package(state, content))) == Package(state, content)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    read_or_refused(data)


@given(st.binary(min_size=1, max_size=50), blobs, st.data())
def test_a_changed_package_is_refused_or_read_within_its_bounds(
    state: bytes, content: dict[str, bytes], data: st.DataObject
) -> None:
    changed = bytearray(pack(Package(state, content)))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    found = read_or_refused(bytes(changed))
    assert found is None or len(found.blobs) == len(content)


def test_a_blob_that_would_grow_without_end_is_refused() -> None:
    with pytest.raises(FerryError, match="too large"):
        unpack(pack(Package(b"", {"/rom@etc/acpi/tables": bytes(MAX_BLOB_BYTES + 1)})))
