"""Every key of section `mining` reaches the mining; a resumed run keeps its rule."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from gloo_pool import WorkerPool
from layouts import build_test_trainer, tiny_config, train_run
from test_resume import _deterministic, _metrics

from megatron_conan.mining.local_search import SearchSettings
from megatron_conan.mining.rules import QueryRule, SwapRule
from megatron_conan.mining.select import SelectionSettings
from megatron_conan.train import mining_hook

MINING = {
    "every": 2, "pool_size": 16, "window": 40, "skip_top": 2, "margin": 0.25, "margin_kind": "absolute", "ceiling": 0.75,
    "sample": True, "max_tokens": 4096, "gpu_memory_gib": 3.5, "gpu_fp16": True, "rule": "v1", "rule_every": 7,
    "rule_offset": 3, "drop_ratio": 1.5, "high_score": 0.6,
}  # fmt: skip


def settings_here(config: Any, steps: list[int], alphas: list[float]) -> list[Any]:
    """What `remine` is asked for before each step, and whether the model was in evaluation mode."""
    trainer = build_test_trainer(config)
    found: list[Any] = []

    class Stop(Exception): ...

    def remine(store: Any, embed: Any, context: Any, tokenizer: Any, settings: Any, **more: Any) -> None:
        found.append((settings, more["step"], trainer.chunks[0].training))
        raise Stop

    mining_hook.remine, before = remine, mining_hook.remine
    try:
        for step, alpha in zip(steps, alphas, strict=True):
            trainer.soft_mask.value = alpha
            with pytest.raises(Stop):
                trainer.hooks["mining"].before_step(trainer, step)
            assert trainer.chunks[0].training  # again
    finally:
        mining_hook.remine = before
    return [
        (s.selection, s.rule, s.search, s.scratch_dir, s.weights, s.query_prompt, s.document_prompt, s.num_negatives,
         s.max_tokens, s.width, s.pad_multiple, step, training)
        for s, step, training in found
    ]  # fmt: skip


def test_every_key_reaches_the_mining(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(
        "finetune", tiny_data, tmp_path / "run",
        mining={**MINING, "scratch_dir": str(tmp_path / "scratch")},
        contrastive={"temperature": 0.05, "num_hard_negatives": 2},
        soft_mask={"schedule": "constant", "alpha": 1.0},
        prompts={"query": "find\n", "document": "text\n", "other": "other\n"},
        data={"sources": [{"prefix": str(tiny_data["pairs"]), "query_prompt": "other"}], "max_query_length": 24,
              "max_document_length": 48},
    )  # fmt: skip
    (found,) = workers.run(settings_here, 1, config, [1, 3, 3], [1.0, 1.0, 0.5])
    first, second, third = found
    assert first[0] == SelectionSettings(16, 40, 2, 0.25, "absolute", 0.75, config.train.seed + 1)
    assert second[0].sample_seed == config.train.seed + 3  # another draw every time
    assert first[1] == QueryRule(drop_ratio=1.5, high_score=0.6, every=7, offset=3)
    assert first[2] == SearchSettings(3.5, True)
    assert first[3].parent == tmp_path / "scratch"
    assert first[3].name.startswith("run-")
    assert first[4] == second[4] != third[4]  # the mask counts as the weights do
    assert first[5:12] == ("other", "document", 2, 4096, 64, 8, 0)
    assert second[11] == 2
    assert not any(row[12] for row in found)


def test_another_run_of_the_same_name_has_another_scratch_folder(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    mining = {"every": 2, "scratch_dir": str(tmp_path / "scratch")}
    folders = {
        mining_hook.scratch_folder(tiny_config("finetune", tiny_data, tmp_path / name / "run", mining=mining))
        for name in ("a", "b")
    }
    assert len(folders) == 2


def test_thresholds_of_the_rules() -> None:
    from megatron_conan.config.tree import MiningConfig

    assert mining_hook.replacement_rule(MiningConfig(every=1)) == SwapRule()
    assert mining_hook.replacement_rule(MiningConfig(every=1, rule="v1")) == QueryRule()
    v2 = MiningConfig(every=1, low_score=0.1, drop_ratio=1.3, high_score=0.9)
    assert mining_hook.replacement_rule(v2) == SwapRule(0.1, 1.3, 0.9)


def rules_here(config: Any) -> list[Any]:
    return [table.rule for table in build_test_trainer(config).parts.data.negatives.values()]


def test_a_resumed_run_keeps_its_rule(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Resumed at step 4 with the table of step 0: v1 replaces at steps 6 and 8 only."""

    def config(run: Path) -> Any:
        return tiny_config(
            "finetune", tiny_data, run,
            mining={"every": 100, "pool_size": 12, "window": 40, "margin": None, "rule": "v1", "rule_every": 2,
                    "rule_offset": 2, "drop_ratio": 1.00001, "high_score": 1.0},
            contrastive={"temperature": 0.05, "num_hard_negatives": 2},
            soft_mask={"schedule": "constant", "alpha": 1.0},
            train={"steps": 8, "micro_batch_size": 32, "global_batch_size": 32}, checkpoint={"every": 4},
            optimizer={"lr": 3e-3},
        )  # fmt: skip

    workers.run(train_run, 1, config(tmp_path / "whole"))
    run = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", run)
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    (run / "checkpoints" / "latest").write_text("step_00000004\n", encoding="utf-8")
    assert workers.run(rules_here, 1, config(run)) == [
        [QueryRule(drop_ratio=1.00001, high_score=1.0, every=2, offset=2)]
    ]
    workers.run(train_run, 1, config(run))
    whole = _metrics(tmp_path / "whole")
    assert _deterministic(_metrics(run)) == _deterministic(whole)
    replaced = [row["negatives_replaced"] for row in whole]
    assert replaced[0::2] == [0.0] * 4
    assert sum(replaced[4:]) > 0, replaced


def test_without_a_rule_negatives_stay(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """low_score=1 makes every negative due at once, if there were a rule."""
    config = tiny_config(
        "finetune", tiny_data, tmp_path / "run",
        mining={"every": 100, "pool_size": 12, "window": 40, "margin": None, "rule": "none", "low_score": 1.0},
        contrastive={"temperature": 0.05, "num_hard_negatives": 2}, soft_mask={"schedule": "constant", "alpha": 1.0},
        train={"steps": 2, "micro_batch_size": 8, "global_batch_size": 8},
    )  # fmt: skip
    workers.run(train_run, 1, config)
    for row in _metrics(tmp_path / "run"):
        assert "negatives_replaced" not in row
        assert row["negatives_dry"] == 0.0
        assert row["negatives_drift"] != 0.0 or row["step"] == 1
