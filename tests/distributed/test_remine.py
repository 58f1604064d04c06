"""Mining of real pair files on real ranks: same table in every layout, equal to brute force over all documents."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from rank_contexts import context_of

from megatron_conan.data.format import Formatter, TextKind
from megatron_conan.data.packing import PackedTexts
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer
from megatron_conan.mining.refresh import MiningResult, MiningSettings, NegativesTable, fingerprint, remine
from megatron_conan.mining.select import SelectionSettings

LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (4, 2, 1), (4, 2, 2)]
"""(ranks, tensor, pipeline)"""
WORDS = ["red", "green", "blue", "small", "large", "round", "flat", "hot", "cold", "old", "new", "near", "far", "slow"]
SELECTION = SelectionSettings(pool_size=6, window=40, skip_top=1, margin=0.9)
LENGTHS: dict[TextKind, int] = {"query": 20, "document": 24}
PROMPTS = {"query": "hot or cold:\n", "passage": "old\n"}
NAMES = {"query": "query", "document": "passage"}
"""Which prompt a text gets."""


def make_settings(tokenizer: Tokenizer, prompts: dict[str, str], selection: SelectionSettings) -> MiningSettings:
    return MiningSettings(
        selection=selection,
        formatter=Formatter(tokenizer, prompts, LENGTHS),
        num_negatives=3,
        max_tokens=64,
        width=8,
        query_prompt=NAMES["query"],
        document_prompt=NAMES["document"],
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(output prefix, tokenizer model): 40 rows, some with the same query, and 50 more documents."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(3, 12)))

    rows = []
    for i in range(36):
        query = text()
        rows.append(
            {"query": query, "positive": [f"{query} {query} {rng.choice(WORDS)} {j}" for j in range(1 + i % 3)]}
        )
    rows += [{"query": rows[0]["query"], "positive": text()}, {"query": rows[0]["query"], "positive": text()}]
    rows += [{"query": rows[1]["positive"][0], "positive": text()}]  # a query that is a document too
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = [text() for _ in range(50)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    (folder / "sample.model").write_bytes(train_tokenizer(documents, 340))
    preprocess_pairs(
        "retrieval",
        [folder / "rows.jsonl"],
        folder / "sample.model",
        folder / "pairs",
        corpus=[folder / "corpus.jsonl"],
    )
    return folder / "pairs", folder / "sample.model"


def token_vectors(seed: int) -> torch.Tensor:
    """[340, 8] small integers, so that every score is exact whatever the order of summation."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, (340, 8))).float()


def embed_with(vectors: torch.Tensor, micro_batches: list[PackedTexts]) -> torch.Tensor:
    """[n, 8]: the sum of the tokens' vectors, those behind the prompt counted twice, padding not at all."""
    rows = []
    for batch in micro_batches:
        ends = batch.sequences.cu_seqlens.tolist()
        for begin, end, prompt in zip(ends[:-1], ends[1:], batch.prompt_lengths.tolist(), strict=True):
            token_vectors = vectors[batch.tokens[0, begin:end]]
            rows.append(token_vectors.sum(0) + token_vectors[prompt:].sum(0))
    return torch.stack(rows)


def mine_here(
    data: tuple[Path, Path],
    layout: tuple[int, int, int],
    prompts: dict[str, str] | None = None,
    selection: SelectionSettings = SELECTION,
) -> tuple[MiningResult, MiningResult]:
    """Mine, then mine again with other weights."""
    tokenizer = Tokenizer(data[1])
    settings = make_settings(tokenizer, prompts or {}, selection)
    store = PairStore(data[0], tokenizer)
    context = context_of(*layout)
    results: list[MiningResult] = []
    for seed, step in ((1, 0), (2, 50)):
        vectors = token_vectors(seed)
        results.append(
            remine(
                store,
                lambda micro_batches, vectors=vectors: embed_with(vectors, micro_batches),
                context,
                tokenizer,
                settings,
                step=step,
                previous=results[-1].table if results else None,
            )
        )
    return results[0], results[1]


