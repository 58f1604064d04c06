"""A dry run of the largest batch leaves nothing behind: training after it is bitwise training without it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from layouts import build_test_trainer, deterministic, final_weights, tiny_config, train_run

from megatron_conan.config import RunConfig, dump_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2 sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 overlapped": (2, {"pipeline": 2, "overlap_grad_reduce": True}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2 overlapped sharded": (2, {"distributed_optimizer": True, "overlap_grad_reduce": True}),
}
PASSES: dict[str, dict[str, Any]] = {
    "by rows": {"micro_batch_size": 4},
    "by tokens": {"micro_batch_size": None, "micro_batch_tokens": 310},
    "one pass": {"micro_batch_size": None, "micro_batch_tokens": 4000},
}
MINED = {
    # replaced in every step, if a dry run's similarities were taken for a step's also before the first
    "mining": {"every": 2, "pool_size": 8, "window": 30, "low_score": 0.0, "drop_ratio": 1.0001, "high_score": 1.0},
    "contrastive": {"temperature": 0.05, "num_hard_negatives": 2, "num_positives": 2, "symmetric": True},
    "soft_mask": {"schedule": "constant", "alpha": 1.0},
}
OPENING = {
    "contrastive": {"temperature": 0.05, "num_hard_negatives": 2, "batch_balance": {"scored_batch_size": 6}},
    "soft_mask": {"form": "row", "schedule": "linear"},
    "prompts": {"query": "find\n"},
    "pooling": {"include_prompt": False},
}
FULL = pytest.mark.full
SHORT_LM = ("one process", "tp2 sp", "pp2 vpp2", "dp2 overlapped sharded")
SHORT_MINED = {("one process", "by rows"), ("pp2 vpp2", "by tokens"), ("dp2 overlapped sharded", "by tokens")}


def _random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]


def _everything(trainer: Any) -> dict[str, Any]:
    """All that a step starts from."""
    groups = [group for chunk in trainer.chunks for group in chunk.bucket_groups]
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    return {
        "weights": final_weights(trainer),
        "gradients": [parameter.main_grad.tolist() for parameter in parameters],
        "torch gradients": [parameter.grad is None for parameter in parameters],
        "ready": [(group.is_first_batch, len(group.golden_per_param_grad_ready_counts)) for group in groups],
        "moments": [
            {kind: tensor.tolist() for kind, tensor in values.items()}
            for part in trainer.optimizer.chained_optimizers
            for values in part.optimizer.state.values()
        ],
        "mask": (trainer.soft_mask.value, trainer.soft_mask.alpha.item()),
        "modes": [chunk.training for chunk in trainer.chunks],
        "random": _random_states(),
        "negatives": {name: t.content_hash() for name, t in getattr(trainer.parts.data, "negatives", {}).items()},
        "done": (trainer.step, trainer.scheduler.num_steps),
    }


def train_after(config: RunConfig, rehearsed: bool) -> dict[str, Any]:
    """Train in this process's place, after a dry run or without one; what every step gave, and this rank's weights."""
    from megatron_conan.train import loop
    from megatron_conan.train.dry_run import dry_run

    trainer = build_test_trainer(config)
    if rehearsed:
        before = _everything(trainer)
        dry_run(trainer)
        after = _everything(trainer)
        for what, value in before.items():
            np.testing.assert_equal(after[what], value, err_msg=what)
    steps = []
    while trainer.step < config.train.steps:
        steps.append(deterministic(loop.one_step(trainer)))
    return {"steps": steps, "weights": final_weights(trainer)}


def _assert_unchanged(workers: WorkerPool, world: int, config: RunConfig, folder: Path) -> None:
    runs = []
    for rehearsed in (True, False):
        own = config.model_copy(update={"run_dir": folder / str(rehearsed)})
        if config.run_dir.exists():  # one that goes on
            shutil.copytree(config.run_dir, own.run_dir)
        runs.append(workers.run(train_after, world, own, rehearsed))
    for rank, (after_dry_run, without) in enumerate(zip(*runs, strict=True)):
        assert after_dry_run["steps"] == without["steps"], f"rank {rank}"  # losses, gradient norms, all metrics
        np.testing.assert_equal(after_dry_run["weights"], without["weights"], err_msg=f"rank {rank}")


@pytest.mark.parametrize("layout", [pytest.param(n, marks=() if n in SHORT_LM else FULL) for n in LAYOUTS])
def test_pretraining_is_the_same(layout: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    world, parallel = LAYOUTS[layout]
    config = tiny_config("pretrain", tiny_data, tmp_path / "run", parallel=parallel, train={"steps": 3})
    _assert_unchanged(workers, world, config, tmp_path)


@pytest.mark.parametrize(
    ("layout", "passes"),
    [
        pytest.param(layout, passes, marks=() if (layout, passes) in SHORT_MINED else FULL)
        for layout in LAYOUTS
        for passes in PASSES
    ],
)
def test_finetuning_with_mined_negatives_is_the_same(
    layout: str, passes: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    world, parallel = LAYOUTS[layout]
    train = {"steps": 3, "global_batch_size": 24, **PASSES[passes]}
    config = tiny_config("finetune", tiny_data, tmp_path / "run", parallel=parallel, train=train, **MINED)
    _assert_unchanged(workers, world, config, tmp_path)


def test_sft_is_the_same(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    _assert_unchanged(workers, 1, tiny_config("sft", tiny_data, tmp_path / "run", train={"steps": 2}), tmp_path)


@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2", marks=FULL)])
def test_an_opening_mask_and_scored_pairs_beside_are_the_same(
    layout: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    world, parallel = LAYOUTS[layout]
    data = {"sources": [{"prefix": str(tiny_data[name])} for name in ("pairs", "sts")]}
    config = tiny_config(
        "weak", tiny_data, tmp_path / "run", parallel=parallel, data=data, train={"steps": 3}, **OPENING
    )
    _assert_unchanged(workers, world, config, tmp_path)


@pytest.mark.parametrize("layout", ["one process", pytest.param("dp2 overlapped sharded", marks=FULL)])
def test_a_run_that_goes_on_keeps_its_moments_and_negatives(
    layout: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """The rule v1 looks at the rows seen in every step: a dry run that counted for a step would replace some."""
    world, parallel = LAYOUTS[layout]
    rule = {"rule": "v1", "rule_every": 1, "rule_offset": 2, "drop_ratio": 1.0001, "high_score": 1.1, "every": 4}
    config = tiny_config(
        "finetune",
        tiny_data,
        tmp_path / "run",
        parallel=parallel,
        train={"steps": 4, "micro_batch_size": 4},
        checkpoint={"every": 2, "keep_last": 3},
        **{**MINED, "mining": {**MINED["mining"], **rule}},
    )
    workers.run(train_run, world, config)
    for later in config.run_dir.glob("*/step_00000004"):
        shutil.rmtree(later)
    (config.run_dir / "checkpoints" / "latest").write_text("step_00000002\n", encoding="utf-8")
    _assert_unchanged(workers, world, config, tmp_path)


@pytest.mark.parametrize(
    ("stage", "train", "more", "what", "remedy"),
    [
        pytest.param(
            "pretrain",
            {"micro_batch_size": 65536, "global_batch_size": 65536},
            {},
            "(",
            "train.micro_batch_size=32768",
            marks=FULL,
        ),
        pytest.param(
            "finetune",
            {},
            {**MINED, "mining": {**MINED["mining"], "max_tokens": 40_000_000}},
            "of mining (mining.max_tokens=40,000,000)",
            "mining.max_tokens=20000000",
            marks=FULL,
        ),
    ],
)
def test_too_little_memory_shows_before_the_first_step(
    stage: str,
    train: dict[str, Any],
    more: dict[str, Any],
    what: str,
    remedy: str,
    tiny_data: dict[str, Path],
    tmp_path: Path,
) -> None:
    """The launch script's Python in a process that may have 8 GiB."""
    train = {"steps": 2, "dry_run": True, **train}
    config = tiny_config(stage, tiny_data, tmp_path / "run", train=train, **more)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    program = f"from megatron_conan.main import main; raise SystemExit(main({stage!r}, ['--config', {str(file)!r}]))"
    started = subprocess.run(
        ["bash", "-c", f'ulimit -v {8 << 20} && exec "$0" "$@"', sys.executable, "-P", "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = started.stderr
    line = next((line for line in told.splitlines() if line.startswith("error: ")), "")
    assert line.startswith(f"error: out of memory before step 1: the largest batch {what}"), told
    assert " of 8.0 GiB were in use when " in line
    assert remedy in line
    assert started.returncode == 2
    assert (config.run_dir / "metrics.jsonl").read_text() == ""
