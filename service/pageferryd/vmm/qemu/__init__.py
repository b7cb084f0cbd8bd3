"""QEMU, attached to from outside: its monitor, its RAM blocks, its device state."""
