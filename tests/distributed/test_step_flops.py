"""Model FLOPs against torch's own counter on the real model; mfu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gloo_pool import WorkerPool
from layouts import build_test_trainer, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from megatron_conan.config import RunConfig
from megatron_conan.train.flops import step_flops


def _count(config: RunConfig) -> dict[str, Any]:
    """FLOPs of a step's forward and backward as torch counts them, beside ours."""
    trainer = build_test_trainer(config)
    alpha = trainer.soft_mask.at_step(1)
    batch = trainer.parts.data.batch(1)
    with FlopCounterMode(display=False) as counter:
        reports = trainer.parts.forward_backward(trainer.chunks, batch)
    totals: dict[str, float] = {}
    for report in reports:
        for name, value in report.totals.items():
            totals[name] = totals.get(name, 0.0) + value
    ours = step_flops(config, totals["tokens"], totals["attended_pairs"], causal=alpha == 0.0)
    half = step_flops(config, totals["tokens"], totals["attended_pairs"], causal=False)
    return {"ours": ours, "open": half, "torch": counter.get_total_flops(), "totals": totals}


@pytest.mark.parametrize("stage", ["pretrain", "weak"])
def test_flops_are_those_that_torch_counts(
    stage: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """torch counts a causal mask as if it were open, padding of groups of texts, and the similarities of the loss."""
    more: dict[str, Any] = {"attention": {"backend": "reference"}}
    if stage == "weak":
        more |= {
            "soft_mask": {"schedule": "constant", "alpha": 0.5},
            "train": {"micro_batch_size": 8, "global_batch_size": 8},
        }
    (found,) = workers.run(_count, 1, tiny_config(stage, tiny_data, tmp_path / "run", **more))
    assert found["open"] == pytest.approx(found["torch"], rel=1e-6 if stage == "pretrain" else 0.05)
    if stage == "pretrain":
        assert found["totals"] == {"tokens": 8 * 32, "attended_pairs": 8 * 32 * 32}
        scores = 3 * 4 * 4 * 64 * 8 * 32 * 32  # three passes, two products of 2 FLOPs, layers, heads' width
        assert found["open"] - found["ours"] == pytest.approx(scores / 2 * (1 - 1 / 32))
    else:
        assert found["ours"] == found["open"] < found["torch"]


def test_mfu_is_a_metric_where_the_peak_is_given(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    def mfu(parallel: dict[str, int], ranks: int) -> tuple[float, float]:
        train = {"steps": 1, "peak_tflops": 0.1, "micro_batch_size": 2}
        config = tiny_config("pretrain", tiny_data, tmp_path / f"run{ranks}", train=train, parallel=parallel)
        values = workers.run(_first_step, ranks, config)[0]
        return values["mfu"] * values["step_seconds"], values["tokens"]

    one, two = mfu({}, 1), mfu({"tensor": 2}, 2)
    assert one[1] == two[1] == 256
    assert one[0] == pytest.approx(2 * two[0])  # twice the chips for the same work
    assert one[0] == pytest.approx(step_flops(_config_of(tiny_data, tmp_path), 256, 256 * 32, causal=True) / 1e11)


def _config_of(files: dict[str, Path], folder: Path) -> RunConfig:
    return tiny_config("pretrain", files, folder)


def _first_step(config: RunConfig) -> dict[str, float]:
    from megatron_conan.train import loop

    return loop.one_step(build_test_trainer(config))
