"""The two stages that train embeddings: weak and finetune. Data, forward step, and the global loss.

Shapes: `q` queries of this rank, `d` documents of this rank, `h` hidden; `Q`, `D` those of all data-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_conan.data.batch import PairBatch, TextBatch
from megatron_conan.data.pairs import PairStore, build_pair_batch
from megatron_conan.data.sampler import SourceSchedule, dp_slice, sample_indices
from megatron_conan.loss.contrastive import InfoNCE, excluded_documents, info_nce
from megatron_conan.loss.cosent import cosent
from megatron_conan.loss.gather import gather_rows, gather_sizes, gather_with_gradient
from megatron_conan.mining.table import NegativesTable
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import LossFunction, StepReport

LENGTH_GROUP_WIDTH = 32
"""A batch of texts is embedded in one group of similar length for every so many tokens of its width ..."""

MAX_LENGTH_GROUPS = 4
"""... but in no more than so many: every group has its own pass over the weights."""


class Pairs:
    """Pair data: one source a global batch, rows in a seeded order, negatives from the file or from mining."""

    def __init__(self, setup: Setup) -> None:
        """Open the sources."""
        config = setup.config
        self.setup = setup
        self.stores = [PairStore(source.prefix, setup.tokenizer) for source in config.data.sources]
        names = [store.name for store in self.stores]
        if len(set(names)) < len(names):
            raise ValueError(f"data.sources: two sources are called alike ({', '.join(names)}); rename a file prefix")
        self.by_name = dict(zip(names, self.stores, strict=True))
        self.negatives: dict[str, NegativesTable] = {}
        weights = [source.weight for source in config.data.sources]
        self.schedule = SourceSchedule([store.num_rows for store in self.stores], weights, seed=config.train.seed)
        self.pad_multiple = pad_multiple(config.parallel.tensor)

    def micro_batches(self, step: int) -> list[PairBatch]:
        """This rank's share of step `step` (from 1), in one micro-batch. Negatives are those in use at this moment."""
        config, context = self.setup.config, self.setup.context
        store = self.stores[self.schedule.source_at(step - 1)]
        size = config.train.global_batch_size
        start = self.schedule.batches_before(step - 1) * size
        rows = sample_indices(store.num_rows, config.train.seed, start, size)
        (own,) = dp_slice(rows, context.dp_rank, context.dp_size, config.train.micro_batch_size)
        table = self.negatives.get(store.name)
        batch = build_pair_batch(
            store,
            own,
            tokenizer=self.setup.tokenizer,
            max_query_length=config.max_query_length,
            max_document_length=config.max_document_length,
            rng=(config.train.seed, step),
            negatives=None if table is None else table.current(own),
            num_negatives=config.contrastive.num_hard_negatives,
            pad_multiple=self.pad_multiple,
        )
        return [batch.to(context.device)]


def pad_multiple(tensor_size: int) -> int:
    """Padded lengths are multiples of 8 (for the kernels) and of tp (for sequence parallelism)."""
    return math.lcm(8, tensor_size)


def known_positives(store: PairStore, rows: np.ndarray, document_ids: np.ndarray) -> np.ndarray:
    """[rows, documents] bool: the data names the document as a positive of the row's query."""
    return np.stack([np.isin(document_ids, store.positives(row)) for row in rows])


