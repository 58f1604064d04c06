"""Steps whose loss or gradient is not finite: skipped by all ranks, counted, and too many in a row end the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from layouts import build_test_trainer, deterministic, final_weights, tiny_config

from megatron_conan.config import RunConfig

CONTRASTIVE: dict[str, Any] = {
    "mining": {"every": 20, "pool_size": 8, "window": 40, "margin": None, "low_score": 1.1},
    "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
    "soft_mask": {"schedule": "constant", "alpha": 1.0},
}
PARALLEL: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 sharded": {"distributed_optimizer": True, "overlap_grad_reduce": True},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
}


def _config(stage: str, files: dict[str, Path], run: Path, parallel: str, max_skipped: int, **more: Any) -> RunConfig:
    train = {"steps": 6, "micro_batch_size": 2, "global_batch_size": 8, "max_skipped_steps": max_skipped}
    sections = {"train": train, "parallel": PARALLEL[parallel], "checkpoint": {"every": 2, "asynchronous": False}}
    return tiny_config(stage, files, run, **sections, **(CONTRASTIVE if stage == "finetune" else {}), **more)


def _negatives(trainer: Any) -> dict[str, str]:
    """Digest of each source's table."""
    return {name: table.content_hash() for name, table in getattr(trainer.parts.data, "negatives", {}).items()}


class _Poison:
    """Makes the loss, or the gradient of one parameter, NaN in some steps, on one rank."""

    def __init__(self, parameter: torch.nn.Parameter, what: str, steps: list[int], rank: int) -> None:
        self.parameter, self.what, self.steps, self.rank = parameter, what, steps, rank
        self.kept: torch.Tensor | None = None
        self.poisoned = False
        self.seen: dict[str, Any] = {}
        if what == "gradient":
            parameter.register_hook(lambda gradient: gradient * float("nan") if self.poisoned else gradient)

    def before_step(self, trainer: Any, step: int) -> dict[str, float]:
        self.poisoned = step in self.steps and trainer.setup.context.rank == self.rank
        if self.what == "loss" and self.kept is not None:
            self.parameter.data.copy_(self.kept)
            self.kept = None
        if step == self.steps[0]:
            self.seen |= {"before": final_weights(trainer), "negatives before": _negatives(trainer)}
        if step == self.steps[0] + 1:
            self.seen |= {"after": final_weights(trainer), "negatives after": _negatives(trainer)}
        if step == self.steps[0] + 2:
            self.seen["negatives later"] = _negatives(trainer)
        if self.what == "loss" and self.poisoned:
            self.kept = self.parameter.data.clone()
            self.parameter.data.fill_(float("nan"))
        return {}

    def after_training(self, trainer: Any) -> None: ...

    def state(self, trainer: Any, step: int) -> dict[str, Any]:
        return {}

    def restore(self, trainer: Any, state: dict[str, Any]) -> None: ...


def _train(config: RunConfig, what: str, steps: list[int], rank: int) -> dict[str, Any]:
    """Train with a poison before the other hooks' turn; weights as they stand after the last step, or the error."""
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)
    poison = _Poison(next(iter(trainer.chunks[0].parameters())), what, steps, rank)
    trainer.hooks["poison"] = poison
    try:
        loop.train(trainer)
    except FloatingPointError as error:
        return {"error": str(error)}
    skipped = (trainer.skipped.total, trainer.skipped.in_a_row)
    return {"error": "", "weights": final_weights(trainer), "skipped": skipped, **poison.seen}


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [deterministic(json.loads(line)) for line in lines]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("stage", "parallel"), [("pretrain", "dp2"), ("pretrain", "dp2 sharded"), ("pretrain", "tp2"), ("finetune", "pp2")]
)
def test_a_poisoned_step_changes_nothing(
    what: str, stage: str, parallel: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """NaN on one rank in step 3: all ranks skip it, and training goes on."""
    config = _config(stage, tiny_data, tmp_path / "run", parallel, 1)
    for found in workers.run(_train, 2, config, what, [3], 1):
        assert (found["error"], found["skipped"]) == ("", (1, 0))
        for name, (before, *_) in found["before"].items():
            np.testing.assert_array_equal(found["after"][name][0], before, err_msg=name)
        assert found["negatives after"] == found["negatives before"]
        assert (found["negatives later"] != found["negatives after"]) == (stage == "finetune")
        assert any((found["weights"][name][0] != before).any() for name, (before, *_) in found["before"].items())
    lines = _metrics(tmp_path / "run")
    assert [line.get("skipped_steps") for line in lines] == [None, None, 1.0, 1.0, 1.0, 1.0]
    assert [None in (line["loss"], line["grad_norm"]) for line in lines] == [False, False, True, False, False, False]


def test_too_many_in_a_row_end_the_run(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    config = _config("pretrain", tiny_data, tmp_path / "run", "dp2", 1)
    for found in workers.run(_train, 2, config, "loss", [3, 4, 5], 1):
        assert "step 4 is not finite (loss nan" in found["error"]
        assert "the 2. in a row" in found["error"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_00000002\n"
    assert [line["step"] for line in _metrics(tmp_path / "run")] == [1, 2, 3]
    for rank in (0, 1):
        kept = torch.load(tmp_path / "run" / "not_finite" / "step_00000004" / f"rank_{rank}.pt")
        assert (kept["step"], kept["rank"], math.isnan(kept["values"]["loss"])) == (4, rank, True)
        assert len(kept["batch"]) == 2  # micro-batches
        assert kept["batch"][0]["tokens"].shape == (2, 32)
    # the same command goes on from the last checkpoint, and gets over it if the cause is gone
    found = workers.run(_train, 2, config, "loss", [9], 1)
    assert [rank["error"] for rank in found] == ["", ""]
    assert [line["step"] for line in _metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_kept_batch_of_pairs_is_small_and_says_which_rows(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """Not the store of all texts, which may be terabytes; and it opens where there is no GPU, nor this package."""
    config = _config("finetune", tiny_data, tmp_path / "run", "dp2", 0)
    for found in workers.run(_train, 2, config, "loss", [3], 1):
        assert "step 3 is not finite" in found["error"]
    for rank in (0, 1):
        file = tmp_path / "run" / "not_finite" / "step_00000003" / f"rank_{rank}.pt"
        kept = torch.load(file)["batch"]
        (batch,) = kept["batches"]
        assert (batch["store"], len(batch["rows"])) == ("pairs", 8)
        assert sum(part["tokens"].numel() for part in kept["micro_batches"]) >= kept["num_tokens"] > 0
        assert file.stat().st_size < 40_000


def test_single_ones_are_counted_over_a_resume(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    config = _config("pretrain", tiny_data, tmp_path / "run", "dp2", 1)
    shorter = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    assert workers.run(_train, 2, shorter, "gradient", [2, 4], 0)[0]["skipped"] == (2, 1)
    assert workers.run(_train, 2, config, "gradient", [6], 0)[0]["skipped"] == (3, 1)
    assert _metrics(tmp_path / "run")[-1]["skipped_steps"] == 3.0
    np.testing.assert_equal([line.get("skipped_steps", 0.0) for line in _metrics(tmp_path / "run")], [0, 1, 1, 2, 2, 3])
