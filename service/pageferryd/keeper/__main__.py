"""What `pageferryd --keeper` executes: RUNTIME_DIR STOP_SECONDS LOG_FORMAT, then the sidecar's options."""

from __future__ import annotations

import sys
from pathlib import Path

from pageferryd.keeper.running import run

if __name__ == "__main__":
    _runtime_dir, _stop_seconds, _log_format, *_options = sys.argv[1:]
    sys.exit(run(_options, Path(_runtime_dir), stop_seconds=float(_stop_seconds), log_format=_log_format))
