"""Whom the watchdog calls behind, in a run that stands still and in one that is slow."""

from __future__ import annotations

import pytest

from megatron_conan.train.phases import ORDER, place
from megatron_conan.train.watchdog import MIN_LOOKS, Note, SlowRanks, earliest, report


def _note(rank: int, step: int, phase: str) -> Note:
    return Note(rank, f"n{rank // 4}", step, phase, 7, 9)


def test_who_is_behind() -> None:
    waiting = [_note(rank, 5, "forward_backward") for rank in range(6)]
    text, behind = report([*waiting, _note(6, 5, "data"), _note(7, 5, "data")], [], 300.4)
    assert behind == [6, 7]
    assert text == (
        "no progress for 300 s: in phase data of step 5: rank 6 (n1), rank 7 (n1); "
        "in phase forward_backward of step 5: rank 0 (n0), rank 1 (n0), rank 2 (n0), rank 3 (n0) and 2 more"
    )
    assert report([*waiting, _note(6, 4, "checkpoint")], [], 1)[1] == [6]  # an earlier step
    assert report(waiting, [], 1)[1] == list(range(6))  # nobody is blamed, all print stacks
    text, behind = report(waiting, [2], 1)
    assert "rank 2 (n0) gives no sign of life" in text
    assert behind == [0, 1, 3, 4, 5]
    assert "rank 0 (n0), rank 1 (n0), rank 2 (n0), rank 3 (n0) and 2 more gives" in report(waiting, range(6), 1)[0]


@pytest.mark.parametrize(
    ("phases", "behind"),
    [
        (["agree", "agree", "agree", "optimizer"], [3]),
        (["forward_backward", "data", "forward_backward", "forward_backward"], [1]),
        (["data", "mining", "data", "mining"], [1, 3]),
        (["mining", "evaluation", "what came later"], [0, 1, 2]),
        (["agree", "start"], [1]),  # between optimizer and agree
        (["checkpoint", "agree", "agree"], [1, 2]),
        (["checkpoint", "ended"], [0]),
        (["optimizer"] * 3, [0, 1, 2]),
    ],
)
def test_who_is_behind_in_one_step(phases: list[str], behind: list[int]) -> None:
    notes = [_note(rank, 5, phase) for rank, phase in enumerate(phases)]
    assert report(notes, [], 1)[1] == behind
    assert [note.rank for note in earliest(notes)] == behind


def test_places_of_phases() -> None:
    assert [place(phase) for phase in ORDER] == list(range(len(ORDER)))
    assert place("start") < place("mining") == place("evaluation") < place("data")


def _windows(slow: SlowRanks, looks: list[list[Note]], count: int, start: float, moved: bool = True) -> list[str]:
    """What is said in a window of `count` looks, one a second."""
    said = []
    for i in range(count):
        now = start + i + 1.0
        said.append(slow.look(looks[i % len(looks)], now if moved else -1.0, now))
    assert not any(said[:-1])
    return said[-1:]


def test_a_slow_rank_is_named_once_until_it_recovers() -> None:
    equal = [_note(rank, 5, "optimizer") for rank in range(4)]
    one_late = [*equal[:3], _note(3, 5, "data")]
    two_late = [*equal[:1], *(_note(rank, 5, "forward_backward") for rank in (1, 2)), _note(3, 5, "optimizer")]
    slow = SlowRanks(20.0, 0.0)
    text = "rank 3 (n0) is slow: the others waited for it in 75% of the last 20 s, mostly in phase data"
    three_in_four = [one_late, equal, one_late, one_late]
    assert _windows(slow, three_in_four, 20, 0) == [text]
    assert _windows(slow, three_in_four, 20, 20) == [""]  # still
    assert _windows(slow, [equal], 20, 40) == [""]  # recovered
    assert _windows(slow, three_in_four, 20, 60) == [text]
    assert _windows(slow, [two_late], 20, 80) == [
        "rank 1 (n0), rank 2 (n0) are slow: the others waited for them in 100% of the last 20 s, "
        "mostly in phase forward_backward"
    ]


def test_who_is_not_called_slow() -> None:
    equal = [_note(rank, 5, "optimizer") for rank in range(4)]
    late = [*equal[:3], _note(3, 5, "data")]
    most = [*(_note(rank, 5, "data") for rank in range(3)), equal[3]]
    quiet = SlowRanks(20.0, 0.0)
    for start, looks in (
        (0, [late, equal]),
        (20, [equal]),
        (40, [most]),
    ):  # half of the time; never; it is one that is early
        assert _windows(quiet, looks, 20, start) == [""]
    assert _windows(quiet, [late], 20, 60, moved=False) == [""]  # it hangs
    assert _windows(quiet, [late] + [[]] * (20 // MIN_LOOKS), 20, 80) == [""]  # seldom seen at one moment
    assert _windows(quiet, [late], 20, 100) != [""]
    pair = SlowRanks(20.0, 0.0)
    assert "rank 1 (n0) is slow" in _windows(pair, [[_note(0, 6, "start"), _note(1, 5, "agree")]], 20, 0)[0]
