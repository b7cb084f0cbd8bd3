"""The driver for Firecracker: its HTTP API, and its hand-off over a Unix socket (docs/vmm-firecracker.md)."""
