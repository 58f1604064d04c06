"""Search over shards on real ranks equals one flat index; encoding over ranks gives every text once, same values."""

import faiss
import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_contexts import context_of

from megatron_conan.data.packing import PackedTexts, pack_texts
from megatron_conan.data.ragged import Ragged
from megatron_conan.mining.encode import Embed, EmbeddedTexts, encode_corpus, encode_texts, packed_embed, plan_batches
from megatron_conan.mining.shards import ShardedIndex, canonical_top
from megatron_conan.parallel.context import ParallelContext


def integer_vectors(count: int, width: int, seed: int) -> np.ndarray:
    """Small integers: every inner product is exact in float32, and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float32)


def flat_top(documents: np.ndarray, ids: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All of the documents ranked by one faiss index, put into canonical order, cut to k, padded."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found_ids = np.full((len(queries), k), -1, np.int64)
    if len(documents) and len(queries):
        index = faiss.IndexFlatIP(documents.shape[1])
        index.add(documents)
        all_scores, rows = index.search(queries, len(documents))
        kept = min(k, len(documents))
        scores[:, :kept], found_ids[:, :kept] = canonical_top(all_scores, ids[rows], kept)
    return scores, found_ids


def split_unevenly(count: int, parts: int, seed: int) -> list[np.ndarray]:
    """Random disjoint parts of range(count); often some are empty."""
    rng = np.random.default_rng(seed)
    chance = rng.random(parts) * (rng.random(parts) < 0.7) + 1e-9
    owner = rng.choice(parts, count, p=chance / chance.sum())
    return [np.flatnonzero(owner == part) for part in range(parts)]


def search_here(case: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Search this rank's part of the queries; every rank makes the same documents and queries from the seed."""
    context = context_of(case["world_size"])
    documents, ids, queries = make_case(case)
    document_rows = split_unevenly(len(documents), context.world_size, case["seed"] + 1)[context.rank]
    query_rows = split_unevenly(len(queries), context.world_size, case["seed"] + 2)[context.rank]
    index = index_of(ids[document_rows], documents[document_rows], context, case["block_size"])
    scores, found = index.search(queries[query_rows], case["k"])
    pairs = [np.random.default_rng(int(row)).choice(len(ids) + 1, int(row) % 4) for row in query_rows]
    wanted = Ragged.of([np.append(ids, 10**9)[rows] for rows in pairs])
    pair_scores = index.score_pairs(queries[query_rows], wanted)
    by_id = dict(zip(ids.tolist(), documents, strict=True))
    pair_of = zip(wanted.values.tolist(), query_rows[wanted.owner], strict=True)
    expected = [by_id[i] @ queries[q] if i in by_id else np.nan for i, q in pair_of]
    np.testing.assert_array_equal(pair_scores, np.array(expected, np.float32))
    return query_rows, scores, found, index.shard_sizes


def index_of(ids: np.ndarray, documents: np.ndarray, context: ParallelContext, block_size: int = 4096) -> ShardedIndex:
    """Over documents in any order."""
    order = np.argsort(ids)
    return ShardedIndex(EmbeddedTexts(ids[order], np.ascontiguousarray(documents[order])), context, block_size)


def make_case(case: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    documents = integer_vectors(case["num_documents"], case["width"], case["seed"])
    ids = np.random.default_rng(case["seed"]).permutation(case["num_documents"] * 3)[: case["num_documents"]]
    return documents, ids.astype(np.int64), integer_vectors(case["num_queries"], case["width"], case["seed"] + 9)


def check_case(case: dict[str, int], results: list[tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]]) -> None:
    documents, ids, queries = make_case(case)
    expected_scores, expected_ids = flat_top(documents, ids, queries, case["k"])
    rows = np.concatenate([result[0] for result in results])
    assert sorted(rows.tolist()) == list(range(case["num_queries"]))
    np.testing.assert_array_equal(np.concatenate([result[1] for result in results]), expected_scores[rows])
    np.testing.assert_array_equal(np.concatenate([result[2] for result in results]), expected_ids[rows])
    assert all(result[3] == results[0][3] and sum(result[3]) == case["num_documents"] for result in results)


