"""An encoding that was interrupted goes on from what all tensor and pipeline ranks have on disk, and only from that."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from rank_contexts import context_of

from megatron_conan.mining import encode, rows
from megatron_conan.mining.encode import encode_blocks, encode_corpus
from megatron_conan.mining.rows import Scratch

COUNT, PER_BATCH = 40, 4
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2)]
"""(ranks, tensor)"""


def vectors(ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([ids, ids**2], axis=1).astype(np.float32))


def encode_here(
    folder: Path, layout: tuple[int, int], fail_after: dict[int, int] | None, bad: tuple[int, ...] = ()
) -> tuple[int, np.ndarray, np.ndarray, list[int | None], str]:
    """Batches embedded here, ids, rows, rounds noted on disk (own rank), and the error. `fail_after`: dp rank -> batches."""
    before, rows.SAVE_SECONDS = rows.SAVE_SECONDS, 0.0
    context = context_of(layout[0], layout[1])
    limit = (fail_after or {}).get(context.dp_rank, 10**9)
    calls = 0

    def embed(batches: list[np.ndarray]) -> torch.Tensor:
        nonlocal calls
        if calls >= limit:
            raise KeyboardInterrupt
        calls += len(batches)
        ids = np.concatenate(batches)
        found = vectors(ids)
        found[torch.from_numpy(np.isin(ids, bad)), 0] = float("nan")
        return found

    scratch, part, error = Scratch(folder / "pairs", "key"), None, ""
    try:
        part = encode_corpus(
            embed, np.arange(COUNT), np.full(COUNT, 3), context, width=2, max_tokens=3 * PER_BATCH, scratch=scratch
        )
    except KeyboardInterrupt:
        error = "killed"
    except ValueError as caught:
        error = str(caught)
    finally:
        rows.SAVE_SECONDS = before
    note = scratch.files(context)[1]
    noted = json.loads(note.read_text())["rounds_done"] if note.exists() else None
    ids, found = (part.ids, np.array(part.embeddings)) if part else (np.empty(0, np.int64), np.empty((0, 2)))
    return calls, ids, found, noted, error


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_goes_on_where_it_was(workers: WorkerPool, layout: tuple[int, int], tmp_path: Path) -> None:
    world, tensor = layout
    dp_size = world // tensor
    rounds = -(-COUNT // PER_BATCH // dp_size)
    done = {dp: 3 - dp for dp in range(dp_size)}  # dp ranks were killed at different places
    first = workers.run(encode_here, world, tmp_path, layout, done)
    for rank, (calls, _, _, noted, error) in enumerate(first):
        assert (calls, noted, error) == (done[rank // tensor % dp_size],) * 2 + ("killed",)
    second = workers.run(encode_here, world, tmp_path, layout, None)
    for rank, (calls, ids, found, noted, error) in enumerate(second):
        own = len(range(rank // tensor % dp_size, COUNT // PER_BATCH, dp_size))
        assert (calls, noted, error) == (own - done[rank // tensor % dp_size], own, "")
        np.testing.assert_array_equal(found, vectors(ids).numpy())
    assert sorted(np.concatenate([ids for _, ids, *_ in second]).tolist()) == list(range(COUNT))
    assert max(noted for *_, noted, _ in second) == rounds
    third = workers.run(encode_here, world, tmp_path, layout, None)  # all there: nothing is embedded again
    assert [calls for calls, *_ in third] == [0] * world


def test_tensor_ranks_go_on_from_what_both_have(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(encode_here, 2, tmp_path, (2, 2), {0: 4})
    note = tmp_path / "pairs.rank_00001_of_00002.json"
    note.write_text(json.dumps({"key": "key", "rounds_done": 2}))
    rows_file = tmp_path / "pairs.rank_00001_of_00002.npy"
    stored = np.load(rows_file, mmap_mode="r+")
    stored[(np.arange(COUNT) // PER_BATCH >= 2)[1::2]] = -1.0  # rank 1 died before these were written
    stored.flush()
    for calls, ids, found, noted, _ in workers.run(encode_here, 2, tmp_path, (2, 2), None):
        assert (calls, noted) == (COUNT // PER_BATCH - 2, COUNT // PER_BATCH)
        np.testing.assert_array_equal(found, vectors(ids).numpy())


def test_what_is_not_finite_is_not_kept(workers: WorkerPool, tmp_path: Path) -> None:
    bad = (17,)  # batch 4 of 10
    (first,) = workers.run(encode_here, 1, tmp_path, (1, 1), None, bad)
    assert "embeddings of 1 texts are not finite, among them 17" in first[-1]
    assert first[3] == 4  # the batches before
    (second,) = workers.run(encode_here, 1, tmp_path, (1, 1), None)
    assert second[0] == 6
    np.testing.assert_array_equal(second[2], vectors(second[1]).numpy())


def test_the_last_round_is_noted_whatever_the_time(
    workers: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SAVE_SECONDS", 1e9)
    context, scratch = context_of(1), Scratch(tmp_path / "pairs", "key")

    def encode(calls: list[int]) -> None:
        def embed(batches: list[np.ndarray]) -> torch.Tensor:
            calls.append(len(batches))
            return vectors(np.concatenate(batches))

        encode_corpus(embed, np.arange(8), np.full(8, 3), context, width=2, max_tokens=6, scratch=scratch)

    first: list[int] = []
    second: list[int] = []
    encode(first)
    encode(second)
    assert (len(first), second) == (4, [])


def blocks_here(layout: tuple[int, int]) -> list[list[int]]:
    context = context_of(*layout)
    parts = encode_blocks(
        lambda batches: vectors(np.concatenate(batches)), np.arange(COUNT), np.full(COUNT, 3), context, width=2,
        max_tokens=3 * PER_BATCH, block_size=10,
    )  # fmt: skip
    return [part.ids.tolist() for part in parts]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_hold_some_block_size_texts_of_all_ranks(workers: WorkerPool, layout: tuple[int, int]) -> None:
    """Batches of 4, blocks of 10: three batches a block, and one left."""
    results = workers.run(blocks_here, layout[0], layout)
    assert [sum(map(len, block)) for block in zip(*results, strict=True)] == [12, 12, 12, 4]
    assert sorted(i for rank in results for block in rank for i in block) == list(range(COUNT))


@pytest.mark.parametrize("folder", [False, True])
def test_room_is_asked_for_before_anything_is_embedded(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 texts x 2 x 4 bytes: 319 free bytes are too few, 320 are enough, of the place where they will lie."""
    context = context_of(1)
    other = 10**12

    def free(bytes_free: int) -> None:
        monkeypatch.setattr(rows, "free_memory", lambda: other if folder else bytes_free)
        monkeypatch.setattr(rows, "_free_disk", lambda path: bytes_free if folder else other)

    def encode(calls: list[int]) -> None:
        def embed(batches: list[np.ndarray]) -> torch.Tensor:
            calls.append(1)
            return vectors(np.concatenate(batches))

        scratch = Scratch(tmp_path / "pairs", "key") if folder else None
        encode_corpus(embed, np.arange(COUNT), np.full(COUNT, 3), context, width=2, max_tokens=12, scratch=scratch)

    calls: list[int] = []
    free(319)
    with pytest.raises(ValueError, match="the embeddings of 40 texts take"):
        encode(calls)
    assert calls == []
    free(320)
    encode(calls)
    assert calls


