"""What each page of the process guest holds: it follows from the seed, the page's number and its version alone.

A page is a header that names all three, and noise taken from a place that they decide. Some runs of pages are holes:
never touched, and so all zeroes, until they reach HOLE_VERSIONS.
"""

from __future__ import annotations

import hashlib
from struct import Struct
from typing import Final

from pageferry.errors import FerryError, Reason
from pageferry.vmm.regions import PAGE_SIZE

HOLE_BLOCK: Final = 64
"""Holes are the last pages of each block of so many: runs, as memory that a system never used."""
HOLE_VERSIONS: Final = 64
"""A hole is written for the first time when it reaches this version."""

_HEADER: Final = Struct("<8sQQQ")
_MAGIC: Final = b"ferrypg1"
_BODY: Final = PAGE_SIZE - _HEADER.size
_NOISE_BYTES: Final = 16384
# Odd, so that neither two neighbours nor two versions of a page take the same noise.
_PAGE_STEP: Final = 5279
_VERSION_STEP: Final = 3571
_ZEROES: Final = bytes(PAGE_SIZE)


class Pattern:
    """The contents of all pages for one seed; `holes` of each HOLE_BLOCK pages are holes."""

    def __init__(self, seed: int, holes: int) -> None:
        if not 0 <= seed < 1 << 64:
            raise FerryError(Reason.INVALID_ARGUMENT, f"seed {seed} is not in 0..2^64-1; choose a smaller one")
        if not 0 <= holes <= HOLE_BLOCK:
            raise FerryError(Reason.INVALID_ARGUMENT, f"{holes} of {HOLE_BLOCK} pages cannot be holes")
        self._seed = seed
        self._first_hole = HOLE_BLOCK - holes
        self._noise = hashlib.shake_256(seed.to_bytes(8, "little")).digest(_NOISE_BYTES + _BODY)

    def untouched(self, number: int, version: int) -> bool:
        """Tell whether a page has not been written yet when it reaches `version`."""
        return version < HOLE_VERSIONS and number % HOLE_BLOCK >= self._first_hole

    def page(self, number: int, version: int) -> bytes:
        """Return the bytes of a page at a version."""
        if self.untouched(number, version):
            return _ZEROES
        at = (number * _PAGE_STEP + version * _VERSION_STEP) % _NOISE_BYTES
        return _HEADER.pack(_MAGIC, self._seed, number, version) + self._noise[at : at + _BODY]

    def explain(self, number: int, version: int, found: bytes) -> str:
        """Say in words what is wrong with a page that does not hold what it must."""
        expected = "zeroes" if self.untouched(number, version) else f"version {version}"
        return f"page {number}: expected {expected}, found {self._recognise(found)}"

    def _recognise(self, found: bytes) -> str:
        if found == _ZEROES:
            return "zeroes"
        magic, seed, number, version = _HEADER.unpack_from(found)
        if magic != _MAGIC:
            return f"bytes that no guest wrote ({found[:8].hex()}...)"
        if seed != self._seed:
            return f"page {number} of a guest with seed {seed}"
        whole = "" if found == self.page(number, version) else ", damaged"
        return f"version {version} of page {number}{whole}"
