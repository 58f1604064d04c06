"""Search over shards on real ranks equals one flat index; encoding over ranks gives every text once, same values."""

import faiss
import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo_pool import WorkerPool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_conan.data.batch import TextBatch
from megatron_conan.mining.encode import encode_corpus, encode_texts, plan_batches
from megatron_conan.mining.shards import ShardedIndex, canonical_top
from megatron_conan.parallel.context import ParallelContext


def context_of(world_size: int, tensor_parallel: int = 1) -> ParallelContext:
    """tp ranks side by side, as in megatron-core; these functions use the world group only."""
    rank = dist.get_rank() if world_size > 1 else 0
    return ParallelContext(
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        tp_rank=rank % tensor_parallel,
        tp_size=tensor_parallel,
        tp_group=None,
        pp_rank=0,
        pp_size=1,
        pp_group=None,
        dp_rank=rank // tensor_parallel,
        dp_size=world_size // tensor_parallel,
        dp_group=None,
        world_group=dist.group.WORLD if world_size > 1 else None,
    )


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
    index = ShardedIndex(ids[document_rows], documents[document_rows], context, block_size=case["block_size"])
    scores, found = index.search(queries[query_rows], case["k"])
    pairs = [np.random.default_rng(int(row)).choice(len(ids) + 1, int(row) % 4) for row in query_rows]
    pair_ids = np.concatenate([np.empty(0, np.int64), *(np.append(ids, 10**9)[rows] for rows in pairs)])
    offsets = np.cumsum([0, *(len(rows) for rows in pairs)])
    pair_scores = index.score_pairs(queries[query_rows], pair_ids, offsets)
    by_id = dict(zip(ids.tolist(), documents, strict=True))
    owner = np.repeat(query_rows, np.diff(offsets))
    expected = [by_id[i] @ queries[q] if i in by_id else np.nan for i, q in zip(pair_ids.tolist(), owner, strict=True)]
    np.testing.assert_array_equal(pair_scores, np.array(expected, np.float32))
    return query_rows, scores, found, index.shard_sizes


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
    index = ShardedIndex(ids, np.ones((len(ids), 8), np.float32), context)
    return index.search(np.ones((3, 8), np.float32), 6)[1].tolist()


def test_a_collapsed_model_gives_the_lowest_ids(workers: WorkerPool) -> None:
    assert workers.run(collapsed_here, 2, 2) == [[list(range(6))] * 3] * 2


def real_vectors_here(world_size: int) -> tuple[np.ndarray, np.ndarray]:
    context = context_of(world_size)
    rng = np.random.default_rng(3)
    documents, queries = (rng.standard_normal((n, 64)).astype(np.float32) for n in (500, 40))
    mine = slice(context.rank, None, world_size)
    return ShardedIndex(np.arange(500)[mine], documents[mine], context).search(queries[mine], 10)


def test_real_vectors_agree_to_float32(workers: WorkerPool) -> None:
    whole = real_vectors_here(1)
    for rank, (scores, ids) in enumerate(workers.run(real_vectors_here, 2, 2)):
        # faiss sums in an order that depends on the block: a few units in the last place of scores up to 32 (1.9e-6)
        np.testing.assert_allclose(scores, whole[0][rank::2], rtol=0, atol=1.6e-5)
        assert np.array_equal(ids, whole[1][rank::2])  # no two scores of this seed are that close


def nan_here(in_queries: bool) -> None:
    context = context_of(2)
    rows = np.ones((4, 3), np.float32)
    if context.rank == 1:
        rows[2, 0] = np.nan
    good = np.ones((4, 3), np.float32)
    index = ShardedIndex(np.arange(4) * 10 + context.rank, good if in_queries else rows, context)
    index.search(rows, 2)


def error_on_every_rank(in_queries: bool) -> str:
    with pytest.raises(ValueError, match="not finite") as caught:
        nan_here(in_queries)
    return str(caught.value)


