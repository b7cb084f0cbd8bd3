"""pageferryd: the sidecar that moves guests' memory between hosts."""

import os

# gRPC reads this once, when it is first imported: hence here. Its older poller answers a 4 KiB round trip in about two
# thirds of the time of the event engine's (grpcio 1.85, docs/benchmarks.md), and a fault waits for just that.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
