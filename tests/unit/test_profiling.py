"""A window of steps under torch.profiler, with the real profiler."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_conan.config.operation import ProfileConfig
from megatron_conan.train.profiling import ProfilerWindow

WINDOW = ProfileConfig(start=3, steps=2)


def _train(window: ProfilerWindow, first: int, last: int) -> None:
    with window:
        for step in range(first, last + 1):
            window.before_step(step)
            torch.ones(step, 3) @ torch.ones(3, 5)


def _fail_in_step(window: ProfilerWindow, step: int) -> None:
    window.before_step(step)
    raise KeyError("batch")


def _events(trace: Path) -> list[dict[str, Any]]:
    with gzip.open(trace) as stream:
        return json.load(stream)["traceEvents"]


@pytest.mark.parametrize(
    ("first", "last", "recorded"),
    [(1, 9, (3, 4)), (1, 4, (3, 4)), (1, 3, (3,)), (2, 9, (3, 4)), (3, 9, (3, 4)), (4, 9, (4,))],
)
def test_the_window_is_recorded(
    first: int, last: int, recorded: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what is left of it in a run that is resumed or stopped there."""
    _train(ProfilerWindow(WINDOW, tmp_path, 0), first, last)
    trace, table = (tmp_path / "profile" / f"rank_0.step_{recorded[0]}.{end}" for end in ("trace.json.gz", "txt"))
    assert sorted((tmp_path / "profile").iterdir()) == [trace, table]
    events = _events(trace)
    shapes = [event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm"]
    assert tuple(shapes) == recorded
    marks = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert marks == [f"step {step}" for step in recorded]
    assert "aten::mm" in table.read_text()
    told = f"rank 0: profile of steps {recorded[0]} to {recorded[-1]} in {trace}"
    assert told in capsys.readouterr().err


def test_a_window_that_is_not_reached_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _train(ProfilerWindow(WINDOW, tmp_path, 0), 1, 2)
    assert capsys.readouterr().err == "rank 0: the run ended before profile.start=3: nothing was recorded\n"
    _train(ProfilerWindow(WINDOW, tmp_path, 0), 1, 9)  # the one that was only warmed up is not in the way
    assert len(list((tmp_path / "profile").iterdir())) == 2


def test_nothing_is_recorded_elsewhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _train(ProfilerWindow(WINDOW, tmp_path, 1), 1, 9)  # another rank
    _train(ProfilerWindow(None, tmp_path, 0), 1, 9)
    _train(ProfilerWindow(WINDOW, tmp_path, 0), 5, 9)  # resumed behind it
    _train(ProfilerWindow(WINDOW, tmp_path, 0), 1, 0)  # finished before
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "profile").exists()


def test_a_run_that_fails_in_the_window_fails_as_it_would(tmp_path: Path) -> None:
    window = ProfilerWindow(WINDOW, tmp_path, 0)
    with pytest.raises(KeyError, match="batch"), window:
        _fail_in_step(window, 3)
    assert not (tmp_path / "profile").exists()
    _train(ProfilerWindow(WINDOW, tmp_path, 0), 1, 9)
    assert (tmp_path / "profile").exists()


def test_a_profile_that_can_not_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("in the way")
    _train(ProfilerWindow(WINDOW, tmp_path, 0), 1, 9)
    assert "rank 0: warning: no profile of this run: FileExistsError" in capsys.readouterr().err
