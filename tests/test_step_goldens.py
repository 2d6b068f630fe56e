"""The compiled step of each kind of recipe does what it did when it was recorded."""

import jax
import pytest
from golden import record_steps

RECORDED = record_steps.recorded()


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version__ != RECORDED["jax"], reason=f"recorded with jax {RECORDED['jax']}"
)
@pytest.mark.parametrize("way", record_steps.WAYS)
@pytest.mark.parametrize("name", record_steps.RECIPES)
def test_a_step_does_no_more_than_was_recorded(name, way):
    """Counts exactly, bytes within 5 %: what moves, and what is kept, costs time."""
    found = record_steps.counts(name, way) | record_steps.large_floats(name, way)
    expected = RECORDED["steps"][name][way]
    bytes_, counts = (
        {k: v for k, v in expected.items() if ("bytes" in k) == which}
        for which in (True, False)
    )
    assert {k: found.get(k) for k in counts} == counts, "see golden/README.md"
    assert {k: found.get(k) for k in bytes_} == pytest.approx(bytes_, rel=0.05)
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("name", record_steps.RECIPES)
def test_the_state_is_changed_in_place(name):
    """Recorded: parameters and moments are donated, whatever the mesh."""
    for way in record_steps.WAYS:
        step = RECORDED["steps"][name][way]
        assert step["bytes in place"] > 0.9 * step["argument bytes"]
