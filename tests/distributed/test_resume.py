"""A run that stops and goes on is the run that never stopped; a later stage starts from an earlier one's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo_pool import WorkerPool
from layouts import assemble, deterministic, tiny_config, train_run

from megatron_conan.config import RunConfig
from megatron_conan.config.tree import PoolingConfig

MINING = {
    "mining": {"every": 3, "pool_size": 8, "window": 40},
    "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
    "soft_mask": {"schedule": "constant", "alpha": 1.0},
}


def _config(stage: str, files: dict[str, Path], run: Path, **more: Any) -> RunConfig:
    train = {"steps": 8, "micro_batch_size": 4, "global_batch_size": 8}
    sections: dict[str, Any] = {"train": train, "checkpoint": {"every": 4}, **(MINING if stage == "finetune" else {})}
    sections["optimizer"] = {"decoupled_lr": 2e-3}
    return tiny_config(stage, files, run, **{**sections, **more})


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _deterministic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must repeat bitwise: all but times and memory."""
    return [deterministic(row) for row in rows]


@pytest.mark.parametrize("parallel", [{}, {"distributed_optimizer": True}], ids=["replicated", "sharded optimizer"])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "finetune"])
def test_resumed_equals_uninterrupted(
    stage: str, parallel: dict[str, Any], workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """Killed after step 4's checkpoint (two steps later, here by removing what came after): bitwise the same."""
    whole = workers.run(train_run, 2, _config(stage, tiny_data, tmp_path / "whole", parallel=parallel))
    run = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", run)
    config = _config(stage, tiny_data, run, parallel=parallel)
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    (run / "checkpoints" / "latest").write_text("step_00000004\n", encoding="utf-8")
    if stage == "finetune":
        shutil.rmtree(run / "negatives" / "step_00000008")
    resumed = workers.run(train_run, 2, config)
    assert _deterministic(_metrics(run)) == _deterministic(_metrics(tmp_path / "whole"))
    expected, found = assemble([rank["weights"] for rank in whole]), assemble([rank["weights"] for rank in resumed])
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_resumes_under_another_layout(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Saved by one process, gone on with by tp 2 and by pp 2, optimizer state included."""
    one = tmp_path / "one"
    whole = workers.run(train_run, 1, _config("pretrain", tiny_data, one))
    expected = assemble([rank["weights"] for rank in whole])
    for name, parallel in (("tp2", {"tensor": 2}), ("pp2", {"pipeline": 2})):
        run = tmp_path / name
        shutil.copytree(one, run)
        shutil.rmtree(run / "checkpoints" / "step_00000008")
        (run / "checkpoints" / "latest").write_text("step_00000004\n", encoding="utf-8")
        ranks = workers.run(train_run, 2, _config("pretrain", tiny_data, run, parallel=parallel))
        losses = [[row["loss"] for row in _metrics(folder)] for folder in (run, one)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
        found = assemble([rank["weights"] for rank in ranks])
        for key, array in expected.items():  # 5% of the learning rate, as in test_layouts
            np.testing.assert_allclose(found[key], array, atol=5e-5, err_msg=key)


def test_stages_start_from_each_other(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """pretrain (tp 2) -> weak (learned mask, projection) -> finetune: weights are handed on, heads and theta are not."""
    pretrain = tmp_path / "pretrain"
    first = workers.run(train_run, 2, _config("pretrain", tiny_data, pretrain, parallel={"tensor": 2}))
    learned = {"form": "learned", "schedule": "linear"}
    contrastive, projection = {"temperature": 0.05}, {"projection_dim": 48}
    train = {"steps": 1, "micro_batch_size": 8, "global_batch_size": 8}
    weak = _config(
        "weak", tiny_data, tmp_path / "weak", soft_mask=learned, contrastive=contrastive, train=train, pooling=projection,
        optimizer={"lr": 1e-12}, checkpoint={"init_from": str(pretrain)},
    )  # fmt: skip
    second = workers.run(train_run, 1, weak)
    opened = {"schedule": "constant", "alpha": 1.0}
    finetune = _config(
        "finetune", tiny_data, tmp_path / "finetune", train=train, optimizer={"lr": 1e-12}, soft_mask=opened,
        pooling=projection, checkpoint={"init_from": str(tmp_path / "weak")},
    )  # fmt: skip
    third = workers.run(train_run, 1, finetune)
    expected = assemble([rank["weights"] for rank in first])
    projected = assemble([rank["weights"] for rank in second])
    for ranks in (second, third):
        found = assemble([rank["weights"] for rank in ranks])
        assert {name for name in found if "theta" not in name} == {*expected, "projection.weight"}
        np.testing.assert_allclose(found["projection.weight"], projected["projection.weight"], atol=1e-9)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, atol=1e-9, err_msg=name)
    assert not any("theta" in name for name in assemble([rank["weights"] for rank in third]))
    with pytest.raises(ValueError, match=r"trained with pooling\.projection_dim=48, not None; set it to that"):
        workers.run(
            train_run, 1, finetune.model_copy(update={"pooling": PoolingConfig(), "run_dir": tmp_path / "other"})
        )
