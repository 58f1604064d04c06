"""Every parallel layout trains as one process does: losses, gradient norms, all gradients, all weights.

fp32 from scratch, no checkpoint. Tolerance: sums over ranks and over the tensor-parallel halves of a product run in another
order, which in fp32 gives relative differences of about 1e-6 a step. Adam divides a gradient by its own size, so a weight whose
gradient is almost zero may move by a visible share of the learning rate either way: weights are held to 20% of it, and
gradients to 1e-5 of the largest number of their tensor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo_pool import WorkerPool
from layouts import LAYOUT_DEPENDENT, assemble, build_test_trainer, tiny_config, train_layout

from megatron_conan.config import RunConfig

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
    "one process": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 overlapped": (2, {"pipeline": 2, "overlap_grad_reduce": True}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2": (2, {}),
    "dp2 overlapped": (2, {"overlap_grad_reduce": True}),
    "dp2 sharded optimizer": (2, {"distributed_optimizer": True}),
    "tp2 pp2 sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "dp2 tp2 sp": (4, {"tensor": 2, "sequence": True}),
    "dp2 pp2 overlapped": (4, {"pipeline": 2, "overlap_grad_reduce": True}),
    "dp4": (4, {}),
}

# Micro-batches of a step by dp = 1, 2, 4: the whole share at once, or by tokens, which gives ranks different numbers of them.
PASSES: dict[str, dict[str, Any]] = {
    "one pass": {},
    "two passes": {"micro_batch_tokens": 310},
}

Baseline = dict[str, Any]


def _run(workers: WorkerPool, config: Any, world: int) -> dict[str, Any]:
    ranks = workers.run(train_layout, world, config)
    for rank in ranks:
        assert rank["losses"] == ranks[0]["losses"], "ranks report different losses"
        assert rank["metrics"] == ranks[0]["metrics"], "ranks report different metrics"
    return {
        "losses": ranks[0]["losses"],
        "metrics": ranks[0]["metrics"],
        "grad_norms": ranks[0]["grad_norms"],
        "gradients": assemble([rank["gradients"] for rank in ranks]),
        "weights": assemble([rank["weights"] for rank in ranks]),
    }


def _assert_same(found: dict[str, Any], expected: Baseline, config: RunConfig) -> None:
    """Gradients are not compared with a sharded optimizer: every rank holds its own part of them only."""
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["grad_norms"], expected["grad_norms"], rtol=1e-5)
    for metrics, others in zip(found["metrics"], expected["metrics"], strict=True):
        assert metrics.keys() == others.keys()
        for name in metrics.keys() - set(LAYOUT_DEPENDENT):
            assert metrics[name] == pytest.approx(others[name], rel=1e-4, abs=1e-5), name
    for kind in ("gradients", "weights"):
        if kind == "gradients" and config.parallel.distributed_optimizer:
            continue
        assert found[kind].keys() == expected[kind].keys()
        for name, array in expected[kind].items():
            atol = 0.2 * config.optimizer.lr if kind == "weights" else 1e-5 * float(np.abs(array).max())
            np.testing.assert_allclose(found[kind][name], array, rtol=1e-5, atol=atol, err_msg=name)


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
    _assert_same(_run(workers, config, world), pretrain_baseline, config)


MIXED = {
    "soft_mask": {"form": "row", "schedule": "linear"},
    "contrastive": {
        "temperature": 0.05,
        "symmetric": True,
        "num_positives": 2,
        "num_hard_negatives": 3,
        "in_batch_negatives": ["documents", "queries", "same_side"],
        "false_negative_margin": 0.1,
        "matryoshka_dims": [16, 64],
        "batch_balance": {"scored_batch_size": 11, "weight": 0.8},
    },
    "prompts": {"query": "find\n"},
    "pooling": {"include_prompt": False},
    "optimizer": {"lr": 1e-5, "clip_grad": 0.5},
}
"""Everything at once: InfoNCE with ragged positives and negatives plus CoSENT, cut sizes, prompts; clipping is on.

The rate is low, as the margin is a step: with weights that differ by a visible share of a rate of 1e-3 a candidate soon lies
on either side of it, which moves the loss by 3e-4 (seen at step 2 with tensor, pipeline and sequence parallelism).
"""


def _contrastive_config(
    stage: str, files: dict[str, Path], run: Path, parallel: dict[str, Any], **more: Any
) -> RunConfig:
    one_pass = {"micro_batch_size": None, "micro_batch_tokens": 4000}
    train = {"global_batch_size": 24, **one_pass, **more.pop("train", {})}
    sources = [{"prefix": str(files["pairs"])}, {"prefix": str(files["sts"])}]
    data = {"sources": sources, "max_query_length": 24, "max_document_length": 48}
    return tiny_config(stage, files, run, **{"train": train, "parallel": parallel, "data": data, **MIXED, **more})


def test_sft_equals_one_process(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Every micro-batch and rank has another number of labels: the loss is a mean over all labels of the global batch."""
    expected = _run(workers, tiny_config("sft", tiny_data, tmp_path / "one"), 1)
    for name, (world, parallel) in {"dp2": (2, {}), "tp2 pp2 sp": LM_LAYOUTS["tp2 pp2 sp"]}.items():
        config = tiny_config("sft", tiny_data, tmp_path / name, parallel=parallel)
        _assert_same(_run(workers, config, world), expected, config)


