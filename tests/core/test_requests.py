"""The requests that are written and read by hand, against the generated classes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.v1 import page_pb2
from pageferryd.core.errors import MalformedPagesError
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.requests import (
    MAX_CREDIT,
    MAX_FETCH_PAGES,
    MAX_PUSH_RUNS,
    decode_fetch,
    decode_push,
    encode_request,
)

FIRSTS = st.integers(0, (1 << 64) - 1)
fetches = st.lists(st.tuples(FIRSTS, st.integers(1, 64)), min_size=1, max_size=8)
pushes = st.lists(st.tuples(FIRSTS, st.integers(1, (1 << 32) - 1)), min_size=1, max_size=20)


@given(fetches)
def test_a_fetch_is_byte_for_byte_the_generated_message(runs: list[tuple[int, int]]) -> None:
    expected = page_pb2.FetchPagesRequest(
        first_pages=[first for first, _ in runs], page_counts=[pages for _, pages in runs]
    )
    assert encode_request(runs) == expected.SerializeToString()
    assert decode_fetch(expected.SerializeToString()).runs == runs


@given(pushes, st.integers(PAGE_SIZE, MAX_CREDIT))
def test_a_push_is_byte_for_byte_the_generated_message(runs: list[tuple[int, int]], credit: int) -> None:
    expected = page_pb2.PushPagesRequest(
        first_pages=[first for first, _ in runs], page_counts=[pages for _, pages in runs], credit_bytes=credit
    )
    assert encode_request(runs, credit) == expected.SerializeToString()
    assert decode_push(expected.SerializeToString()) == (runs, credit)


@settings(max_examples=400)
@given(st.one_of(st.binary(max_size=50), fetches.map(encode_request)), st.data())
def test_any_bytes_give_a_request_within_bounds_or_are_malformed(message: bytes, data: st.DataObject) -> None:
    changed = bytearray(message)
    for _ in range(data.draw(st.integers(0, 2))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    for decode in (decode_fetch, decode_push):
        try:
            request = decode(bytes(changed))
        except MalformedPagesError:
            continue
        assert 0 < len(request.runs) <= MAX_FETCH_PAGES


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(encode_request([(0, MAX_FETCH_PAGES + 1)]), id="too many pages in one run"),
        pytest.param(encode_request([(0, 1)] * (MAX_FETCH_PAGES + 1)), id="too many pages in all"),
        pytest.param(encode_request([(0, 1)])[:-1], id="the end in a column"),
        pytest.param(b"\x0a\x08" + bytes(8), id="a run without a length"),
        pytest.param(b"\x12\x04" + bytes(4), id="a length without a run"),
    ],
)
def test_a_fetch_that_cannot_be_is_refused(message: bytes) -> None:
    with pytest.raises(MalformedPagesError) as raised:
        decode_fetch(message)
    assert raised.value.reason == "MALFORMED_PAGES"


@pytest.mark.parametrize("credit", [0, 1, PAGE_SIZE - 1, MAX_CREDIT + 1, 1 << 60])
def test_a_push_with_a_credit_that_cannot_be_is_refused(credit: int) -> None:
    with pytest.raises(MalformedPagesError, match="grants"):
        decode_push(encode_request([(0, 1), (2, 1)], credit))


def test_a_push_of_too_many_runs_is_refused() -> None:
    with pytest.raises(MalformedPagesError):
        decode_push(encode_request([(0, 1)] * (MAX_PUSH_RUNS + 1), PAGE_SIZE))
