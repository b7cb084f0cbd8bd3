"""The demonstration guests: small programs whose whole memory can be predicted, and so proved."""

import os

# gRPC reads this once, when it is first imported: hence here. A fault that a guest forwards waits for a round trip, and
# the older poller makes it shorter (pageferry.vmm.faults).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