@pytest.fixture(scope="module")
def weak_baseline(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Baseline:
    """One process, one pass over the whole batch; 0 to 3 hard negatives a query, repeated queries and documents."""
    return _run(workers, _contrastive_config("weak", tiny_data, tmp_path_factory.mktemp("one") / "run", {}), 1)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("layout", CONTRASTIVE_LAYOUTS)
def test_weak_equals_one_process(
    layout: str,
    passes: str,
    workers: WorkerPool,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    weak_baseline: Baseline,
) -> None:
    world, parallel = CONTRASTIVE_LAYOUTS[layout]
    config = _contrastive_config("weak", tiny_data, tmp_path / "run", parallel, train=PASSES[passes])
    _assert_same(_run(workers, config, world), weak_baseline, config)


MINED = {
    # some negatives lose similarity and give way, others don't: which ones, the loss's similarities say
    "mining": {"every": 2, "pool_size": 8, "window": 30, "low_score": 0.0, "drop_ratio": 1.0001, "high_score": 1.0},
    "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
    "soft_mask": {"schedule": "constant", "alpha": 1.0},
    "train": PASSES["two passes"],
}


def _mined_run(
    workers: WorkerPool, files: dict[str, Path], run: Path, world: int, parallel: dict[str, Any]
) -> dict[str, Any]:
    data = {"sources": [{"prefix": str(files["pairs"])}], "max_query_length": 24, "max_document_length": 48}
    config = _contrastive_config("finetune", files, run, parallel, data=data, **MINED)
    found = _run(workers, config, world)
    lines = (run / "negatives" / "mining.jsonl").read_text(encoding="utf-8").splitlines()
    return {**found, "config": config, "minings": [json.loads(line) for line in lines]}


@pytest.fixture(scope="module")
def mined_baseline(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Baseline:
    """One process, two minings."""
    return _mined_run(workers, tiny_data, tmp_path_factory.mktemp("mined") / "run", 1, {})


@pytest.mark.parametrize("layout", ["tp2", "pp2", "pp2 vpp2", "dp2", "tp2 pp2 sp"])
def test_mined_negatives_equal_one_process(
    layout: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path, mined_baseline: Baseline
) -> None:
    """Two minings and single replacements in between, in two passes: the same negatives, and so the same losses."""
    found = _mined_run(workers, tiny_data, tmp_path / "run", *CONTRASTIVE_LAYOUTS[layout])
    _assert_same(found, mined_baseline, found["config"])
    assert len(mined_baseline["minings"]) == 2
    replaced = [step["negatives_replaced"] for step in mined_baseline["metrics"]]
    assert any(0 < number < 24 for number in replaced), replaced
    for one, other in zip(mined_baseline["minings"], found["minings"], strict=True):
        assert one["changed_share"] == other["changed_share"]
        assert one["mean_negative_score"] == pytest.approx(other["mean_negative_score"], abs=1e-6)


def _num_micro_batches(config: Any) -> list[int]:
    data = build_test_trainer(config).parts.data
    return [len(data.batch(step).micro_batches) for step in (1, 2)]


def test_ranks_have_different_numbers_of_micro_batches(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """What the runs above rest on: one pass is one micro-batch, two passes are several, not always as many on every rank."""
    config = _contrastive_config("weak", tiny_data, tmp_path / "one", {})
    assert workers.run(_num_micro_batches, 1, config) == [[1, 1]]
    for world in (2, 4):
        config = _contrastive_config("weak", tiny_data, tmp_path / f"{world}", {}, train=PASSES["two passes"])
        by_rank = workers.run(_num_micro_batches, world, config)
        assert min(min(counts) for counts in by_rank) > 1
        assert any(len(set(counts)) > 1 for counts in zip(*by_rank, strict=True)), by_rank


@pytest.mark.parametrize(
    "more", [{"soft_mask": {"form": "learned", "schedule": "linear"}}, {"pooling": {"projection_dim": 48}}]
)
def test_what_only_some_runs_train_equals_one_process(
    more: dict[str, Any], workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """theta of the learned mask is split over tensor ranks; a projection is whole on the last stage's. Scored pairs alone."""
    more = {
        "data": {"sources": [{"prefix": str(tiny_data["sts"])}], "max_query_length": 24, "max_document_length": 48},
        "contrastive": {"cosent_temperature": 0.1},
        **more,
    }
    runs = []
    for world, parallel in ((1, {}), (2, {"tensor": 2, "sequence": True}), (2, {}), (2, {"pipeline": 2})):
        config = _contrastive_config("weak", tiny_data, tmp_path / f"{len(runs)}", parallel, **more)
        runs.append(_run(workers, config, world))
    assert any(name.endswith(("core_attention.theta", "projection.weight")) for name in runs[0]["gradients"])
    for found in runs[1:]:
        _assert_same(found, runs[0], config)