case_sizes = {
    "num_documents": st.integers(0, 60),
    "num_queries": st.integers(0, 20),
    "width": st.integers(1, 5),
    "k": st.integers(1, 80),
    "block_size": st.sampled_from([1, 5, 4096]),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries({"world_size": st.just(1), **case_sizes}))
def test_one_rank_equals_a_flat_index(case: dict[str, int]) -> None:
    check_case(case, [search_here(case)])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({"world_size": st.sampled_from([2, 4]), **case_sizes}))
def test_several_ranks_equal_a_flat_index(workers: WorkerPool, case: dict[str, int]) -> None:
    check_case(case, workers.run(search_here, case["world_size"], case))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_many_duplicates_and_several_blocks(workers: WorkerPool, world_size: int) -> None:
    """Two dimensions of five values: 25 different documents among 1500, so every list ends within a tie."""
    case = {"num_documents": 1500, "num_queries": 150, "width": 2, "k": 70, "block_size": 64, "seed": 5}
    case["world_size"] = world_size
    check_case(case, workers.run(search_here, world_size, case))


def collapsed_here(world_size: int) -> list[list[int]]:
    context = context_of(world_size)
    ids = np.arange(context.rank, 400, world_size)
    index = index_of(ids, np.ones((len(ids), 8), np.float32), context)
    return index.search(np.ones((3, 8), np.float32), 6)[1].tolist()


def test_a_collapsed_model_gives_the_lowest_ids(workers: WorkerPool) -> None:
    assert workers.run(collapsed_here, 2, 2) == [[list(range(6))] * 3] * 2


def real_vectors_here(world_size: int) -> tuple[np.ndarray, np.ndarray]:
    context = context_of(world_size)
    rng = np.random.default_rng(3)
    documents, queries = (rng.standard_normal((n, 64)).astype(np.float32) for n in (500, 40))
    mine = slice(context.rank, None, world_size)
    return index_of(np.arange(500)[mine], documents[mine], context).search(queries[mine], 10)


def test_real_vectors_agree_to_float32(workers: WorkerPool) -> None:
    whole = real_vectors_here(1)
    for rank, (scores, ids) in enumerate(workers.run(real_vectors_here, 2, 2)):
        # faiss sums in an order that depends on the block: a few units in the last place of scores up to 32 (1.9e-6)
        np.testing.assert_allclose(scores, whole[0][rank::2], rtol=0, atol=1.6e-5)
        assert np.array_equal(ids, whole[1][rank::2])  # no two scores of this seed are that close


def test_wrong_k_and_sizes_are_refused() -> None:
    index = index_of(np.arange(3), np.ones((3, 2), np.float32), context_of(1))
    with pytest.raises(ValueError, match="k=0"):
        index.search(np.ones((1, 2), np.float32), 0)
    with pytest.raises(ValueError, match=r"queries have different widths: \[2, 3\]"):
        index.search(np.ones((1, 3), np.float32), 1)


# --- encoding ---


def make_texts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(4, 90, rng.integers(1, 30)).astype(np.int32) for _ in range(count)]


def embed(micro_batches: list[PackedTexts]) -> torch.Tensor:
    """[n, 5] of exact float32 integers: length, sum, weighted sum, last token, prompt. Padding (0) must not matter."""
    rows = []
    for batch in micro_batches:
        assert batch.tokens.shape[1] == micro_batches[0].tokens.shape[1]
        ends = batch.sequences.cu_seqlens.tolist()
        for begin, end, prompt in zip(ends[:-1], ends[1:], batch.prompt_lengths.tolist(), strict=True):
            text = batch.tokens[0, begin:end].float()
            place = torch.arange(1, end - begin + 1)
            rows.append([end - begin, text.sum(), (text * place).sum(), text[-1], prompt])
    return torch.tensor(rows)


