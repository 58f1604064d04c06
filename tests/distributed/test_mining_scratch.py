"""A mining with `scratch_dir`: the same table, taken over after an interruption, nothing left; and what its key depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gloo_pool import WorkerPool
from rank_contexts import context_of
from test_remine import PROMPTS, SELECTION, data, embed_with, make_settings, token_vectors

from megatron_conan.data.format import Formatter
from megatron_conan.data.packing import PackedTexts
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.mining.pools import MiningSource
from megatron_conan.mining.refresh import _Encoding, fingerprint, remine

__all__ = ["data"]


def mine_here(
    data: tuple[Path, Path], layout: tuple[int, int, int], scratch: Path | None, killed: bool = False
) -> tuple[str, int]:
    """The table's hash ("" if interrupted) and the number of batches embedded here."""
    tokenizer, context, batches = Tokenizer(data[1]), context_of(*layout), 0
    settings = replace(make_settings(tokenizer, PROMPTS, SELECTION), scratch_dir=scratch, weights="seed 1")

    query_prompt = len(settings.formatter.prompt_tokens(settings.query_prompt))
    assert query_prompt != len(settings.formatter.prompt_tokens(settings.document_prompt))

    def embed(micro_batches: list[PackedTexts]) -> torch.Tensor:
        nonlocal batches
        if killed and int(micro_batches[0].prompt_lengths[0]) == query_prompt:
            raise KeyboardInterrupt  # all documents are there, and no query
        batches += len(micro_batches)
        return embed_with(token_vectors(1), micro_batches)

    try:
        result = remine(PairStore(data[0], tokenizer), embed, context, tokenizer, settings, step=0)
    except KeyboardInterrupt:
        return "", batches
    return result.table.content_hash(), batches


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2)], ids=str)
def test_an_interrupted_mining_takes_over_its_documents(
    workers: WorkerPool, data: tuple[Path, Path], layout: tuple[int, int, int], tmp_path: Path
) -> None:
    expected = workers.run(mine_here, layout[0], data, layout, None)
    whole = workers.run(mine_here, layout[0], data, layout, tmp_path)
    assert whole == expected  # in memory or in files
    assert list(tmp_path.iterdir()) == []  # nothing is left
    first = workers.run(mine_here, layout[0], data, layout, tmp_path, True)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) == 2 * layout[0]
    again = workers.run(mine_here, layout[0], data, layout, tmp_path)
    assert [table for table, _ in again] == [table for table, _ in expected]
    assert [count for _, count in again] == [
        all_ - documents for (_, all_), (_, documents) in zip(expected, first, strict=True)
    ]  # queries only
    assert list(tmp_path.iterdir()) == []


def test_the_key_holds_all_that_embeddings_depend_on(data: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer(data[1])
    store, context = PairStore(data[0], tokenizer), context_of(1)
    settings = replace(make_settings(tokenizer, PROMPTS, SELECTION), scratch_dir=tmp_path, weights="seed 1")
    encoding = _Encoding(
        store, MiningSource.of_store(store), fingerprint(store, tokenizer), context, tokenizer, settings
    )

    def key(change: Callable[[_Encoding], _Encoding] = lambda e: e) -> str:
        scratch = change(encoding)._scratch()
        assert scratch is not None
        return scratch.key

    def with_settings(**changes: object) -> Callable[[_Encoding], _Encoding]:
        return lambda e: replace(e, settings=replace(settings, **changes))

    keys = [
        key(),
        key(with_settings(weights="seed 2")),
        key(with_settings(document_prompt="query")),
        key(with_settings(max_tokens=65)),
        key(with_settings(pad_multiple=16)),
        key(with_settings(formatter=Formatter(tokenizer, PROMPTS, {"query": 20, "document": 23}))),
        key(lambda e: replace(e, corpus=replace(e.corpus, tokens_sha256="other"))),
        key(lambda e: replace(e, corpus=replace(e.corpus, rows_sha256="other"))),
        *(key(lambda e, n=name: replace(e, context=replace(context, **{n: 2}))) for name in ("tp_size", "pp_size", "dp_size")),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    unchanged = [key(), key(with_settings(query_prompt="passage")), key(with_settings(num_negatives=1))]
    assert set(unchanged) == {keys[0]}  # what documents don't depend on
