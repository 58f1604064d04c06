"""Mine a source's hard negatives anew with the live weights: encode, search, select, on all ranks together.

Shapes: `R` rows of the source, `u` distinct queries, `m` of them on this rank, `P` pool size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_conan.data.format import Formatter, TextKind
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.mining.encode import Embed, encode_corpus
from megatron_conan.mining.exchange import gather_counts, gather_rows
from megatron_conan.mining.select import SHORT_REASONS, SelectionSettings, lowest_scores, select_negatives
from megatron_conan.mining.shards import ShardedIndex
from megatron_conan.mining.table import CorpusFingerprint, NegativesTable, SwapRule
from megatron_conan.parallel.context import ParallelContext

__all__ = ["CorpusFingerprint", "MiningReport", "MiningSettings", "NegativesTable", "SwapRule", "fingerprint", "remine"]


@dataclass(frozen=True)
class MiningSettings:
    """How a source is mined; prompts and lengths are those of training."""

    selection: SelectionSettings
    formatter: Formatter
    num_negatives: int
    """Negatives a query has in use."""
    max_tokens: int
    """Padded tokens of one encoding batch."""
    pad_multiple: int = 8
    """What padded lengths are rounded up to."""
    rule: SwapRule | None = None
    """When single negatives are replaced between two minings; None for the published thresholds."""
    query_prompt: str | None = None
    """Name of the prompt before queries."""
    document_prompt: str | None = None
    """Name of the prompt before documents."""


@dataclass(frozen=True)
class MiningReport:
    """What one mining did; the same on all ranks but for the seconds."""

    step: int
    seconds: float
    num_documents: int
    num_queries: int
    """Distinct queries."""
    shard_sizes: list[int]
    """Documents of every rank."""
    changed_share: float | None
    """Share of the negatives in use that the same row didn't use just before; None the first time."""
    mean_negative_score: float
    """Mean S0 of the negatives in use; NaN if there are none."""
    mean_positive_score: float
    """Mean over distinct queries of the lowest positive's score."""
    short_queries: dict[str, int]
    """Distinct queries with an incomplete pool, by main reason (`Selection.count_short`)."""
    num_empty_slots: int
    """Slots without a negative, over all rows."""


@dataclass(frozen=True)
class MiningResult:
    """The new table and how it came about."""

    table: NegativesTable
    report: MiningReport


@dataclass(frozen=True)
class _Queries:
    """The distinct queries of a source."""

    ids: np.ndarray
    """[u] int64 text ids, rising."""
    of_row: np.ndarray
    """[R] int64, place in ids of each row's query."""
    positives: list[np.ndarray]
    """u arrays: the positives of all rows with this query, sorted, none twice."""


def fingerprint(store: PairStore, tokenizer: Tokenizer) -> CorpusFingerprint:
    """What ties a negatives table to this source."""
    return CorpusFingerprint(store.num_rows, store.num_texts, len(store.corpus_ids), tokenizer.sha256)


def remine(
    store: PairStore,
    embed: Embed,
    context: ParallelContext,
    tokenizer: Tokenizer,
    settings: MiningSettings,
    *,
    step: int,
    previous: NegativesTable | None = None,
) -> MiningResult:
    """Encode all documents and queries with the live weights and choose every row's pool of negatives.

    Rows with the same query text share one pool; the positives of all of them are known and never become negatives.
    All ranks of the world must call with the same arguments; all end with the same table.

    Args:
        embed: see `encode_corpus`; the model in the state (weights, soft mask) it trains in.
        step: training step, for the record.
        previous: the table used so far, for the share that changed.

    Raises ValueError for a source without retrieval rows or documents; RuntimeError if the ranks' tables differ.
    """
    start = time.monotonic()
    if store.task == "sts":
        raise ValueError(f"{store.name} holds scored pairs (sts), which have no negatives to mine; mine retrieval data")
    if len(store.corpus_ids) == 0 or store.num_rows == 0:
        raise ValueError(
            f"{store.name} has {store.num_rows} rows and {len(store.corpus_ids)} documents; nothing can be mined"
        )
    queries = _distinct_queries(store)
    index = ShardedIndex(*_encode(store, embed, context, tokenizer, settings, store.corpus_ids, "document"), context)
    local_ids, local_embeddings = _encode(store, embed, context, tokenizer, settings, queries.ids, "query")
    local = np.searchsorted(queries.ids, local_ids)  # [m]
    positives = [queries.positives[i] for i in local]
    lowest = _lowest_positive_scores(store, index, local_embeddings, positives, context)
    selection = select_negatives(
        *index.search(local_embeddings, _search_width(store, queries, settings, index)),
        [np.append(p, query_id) for p, query_id in zip(positives, local_ids, strict=True)],
        lowest,
        settings.selection,
        local_ids,
    )
    pool_ids, pool_scores, mean_positive = _gather_pools(
        context, local, selection.ids, selection.scores, lowest, len(queries.ids)
    )
    table = NegativesTable.from_pools(
        pool_ids[queries.of_row],
        pool_scores[queries.of_row],
        settings.num_negatives,
        corpus=fingerprint(store, tokenizer),
        version=1 if previous is None else previous.version + 1,
        step=step,
        rule=settings.rule,
    )
    _check_identical(table, context)
    in_use = table.pointer >= 0
    report = MiningReport(
        step=step,
        seconds=time.monotonic() - start,
        num_documents=len(store.corpus_ids),
        num_queries=len(queries.ids),
        shard_sizes=index.shard_sizes,
        changed_share=None if previous is None else changed_share(previous, table),
        mean_negative_score=float(table.initial_score[in_use].mean()) if in_use.any() else float("nan"),
        mean_positive_score=mean_positive,
        short_queries=_sum_counts(selection.count_short(), context),
        num_empty_slots=int((~in_use).sum()),
    )
    return MiningResult(table, report)


