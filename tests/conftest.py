"""What every test relies on."""

from __future__ import annotations

import signal

# Run in the background, as by a script with `&`, this process would have been started with SIGINT ignored, and so would
# all that it starts: tests that interrupt a program would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
