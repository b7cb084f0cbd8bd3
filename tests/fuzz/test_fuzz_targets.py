"""Every parser of what comes from outside, on bytes that are nearly right: it reads them or refuses them, no third."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from mutated import anything
from target import EFFORT
from targets import ALL, TARGETS


@pytest.mark.timeout(60 * EFFORT)
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_nearly_right_is_read_or_refused_with_a_reason(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds:
        target(seed)

    @hypothesis_settings(
        max_examples=target.examples * EFFORT, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(anything(target.seeds))
    def on_anything(data: bytes) -> None:
        target(data)

    on_anything()


def test_some_seed_of_each_target_is_read() -> None:
    """A target that refuses all that it is given tests nothing."""
    refusing = [name for name, target in TARGETS.items() if all(map(_is_refused(target), target.seeds))]
    assert refusing == []


def _is_refused(target: object) -> object:
    def refused(seed: bytes) -> bool:
        try:
            target.run(seed)  # type: ignore[attr-defined]
        except target.refusals:  # type: ignore[attr-defined]
            return True
        except Exception:
            # One of those that are known.
            return False
        return False

    return refused


def test_no_two_targets_have_one_name() -> None:
    assert len(TARGETS) == len(ALL)
