"""A run that goes on under another parallel layout is the run that never stopped; all pairs are in tests/full."""

from __future__ import annotations

from pathlib import Path

import pytest
from gloo_pool import WorkerPool
from resumed_runs import Runs


@pytest.fixture(scope="module")
def runs(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(workers, tiny_data, tmp_path_factory.mktemp("resumed"))


@pytest.mark.parametrize(
    ("stage", "saved", "other", "precision"),
    [
        ("pretrain", "one process", "tp2", "fp32"),
        ("pretrain", "one process", "dp2 sharded", "fp32"),
        ("pretrain", "dp2 sharded", "pp2", "fp32"),
        ("pretrain", "dp2 sharded", "dp2 sharded", "fp32"),
        ("pretrain", "dp2", "dp2 sharded", "bf16"),
        ("finetune", "dp2 sharded", "one process", "fp32"),
        ("finetune", "dp2 sharded", "tp2 sp", "fp32"),
        ("finetune", "pp2", "dp2", "fp32"),
    ],
)
def test_goes_on_under_another_layout(stage: str, saved: str, other: str, precision: str, runs: Runs) -> None:
    runs.check_change(stage, saved, other, precision)
