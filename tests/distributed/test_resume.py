"""A run that stops and goes on is the run that never stopped; a later stage starts from an earlier one's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo_pool import WorkerPool
from layouts import assemble, build_test_trainer, deterministic, tiny_config, train_run

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


@pytest.mark.parametrize(("stage", "name"), [("pretrain", "lm.bin"), ("finetune", "pairs.negatives.npy")])
def test_a_run_whose_data_changed_is_refused(
    stage: str, name: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """Some tokens, or one id, are others. With the old file back the run goes on; another run may train on the new one."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data["lm"].parent, folder)
    files = {key: folder / path.name for key, path in tiny_data.items()}
    train = {"steps": 2, "micro_batch_size": 4, "global_batch_size": 8}
    config = _config(stage, files, tmp_path / "run", train=train, checkpoint={"every": 1})
    workers.run(train_run, 2, config)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000001\n", encoding="utf-8")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-8] + bytes(8))
    assert (folder / name).read_bytes() != content
    with pytest.raises(ValueError, match="the data changed since the run began") as error:
        workers.run(train_run, 2, config)
    assert f"data.sources.0: {name} has other content of the same size. Bring the old files back" in str(error.value)
    assert [row["step"] for row in _metrics(tmp_path / "run")] == [1, 2], "nothing is touched"
    workers.run(train_run, 2, config.model_copy(update={"run_dir": tmp_path / "other"}))
    (folder / name).write_bytes(content)
    workers.run(train_run, 2, config)


def test_more_steps_on_resume_are_a_run_of_that_many_steps_from_there(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """Learning rate and mask follow the longer schedules from the checkpoint on; the samples stay where they were."""
    mask = {"soft_mask": {"form": "row", "schedule": "linear"}}
    longer = {"train": {"steps": 12, "micro_batch_size": 4, "global_batch_size": 8}}
    workers.run(train_run, 1, _config("weak", tiny_data, tmp_path / "run", **mask))
    workers.run(train_run, 1, _config("weak", tiny_data, tmp_path / "run", **mask, **longer))
    workers.run(train_run, 1, _config("weak", tiny_data, tmp_path / "longer", **mask, **longer))
    found, expected = _metrics(tmp_path / "run"), _metrics(tmp_path / "longer")
    for key in ("step", "lr", "alpha", "tokens"):
        assert [row[key] for row in found[8:]] == [row[key] for row in expected[8:]]
    assert found[7]["alpha"] == 1.0
    assert found[8]["alpha"] == pytest.approx(9 / 12)


class _Skip:
    """Makes the gradient of the first steps NaN, so that no weight has moved when the first checkpoint is written."""

    def before_step(self, trainer: Any, step: int) -> dict[str, float]:
        if step == 1:
            parameter = next(iter(trainer.chunks[0].parameters()))
            parameter.register_hook(lambda gradient: gradient * (float("nan") if trainer.step < 4 else 1.0))
        return {}

    def after_training(self, trainer: Any) -> None: ...

    def state(self, trainer: Any, step: int) -> dict[str, Any]:
        return {}

    def restore(self, trainer: Any, state: dict[str, Any]) -> None: ...


def _train_skipping(config: RunConfig) -> None:
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)
    trainer.hooks["skip"] = _Skip()
    loop.train(trainer)


@pytest.mark.parametrize("layouts", [({}, {"distributed_optimizer": True}), ({"distributed_optimizer": True}, {})])
def test_a_checkpoint_before_the_first_update_is_one(
    layouts: tuple[dict[str, Any], dict[str, Any]], workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """All steps so far were skipped: the optimizer has no state yet, under whatever layout it goes on."""
    saved, other = layouts
    workers.run(_train_skipping, 2, _config("pretrain", tiny_data, tmp_path / "run", parallel=saved))
    expected = _metrics(tmp_path / "run")
    assert [row.get("skipped_steps") for row in expected] == [1, 2, 3, 4, 4, 4, 4, 4]
    for parallel in (saved, other):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
        (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000004\n", encoding="utf-8")
        workers.run(train_run, 2, _config("pretrain", tiny_data, tmp_path / "run", parallel=parallel))
        losses = [[row["loss"] for row in rows[4:]] for rows in (_metrics(tmp_path / "run"), expected)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=0 if parallel == saved else 1e-5)


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
