"""Bytes that once took time or memory beyond their length: each is over within the test's deadline, or never."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.core.errors import MalformedPagesError
from pageferryd.core.frames import MAX_REQUEST, RequestFrames
from pageferryd.vmm.firecracker import memory
from pageferryd.vmm.qemu.blocks import _ranges, parse_ramblocks
from pageferryd.vmm.qemu.movable import _other_mappers
from pageferryd.vmm.qemu.package import MAX_BLOB_BYTES, Blob, unpack_blob

MOST = 4 << 20
"""The longest message that is taken of a monitor."""
HEAD = "Block Name PSize Offset Used Total\n"


@pytest.mark.parametrize("row", ["a" + " " * MOST, " " * MOST, "a 1 B" * (MOST // 5), "a" * MOST, "1 " * (MOST // 2)])
def test_a_row_of_any_length_is_refused_at_once(row: str) -> None:
    with pytest.raises(FerryError) as refused:
        parse_ramblocks(HEAD + row)
    assert refused.value.reason is Reason.VMM_FAILED
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "text", [" " * MOST, "\n" * MOST, " \n" * (MOST // 2), "a" * MOST, "a: " * (MOST // 3), "0" * MOST]
)
async def test_a_text_of_any_form_is_searched_at_once(text: str) -> None:
    class Monitor:
        async def hmp(self, _line: str) -> str:
            return text

    async with asyncio.timeout(50):
        assert await _other_mappers(Monitor()) == []  # type: ignore[arg-type]
    with pytest.raises(FerryError):
        _ranges(' AS "memory", root: system\n' + text)


@pytest.mark.parametrize("file", ["file", ""])
def test_very_many_mappings_that_do_not_belong_together_are_no_memory(file: str) -> None:
    gib = 1 << 30
    ranges = ((0, 3 * gib), (4 * gib, gib))
    mapped = [
        one
        for number in range(20_000)
        for one in (
            memory._Mapped(number << 33, (number << 33) + 3 * gib, 1 << 40, f"{number}"),
            memory._Mapped((number << 33) + 4 * gib, (number << 33) + 5 * gib, 3 * gib, file and f"x{number}"),
        )
    ]
    assert list(memory._apart(ranges, mapped)) == []


@pytest.mark.parametrize("length", [0, 1, 4096, MAX_BLOB_BYTES])
def test_a_blob_that_grows_without_end_is_unpacked_no_further_than_it_may_be(length: int) -> None:
    bomb = zlib.compressobj(9)
    packed = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(64)) + bomb.flush()
    with pytest.raises(FerryError, match="damaged"):
        unpack_blob("/rom@bomb", Blob(length, bytes(32), packed))


def test_a_frame_that_is_announced_keeps_no_more_than_came() -> None:
    frames: Any = RequestFrames()
    assert frames.take(MAX_REQUEST.to_bytes(4, "little")) == []
    assert len(frames._buffer) == 4
    with pytest.raises(MalformedPagesError):
        RequestFrames().take((MAX_REQUEST + 1).to_bytes(4, "little"))