def embed_ids(texts: list[np.ndarray], context: ParallelContext) -> Embed:
    """Text i has id 7 i + 100."""
    return packed_embed(embed, lambda i: texts[(i - 100) // 7], context.device, pad_id=0, prompt_length=3)


def ids_and_lengths(texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(texts)) * 7 + 100, np.array([len(text) for text in texts], dtype=np.int64)


def encode_here(context: ParallelContext, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    texts = make_texts(count)
    part = encode_corpus(embed_ids(texts, context), *ids_and_lengths(texts), context, width=5, max_tokens=64)
    gathered = encode_texts(embed, texts, context, width=5, max_tokens=64, pad_id=0, prompt_length=3)
    return part.ids, part.embeddings, gathered


def encode_in_layout(layout: dict[str, int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return encode_here(context_of(**layout), count)


LAYOUTS = {
    "1": {"world_size": 1},
    "dp2": {"world_size": 2},
    "tp2": {"world_size": 2, "tensor_parallel": 2},
    "pp2": {"world_size": 2, "pipeline_parallel": 2},
    "dp4": {"world_size": 4},
    "dp2 tp2": {"world_size": 4, "tensor_parallel": 2},
    "dp2 pp2": {"world_size": 4, "pipeline_parallel": 2},
    "tp2 pp2": {"world_size": 4, "tensor_parallel": 2, "pipeline_parallel": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 50])
def test_every_text_is_encoded_once(workers: WorkerPool, layout: str, count: int) -> None:
    texts = make_texts(count)
    expected = np.array(
        [embed([pack_texts([i], texts.__getitem__, np.full(count, 3), pad_id=0)])[0].numpy() for i in range(count)]
    ).reshape(count, 5)
    results = workers.run(encode_in_layout, LAYOUTS[layout]["world_size"], LAYOUTS[layout], count)
    ids = np.concatenate([result[0] for result in results])
    assert sorted(ids.tolist()) == [i * 7 + 100 for i in range(count)]
    for part_ids, rows, gathered in results:
        assert (np.diff(part_ids) > 0).all()
        np.testing.assert_array_equal(rows, expected[(part_ids - 100) // 7])
        np.testing.assert_array_equal(gathered, expected)
    if count == 50:
        assert min(len(result[0]) for result in results) > 0


def poisoned_here(poisoned: list[int]) -> str:
    """The message, where the embeddings of some texts are NaN."""
    context, texts = context_of(2), make_texts(50)
    good = embed_ids(texts, context)

    def embed_some(batches: list[np.ndarray]) -> torch.Tensor:
        rows = good(batches)
        rows[np.isin(np.concatenate(batches), poisoned), 1] = float("nan")
        return rows

    with pytest.raises(ValueError, match="not finite") as caught:
        encode_corpus(
            embed_some,
            *ids_and_lengths(texts),
            context,
            width=5,
            max_tokens=64,
            describe=lambda text_id: f"text {text_id}",
        )
    return str(caught.value)


def test_embeddings_that_are_not_finite_stop_all_ranks(workers: WorkerPool) -> None:
    one = workers.run(poisoned_here, 2, [121])
    assert one[0] == one[1]
    assert "embeddings of 1 texts are not finite, among them text 121; the model has diverged" in one[0]
    many = [i * 7 + 100 for i in range(0, 50, 5)]
    errors = workers.run(poisoned_here, 2, many)
    assert errors[0] == errors[1]
    shown = ", ".join(f"text {text_id}" for text_id in many[:5])
    assert f"embeddings of 10 texts are not finite, among them {shown}; " in errors[0]


def test_plan_is_sorted_and_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 300)
    plan = plan_batches(lengths, 128)
    assert sorted(np.concatenate(plan).tolist()) == list(range(300))
    assert all(lengths[batch].sum() <= 128 for batch in plan)
    assert (np.diff(lengths[np.concatenate(plan)]) <= 0).all()
    assert len(plan) <= 1.3 * lengths.sum() / 128
    assert plan_batches(lengths[:0], 1) == []
    with pytest.raises(ValueError, match="max_tokens=48 is below the longest text, 59 tokens"):
        plan_batches(lengths, 48)
