"""Mining where something is short, odd or in the way: memory, disks, blocks, precision."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from layouts import tiny_config, train_run
from rank_contexts import context_of

from megatron_conan.data.ragged import Ragged
from megatron_conan.mining import encode, local_search, rows, shards
from megatron_conan.mining.encode import EmbeddedTexts, encode_corpus
from megatron_conan.mining.pools import MiningSource, mine_pools
from megatron_conan.mining.rows import RowStore, Scratch
from megatron_conan.mining.select import SHORT_REASONS, SelectionSettings

MINED = {
    "mining": {"every": 2, "pool_size": 8, "window": 30},
    "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
    "soft_mask": {"schedule": "constant", "alpha": 1.0},
    "train": {"steps": 2, "micro_batch_size": 8, "global_batch_size": 8, "precision": "bf16"},
}


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}], ids=str)
def test_bf16_is_mined_through_a_pipeline(
    parallel: dict[str, Any], workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    workers.run(train_run, 2, tiny_config("finetune", tiny_data, tmp_path / "run", parallel=parallel, **MINED))


def test_what_is_on_disk_already_needs_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """768 kB on a disk of 1 MB, killed when two thirds are there."""
    monkeypatch.setattr(rows, "SAVE_SECONDS", 0.0)

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=10**6 - sum(f.stat().st_blocks * 512 for f in tmp_path.rglob("*") if f.is_file()))

    monkeypatch.setattr(rows.shutil, "disk_usage", usage)
    calls = 0

    def embed(batches: list[np.ndarray]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 400:
            raise KeyboardInterrupt
        return torch.ones(sum(map(len, batches)), 32)

    def run() -> EmbeddedTexts:
        scratch = Scratch(tmp_path / "pairs", "key")
        return encode_corpus(
            embed, np.arange(6000), np.full(6000, 4), context_of(1), width=32, max_tokens=40, scratch=scratch
        )

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(run().ids) == 6000


@pytest.mark.parametrize("beside", [False, True])
def test_why_a_pool_is_short_does_not_depend_on_other_queries(beside: bool) -> None:
    rng = np.random.default_rng(0)
    documents, ids = rng.standard_normal((200, 8)).astype(np.float32), np.arange(100, 300)
    queries = np.stack([documents[0] * 0.1, documents[1]])[: 1 + beside]
    far = ids[np.argsort(documents @ queries[0])[-30]]  # a positive at place 30: nearer documents are too near
    positives = [np.array([far]), np.arange(100, 180)][: 1 + beside]
    numbers = np.arange(len(queries))
    pools = mine_pools(
        MiningSource.of_rows("s", numbers, Ragged.of(positives), ids, str),
        EmbeddedTexts(ids, documents), [EmbeddedTexts(numbers, queries)], context_of(1),
        SelectionSettings(pool_size=4, window=10, margin=1.0),
    )  # fmt: skip
    assert SHORT_REASONS[pools.short_reasons[0]] == "margin"


@pytest.mark.parametrize("damage", ["rows", "note"])
def test_an_empty_file_of_rows_or_an_odd_note_starts_over(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SAVE_SECONDS", 0.0)
    context, scratch = context_of(1), Scratch(tmp_path / "pairs", "key")
    RowStore(10, 3, context, scratch).save(1)
    file, note = scratch.files(context)
    if damage == "rows":
        file.write_bytes(b"")
    else:
        note.write_text(json.dumps([]))
    assert RowStore(10, 3, context, scratch).rounds_done == 0


def refused_here(world_size: int) -> str:
    """One GPU has less free memory than the others."""
    context = context_of(world_size)

    def refuse(found: np.ndarray, device: torch.device, settings: Any) -> Any:
        if context.rank == 1:
            raise ValueError("mining.gpu_memory_gib=60 is more than the 50.00 GiB that are free on cuda:1; lower it")
        return local_search.HostSearch(found)

    before, shards.local_search = shards.local_search, refuse
    try:
        with pytest.raises(ValueError, match="gpu_memory_gib=60") as caught:
            shards.ShardedIndex(EmbeddedTexts(np.arange(3) + 3 * context.rank, np.ones((3, 2), np.float32)), context)
    finally:
        shards.local_search = before
    return str(caught.value)


def test_a_rank_without_room_on_its_gpu_stops_all(workers: WorkerPool) -> None:
    errors = workers.run(refused_here, 2, 2, timeout=20)
    assert errors[0] == errors[1]


def test_blocks_are_cut_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One text a batch, as with long queries: lengths of batches are asked for once each."""
    asked = 0

    class Counting(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            nonlocal asked
            asked += 1
            return super().__len__()

    cut = encode.plan_batches
    monkeypatch.setattr(encode, "plan_batches", lambda *args: [Counting(batch.tolist()) for batch in cut(*args)])
    blocks = encode.encode_blocks(
        lambda batches: torch.ones(len(batches), 2),
        np.arange(2000),
        np.full(2000, 3),
        context_of(1),
        width=2,
        max_tokens=3,
    )
    assert sum(len(block.ids) for block in blocks) == 2000
    assert asked < 20 * 2000
