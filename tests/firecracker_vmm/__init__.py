"""A stand-in for Firecracker: its API, its snapshot file and its hand-off, over memory that a workload checks.

A process of its own, without KVM: the guest is a thread that checks and rewrites pages.
"""
