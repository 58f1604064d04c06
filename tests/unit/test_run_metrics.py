"""What a run tells of its steps: lines, TensorBoard, progress, seconds by phase, memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_conan.config.tree import MiningConfig
from megatron_conan.train.metrics import MetricsWriter, cut_back, memory_gib, phase_seconds
from megatron_conan.train.phases import Phases

VALUES = {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5.0}


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]


def _scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_is_not_finite_is_null_and_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricsWriter(tmp_path, "pretrain", 3, 0)
    writer.write(1, VALUES)
    writer.write(2, {**VALUES, "loss": float("nan"), "grad_norm": float("inf"), "skipped_steps": 1.0})
    writer.write(3, {**VALUES, "loss": float("nan"), "mfu": 0.412, "skipped_steps": 2.0})
    writer.close()
    lines = _lines(tmp_path)
    assert lines[0] == {"step": 1, "stage": "pretrain", **VALUES}
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [(2.5, 1.0), (None, None), (None, 1.0)]
    scalars = _scalars(tmp_path)
    assert scalars["loss"] == [(1, 2.5)]
    assert scalars["grad_norm"] == [(1, 1.0), (3, 1.0)]
    assert scalars["skipped_steps"] == [(2, 1.0), (3, 2.0)]
    first, last = capsys.readouterr().err.splitlines()
    assert "pretrain 1/3 | loss 2.5000 | lr 1.00e-03 | 5 tokens/s | 0:00 elapsed" in first
    assert "MFU" not in first
    assert "skipped" not in first
    assert "pretrain 3/3 | loss nan | lr 1.00e-03 | 5 tokens/s | 41% MFU | 2 skipped | 0:00 elapsed, 0:00 left" in last


def test_seconds_of_rare_phases_are_not_lost_between_lines(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, "weak", 8, 0, log_every=3)
    rare = {
        2: {"mining_seconds": 2.0},
        3: {"mining_seconds": 1.0, "checkpoint_seconds": 4.0},
        7: {"mining_seconds": 8.0},
    }
    for step in range(1, 9):
        writer.write(step, {**VALUES, "data_seconds": float(step), **rare.get(step, {})})
    writer.close()
    told = [(line["step"], line["data_seconds"], line.get("mining_seconds")) for line in _lines(tmp_path)]
    assert told == [(1, 1.0, None), (3, 3.0, 3.0), (6, 6.0, None), (8, 8.0, 8.0)]
    assert _lines(tmp_path)[1]["checkpoint_seconds"] == 4.0
    assert _scalars(tmp_path)["mining_seconds"] == [(3, 3.0), (8, 8.0)]


def test_minings_ahead_are_part_of_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mining, left in (
        (MiningConfig(every=40), "4:00 left"),
        (MiningConfig(at=[0, 99]), "2:00 left"),
        (None, "0:00 left"),
    ):
        run_dir = tmp_path / left[0]
        run_dir.mkdir()
        writer = MetricsWriter(run_dir, "weak", 100, 0, mining=mining)
        writer.last_step = time.monotonic() - 120.0
        writer.write(1, {**VALUES, "mining_seconds": 120.0})
        writer.close()
        assert capsys.readouterr().err.strip().endswith(left)


@pytest.mark.parametrize("torn", ["", '{"step": 6, "sta', '{"step": 6}', "\0\0\0\n", '{"stage": "weak"}\n', "7\n"])
@pytest.mark.parametrize("step", [0, 3, 5, 9])
def test_lines_are_cut_back_to_the_checkpoint(torn: str, step: int, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": number, "text": "ä" * number}) + "\n" for number in range(1, 6)]
    file.write_text("".join(whole) + torn, encoding="utf-8")
    cut_back(file, step)
    assert file.read_text(encoding="utf-8") == "".join(whole[:step])


def test_a_resumed_run_draws_every_step_once(tmp_path: Path) -> None:
    for first, last in ((1, 5), (4, 7)):
        writer = MetricsWriter(tmp_path, "sft", 7, first - 1)
        for step in range(first, last + 1):
            writer.write(step, {**VALUES, "loss": float(10 * first + step)})
        writer.close()
        time.sleep(1.1)  # event files are told apart by the second
    losses = [(1, 11.0), (2, 12.0), (3, 13.0), (4, 44.0), (5, 45.0), (6, 46.0), (7, 47.0)]
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == losses
    assert _scalars(tmp_path)["loss"] == losses


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
    assert taken["mining"] >= 0.02
    assert phases.take().keys() == {"start"}


def test_phases_become_metrics_but_for_the_rest_of_the_loop() -> None:
    taken = {"start": 9.0, "step": 1.0, "data": 0.0, "mining": 1e-5, "checkpoint": 2.0}
    assert phase_seconds(taken) == {"data_seconds": 0.0, "checkpoint_seconds": 2.0}


def test_peak_memory_is_this_processes_own() -> None:
    block = torch.ones(1 << 26)  # 256 MiB
    here = memory_gib(torch.device("cpu"))
    assert here >= block.numel() * 4 / 2**30
    code = (
        "import resource, sys; from megatron_conan.train.metrics import memory_gib; import torch;"
        "print(memory_gib(torch.device('cpu')), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    own, by_rusage = map(float, done.stdout.split())
    assert 0.01 < own <= by_rusage + 0.01
    del block


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_goes_on_without_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricsWriter(tmp_path, "pretrain", 200, 0)
    writer.write(1, VALUES)
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(2, 201):
        writer.write(step, VALUES)
        time.sleep(0.001)
    writer.close()
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 201))
    told = capsys.readouterr().err
    assert told.count("warning: no curves in ") == 1
    assert "No such file or directory" in told