def test_embeddings_that_are_not_finite_stop_all_ranks(workers: WorkerPool) -> None:
    errors = workers.run(error_on_every_rank, 2, False)
    assert errors[0] == errors[1]
    assert "of 1 texts are not finite, among them text ids [21]" in errors[0]
    assert workers.run(error_on_every_rank, 2, True) == ["embeddings of [0, 1] queries (by rank) are not finite"] * 2


def test_wrong_k_and_sizes_are_refused() -> None:
    index = ShardedIndex(np.arange(3), np.ones((3, 2), np.float32), context_of(1))
    with pytest.raises(ValueError, match="k=0"):
        index.search(np.ones((1, 2), np.float32), 0)
    with pytest.raises(ValueError, match=r"queries have different widths: \[2, 3\]"):
        index.search(np.ones((1, 3), np.float32), 1)


# --- encoding ---


def make_texts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(4, 90, rng.integers(1, 30)).astype(np.int32) for _ in range(count)]


def embed(batch: TextBatch) -> torch.Tensor:
    """[n, 5] of exact float32 integers: length, sum, weighted sum, last token, prompt. Padding (0) must not matter."""
    tokens, lengths = batch.tokens.float(), batch.lengths
    last = batch.tokens.gather(1, lengths[:, None] - 1)[:, 0]
    place = torch.arange(1, tokens.shape[1] + 1)
    prompt = torch.full(lengths.shape, float(batch.prompt_length))
    return torch.stack([lengths.float(), tokens.sum(1), (tokens * place).sum(1), last.float(), prompt], dim=1)


def encode_here(world_size: int, tensor_parallel: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    context = context_of(world_size, tensor_parallel)
    texts = make_texts(count)
    ids = np.arange(count) * 7 + 100
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    settings = {"max_tokens": 64, "pad_id": 0, "prompt_length": 3}
    part = encode_corpus(embed, lambda i: texts[(i - 100) // 7], ids, lengths, context, **settings)
    return part.ids, part.embeddings, encode_texts(embed, texts, context, **settings)


@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_every_text_is_encoded_once(workers: WorkerPool, world_size: int, tensor_parallel: int, count: int) -> None:
    texts = make_texts(count)
    expected = np.array([embed(TextBatch(torch.tensor(t)[None], torch.tensor([len(t)]), 3))[0].numpy() for t in texts])
    results = workers.run(encode_here, world_size, world_size, tensor_parallel, count)
    ids = np.concatenate([result[0] for result in results])
    assert sorted(ids.tolist()) == [i * 7 + 100 for i in range(count)]
    for part_ids, rows, gathered in results:
        assert len(part_ids) == len(rows)
        assert gathered.shape == ((count, 5) if count else (0, 0))
        for text_id, row in zip(part_ids, rows, strict=True):
            np.testing.assert_array_equal(row, expected[(text_id - 100) // 7])
        np.testing.assert_array_equal(gathered, expected.reshape(gathered.shape))
    if count == 50:
        sizes = [len(result[0]) for result in results]
        assert min(sizes) > 0


def test_plan_is_sorted_and_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 300)
    plan = plan_batches(lengths, 128)
    assert sorted(np.concatenate(plan).tolist()) == list(range(300))
    padded = [-(-int(lengths[batch].max()) // 8) * 8 for batch in plan]
    assert all(width * len(batch) <= 128 for width, batch in zip(padded, plan, strict=True))
    assert padded == sorted(padded, reverse=True)
    many = np.random.default_rng(1).integers(1, 60, 3000)
    # Mixed lengths would make every batch as wide as 64, which needs 94 batches.
    assert len(plan_batches(many, 2048)) <= 1.1 * (-(-many // 8) * 8).sum() / 2048
    with pytest.raises(ValueError, match="max_tokens=48 is below the longest text, 64 tokens"):
        plan_batches(lengths, 48)
