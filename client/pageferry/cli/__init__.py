"""What people type: the `pageferry` command."""

import os

# Read when grpc is imported: its remarks about connections would stand between what the command says on stderr.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
