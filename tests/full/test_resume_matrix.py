"""Every layout's checkpoint goes on under every other one. `pytest -rP` shows how far the losses are apart."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from gloo_pool import WorkerPool
from resumed_runs import STAGES, Runs

pytestmark = pytest.mark.full

SIMPLE = ["one process", "tp2", "pp2", "dp2", "dp2 sharded", "tp2 sp"]
COMBINED = ["dp2 sharded", "tp2 pp2", "pp2 vpp2", "dp2 tp2 sharded", "dp2 pp2 sharded"]
BF16 = ["tp2", "pp2", "dp2", "dp2 sharded"]


@pytest.fixture(scope="module")
def runs(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(workers, tiny_data, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("other", SIMPLE)
@pytest.mark.parametrize("saved", SIMPLE)
@pytest.mark.parametrize("stage", STAGES)
def test_every_layout_goes_on_under_every_layout(stage: str, saved: str, other: str, runs: Runs) -> None:
    runs.check_change(stage, saved, other)


@pytest.mark.parametrize(("saved", "other"), [*permutations(COMBINED, 2), *((name, name) for name in COMBINED[1:])])
@pytest.mark.parametrize("stage", STAGES)
def test_combined_layouts_go_on_under_each_other(stage: str, saved: str, other: str, runs: Runs) -> None:
    runs.check_change(stage, saved, other)


@pytest.mark.parametrize("other", BF16)
@pytest.mark.parametrize("saved", BF16)
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_keeps_its_fp32_weights_through_every_change(stage: str, saved: str, other: str, runs: Runs) -> None:
    runs.check_change(stage, saved, other, "bf16")