def room_here(free: list[int], needed: list[int], hosts: list[int]) -> str:
    context = context_of(len(free))
    before = rows.free_memory, rows.machine_number
    rows.free_memory, rows.machine_number = lambda: free[context.rank], lambda: hosts[context.rank]
    try:
        rows.check_room(needed[context.rank], "the embeddings of 5 texts", context)
    except ValueError as error:
        return str(error)
    finally:
        rows.free_memory, rows.machine_number = before
    return ""


@pytest.mark.parametrize(
    ("free", "needed", "hosts", "fits"),
    [
        ([10, 10], [5, 5], [1, 1], True),
        ([10, 10], [6, 5], [1, 1], False),  # together too much for the one machine
        ([10, 10], [9, 9], [1, 2], True),  # two machines
        ([20, 9], [5, 5], [1, 1], False),  # the least that one saw free counts
        ([20, 4], [5, 5], [1, 2], False),  # on the second machine alone
        ([4, 20], [0, 5], [1, 2], True),
    ],
)
def test_ranks_of_a_machine_share_its_memory(
    workers: WorkerPool, free: list[int], needed: list[int], hosts: list[int], fits: bool
) -> None:
    errors = workers.run(room_here, 2, free, needed, hosts)
    assert errors[0] == errors[1]
    assert (errors[0] == "") == fits


def test_the_limit_of_the_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 200000\nactive_file 100000\n")
    assert rows.free_memory() == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert rows.free_memory() > 500_000


def progress_here(layout: tuple[int, int]) -> list[tuple[int, int]]:
    """(tokens done, tokens in all) of every progress line's bar."""
    bars: list[encode.Progress] = []

    class Recorded(encode.Progress):
        def __init__(self, *args: str | int) -> None:
            super().__init__(*args)
            bars.append(self)

    plain, encode.Progress = encode.Progress, Recorded
    try:
        encode_corpus(
            lambda batches: vectors(np.concatenate(batches)), np.arange(COUNT), np.arange(COUNT) % 5 + 1,
            context_of(*layout), width=2, max_tokens=12, progress="documents",
        )  # fmt: skip
    finally:
        encode.Progress = plain
    return [(bar.done, bar.total) for bar in bars]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_progress_ends_at_all_of_rank_0(workers: WorkerPool, layout: tuple[int, int]) -> None:
    first, *others = workers.run(progress_here, layout[0], layout)
    ((done, total),) = first
    assert done == total > 0
    assert others == [[]] * (layout[0] - 1)