def brute_force(data: tuple[Path, Path], seed: int, prompts: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Pools [R, P] by scoring every document for every row, as the rules are said."""
    tokenizer = Tokenizer(data[1])
    store = PairStore(data[0], tokenizer)
    vectors = token_vectors(seed).numpy()
    choice = SELECTION

    def vector(text_id: int, kind: TextKind) -> np.ndarray:
        prompt = tokenizer.encode(prompts.get(NAMES[kind], ""))
        body = tokenizer.encode(store.text(text_id))[: LENGTHS[kind] - 1 - len(prompt)]
        return vectors[prompt].sum(0) + 2 * vectors[[*body, tokenizer.eos_id]].sum(0)

    documents = {int(i): vector(int(i), "document") for i in store.corpus_ids}
    known: dict[int, set[int]] = {}
    for row in range(store.num_rows):
        known.setdefault(store.query(row), {store.query(row)}).update(store.positives(row).tolist())
    ids = np.full((store.num_rows, choice.pool_size), -1, np.int64)
    scores = np.full((store.num_rows, choice.pool_size), -np.inf, np.float32)
    for row in range(store.num_rows):
        query = store.query(row)
        embedding = vector(query, "query")
        ranked = sorted((-float(embedding @ v), i) for i, v in documents.items() if i not in known[query])
        positive = min(float(embedding @ documents[i]) for i in known[query] - {query})
        limit = positive - (1 - choice.margin) * abs(positive)
        kept = [(-s, i) for s, i in ranked[choice.skip_top : choice.window] if -s <= limit][: choice.pool_size]
        for place, (score, text_id) in enumerate(kept):
            ids[row, place], scores[row, place] = text_id, score
    return ids, scores


@pytest.mark.parametrize("prompts", [{}, PROMPTS], ids=["no prompts", "prompts"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tables_equal_brute_force(
    workers: WorkerPool,
    data: tuple[Path, Path],
    layout: tuple[int, int, int],
    prompts: dict[str, str],
) -> None:
    results = workers.run(mine_here, layout[0], data, layout, prompts)
    store = PairStore(data[0], Tokenizer(data[1]))
    expected = [brute_force(data, seed, prompts) for seed in (1, 2)]
    for number, (ids, scores) in enumerate(expected):
        short_queries = {store.query(row) for row in np.flatnonzero(ids[:, -1] < 0)}
        assert 0 < (ids < 0).sum() < ids.size / 2  # some pools are short, most are not
        for result in results:
            table, report = result[number].table, result[number].report
            np.testing.assert_array_equal(table.pool_ids, ids)
            np.testing.assert_array_equal(table.pool_scores, scores)
            in_use = table.current(np.arange(len(ids)))
            np.testing.assert_array_equal(in_use, ids[:, :3])
            assert (table.version, table.step) == (number + 1, (0, 50)[number])
            assert report.num_queries == len(ids) - 2
            assert len(report.shard_sizes) == layout[0]
            assert sum(report.shard_sizes) == report.num_documents
            assert report.mean_negative_score == pytest.approx(scores[:, :3][ids[:, :3] >= 0].mean(), rel=1e-6)
            assert report.num_empty_slots == (ids[:, :3] < 0).sum()
            assert sum(report.short_queries.values()) == len(short_queries)
    first, second = (ids[:, :3] for ids, _ in expected)
    new = [i not in first[row] for row in range(len(second)) for i in second[row] if i >= 0]
    assert results[0][0].report.changed_share is None
    assert results[0][1].report.changed_share == pytest.approx(np.mean(new))


def test_sampled_pools_are_the_same_in_every_layout(workers: WorkerPool, data: tuple[Path, Path]) -> None:
    sampled = replace(SELECTION, sample_seed=11, margin=None, pool_size=4)
    hashes = {
        result[1].table.content_hash()
        for layout in LAYOUTS
        for result in workers.run(mine_here, layout[0], data, layout, None, sampled)
    }
    assert len(hashes) == 1


def test_a_saved_table_belongs_to_its_source(data: tuple[Path, Path], tmp_path: Path) -> None:
    table = mine_here(data, (1, 1, 1))[1].table
    table.save(tmp_path / "table")
    tokenizer = Tokenizer(data[1])
    corpus = fingerprint(PairStore(data[0], tokenizer), tokenizer)
    assert NegativesTable.load(tmp_path / "table", corpus).content_hash() == table.content_hash()
    with pytest.raises(ValueError, match="num_rows: 39 in the table, 40 now"):
        NegativesTable.load(tmp_path / "table", replace(corpus, num_rows=40))


def mine_expecting_error(data: tuple[Path, Path], world_size: int, message: str) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        mine_here(data, (world_size, 1, 1))
    return str(caught.value)


def test_a_positive_outside_the_corpus_stops_all_ranks(
    workers: WorkerPool, data: tuple[Path, Path], tmp_path: Path
) -> None:
    for path in data[0].parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    store = PairStore(data[0], Tokenizer(data[1]))
    lost = int(store.positives(20)[0])
    np.save(tmp_path / "pairs.corpus.npy", store.corpus_ids[store.corpus_ids != lost])
    errors = workers.run(mine_expecting_error, 2, (tmp_path / "pairs", data[1]), 2, "not among its documents")
    assert errors[0] == errors[1]
    assert f'text {lost} ("{store.text(lost)[:60]}' in errors[0]
    assert f'of query text {store.query(20)} ("{store.text(store.query(20))[:60]}' in errors[0]


def test_scored_pairs_are_refused(data: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "sts.jsonl").write_text(json.dumps({"text1": "red", "text2": "blue", "score": 1.0}) + "\n")
    preprocess_pairs("sts", [tmp_path / "sts.jsonl"], data[1], tmp_path / "sts")
    with pytest.raises(ValueError, match="holds sts rows, which have no negatives"):
        mine_here((tmp_path / "sts", data[1]), (1, 1, 1))
