"""pageferry: post-copy live migration from outside the sidecar: client, command line, the VMM author's side."""

from pageferry._version import __version__

__all__ = ["__version__"]
