"""A whole migration in one process under a fake clock: source, wire, kernel, guest, and the pager that is tested.

`python -m tests.core.simulation SEED` replays one seed with a trace.
"""
