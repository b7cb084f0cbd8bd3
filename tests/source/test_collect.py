"""Collecting from memory of any shape, with any credit: what comes is what was there."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from held_memory import DATA, HOLE, LATE, PAGE, READ, ZERO, content, fill
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.v1 import memory_pb2
from pageferryd.core.layout import Layout, Region
from pageferryd.core.runs import RAW, decode, encode
from pageferryd.core.runs import ZERO as ZERO_RUN
from pageferryd.source.memory import LARGEST_READ, SourceMemory

pytestmark = pytest.mark.root
stretches = st.tuples(st.sampled_from([HOLE, ZERO, DATA, LATE, READ]), st.integers(1, 100))
plans = st.lists(stretches, min_size=1, max_size=12).map(lambda parts: "".join(kind * pages for kind, pages in parts))
credits_ = st.one_of(st.integers(PAGE, 40 * PAGE), st.sampled_from([PAGE, LARGEST_READ, LARGEST_READ + PAGE, 1 << 30]))
KINDS = {DATA: RAW, LATE: RAW}


@contextmanager
def opened(plan: str, how: str, border: int) -> Iterator[SourceMemory]:
    """Hold a plan in this process and open it as two regions."""
    size, memfd = len(plan) * PAGE, -1
    if how == "memfd":
        memfd = os.memfd_create("guest-memory")
        os.truncate(memfd, size)
        memory = mmap.mmap(memfd, size)
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    fill(memory, plan)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    sizes = [border * PAGE, size - border * PAGE] if 0 < border < len(plan) else [size]
    layout = Layout([Region(number << 40, part) for number, part in enumerate(sizes)])
    locations = [
        memory_pb2.MemoryLocation(memfd=memory_pb2.MemfdMemory(fd=memfd, offset=start * PAGE))
        if how == "memfd"
        else memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=address + start * PAGE))
        for start in layout.starts
    ]
    source = SourceMemory.open(layout, locations, os.getpid())
    try:
        yield source
    finally:
        source.close()
        if memfd >= 0:
            os.close(memfd)


@pytest.mark.parametrize("how", ["process", "memfd"])
@settings(max_examples=60, deadline=None)
@given(plan=plans, border=st.integers(0, 600), credits_given=st.lists(credits_, min_size=1, max_size=5), data=st.data())
def test_what_is_collected_piece_by_piece_is_the_memory(
    how: str, plan: str, border: int, credits_given: list[int], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(plan) - 1))
    end = data.draw(st.integers(first + 1, len(plan)))
    kinds: list[int] = []
    found: list[bytes] = []
    at, calls = first, 0
    with opened(plan, how, border) as source:
        while at < end:
            collected = source.collect(at, end - at, credits_given[calls % len(credits_given)])
            assert collected.next_page > at
            batch = decode(encode(collected.runs, collected.data))
            assert len(batch.message) - batch.offset <= credits_given[calls % len(credits_given)]
            offset = batch.offset
            for run in batch.runs:
                assert run.first == at
                at += run.pages
                kinds += [run.kind] * run.pages
                size = run.pages * PAGE if run.kind == RAW else 0
                found.append(batch.message[offset : offset + size] or bytes(run.pages * PAGE))
                offset += size
            assert at == collected.next_page
            calls += 1

    assert kinds == [KINDS.get(kind, ZERO_RUN) for kind in plan[first:end]]
    assert b"".join(found) == content(plan)[first * PAGE : end * PAGE]
