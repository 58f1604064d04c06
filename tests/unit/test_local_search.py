"""Search over one rank's rows: in slices as in one piece, in place on files, and refused where there is no room."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_contexts import context_of

from megatron_conan.mining.local_search import HostSearch, SearchSettings, local_search, search_slices
from megatron_conan.mining.rows import RowStore, Scratch, check_room, free_memory, weights_fingerprint


def integer_vectors(count: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, (count, width)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 60), st.integers(0, 10**6))
def test_slices_give_the_scores_of_one_search(num_rows: int, size: int, k: int, seed: int) -> None:
    """What a GPU with too little memory for all documents does, with the host searching each slice."""
    rows, queries = integer_vectors(num_rows, 4, seed), integer_vectors(7, 4, seed + 1)
    k = min(k, num_rows)

    def search_slice(begin: int, end: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return HostSearch(rows[begin:end]).search(queries, count)

    scores, places = search_slices(search_slice, num_rows, size, k)
    index = faiss.IndexFlatIP(4)
    index.add(rows)
    np.testing.assert_array_equal(scores, index.search(queries, k)[0])
    np.testing.assert_array_equal(np.take_along_axis(queries @ rows.T, places, axis=1), scores)
    assert all(len(set(row)) == k for row in places.tolist())


def test_memory_mapped_rows_are_searched_in_place(tmp_path: Path) -> None:
    rows, queries = integer_vectors(500, 8, 1), integer_vectors(30, 8, 2)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    search = local_search(mapped, torch.device("cpu"), SearchSettings())
    np.testing.assert_array_equal(search.search(queries, 20)[0], HostSearch(rows).search(queries, 20)[0])
    search.close()


def test_rows_survive_until_the_key_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_conan.mining.rows.SAVE_SECONDS", 0.0)
    context, rows = context_of(1), integer_vectors(10, 3, 0)
    scratch = Scratch(tmp_path / "run" / "pairs.document", "weights 1")
    store = RowStore(10, 3, context, scratch)
    assert store.rounds_done == 0
    store.rows[:5] = rows[:5]
    store.save(2)
    again = RowStore(10, 3, context, scratch)
    assert again.rounds_done == 2
    np.testing.assert_array_equal(again.rows[:5], rows[:5])
    assert RowStore(10, 3, context, Scratch(scratch.file, "weights 2")).rounds_done == 0
    assert RowStore(10, 3, context, scratch).rounds_done == 0  # overwritten by the other weights
    scratch.remove(context)
    assert list(scratch.file.parent.iterdir()) == []


def test_a_damaged_note_or_file_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_conan.mining.rows.SAVE_SECONDS", 0.0)
    context, scratch = context_of(1), Scratch(tmp_path / "pairs.query", "key")
    for damage in ("note", "rows"):
        RowStore(10, 3, context, scratch).save(1)
        rows, note = scratch.files(context)
        if damage == "note":
            note.write_text("{", encoding="utf-8")
        else:
            rows.write_bytes(rows.read_bytes()[:-8])
        store = RowStore(10, 3, context, scratch)
        assert store.rounds_done == 0
        assert store.rows.shape == (10, 3)


def test_what_does_not_fit_is_refused_with_figures_and_remedies(tmp_path: Path) -> None:
    context = context_of(1)
    check_room(1 << 20, "the embeddings of 5 texts", context)
    check_room(1 << 20, "the embeddings of 5 texts", context, Scratch(tmp_path / "not" / "there" / "rows", ""))
    free = free_memory()
    assert 0 < free < 1 << 45
    message = (
        r"the embeddings of 5 texts take 32,768\.00 GiB on a machine with 1 ranks, but [\d,.]+ GiB of memory are free; "
    )
    with pytest.raises(ValueError, match=message + r"put them on a local disk \(mining\.scratch_dir, --scratch-dir\)"):
        check_room(1 << 45, "the embeddings of 5 texts", context)
    with pytest.raises(ValueError, match=rf"but {tmp_path} has [\d,.]+ GiB free; name a larger disk"):
        check_room(1 << 60, "the embeddings of 5 texts", context, Scratch(tmp_path / "rows", ""))


def test_a_fingerprint_tells_weights_and_states_apart() -> None:
    def print_of(change: str = "", state: str = "alpha 1.0") -> str:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 5).to(torch.bfloat16 if change == "dtype" else torch.float32)
        layer.scale = torch.nn.Parameter(torch.tensor(2.0 if change == "scalar" else 1.0))
        with torch.no_grad():
            if change == "last bit":
                layer.weight.view(torch.int32)[2, 1] ^= 1
            if change == "swap":
                layer.weight[[0, 1]] = layer.weight[[1, 0]].clone()
        return weights_fingerprint([layer], state)

    changes = ("", "last bit", "swap", "dtype", "scalar")
    prints = [*map(print_of, changes), print_of(state="alpha 0.5")]
    assert len(set(prints)) == 6
    assert print_of() == prints[0]