def embed_by_length(model: torch.nn.Module, batch: TextBatch, multiple: int) -> Tensor:
    """Embed texts in groups of similar length, each padded to its own longest text only.

    Padding is masked, so grouping changes no embedding; it halves the tokens computed where lengths differ widely.

    Args:
        model: a whole model (one pipeline stage) with head "embedding".
        batch: n right-padded texts.
        multiple: padded lengths are multiples of this.

    Returns:
        [n, h] in the order of the batch.
    """
    order = torch.argsort(batch.lengths, stable=True)
    num_groups = min(max(batch.tokens.shape[1] // LENGTH_GROUP_WIDTH, 1), MAX_LENGTH_GROUPS)
    groups = [group for group in order.chunk(num_groups) if len(group)]
    embeddings = []
    for group in groups:
        width = -(-int(batch.lengths[group[-1]]) // multiple) * multiple
        embeddings.append(model(batch.tokens[group, :width], batch.lengths[group]))
    return torch.cat(embeddings)[torch.argsort(order)]


class Objective:
    """The contrastive loss over the global batch, for one micro-batch a rank.

    Every rank computes the losses of its own queries against the documents of all ranks. Gathered rows send their gradient
    back to the rank that brought them, gradients are summed over ranks, and megatron-core divides once by the global
    number of queries: value and gradient are those of one process on the whole batch.
    """

    def __init__(self, setup: Setup, data: Pairs) -> None:
        """`data` resolves sources, and holds the negatives tables that the losses' similarities update."""
        self.setup, self.data = setup, data

    def forward_step(self, batches: Iterator[PairBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Embed queries and documents ([q + d, h]); the loss follows."""
        batch = next(batches)
        query = embed_by_length(model, batch.query, self.data.pad_multiple)
        document = embed_by_length(model, batch.document, self.data.pad_multiple)
        loss = self._scored_loss if batch.task == "sts" else self._retrieval_loss
        return torch.cat([query, document]), partial(loss, batch)

    def _retrieval_loss(self, batch: PairBatch, embeddings: Tensor) -> tuple[Tensor, Tensor, StepReport]:
        settings, group = self.setup.config.contrastive, self.setup.context.dp_group
        num_queries, device = len(batch.query_ids), embeddings.device
        query, document = embeddings.split([num_queries, len(batch.document_ids)])
        sizes = gather_sizes(len(document), group, device)
        documents = gather_with_gradient(document, sizes, group, sum_gradients=True)  # [D, h]
        first = sum(sizes[: self.setup.context.dp_rank])
        owner = torch.where(batch.is_positive, batch.query_ids[batch.document_query], -1)
        all_ids, all_owners = gather_rows(torch.stack([batch.document_ids, owner], 1), sizes, group).unbind(1)
        store = self.data.by_name[batch.source]
        known = known_positives(store, batch.rows.cpu().numpy(), all_ids.cpu().numpy())
        excluded = excluded_documents(batch.query_ids, all_ids, all_owners, torch.from_numpy(known).to(device))
        positive = first + torch.arange(num_queries, device=device)
        result = info_nce(query, documents, positive, excluded, settings.temperature)
        losses = result.losses
        if settings.symmetric:
            losses = 0.5 * (losses + self._reverse_losses(batch, query, document[:num_queries], store))
        report = self._report(batch, result, positive, excluded, first)
        report.means["loss"] = (losses.detach().sum().item(), num_queries)
        return losses.sum(), torch.tensor(num_queries, dtype=torch.int32, device=device), report

    def _reverse_losses(self, batch: PairBatch, query: Tensor, positive_document: Tensor, store: PairStore) -> Tensor:
        """[q] losses of finding each positive's query among the queries of all ranks."""
        group, device = self.setup.context.dp_group, query.device
        sizes = gather_sizes(len(query), group, device)
        queries = gather_with_gradient(query, sizes, group, sum_gradients=True)  # [Q, h]
        all_ids, all_rows = gather_rows(torch.stack([batch.query_ids, batch.rows], 1), sizes, group).unbind(1)
        own_ids = batch.document_ids[: len(query)]
        known = known_positives(store, all_rows.cpu().numpy(), own_ids.cpu().numpy()).T  # [Q, q] -> [q, Q]
        excluded = excluded_documents(
            own_ids, all_ids, torch.full_like(all_ids, -1), torch.from_numpy(known).to(device)
        )
        excluded |= batch.query_ids[:, None] == all_ids[None, :]  # another row with the same query text
        first = sum(sizes[: self.setup.context.dp_rank])
        positive = first + torch.arange(len(query), device=device)
        return info_nce(
            positive_document, queries, positive, excluded, self.setup.config.contrastive.temperature
        ).losses

    def _scored_loss(self, batch: PairBatch, embeddings: Tensor) -> tuple[Tensor, Tensor, StepReport]:
        """CoSENT over the pairs of all ranks: every rank computes the whole loss, and sends back its own pairs' gradient."""
        context = self.setup.context
        num_pairs, device = len(batch.query_ids), embeddings.device
        query, document = embeddings.split([num_pairs, len(batch.document_ids)])
        similarity = (query * document).sum(dim=-1)  # [q]
        sizes = gather_sizes(num_pairs, context.dp_group, device)
        everyone = gather_with_gradient(similarity[:, None], sizes, context.dp_group, sum_gradients=False)[:, 0]
        scores = gather_rows(batch.scores, sizes, context.dp_group)
        loss = cosent(everyone, scores, self.setup.config.contrastive.cosent_temperature)
        report = StepReport(
            means={"loss": (loss.item() * num_pairs, num_pairs)}, totals={"tokens": float(_count_tokens(batch))}
        )
        # summed over ranks and divided by the global number of pairs, this is the gradient of `loss`
        return loss * len(everyone), torch.tensor(num_pairs, dtype=torch.int32, device=device), report

    def _report(self, batch: PairBatch, result: InfoNCE, positive: Tensor, excluded: Tensor, first: int) -> StepReport:
        """Metrics of this rank's queries; updates the negatives table with the similarities the loss has anyway."""
        num_queries = len(batch.query_ids)
        similarities = result.similarities
        own_positive = similarities.gather(1, positive[:, None])
        hard = torch.arange(num_queries, len(batch.document_ids), device=similarities.device)
        hard_similarity = similarities[batch.document_query[hard], first + hard]
        if self.setup.config.contrastive.num_hard_negatives:
            negative = (hard_similarity.sum().item(), len(hard))
        else:
            others = ~excluded
            others[torch.arange(num_queries, device=others.device), positive] = False
            negative = (similarities[others].sum().item(), int(others.sum().item()))
        report = StepReport(
            means={
                "in_batch_accuracy": (float(result.correct.sum().item()), num_queries),
                "positive_similarity": (own_positive.sum().item(), num_queries),
                "negative_similarity": negative,
            },
            totals={"tokens": float(_count_tokens(batch))},
        )
        table = self.data.negatives.get(batch.source)
        mining = self.setup.config.mining
        if table is not None and mining is not None and mining.dynamic:
            rows = batch.rows[batch.document_query[hard]]
            replaced = table.update(
                rows.cpu().numpy(), batch.slots[hard].cpu().numpy(), hard_similarity.cpu().numpy(), self.setup.context
            )
            report.means["negatives_replaced"] = (float(replaced), 1)  # the same on every rank: a mean, not a total
        return report


def _count_tokens(batch: PairBatch) -> int:
    return int(batch.query.lengths.sum().item() + batch.document.lengths.sum().item())
