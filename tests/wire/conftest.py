"""What the tests of the wire share: guests under a userfaultfd, as the tests of the destination have them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "destination"))
