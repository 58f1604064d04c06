"""What a run of several sources says it took is what it took, also after it was stopped, and sources keep to their epochs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo_pool import WorkerPool
from layouts import tiny_config, train_run

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.packed_lm import build_lm_dataset, samples_per_epoch
from megatron_conan.data.tokenizer import Tokenizer

WEIGHTS = {"chinese": 3.0, "news": 2.0, "bitext": 1.0}
STEPS = 24


@pytest.fixture(scope="module")
def corpora(tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three corpora, the documents of each of one word; of bitext there is little."""
    folder = tmp_path_factory.mktemp("corpora")
    for name in WEIGHTS:
        file = folder / f"{name}.jsonl"
        count = 12 if name == "bitext" else 600
        file.write_text("".join(json.dumps({"text": f"{name} " * 8}) + "\n" for _ in range(count)), encoding="utf-8")
        preprocess_documents([file], tiny_data["tokenizer"], folder / name, append_eod=True)
    return {name: folder / name for name in WEIGHTS}


def blended_config(tiny_data: dict[str, Path], corpora: dict[str, Path], run: Path, **limits: float) -> Any:
    sources = [
        {"prefix": str(corpora[name]), "weight": weight} | ({"max_epochs": limits[name]} if name in limits else {})
        for name, weight in WEIGHTS.items()
    ]
    train = {"steps": STEPS, "micro_batch_size": 4, "global_batch_size": 8}
    return tiny_config("pretrain", tiny_data, run, train=train, data={"sources": sources}, checkpoint={"every": 12})


def mixes(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key[4:]: value for key, value in line.items() if key.startswith("mix/")} for line in lines]


def test_the_mix_is_that_of_the_samples_and_survives_a_stop(
    workers: WorkerPool, tiny_data: dict[str, Path], corpora: dict[str, Path], tmp_path: Path
) -> None:
    config = blended_config(tiny_data, corpora, tmp_path / "run")
    workers.run(train_run, 2, config)
    whole = mixes(tmp_path / "run")
    assert whole[-1] == pytest.approx({"chinese": 1 / 2, "news": 1 / 3, "bitext": 1 / 6}, abs=0.01)
    # against the samples themselves
    tokenizer = Tokenizer(tiny_data["tokenizer"])
    dataset = build_lm_dataset(
        list(corpora.values()),
        list(WEIGHTS.values()),
        seq_length=config.seq_length,
        num_samples=STEPS * 8,
        seed=config.train.seed,
        tokenizer=tokenizer,
        cache_dir=tmp_path / "cache",
    )
    texts = [tokenizer.decode(dataset[i]["tokens"].tolist()) for i in range(STEPS * 8)]
    for step, mix in enumerate(whole, 1):
        counts = {name: sum(name in text for text in texts[: step * 8]) for name in WEIGHTS}
        assert mix == pytest.approx({name: count / (step * 8) for name, count in counts.items()})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000012\n", encoding="utf-8")
    workers.run(train_run, 2, config)
    assert mixes(tmp_path / "run") == whole


def test_a_source_is_not_repeated_beyond_its_epochs(
    workers: WorkerPool, tiny_data: dict[str, Path], corpora: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer(tiny_data["tokenizer"])
    config = blended_config(tiny_data, corpora, tmp_path / "run", bitext=1.0)
    workers.run(train_run, 1, config)
    size = dict(
        zip(corpora, samples_per_epoch(list(corpora.values()), seq_length=32, tokenizer=tokenizer), strict=True)
    )
    taken = {name: share * STEPS * 8 for name, share in mixes(tmp_path / "run")[-1].items()}
    assert size["bitext"] < STEPS * 8 / 6  # its weight asks for more
    assert taken["bitext"] == pytest.approx(size["bitext"], abs=1)
    assert taken["chinese"] / taken["news"] == pytest.approx(3 / 2, rel=0.03)


def test_epoch_sizes_are_those_of_the_datasets(
    tiny_data: dict[str, Path], corpora: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer(tiny_data["tokenizer"])
    for seq_length in (7, 32, 33):
        for prefix in corpora.values():
            dataset = build_lm_dataset(
                [prefix], [1.0], seq_length=seq_length, num_samples=1, seed=1, tokenizer=tokenizer, cache_dir=tmp_path
            )
            found = samples_per_epoch([prefix], seq_length=seq_length, tokenizer=tokenizer)
            assert found == [dataset.epoch_size]  # type: ignore[attr-defined]


def test_rows_of_batches_of_several_sizes_count(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    sources = [
        {"prefix": str(tiny_data["pairs"]), "weight": 3.0},
        {"prefix": str(tiny_data["sts"]), "weight": 1.0, "batch_size": 4},
    ]
    config = tiny_config(
        "weak",
        tiny_data,
        tmp_path / "run",
        data={"sources": sources},
        train={"steps": 9},
        soft_mask={"schedule": "linear"},
    )
    workers.run(train_run, 1, config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = np.zeros(2)
    for line in lines:
        is_scored = "loss_sts" in line
        rows += [0, 4] if is_scored else [8, 0]
        assert [line["mix/pairs"], line["mix/sts"]] == pytest.approx((rows / rows.sum()).tolist())
    assert rows.all()
