"""Foreign files of any content: thousands of made-up ones, the same in every run (see fuzz_targets.py)."""

import pytest
from fuzz_targets import TARGETS, limit_memory
from hypothesis import HealthCheck, given, settings

CASES = {"pickle": 1500, "references": 500, "image": 1200, "checkpoint": 500}  # the others have 300


@pytest.fixture(autouse=True)
def little_memory():
    undo = limit_memory()
    yield
    undo()


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_gives_a_value_or_a_sentence(name):
    content, target = TARGETS[name]
    checks = settings(
        max_examples=CASES.get(name, 300),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    checks(given(content)(target))()
