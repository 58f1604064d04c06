"""The largest batch there can be under a config, for the dry run: what it holds is of no meaning, its sizes are.

Shapes: `N` rows of a global batch, `a` its distinct queries, `d` its distinct documents, `m` texts that a rank embeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_conan.config.tree import ContrastiveConfig
from megatron_conan.data.packing import GROUP_RATIO, split_texts
from megatron_conan.data.pair_batch import PairBatch
from megatron_conan.data.pairs import PairStore
from megatron_conan.parallel.context import ParallelContext


@dataclass(frozen=True)
class LargestBatch:
    """A batch for the stage's `forward_backward`, of which no step can have a larger one."""

    batch: Any
    num_micro_batches: int
    """Micro-batches of the largest size: as many as the pipeline holds at once, or a step has."""
    num_tokens: int
    """Tokens of these."""
    longest: int
    """Tokens of the longest text."""


@dataclass(frozen=True)
class LargestRows:
    """How large a global batch of one source gets."""

    store: PairStore
    num_rows: int
    """N."""
    num_positives: int
    """Most a row."""
    num_negatives: int
    """Most a row."""
    query_length: int
    """Longest query as the model takes it, tokens."""
    document_length: int
    """Longest document."""

    @property
    def num_queries(self) -> int:
        """a."""
        return min(self.num_rows, self.store.num_rows)

    @property
    def num_documents(self) -> int:
        """d."""
        return min(self.num_rows * (self.num_positives + self.num_negatives), self.store.num_texts)

    @property
    def lengths(self) -> np.ndarray:
        """[a + d] int64 tokens of all texts, queries first."""
        return np.repeat([self.query_length, self.document_length], [self.num_queries, self.num_documents])

    def batch(self) -> PairBatch:
        """Rows and texts of any numbers, all distinct as far as the source has so many; their negatives are not mined."""
        rows, queries = np.arange(self.num_rows), np.arange(self.num_queries)
        positive, negative = (np.repeat(rows, count) for count in (self.num_positives, self.num_negatives))
        document = np.arange(len(positive) + len(negative)) % self.num_documents
        row_query = rows % self.num_queries
        labels: dict[str, np.ndarray] = {}
        if self.store.label_offsets is not None:
            num_classes = len(self.store.label_offsets) - 1
            labels = {
                "query_labels": queries % num_classes,
                "document_labels": np.arange(self.num_documents) % num_classes,
            }
        return PairBatch(
            store=self.store,
            rows=rows,
            query_ids=queries,
            document_ids=np.arange(self.num_documents),
            row_query=row_query,
            positive=np.stack([positive, document[: len(positive)]]),
            negative=np.stack([negative, document[len(positive) :]]),
            slots=np.full(len(negative), -1),
            related=np.unique(np.stack([row_query[positive], document[: len(positive)]]), axis=1),
            alike=np.stack([queries, queries]),
            hubs=np.empty((self.num_queries, 0), np.int64),
            scores=(rows % 2).astype(np.float32),
            **labels,
        )


def most_a_row(store: PairStore, settings: ContrastiveConfig, *, is_mined: bool) -> tuple[int, int]:
    """Most positives and hard negatives that a row of the source brings along."""
    if store.task == "classification":
        return settings.num_positives, settings.num_hard_negatives

    def most(offsets: np.ndarray, limit: int) -> int:
        return limit if limit == 0 else min(limit, int(np.diff(offsets).max()))

    num_negatives = settings.num_hard_negatives
    if not is_mined:
        num_negatives = most(store.negative_offsets, num_negatives)
    return most(store.positive_offsets, settings.num_positives), num_negatives


def max_in_flight(context: ParallelContext, is_interleaved: bool) -> int:
    """No pipeline rank holds the activations of more micro-batches than this at once; a step may have fewer."""
    return context.pp_size * (2 if is_interleaved else 1)


def largest_parts(
    longest: np.ndarray, num_full: int, *, max_tokens: int | None, num_parts: int | None, is_padded: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Cut a rank's texts into micro-batches, the first of which are the largest that `split_texts` makes of such texts.

    That is those of most tokens, in the longest texts; with padded groups also of most padding, but for a few percent where
    few texts make a micro-batch. The others would be as large. Instead their texts have one token each, as only the
    embeddings count there: the loss is that of the whole global batch.

    Args:
        longest: [m] most tokens of each text, falling.
        num_full: micro-batches that are to be the largest.
        max_tokens: tokens of a micro-batch.
        num_parts: alternatively, the number of micro-batches.
        is_padded: attention takes texts in padded groups; then texts a little shorter than the longest cost most.

    Returns:
        Positions of each micro-batch's texts, `num_full` (or all there are) large ones first; and [m] tokens of each text.
    """
    if max_tokens is None:
        max_tokens = max((int(longest[part].sum()) for part in split_texts(longest, None, num_parts)), default=1)
    parts: list[np.ndarray] = []
    lengths, begin = np.ones_like(longest), 0
    while begin < len(longest) and len(parts) < num_full:
        filled = _fill(longest[begin:], max_tokens, is_padded)
        parts.append(np.arange(begin, begin + len(filled)))
        lengths[parts[-1]] = filled
        begin += len(filled)
    rest = np.arange(begin, len(longest))
    return [*parts, *(rest[i : i + max_tokens] for i in range(0, len(rest), max_tokens))], lengths


def _fill(longest: np.ndarray, max_tokens: int, is_padded: bool) -> np.ndarray:
    """Tokens of the first texts, of at most `longest` ([m], falling) each, such that they fill a micro-batch."""
    lengths = longest.copy()
    if is_padded and lengths.sum() > max_tokens:
        # the shortest that still go into one padded group with the first
        lengths[1:] = np.minimum(lengths[1:], int(np.ceil(GROUP_RATIO * lengths[0])))
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, max_tokens, side="right"))
    if count < len(lengths) and (room := max_tokens - int(ends[count - 1])) > 0:
        lengths[count] = room
        count += 1
    return lengths[:count]
