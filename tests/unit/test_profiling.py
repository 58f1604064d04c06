"""A window under torch.profiler, and the metrics of a step as files."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from megatron_conan.config.operation import ProfileConfig
from megatron_conan.train.metrics import MetricsWriter, memory_gib, phase_seconds
from megatron_conan.train.phases import Phases
from megatron_conan.train.profiling import ProfilerWindow


def _train(window: ProfilerWindow, first: int, last: int) -> None:
    with window:
        for step in range(first, last + 1):
            window.before_step(step)
            torch.ones(step, 3) @ torch.ones(3, 5)


@pytest.mark.parametrize(("first", "last", "recorded"), [(1, 9, (3, 4)), (1, 4, (3, 4)), (1, 3, (3,)), (3, 9, (3, 4))])
def test_the_window_is_recorded(first: int, last: int, recorded: tuple[int, ...], tmp_path: Path) -> None:
    _train(ProfilerWindow(ProfileConfig(start=3, steps=2), tmp_path, 0), first, last)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "rank_0.step_3.trace.json.gz",
        "rank_0.step_3.txt",
    ]
    with gzip.open(tmp_path / "profile" / "rank_0.step_3.trace.json.gz") as stream:
        events = json.load(stream)["traceEvents"]
    shapes = [event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm"]
    assert tuple(shapes) == recorded
    assert "aten::mm" in (tmp_path / "profile" / "rank_0.step_3.txt").read_text()


def test_nothing_is_recorded_elsewhere(tmp_path: Path) -> None:
    _train(ProfilerWindow(ProfileConfig(start=3, steps=2), tmp_path, 1), 1, 9)  # another rank
    _train(ProfilerWindow(None, tmp_path, 0), 1, 9)
    _train(ProfilerWindow(ProfileConfig(start=3, steps=2), tmp_path, 0), 4, 9)  # resumed behind its beginning
    with contextlib.suppress(KeyError), ProfilerWindow(ProfileConfig(start=1), tmp_path, 0) as window:
        window.before_step(1)
        raise KeyError
    assert not (tmp_path / "profile").exists()


def test_phases_add_up_and_lie_within_each_other() -> None:
    phases = Phases()
    phases.take()
    started = time.monotonic()
    with phases.within("mining"):
        time.sleep(0.02)
        with phases.within("data"):
            time.sleep(0.03)
            assert phases.phase == "data"
        assert phases.phase == "mining"
    taken = phases.take()
    assert sum(taken.values()) == pytest.approx(time.monotonic() - started, abs=5e-3)
    assert taken["data"] >= 0.03
    assert 0.02 <= taken["mining"] < 0.05 + 0.03
    assert phases.take().keys() == {"start"}
    found = phase_seconds({"step": 1.0, "data": 0.0, "mining": 1e-5, "checkpoint": 2.0})
    assert found == {"data_seconds": 0.0, "checkpoint_seconds": 2.0}


def test_metrics_are_strict_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricsWriter(tmp_path, "pretrain", 1, 0)
    values = {"loss": float("nan"), "lr": 1e-3, "grad_norm": float("inf"), "tokens_per_second": 5.0}
    writer.write(1, {**values, "mfu": 0.412, "skipped_steps": 2.0})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (line["loss"], line["grad_norm"], line["lr"]) == (None, None, 1e-3)
    told = capsys.readouterr().err
    assert "loss nan" in told
    assert "41% MFU" in told
    assert "2 skipped" in told


def test_peak_memory_is_this_processes_own() -> None:
    before = memory_gib(torch.device("cpu"))
    block = torch.ones(1 << 28)  # 1 GiB
    assert memory_gib(torch.device("cpu")) >= max(before, block.numel() * 4 / 2**30)
