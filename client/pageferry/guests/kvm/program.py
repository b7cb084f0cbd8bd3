"""The guest's program: it checks and rewrites all data pages without end, and keeps all of its state in registers.

Step n takes data page `page_at(n)` from version `n div N` to the next: it checks that each of the 512 qwords is what
that version must hold, then writes the next version. Qword j of a page at a version is `base ^ j * QWORD_STEP`, and
`base` differs for every page and version and always has bit 63 set: another page, an older version and zero each differ
in every qword. Runs of HOLE_RUN pages are all zero at each HOLE_PERIOD-th version, another run at another version.

At any boundary between two instructions the whole of memory follows from two registers: RBX counts the steps that are
done, and RDI is where the next qword of the rewrite goes. STOSQ stores and moves RDI in one instruction, so that no
interruption can come between the two.

It runs at privilege level 3, where every flavour of KVM runs code on the processor itself: one that has no help of the
hardware emulates level 0, thousands of times slower. It speaks to the VMM by two pages that are no memory of the guest:
it stores the count of steps to STATUS_ADDRESS, plain memory of the VMM, and reports a wrong page by a store to
REPORT_ADDRESS, where nothing is mapped, so that the vCPU leaves the guest with all the findings in its registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pageferry.abi import kvm as abi
from pageferry.errors import FerryError, Reason

PAGE_SIZE: Final = 4096
QWORDS: Final = PAGE_SIZE // 8
QWORD_STEP: Final = 0x5BD1E995
"""Below 2^31, since it is a signed immediate; 511 times it stays clear of bit 63."""
PAGE_MULTIPLIER: Final = 0x9E3779B97F4A7C15
"""Odd, so that multiplying by it keeps all pages and versions apart modulo 2^63."""
VERSION_SHIFT: Final = 24
"""Data pages are numbered below 2^24: 64 GiB."""
HOLE_RUN: Final = 16
HOLE_PERIOD: Final = 8
HOLE_REMAINDER: Final = 5
STATUS_ADDRESS: Final = 0x0000
"""Linear address of the page to which the program stores the count of its steps."""
REPORT_ADDRESS: Final = 0x1000
"""Linear address of the page at which a store reports a wrong page."""

_STEP: Final = QWORD_STEP.to_bytes(4, "little").hex()
_STATUS: Final = STATUS_ADDRESS.to_bytes(4, "little").hex()
_REPORT: Final = REPORT_ADDRESS.to_bytes(4, "little").hex()

# RBX steps done · RDI next store · RSI the page's address · RCX qword index · R8 page · R9 version · R10 steps left in
# this pass · R11 stride of the order · R12 N · R13 address of data page 0 · R14 seed · R15 pages found wrong ·
# RDX PAGE_MULTIPLIER · RBP base · RSP zero where a hole is due, else all ones · RAX scratch.
CODE: Final = bytes.fromhex(
    "4c89c6"  # .......... step:              mov   rsi, r8
    "48c1e60c"  # ........                    shl   rsi, 12
    "4c01ee"  # ..........                    add   rsi, r13
    "4c89cd"  # ..........                    mov   rbp, r9
    "48c1e518"  # ........                    shl   rbp, 24
    "4c09c5"  # ..........                    or    rbp, r8
    "480fafea"  # ........                    imul  rbp, rdx
    "4c01f5"  # ..........                    add   rbp, r14
    "480fbaed3f"  # ......                    bts   rbp, 63
    "4489c0"  # ..........                    mov   eax, r8d
    "c1e804"  # ..........                    shr   eax, 4
    "4401c8"  # ..........                    add   eax, r9d
    "83e007"  # ..........                    and   eax, HOLE_PERIOD - 1
    "31e4"  # ............                    xor   esp, esp
    "83f805"  # ..........                    cmp   eax, HOLE_REMAINDER
    "400f95c4"  # ........                    setne spl
    "48f7dc"  # ..........                    neg   rsp
    "31c9"  # ............                    xor   ecx, ecx
    f"4869c1{_STEP}"  # ... check_qword:      imul  rax, rcx, QWORD_STEP
    "4831e8"  # ..........                    xor   rax, rbp
    "4821e0"  # ..........                    and   rax, rsp
    "483b04ce"  # ........                    cmp   rax, [rsi + 8 * rcx]
    "0f8584000000"  # ....                    jne   mismatch
    "ffc1"  # ............                    inc   ecx
    "81f900020000"  # ....                    cmp   ecx, 512
    "72df"  # ............                    jb    check_qword
    "498d6901"  # ........ rewrite:           lea   rbp, [r9 + 1]
    "418d4101"  # ........                    lea   eax, [r9 + 1]
    "48c1e518"  # ........                    shl   rbp, 24
    "4c09c5"  # ..........                    or    rbp, r8
    "480fafea"  # ........                    imul  rbp, rdx
    "4c01f5"  # ..........                    add   rbp, r14
    "480fbaed3f"  # ......                    bts   rbp, 63
    "4489c1"  # ..........                    mov   ecx, r8d
    "c1e904"  # ..........                    shr   ecx, 4
    "01c8"  # ............                    add   eax, ecx
    "83e007"  # ..........                    and   eax, HOLE_PERIOD - 1
    "31e4"  # ............                    xor   esp, esp
    "83f805"  # ..........                    cmp   eax, HOLE_REMAINDER
    "400f95c4"  # ........                    setne spl
    "48f7dc"  # ..........                    neg   rsp
    "31c9"  # ............                    xor   ecx, ecx
    "4889f7"  # ..........                    mov   rdi, rsi
    f"4869c1{_STEP}"  # ... rewrite_qword:    imul  rax, rcx, QWORD_STEP
    "4831e8"  # ..........                    xor   rax, rbp
    "4821e0"  # ..........                    and   rax, rsp
    "48ab"  # ............                    stosq
    "ffc1"  # ............                    inc   ecx
    "81f900020000"  # ....                    cmp   ecx, 512
    "72e7"  # ............                    jb    rewrite_qword
    "48ffc3"  # ..........                    inc   rbx
    f"48891c25{_STATUS}"  # ...               mov   [STATUS_ADDRESS], rbx
    "4d01d8"  # ..........                    add   r8, r11
    "4d39e0"  # ..........                    cmp   r8, r12
    "7203"  # ............                    jb    same_pass
    "4d29e0"  # ..........                    sub   r8, r12
    "49ffca"  # .......... same_pass:         dec   r10
    "0f8536ffffff"  # ....                    jne   step
    "49ffc1"  # ..........                    inc   r9
    "4d89e2"  # ..........                    mov   r10, r12
    "e92bffffff"  # ......                    jmp   step
    "49ffc7"  # .......... mismatch:          inc   r15
    f"48890425{_REPORT}"  # ...               mov   [REPORT_ADDRESS], rax
    "e976ffffff"  # ......                    jmp   rewrite
)


class Order(StrEnum):
    """In which order a pass takes the data pages."""

    SEQUENTIAL = "sequential"
    RANDOM = "random"
    """Each far from the one before: by the golden section of all pages."""


_EACH_QWORD: Final = sum(1 << 64 * index for index in range(QWORDS))
_STEPS: Final = sum(index * QWORD_STEP << 64 * index for index in range(QWORDS))
_ZEROES: Final = bytes(PAGE_SIZE)


@dataclass(frozen=True)
class Work:
    """What one run of the program works on: it fixes the order of the data pages, and what each holds when."""

    seed: int
    pages: int
    data_address: int
    stride: int

    @classmethod
    def plan(cls, seed: int, pages: int, data_address: int, order: Order) -> Work:
        """Choose the order of `pages` data pages that begin at `data_address`; `seed` is below 2^63."""
        if order is Order.SEQUENTIAL:
            return cls(seed, pages, data_address, stride=1).checked()
        stride = max(1, int(pages * 0.6180339887))
        while math.gcd(stride, pages) != 1:
            stride += 1
        return cls(seed, pages, data_address, stride % pages).checked()

    def checked(self) -> Work:
        """Return itself, unless the program could not work on it."""
        if not 0 <= self.seed < 1 << 63:
            raise FerryError(Reason.INVALID_ARGUMENT, f"seed {self.seed} is not in 0..2^63-1; choose a smaller one")
        if not 2 <= self.pages <= 1 << VERSION_SHIFT:
            raise FerryError(Reason.INVALID_ARGUMENT, f"{self.pages} data pages: the program works on 2 to 2^24")
        if not 0 < self.stride < self.pages or math.gcd(self.stride, self.pages) != 1:
            raise FerryError(
                Reason.INVALID_ARGUMENT, f"a stride of {self.stride} does not reach each of {self.pages} data pages"
            )
        return self

    def page_at(self, step: int) -> int:
        """Return the data page that a step works on."""
        return (self.seed + step * self.stride) % self.pages

    def steps_before(self, page: int) -> int:
        """Return how many steps of each pass come before the one that works on `page`."""
        return (page - self.seed) * pow(self.stride, -1, self.pages) % self.pages

    def base(self, page: int, version: int) -> int:
        """Return qword 0 of a data page at a version, unless it is a hole then."""
        mixed = (version << VERSION_SHIFT | page) * PAGE_MULTIPLIER + self.seed
        return mixed & (1 << 63) - 1 | 1 << 63

    def contents(self, page: int, version: int) -> bytes:
        """Return all of a data page at a version."""
        if is_hole(page, version):
            return _ZEROES
        return (self.base(page, version) * _EACH_QWORD ^ _STEPS).to_bytes(PAGE_SIZE, "little")

    def registers(self, entry: int) -> abi.Regs:
        """Return the registers that start the program, whose code lies at `entry`."""
        return abi.Regs(
            rip=entry,
            rflags=abi.RFLAGS_RESERVED,
            rdx=PAGE_MULTIPLIER,
            r8=self.page_at(0),
            r10=self.pages,
            r11=self.stride,
            r12=self.pages,
            r13=self.data_address,
            r14=self.seed,
        )

    @classmethod
    def from_registers(cls, regs: abi.Regs) -> Work:
        """Read back from the registers of a stopped program what it works on."""
        return cls(regs.r14, regs.r12, regs.r13, regs.r11)


def is_hole(page: int, version: int) -> bool:
    """Tell whether a data page is all zero at a version."""
    return (page // HOLE_RUN + version) % HOLE_PERIOD == HOLE_REMAINDER


@dataclass(frozen=True)
class Progress:
    """Where the program stands, as memory shows it."""

    steps: int
    """Pages checked and rewritten since the start."""
    store_address: int
    """Where the next store of a rewrite goes; it tells of a half-written page only when it lies in the current one."""
    mismatches: int
    """Pages that the program found wrong."""

    @classmethod
    def of(cls, regs: abi.Regs) -> Progress:
        """Read it from the registers of a stopped program."""
        return cls(regs.rbx, regs.rdi, regs.r15)


def describe_mismatch(regs: abi.Regs) -> str:
    """Say in words what the program found wrong, from its registers at the report."""
    page = (regs.rsi - regs.r13) // PAGE_SIZE
    return f"data page {page} at {regs.rsi:#x} is not at version {regs.r9}: qword {regs.rcx} differs from {regs.rax:#x}"
