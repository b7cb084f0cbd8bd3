"""A whole migration in one process under a fake clock: source, wire, kernel, guest, and the pager that is tested.

Either sidecar is killed at any point and starts again: what lasts is the kernel, the VMM's memory and the journal.

`python -m tests.core.simulation SEED` replays one seed with a trace.
"""