def changed_share(previous: NegativesTable, table: NegativesTable) -> float:
    """Share of `table`'s negatives in use that the same row of `previous` doesn't use; 0 if there are none."""
    changed = total = 0
    for start in range(0, len(table.pointer), 65536):
        rows = np.arange(start, min(start + 65536, len(table.pointer)))
        now, before = table.current(rows), previous.current(rows)
        real = now >= 0
        kept = (now[:, :, None] == before[:, None, :]).any(axis=2)
        changed += int((real & ~kept).sum())
        total += int(real.sum())
    return changed / total if total else 0.0


def _distinct_queries(store: PairStore) -> _Queries:
    row_query = np.array([store.query(row) for row in range(store.num_rows)], dtype=np.int64)
    ids, of_row = np.unique(row_query, return_inverse=True)
    collected: list[list[np.ndarray]] = [[] for _ in ids]
    for row, place in enumerate(of_row):
        collected[place].append(store.positives(row))
    return _Queries(ids, of_row, [np.unique(np.concatenate(parts)).astype(np.int64) for parts in collected])


def _encode(
    store: PairStore,
    embed: Embed,
    context: ParallelContext,
    tokenizer: Tokenizer,
    settings: MiningSettings,
    ids: np.ndarray,
    kind: TextKind,
) -> tuple[np.ndarray, np.ndarray]:
    """Embed texts in the way training formats them. Returns this rank's (ids [m], embeddings [m, e])."""
    formatter = settings.formatter
    prompt = settings.query_prompt if kind == "query" else settings.document_prompt
    part = encode_corpus(
        embed,
        lambda text_id: formatter.format(store.tokens(text_id), kind, prompt),
        ids,
        formatter.lengths(store.lengths[ids], kind, prompt),
        context,
        max_tokens=settings.max_tokens,
        pad_id=tokenizer.pad_id,
        pad_multiple=settings.pad_multiple,
        prompt_length=len(formatter.prompt_tokens(prompt)),
        progress=f"mining {store.name}: {'queries' if kind == 'query' else 'documents'}",
    )
    return part.ids, part.embeddings


def _search_width(store: PairStore, queries: _Queries, settings: MiningSettings, index: ShardedIndex) -> int:
    """Results to ask for: the window, and room for a query's positives and itself, which don't count."""
    num_documents = len(store.corpus_ids)
    window = num_documents if settings.selection.window is None else settings.selection.window
    known = max(len(positives) for positives in queries.positives) + 1
    # A window beyond what the index can return is refused by it; the room for known documents just gets smaller.
    return min(window + known, num_documents, max(index.max_k, window))


def _gather_pools(
    context: ParallelContext,
    local: np.ndarray,
    ids: np.ndarray,
    scores: np.ndarray,
    lowest_positive: np.ndarray,
    num_queries: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Bring all queries' pools to all ranks: ([u, P] ids, [u, P] scores, mean lowest positive score)."""
    counts = gather_counts([len(local)], context.world_group, context.world_size, context.device)[:, 0].tolist()

    def gather(rows: np.ndarray) -> np.ndarray:
        return np.concatenate(gather_rows(rows, counts, context.world_group, context.device))

    place = gather(local.astype(np.int64))
    if not np.array_equal(np.sort(place), np.arange(num_queries)):
        raise RuntimeError(f"{len(place)} pools for {num_queries} queries: the ranks did not encode disjoint parts")
    pool_ids = np.empty((num_queries, ids.shape[1]), np.int64)
    pool_scores = np.empty((num_queries, ids.shape[1]), np.float32)
    positive = np.empty(num_queries, np.float64)
    pool_ids[place], pool_scores[place] = gather(ids), gather(scores)
    positive[place] = gather(lowest_positive.astype(np.float64))
    return pool_ids, pool_scores, float(positive.mean())


def _lowest_positive_scores(
    store: PairStore,
    index: ShardedIndex,
    embeddings: np.ndarray,
    positives: list[np.ndarray],
    context: ParallelContext,
) -> np.ndarray:
    """[m] float32. All ranks raise ValueError where one rank's queries have positives that are no documents."""
    offsets = np.cumsum([0, *(len(p) for p in positives)])
    pair_ids = np.concatenate([*positives, np.empty(0, np.int64)])
    scores = index.score_pairs(embeddings, pair_ids, offsets)
    missing = pair_ids[np.isnan(scores)]
    described = gather_counts(
        [len(missing), int(missing[0]) if len(missing) else -1], context.world_group, context.world_size, context.device
    )
    if described[:, 0].any():
        raise ValueError(
            f"{store.name}: {int(described[:, 0].sum())} positives are not among its documents, for example text "
            f"{int(described[:, 1].max())}; write the data again with data_tools/preprocess_pairs.py"
        )
    return lowest_scores([scores[begin:end] for begin, end in pairwise(offsets)])


def _check_identical(table: NegativesTable, context: ParallelContext) -> None:
    # 8 bytes of the hash as one signed integer
    short_hash = int.from_bytes(bytes.fromhex(table.content_hash())[:8], "big", signed=True)
    hashes = gather_counts([short_hash], context.world_group, context.world_size, context.device)[:, 0]
    if len(set(hashes.tolist())) > 1:
        raise RuntimeError(f"the ranks mined different negatives (hashes {hashes.tolist()})")


def _sum_counts(counts: dict[str, int], context: ParallelContext) -> dict[str, int]:
    values = [counts.get(name, 0) for name in SHORT_REASONS]
    summed = gather_counts(values, context.world_group, context.world_size, context.device).sum(axis=0)
    return {name: int(total) for name, total in zip(SHORT_REASONS, summed, strict=True) if total}
