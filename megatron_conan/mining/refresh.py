"""Mine a source's hard negatives anew with the live weights: encode, search, select, on all ranks together.

Shapes: `R` rows of the source, `u` distinct queries, `n` documents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.data.format import Formatter, TextKind
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.mining.encode import EmbeddedTexts, EmbedPacked, encode_blocks, encode_corpus, packed_embed
from megatron_conan.mining.exchange import gather_counts
from megatron_conan.mining.local_search import SearchSettings, check_search
from megatron_conan.mining.pools import MiningSource, Pools, mine_pools
from megatron_conan.mining.rows import Scratch
from megatron_conan.mining.rules import Rule
from megatron_conan.mining.select import SelectionSettings
from megatron_conan.mining.table import CorpusFingerprint, NegativesTable
from megatron_conan.parallel.context import ParallelContext


@dataclass(frozen=True)
class MiningSettings:
    """How a source is mined; prompts and lengths are those of training."""

    selection: SelectionSettings
    formatter: Formatter
    num_negatives: int
    """Negatives a query has in use."""
    max_tokens: int
    """Tokens of one encoding batch."""
    width: int
    """Embedding dim."""
    pad_multiple: int = 8
    """What packed lengths are rounded up to."""
    rule: Rule | None = None
    """When negatives are replaced between two minings; None for the v2 rule as published."""
    query_prompt: str | None = None
    """Name of the prompt before queries."""
    document_prompt: str | None = None
    """Name of the prompt before documents."""
    search: SearchSettings = field(default_factory=SearchSettings)
    """What the search may use of the GPU."""
    scratch_dir: Path | None = None
    """Folder for the embeddings; None for memory."""
    weights: str = ""
    """What identifies the weights and the state of the mask; needed with `scratch_dir`."""


@dataclass(frozen=True)
class MiningReport:
    """What one mining did; the same on all ranks but for the seconds."""

    step: int
    version: int
    """Number of the mining, from 1."""
    seconds: float
    document_seconds: float
    """Of these, until all documents were encoded; then queries are, block by block, and searched."""
    num_documents: int
    num_queries: int
    """Distinct queries."""
    shard_sizes: list[int]
    """Documents of every rank."""
    changed_share: float | None
    """Turnover: share of the negatives in use that the same row didn't use just before; None the first time."""
    drift: float | None
    """Mean change of score of the negatives in use just before, since they came in; None the first time."""
    mean_negative_score: float
    """Mean S0 of the negatives in use; NaN if there are none."""
    mean_positive_score: float
    """Mean over distinct queries of the lowest positive's score."""
    short_queries: dict[str, int]
    """Distinct queries with an incomplete pool, by main reason (`SHORT_REASONS`)."""
    num_empty_slots: int
    """Slots without a negative, over all rows."""


@dataclass(frozen=True)
class MiningResult:
    """The new table and how it came about."""

    table: NegativesTable
    report: MiningReport


def fingerprint(store: PairStore, tokenizer: Tokenizer) -> CorpusFingerprint:
    """What ties a negatives table to this source."""
    digest = hashlib.sha256()
    for array in (store.query_ids, store.positive_ids, store.positive_offsets, store.corpus_ids):
        digest.update(np.ascontiguousarray(array).data)
    return CorpusFingerprint(
        store.num_rows,
        store.num_texts,
        len(store.corpus_ids),
        tokenizer.sha256,
        store.summary["tokens_sha256"],
        digest.hexdigest(),
    )


