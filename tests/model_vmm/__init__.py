"""A model of a confidential guest's VMM, between the sidecar's real parts and an oracle of every byte."""

import sys
from pathlib import Path

# Guarded memory and the lanes over queues are the destination's.
_DESTINATION = str(Path(__file__).resolve().parent.parent / "destination")
if _DESTINATION not in sys.path:
    sys.path.append(_DESTINATION)
