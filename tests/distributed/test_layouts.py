"""Every parallel layout trains as one process does: losses, gradient norms, all gradients, all weights.

fp32 from scratch, no checkpoint. Tolerance: sums over ranks and over the tensor-parallel halves of a product run in another
order, which in fp32 gives relative differences of about 1e-6 a step. Adam divides a gradient by its own size, so a weight whose
gradient is almost zero may move by a visible share of the learning rate (1e-3) either way: weights are held to 5% of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo_pool import WorkerPool
from layouts import assemble, tiny_config, train_layout

LM_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "dp2 overlapped": (2, {"overlap_grad_reduce": True}),
    "dp2 sharded optimizer": (2, {"distributed_optimizer": True}),
    "tp2 sp": (2, {"tensor": 2, "sequence": True}),
    "tp2 pp2 sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}

CONTRASTIVE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "tp2 sp": (2, {"tensor": 2, "sequence": True}),
    "dp2": (2, {}),
    "dp2 overlapped": (2, {"overlap_grad_reduce": True}),
    "dp2 tp2": (4, {"tensor": 2}),
    "dp4": (4, {}),
}

Baseline = dict[str, Any]


def _run(workers: WorkerPool, config: Any, world: int) -> dict[str, Any]:
    ranks = workers.run(train_layout, world, config)
    for rank in ranks:
        assert rank["losses"] == ranks[0]["losses"], "ranks report different losses"
    return {
        "losses": ranks[0]["losses"],
        "grad_norms": ranks[0]["grad_norms"],
        "gradients": assemble([rank["gradients"] for rank in ranks]),
        "weights": assemble([rank["weights"] for rank in ranks]),
    }


def _assert_same(found: dict[str, Any], expected: Baseline, sharded: bool = False) -> None:
    """`sharded`: gradients are not compared, since every rank holds its own part of them only."""
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["grad_norms"], expected["grad_norms"], rtol=1e-5)
    for kind, atol in (("gradients", 1e-6), ("weights", 5e-5)):
        if kind == "gradients" and sharded:
            continue
        assert found[kind].keys() == expected[kind].keys()
        for name, array in expected[kind].items():
            scale = max(float(np.abs(array).max()), 1.0)
            np.testing.assert_allclose(found[kind][name], array, rtol=1e-5, atol=atol * scale, err_msg=name)


@pytest.fixture(scope="module")
def pretrain_baseline(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Baseline:
    """One process."""
    return _run(workers, tiny_config("pretrain", tiny_data, tmp_path_factory.mktemp("one") / "run"), 1)


@pytest.mark.parametrize("layout", LM_LAYOUTS)
def test_pretrain_equals_one_process(
    layout: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path, pretrain_baseline: Baseline
) -> None:
    world, parallel = LM_LAYOUTS[layout]
    config = tiny_config("pretrain", tiny_data, tmp_path / "run", parallel=parallel)
    _assert_same(_run(workers, config, world), pretrain_baseline, config.parallel.distributed_optimizer)


WEAK = {
    "soft_mask": {"form": "row", "schedule": "linear"},
    "contrastive": {"temperature": 0.05, "symmetric": True, "num_hard_negatives": 3},
}


def _contrastive_config(
    stage: str, files: dict[str, Path], run: Path, world: int, parallel: dict[str, Any], **more: Any
) -> Any:
    dp = world // parallel.get("tensor", 1)
    train = {"micro_batch_size": 24 // dp, "global_batch_size": 24}
    return tiny_config(stage, files, run, **{"train": train, "parallel": parallel, **WEAK, **more})


def test_sft_equals_one_process(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Every micro-batch and rank has another number of labels: the loss is a mean over all labels of the global batch."""
    expected = _run(workers, tiny_config("sft", tiny_data, tmp_path / "one"), 1)
    for name, (world, parallel) in {"dp2": (2, {}), "tp2 pp2 sp": LM_LAYOUTS["tp2 pp2 sp"]}.items():
        _assert_same(_run(workers, tiny_config("sft", tiny_data, tmp_path / name, parallel=parallel), world), expected)


@pytest.fixture(scope="module")
def weak_baseline(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Baseline:
    """One process on the whole batch; 0 to 3 hard negatives a query, repeated queries and documents."""
    return _run(workers, _contrastive_config("weak", tiny_data, tmp_path_factory.mktemp("one") / "run", 1, {}), 1)


@pytest.mark.parametrize("layout", CONTRASTIVE_LAYOUTS)
def test_weak_equals_one_process(
    layout: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path, weak_baseline: Baseline
) -> None:
    world, parallel = CONTRASTIVE_LAYOUTS[layout]
    config = _contrastive_config("weak", tiny_data, tmp_path / "run", world, parallel)
    _assert_same(_run(workers, config, world), weak_baseline)


def test_learned_mask_and_scored_pairs_equal_one_process(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """theta is split over tensor ranks; CoSENT is one loss over the pairs of all ranks."""
    more = {
        "soft_mask": {"form": "learned", "schedule": "linear"},
        "data": {"sources": [{"prefix": str(tiny_data["sts"])}], "max_query_length": 24, "max_document_length": 48},
    }
    runs = []
    for world, parallel in ((1, {}), (2, {"tensor": 2}), (2, {})):
        config = _contrastive_config("weak", tiny_data, tmp_path / f"{len(runs)}", world, parallel, **more)
        runs.append(_run(workers, config, world))
    assert any(name.endswith("core_attention.theta") for name in runs[0]["gradients"])
    for found in runs[1:]:
        _assert_same(found, runs[0])