def remine(
    store: PairStore,
    embed: EmbedPacked,
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
        embed: the model in the state (weights, soft mask) it trains in; see `packed_embed`.
        step: training step, for the record.
        previous: the table used so far, for turnover and drift.

    Raises ValueError for a source that can't be mined; RuntimeError if the ranks' tables differ.
    """
    start = time.monotonic()
    source = MiningSource.of_store(store)
    source.check(settings.num_negatives)
    check_search(settings.selection.window, settings.search, context)
    encoding = _Encoding(store, source, fingerprint(store, tokenizer), context, tokenizer, settings)
    documents = encoding.documents(embed)
    document_seconds = time.monotonic() - start
    first_row = np.empty(len(source.query_ids), np.int64)
    first_row[source.query_of_row[::-1]] = np.arange(store.num_rows)[::-1]
    pools = mine_pools(
        source,
        documents,
        encoding.queries(embed),
        context,
        settings.selection,
        search=settings.search,
        compared=None if previous is None else previous.current(first_row),
    )
    table = NegativesTable.from_pools(
        pools.ids[source.query_of_row],
        pools.scores[source.query_of_row],
        settings.num_negatives,
        corpus=encoding.corpus,
        version=1 if previous is None else previous.version + 1,
        step=step,
        rule=settings.rule,
    )
    check_identical(table, context, store.name)
    encoding.remove_scratch()
    used = table.initial_score[table.pointer >= 0]
    report = MiningReport(
        step=step,
        version=table.version,
        seconds=time.monotonic() - start,
        document_seconds=document_seconds,
        num_documents=len(source.document_ids),
        num_queries=len(source.query_ids),
        shard_sizes=pools.shard_sizes,
        changed_share=None if previous is None else changed_share(previous, table),
        drift=None if previous is None else _mean_drift(previous, first_row, pools),
        short_queries=pools.count_short(),
        mean_positive_score=float(pools.positive_scores.mean(dtype=np.float64)),
        mean_negative_score=float(used.mean(dtype=np.float64)) if len(used) else float("nan"),
        num_empty_slots=table.pointer.size - len(used),
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


def check_identical(table: NegativesTable, context: ParallelContext, source: str) -> None:
    """Raise RuntimeError on all ranks if their tables of a source differ. All ranks must call."""
    # 8 bytes of the hash as one signed integer
    short_hash = int.from_bytes(bytes.fromhex(table.content_hash())[:8], "big", signed=True)
    hashes = gather_counts([short_hash], context.world_group, context.world_size, context.device)[:, 0]
    if len(set(hashes.tolist())) > 1:
        raise RuntimeError(
            f"{source}: the ranks hold different negatives (hashes by rank: {hashes.tolist()}), so nothing was saved; start "
            "the run again, which goes on from its last checkpoint"
        )


def _mean_drift(previous: NegativesTable, first_row: np.ndarray, pools: Pools) -> float | None:
    change = pools.compared_scores - previous.initial_score[first_row]
    known = np.isfinite(change)
    return float(change[known].mean(dtype=np.float64)) if known.any() else None


@dataclass(frozen=True)
class _Encoding:
    """One source on its way to embeddings."""

    store: PairStore
    source: MiningSource
    corpus: CorpusFingerprint
    context: ParallelContext
    tokenizer: Tokenizer
    settings: MiningSettings

    def documents(self, embed: EmbedPacked) -> EmbeddedTexts:
        """Embed all documents; this rank's rows."""
        return encode_corpus(**self._texts(embed, "document"), scratch=self._scratch())

    def queries(self, embed: EmbedPacked) -> Iterator[EmbeddedTexts]:
        """Embed the queries block by block; this rank's rows."""
        return encode_blocks(**self._texts(embed, "query"))

    def _texts(self, embed: EmbedPacked, kind: TextKind) -> dict[str, Any]:
        """What to encode, formatted as in training."""
        store, settings, formatter = self.store, self.settings, self.settings.formatter
        ids = self.source.query_ids if kind == "query" else self.source.document_ids
        prompt = settings.query_prompt if kind == "query" else settings.document_prompt
        return {
            "embed": packed_embed(
                embed,
                lambda text_id: formatter.format(store.tokens(text_id), kind, prompt),
                self.context.device,
                pad_id=self.tokenizer.pad_id,
                pad_multiple=settings.pad_multiple,
                prompt_length=len(formatter.prompt_tokens(prompt)),
            ),
            "ids": ids,
            "lengths": formatter.lengths(store.lengths[ids], kind, prompt),
            "context": self.context,
            "width": settings.width,
            "max_tokens": settings.max_tokens,
            "progress": f"mining {store.name}: {'queries' if kind == 'query' else 'documents'}",
            "describe": self.source.describe,
        }

    def remove_scratch(self) -> None:
        """Delete what the documents' embeddings left on disk."""
        scratch = self._scratch()
        if scratch is not None:
            scratch.remove(self.context)

    def _scratch(self) -> Scratch | None:
        """Where the documents' embeddings lie, and all that they depend on; None for memory."""
        settings, context = self.settings, self.context
        if settings.scratch_dir is None:
            return None
        depends_on = {
            "weights": settings.weights,
            "corpus": dataclasses.asdict(self.corpus),
            "prompt": settings.formatter.prompt_tokens(settings.document_prompt).tolist(),
            "length": settings.formatter.max_lengths["document"],
            "batches": [settings.max_tokens, settings.pad_multiple],
            "layout": [context.tp_size, context.pp_size, context.dp_size],
        }
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        return Scratch(settings.scratch_dir / self.store.name, key)
