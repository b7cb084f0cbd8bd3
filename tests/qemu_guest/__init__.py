"""A real guest in a stock QEMU without KVM: Debian's cloud kernel, busybox, and a program that checks its memory."""
