"""All fuzz targets: a plain function from bytes to nothing each, by name."""

from __future__ import annotations

from collections.abc import Mapping

from door_targets import DOOR_TARGETS
from file_targets import FILE_TARGETS
from lane_targets import LANE_TARGETS
from qemu_targets import QEMU_TARGETS
from target import Target
from vmm_targets import VMM_TARGETS

ALL = (*LANE_TARGETS, *DOOR_TARGETS, *QEMU_TARGETS, *VMM_TARGETS, *FILE_TARGETS)
TARGETS: Mapping[str, Target] = {target.name: target for target in ALL}
