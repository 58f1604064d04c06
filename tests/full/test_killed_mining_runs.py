"""A run with dynamic hard negatives, killed at named points and started again, is the run that was never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from layouts import deterministic, tiny_config, train_run
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_conan.config import RunConfig, dump_config
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.mining.table import ARRAYS

DRIVER = Path(__file__).with_name("finetune_killed.py")
SECONDS = 180.0
"""What a launch may take; one that waits for a dead rank takes longer."""
SWAPS = {"margin": None, "low_score": 0.8, "drop_ratio": 1.001, "high_score": 1.1}
"""v2 with nearly all steps replacing something."""
BLOCKS = {"margin": None, "rule": "v1", "rule_every": 7, "rule_offset": 2, "drop_ratio": 1.001, "high_score": 1.1}
RUNS: dict[str, dict[str, Any]] = {
    "short": {"train": {"steps": 12}, "mining": {"every": 4, **SWAPS}},
    "dp2": {"mining": SWAPS},
    "tp2": {"mining": SWAPS, "parallel": {"tensor": 2}},
    "tp2, v1": {"mining": BLOCKS, "parallel": {"tensor": 2}},
    "pp2": {"mining": SWAPS, "parallel": {"pipeline": 2}},
}
"""By name; three minings each."""
FULL = pytest.mark.full
CHAIN = ["encoding@20", "search@20", "record@20", "swap@33", "arrays@45", "shards@45", "rename@45", "latest@60"]


@dataclass(frozen=True)
class Runs:
    """Makes runs of one set of files."""

    files: dict[str, Path]
    workers: WorkerPool
    folder: Path

    def config(self, name: str, run_dir: Path, every: int = 15) -> RunConfig:
        """Two sources that are mined, and scored pairs beside them."""
        run = RUNS[name]
        return tiny_config(
            "finetune",
            self.files,
            run_dir,
            data={"sources": [{"prefix": str(self.files[source])} for source in ("pairs", "other", "sts")]},
            train={"steps": 60, "micro_batch_size": 4, "global_batch_size": 8, **run.get("train", {})},
            checkpoint={"every": every, "keep_last": 2},
            contrastive={"temperature": 0.05, "num_hard_negatives": 2},
            soft_mask={"schedule": "constant", "alpha": 1.0},
            optimizer={"lr": 2e-4},
            parallel=run.get("parallel", {}),
            mining={
                "every": 20,
                "pool_size": 12,
                "window": 40,
                "max_tokens": 160,
                "scratch_dir": str(run_dir.with_name("scratch")),
                **run["mining"],
            },
        )

    def uninterrupted(self, name: str) -> Path:
        """The folder of a run that nothing happens to."""
        config = self.config(name, self.folder / name / "run")
        if not config.run_dir.exists():
            self.workers.run(train_run, 2, config)
        return config.run_dir


@pytest.fixture(scope="module")
def runs(tiny_data: dict[str, Path], workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    lines = (tiny_data["pairs"].with_suffix(".jsonl")).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "other.jsonl").write_text("".join(lines[:90]), encoding="utf-8")
    preprocess_pairs("retrieval", [folder / "other.jsonl"], tiny_data["tokenizer"], folder / "other")
    return Runs({**tiny_data, "other": folder / "other"}, workers, folder)


def _launch(config: RunConfig, point: str) -> tuple[int, str]:
    """Start the run, or go on with it, on two real processes; torchrun's exit status and all that was told."""
    file = config.run_dir.with_name("config.yaml")
    file.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [*command, str(DRIVER), point, "--config", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            told, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun ends its workers, which have sessions of their own
            told, _ = process.communicate()
            raise AssertionError(f"{point}: not ended after {SECONDS:g} s\n{told}") from None
    return process.returncode, told


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file, without what differs between two runs alike."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [deterministic(line) for line in lines]


def _tensors(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a run's last checkpoint."""
    state = torch.load(_converted(run, folder), weights_only=False)
    flat: dict[str, torch.Tensor] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                collect(part, f"{name}.{key}")
        elif isinstance(value, torch.Tensor):
            flat[name] = value

    collect(state, "")
    return flat


def _converted(run: Path, folder: Path) -> Path:
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    file = folder / "whole.pt"
    dcp_to_torch_save(latest, file)
    return file


def _assert_equal_runs(found: Path, expected: Path, folder: Path) -> None:
    """Losses and all other metrics, minings, negatives, weights, optimizer state: bitwise."""
    assert (found / "checkpoints" / "latest").read_text() == (expected / "checkpoints" / "latest").read_text()
    assert _lines(found / "metrics.jsonl") == _lines(expected / "metrics.jsonl")
    assert _lines(found / "negatives" / "mining.jsonl") == _lines(expected / "negatives" / "mining.jsonl")
    last = (expected / "checkpoints" / "latest").read_text().strip()
    for source in ("pairs", "other"):
        tables = [run / "negatives" / last / source for run in (found, expected)]
        assert sorted(path.name for path in tables[0].iterdir()) == sorted(path.name for path in tables[1].iterdir())
        assert (tables[0] / "table.json").read_text() == (tables[1] / "table.json").read_text()
        for name in ARRAYS:
            arrays = [np.load(table / f"{name}.npy") for table in tables]
            assert arrays[0].tobytes() == arrays[1].tobytes(), (source, name)
    tensors, wanted = _tensors(found, folder), _tensors(expected, folder)
    assert tensors.keys() == wanted.keys()
    assert any("exp_avg" in name for name in wanted)
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), name


def _assert_did_something(run: Path, *, num_replaced: int) -> None:
    """The comparison is of runs in which minings change the negatives, and the rule does in between."""
    minings = _lines(run / "negatives" / "mining.jsonl")
    assert [(line["version"], line["source"]) for line in minings] == [
        (version, source) for version in (1, 2, 3) for source in ("pairs", "other")
    ]
    assert all(line["changed_share"] > 0.1 for line in minings[2:])
    assert sum(line.get("negatives_replaced", 0) > 0 for line in _lines(run / "metrics.jsonl")) >= num_replaced


@pytest.mark.parametrize(
    ("name", "every", "points"),
    [
        pytest.param("short", 3, ["encoding@4"], marks=FULL),
        pytest.param("dp2", 15, ["encoding@0"], marks=FULL),
        pytest.param("dp2", 15, ["encoding@20"], marks=FULL),
        pytest.param("dp2", 20, ["search@20"], marks=FULL),
        pytest.param("dp2", 15, ["record@40"], marks=FULL),
        pytest.param("dp2", 15, ["swap@33"], marks=FULL),
        pytest.param("dp2", 15, ["arrays@45"], marks=FULL),
        pytest.param("dp2", 15, ["shards@45", "rename@45"], marks=FULL),
        pytest.param("dp2", 20, ["latest@40"], marks=FULL),
        pytest.param("tp2, v1", 15, CHAIN, marks=FULL),
        pytest.param("pp2", 15, CHAIN, marks=FULL),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None if isinstance(value, int) else value,
)
def test_killed_and_started_again(runs: Runs, name: str, every: int, points: list[str], tmp_path: Path) -> None:
    """Killed at one point after the other, the same command each time; the last start goes on to the end."""
    config = runs.config(name, tmp_path / "run", every)
    for point in points:
        status, told = _launch(config, point)
        assert status != 0, told
        assert f"dies at {point}" in told, told
        assert "Signal 9 (SIGKILL)" in told, told
    status, told = _launch(config, "never")
    assert status == 0, told
    expected = runs.uninterrupted(name)
    _assert_did_something(expected, num_replaced=5 if name == "short" else 3 if "v1" in name else 30)
    _assert_equal_runs(config.run_dir, expected, tmp_path)
    assert not [file for file in (tmp_path / "scratch").rglob("*") if file.is_file()]
    assert not list((config.run_dir / "negatives").rglob(".*"))
    if points[0].startswith("encoding") and len(points) == 1:
        step = int(points[0].partition("@")[2])
        assert config.mining is not None
        assert config.mining.every is not None
        _assert_encoded_once(tmp_path, step, step + config.mining.every)


@pytest.mark.full
def test_goes_on_in_another_layout(runs: Runs, tmp_path: Path) -> None:
    """Killed in encoding under dp 2, gone on with under tp 2, which has other shards: all is encoded anew, nothing left."""
    for layout, point in (("dp2", "encoding@20"), ("tp2", "never")):
        config = runs.config(layout, tmp_path / "run")
        status, told = _launch(config, point)
        assert (status == 0) == (point == "never"), told
    _assert_did_something(config.run_dir, num_replaced=30)
    assert [line["step"] for line in _lines(config.run_dir / "metrics.jsonl")] == list(range(1, 61))
    assert not [file for file in (tmp_path / "scratch").rglob("*") if file.is_file()]


def _assert_encoded_once(folder: Path, step: int, later: int) -> None:
    """What was noted before the kill isn't encoded again; what wasn't, is. The mining before step `later` shows all rounds."""
    for rank in (0, 1):
        rounds: dict[tuple[int, int], list[list[int]]] = {}  # by start and step, of the source killed in
        lines = [json.loads(line) for line in (folder / f"embedded_{rank}.jsonl").read_text().splitlines()]
        processes = list(dict.fromkeys(line["process"] for line in lines))
        for line in lines:
            if line["source"] == "other":
                rounds.setdefault((processes.index(line["process"]), line["step"]), []).append(line["texts"])
        all_rounds, killed, resumed = rounds[1, later], rounds[0, step], rounds[1, step]
        num_skipped = len(all_rounds) - len(resumed)
        assert killed == all_rounds[: len(killed)]
        assert resumed == all_rounds[num_skipped:]
        # rank 1 died when its third round lay in the file but wasn't noted; rank 0 somewhere
        assert (num_skipped, len(killed)) == (2, 3) if rank else num_skipped in (len(killed) - 1, len(killed))
        assert num_skipped > 0
