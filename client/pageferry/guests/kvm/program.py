"""The guest's program: it checks and rewrites all data pages without end, and keeps all of its state in registers.

Step n takes data page `order(n mod N)` from version `n div N` to the next: it checks that each of the 512 qwords is what
that version must hold, then writes the next version. Qword j of a page at a version is `base ^ j * QWORD_STEP`, and
`base` differs for every page and version and always has bit 63 set: another page, an older version and zero each differ
in every qword. At version 0 each page whose number is HOLE_REMAINDER modulo 8 is a hole, and must read as zero.

At any boundary between two instructions the whole of memory follows from two registers: RBX counts the steps that are
done, and RDI is where the next qword of the rewrite goes. STOSQ stores and moves RDI in one instruction, so that no
interruption can come between the two.
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
HOLE_REMAINDER: Final = 5
MISMATCH_PORT: Final = 0xB0

_STEP: Final = QWORD_STEP.to_bytes(4, "little").hex()

# RBX steps done · RDI next store · RSI the page's address · RCX qword index · R8 page · R9 version · R10 steps left in
# this pass · R11 stride of the order · R12 N · R13 address of data page 0 · R14 seed · R15 pages found wrong ·
# RDX PAGE_MULTIPLIER · RBP base · RSP zero where a hole is expected, else all ones · RAX scratch.
CODE: Final = bytes.fromhex(
    "4c89c6"  # ............. step:          mov   rsi, r8
    "48c1e60c"  # .........                  shl   rsi, 12
    "4c01ee"  # ...........                  add   rsi, r13
    "4c89cd"  # ...........                  mov   rbp, r9
    "48c1e518"  # .........                  shl   rbp, 24
    "4c09c5"  # ...........                  or    rbp, r8
    "480fafea"  # .........                  imul  rbp, rdx
    "4c01f5"  # ...........                  add   rbp, r14
    "480fbaed3f"  # .......                  bts   rbp, 63
    "48c7c4ffffffff"  # ...                  mov   rsp, -1
    "4d85c9"  # ...........                  test  r9, r9
    "750d"  # .............                  jne   check
    "4489c0"  # ...........                  mov   eax, r8d
    "83e007"  # ...........                  and   eax, 7
    "83f805"  # ...........                  cmp   eax, HOLE_REMAINDER
    "7502"  # .............                  jne   check
    "31e4"  # .............                  xor   esp, esp
    "31c9"  # ............. check:           xor   ecx, ecx
    f"4869c1{_STEP}"  # ... check_qword:     imul  rax, rcx, QWORD_STEP
    "4831e8"  # ...........                  xor   rax, rbp
    "4821e0"  # ...........                  and   rax, rsp
    "483b04ce"  # .........                  cmp   rax, [rsi + 8 * rcx]
    "755e"  # .............                  jne   mismatch
    "ffc1"  # .............                  inc   ecx
    "81f900020000"  # .....                  cmp   ecx, 512
    "72e3"  # .............                  jb    check_qword
    "498d6901"  # ......... rewrite:         lea   rbp, [r9 + 1]
    "48c1e518"  # .........                  shl   rbp, 24
    "4c09c5"  # ...........                  or    rbp, r8
    "480fafea"  # .........                  imul  rbp, rdx
    "4c01f5"  # ...........                  add   rbp, r14
    "480fbaed3f"  # .......                  bts   rbp, 63
    "31c9"  # .............                  xor   ecx, ecx
    "4889f7"  # ...........                  mov   rdi, rsi
    f"4869c1{_STEP}"  # ... rewrite_qword:   imul  rax, rcx, QWORD_STEP
    "4831e8"  # ...........                  xor   rax, rbp
    "48ab"  # .............                  stosq
    "ffc1"  # .............                  inc   ecx
    "81f900020000"  # .....                  cmp   ecx, 512
    "72ea"  # .............                  jb    rewrite_qword
    "48ffc3"  # ...........                  inc   rbx
    "4d01d8"  # ...........                  add   r8, r11
    "4d39e0"  # ...........                  cmp   r8, r12
    "7203"  # .............                  jb    same_pass
    "4d29e0"  # ...........                  sub   r8, r12
    "49ffca"  # ........... same_pass:       dec   r10
    "0f855fffffff"  # .....                  jne   step
    "49ffc1"  # ...........                  inc   r9
    "4d89e2"  # ...........                  mov   r10, r12
    "e954ffffff"  # .......                  jmp   step
    "49ffc7"  # ........... mismatch:        inc   r15
    "488b04ce"  # .........                  mov   rax, [rsi + 8 * rcx]
    "e6b0"  # .............                  out   MISMATCH_PORT, al
    "eba1"  # .............                  jmp   rewrite
)


class Order(StrEnum):
    """In which order a pass takes the data pages."""

    SEQUENTIAL = "sequential"
    RANDOM = "random"


@dataclass(frozen=True)
class Progress:
    """Where the program stands, as memory shows it."""

    steps: int
    """Pages checked and rewritten since the start."""
    store_address: int
    """Guest-physical address of the next store; it names a half-written page only when it lies in the current one."""
    mismatches: int
    """Pages that the program found wrong."""


@dataclass(frozen=True)
class Work:
    """What one run of the program works on: it fixes `order(i) = (first + i * stride) mod pages` and the contents."""

    seed: int
    pages: int
    data_address: int
    stride: int
    first: int

    @classmethod
    def plan(cls, seed: int, pages: int, data_address: int, order: Order) -> Work:
        """Choose the order of `pages` data pages that begin at `data_address`; `seed` is below 2^63."""
        if not 0 <= seed < 1 << 63:
            raise FerryError(Reason.INVALID_ARGUMENT, f"seed {seed} is not in 0..2^63-1; choose a smaller one")
        if not 2 <= pages <= 1 << VERSION_SHIFT:
            raise FerryError(Reason.INVALID_ARGUMENT, f"{pages} data pages: the program works on 2 to 2^24")
        if order is Order.SEQUENTIAL:
            return cls(seed, pages, data_address, stride=1, first=0)
        stride = max(1, int(pages * 0.6180339887))
        while math.gcd(stride, pages) != 1:
            stride += 1
        return cls(seed, pages, data_address, stride % pages, first=seed % pages)

    def page_at(self, step: int) -> int:
        """Return the data page that a step works on."""
        return (self.first + step % self.pages * self.stride) % self.pages

    def base(self, page: int, version: int) -> int:
        """Return qword 0 of a data page at a version."""
        mixed = (version << VERSION_SHIFT | page) * PAGE_MULTIPLIER + self.seed
        return mixed & (1 << 63) - 1 | 1 << 63

    def registers(self, entry: int) -> abi.Regs:
        """Return the registers that start the program, whose code lies at guest-physical `entry`."""
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
        pages, stride = regs.r12, regs.r11
        first = (regs.r8 - (regs.rbx % pages) * stride) % pages if pages else 0
        return cls(regs.r14, pages, regs.r13, stride, first)


def progress(regs: abi.Regs) -> Progress:
    """Return where the program stands."""
    return Progress(regs.rbx, regs.rdi, regs.r15)
