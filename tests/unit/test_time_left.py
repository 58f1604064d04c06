"""The time that is left, foretold on runs whose every second is known."""

import pytest

from megatron_conan.train.time_left import TimeLeft

STEPS, MINING, CHECKPOINT = 1000, 40.0, 3.0


def _seconds_of(step: int, first: int) -> tuple[float, dict[str, float]]:
    """A run of 1 s a step; mines every 250 steps, a checkpoint behind every 100th; the first three steps are slow."""
    rare = {}
    if (step - 1) % 250 == 0:
        rare["mining_seconds"] = MINING
    if step % 100 == 1 and step > first:
        rare["checkpoint_seconds"] = CHECKPOINT
    if step == 1:
        rare["evaluation_seconds"] = 500.0
    slow = 30.0 if step < first + 3 else 1.0
    return slow + sum(rare.values()), rare


def _told_and_true(first: int, last: int) -> tuple[float, float]:
    """Foretold after step `last` of a start at step `first`, and what it was then."""
    told = TimeLeft(STEPS, range(0, STEPS, 250))
    for step in range(first, last + 1):
        told.note(step, *_seconds_of(step, first))
    return told.seconds(), sum(_seconds_of(step, first)[0] for step in range(last + 1, STEPS + 1))


@pytest.mark.parametrize("last", [6, 50, 240, 250, 251, 600, 990, 1000])
def test_slow_first_steps_and_minings_do_not_deceive(last: int) -> None:
    told, true = _told_and_true(1, last)
    assert told == pytest.approx(true, rel=0.03, abs=1.0)  # stalls of checkpoints are known from the first on


@pytest.mark.parametrize("last", [507, 600, 749, 751, 900])
def test_a_resumed_run_goes_by_its_own_steps(last: int) -> None:
    """Here minings take their time from the first that this start has seen."""
    told, true = _told_and_true(501, last)
    assert told == pytest.approx(true, rel=0.03, abs=1.0)
    told, true = _told_and_true(502, 600)
    assert told == pytest.approx(true - MINING, rel=0.03)


def test_tables_that_are_looked_at_every_step_are_no_minings() -> None:
    left = TimeLeft(100, [0, 50])
    for step in range(1, 21):
        left.note(step, 1.0 + (20.0 if step == 1 else 0.002), {"mining_seconds": 20.0 if step == 1 else 0.002})
    assert left.seconds() == pytest.approx(80 * 1.002 + 20, rel=0.01)


def test_what_was_slow_long_ago_is_forgotten_and_what_alternates_is_not() -> None:
    left = TimeLeft(10_000)
    for step in range(1, 5001):
        left.note(step, 50.0 if step < 100 else 1.0 + step % 2, {})
    assert left.seconds() == pytest.approx(5000 * 1.5)
    assert TimeLeft(100).seconds() == 0.0
