"""The two stages that train embeddings, weak and finetune: the loss of the global batch, and how it reaches the weights.

Shapes: `n` texts of the global batch, `m` those this rank embeds, `e` embedding dim; `q` rows whose loss this rank computes,
`a` distinct queries and `d` distinct documents of one source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_conan.data.packing import PackedTexts
from megatron_conan.data.pair_batch import PairBatch
from megatron_conan.loss.contrastive import Bank, ContrastiveLoss, OwnNegatives, info_nce_loss
from megatron_conan.loss.cosent import cosent
from megatron_conan.loss.embedding_metrics import alignment, uniformity_sum
from megatron_conan.loss.gather import gather_rows, return_gradient
from megatron_conan.loss.matryoshka import truncate
from megatron_conan.model.attention import attention_case, computes_packed
from megatron_conan.train.pair_data import Pairs, PairStep
from megatron_conan.train.relations import RowRelations, own_rows, row_relations
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import LossFunction, StepReport, run_schedule

UNIFORMITY_ROWS = 512
"""Uniformity is measured on no more queries than this, against each other."""


@dataclass(frozen=True)
class Settled:
    """What comes of the embeddings of a global batch, on one rank."""

    gradient: Tensor
    """[m, e] derivative of N x loss with respect to this rank's embeddings, N the rows of the global batch."""
    report: StepReport
    mined_similarity: Tensor
    """[mined negatives in use, of the whole batch] fp32 cosine with their queries."""


@dataclass(frozen=True)
class _Side:
    """Embeddings of one source's texts, cut to one size."""

    query: Tensor
    """[a, e] unit vectors."""
    document: Tensor
    """[d, e] unit vectors."""


class Contrastive:
    """Forward and backward over one global batch.

    Every rank embeds its share of the texts. The embeddings of all ranks are gathered; each rank computes the losses of its
    own rows against all of them, and the gradient with respect to every embedding; gradients are added up over ranks, and
    each rank back-propagates those of its own texts, as sum(embedding x gradient). So value and gradient are those of one
    process on the whole batch, however the texts are shared out. docs/training.md derives the scale.

    With one micro-batch this happens in the one forward and backward pass. With several, a first pass embeds without a graph,
    the gradients are computed once, and a second pass back-propagates them (Gao et al. 2021, GradCache): memory is that of
    one micro-batch and of the embeddings. Both passes go through megatron-core's schedule, and so through the pipeline.
    """

    def __init__(self, setup: Setup, data: Pairs) -> None:
        """`data` holds the negatives tables that the losses' similarities update."""
        self.setup, self.data = setup, data
        self._seen: tuple[PairStep, Tensor | None] | None = None

    def forward_backward(self, chunks: list[DistributedDataParallel], step: PairStep) -> list[StepReport]:
        """Accumulate the gradients of a step. All ranks must call. Returns the report, on the last pipeline stage only."""
        settled: list[Settled] = []

        def settle(embeddings: list[Tensor]) -> None:
            """Once all of this rank's embeddings are there."""
            used = [e.detach()[:count] for e, count in zip(embeddings, step.num_embedded, strict=True)]
            settled.append(self.settle(step, torch.cat(used)))

        if len(step.micro_batches) > 1:
            with torch.no_grad():
                embeddings = self._schedule(chunks, step, None)
            if self.setup.context.is_last_stage:
                settle(embeddings)

        def loss(index: int, embeddings: Tensor) -> tuple[Tensor, Tensor, StepReport]:
            if not settled:
                settle([embeddings])
            gradient = settled[0].gradient.split(step.num_embedded)[index]
            surrogate = (embeddings[: step.num_embedded[index]] * gradient).sum()
            num_rows = self._num_own_rows(step) if index == 0 else 0
            count = torch.tensor(num_rows, dtype=torch.int32, device=embeddings.device)
            return surrogate, count, StepReport()

        self._schedule(chunks, step, loss)
        self._seen = (step, settled[0].mined_similarity if settled else None)
        return [settled[0].report] if settled else []

    def _schedule(
        self,
        chunks: list[DistributedDataParallel],
        step: PairStep,
        loss: Callable[[int, Tensor], tuple[Tensor, Tensor, StepReport]] | None,
    ) -> list[Tensor]:
        """One pass over the micro-batches: forward only without a loss."""

        def forward_step(
            batches: Iterator[tuple[int, PackedTexts]], model: torch.nn.Module
        ) -> tuple[Tensor, LossFunction | None]:
            index, batch = next(batches)
            embeddings = model(batch.tokens, batch.sequences, prompt_lengths=batch.prompt_lengths)
            return embeddings, None if loss is None else partial(loss, index)

        return run_schedule(
            chunks,
            forward_step,
            list(enumerate(step.micro_batches)),
            seq_length=step.micro_batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=loss is None,
        )

    def settle(self, step: PairStep, own: Tensor) -> Settled:
        """The loss of this rank's rows, and the whole loss's derivative with respect to this rank's embeddings.

        All data-parallel ranks (of the last pipeline stage) must call.

        Args:
            step: the global batch.
            own: [m, e] fp32 embeddings of this rank's texts, in the order of its micro-batches.
        """
        context, settings = self.setup.context, self.setup.config.contrastive
        place = torch.from_numpy(step.gathered).to(own.device)
        gathered = gather_rows(own, step.sizes, context.dp_group)
        texts = torch.empty_like(gathered).index_copy_(0, place, gathered).requires_grad_()  # [n, e], as counted
        report = StepReport()
        main, *beside = step.batches
        num_rows = len(main.rows)
        total = getattr(settings.task_weights, main.task) * self._loss_sum(
            main, texts[: main.num_texts], num_rows, report
        )
        for scored in beside:
            assert settings.batch_balance is not None
            weight = settings.batch_balance.weight * settings.task_weights.sts
            total = total + weight * self._loss_sum(scored, texts[main.num_texts :], num_rows, report)
        (gradient,) = torch.autograd.grad(total, texts)
        report.means["loss"] = (total.item(), self._num_own_rows(step))
        query, document = texts.detach()[: main.num_texts].split([len(main.query_ids), len(main.document_ids)])
        self._report_batch(step, query, report)
        own_gradient = return_gradient(gradient.index_select(0, place), step.sizes, context.dp_group).contiguous()
        if context.tp_size > 1:
            # tensor ranks add by index each for itself, on a GPU in any order: their replicated weights must not drift apart
            assert context.tp_group is not None
            dist.broadcast(own_gradient, dist.get_process_group_ranks(context.tp_group)[0], group=context.tp_group)
        return Settled(own_gradient, report, _mined_similarity(main, query, document))

    def _loss_sum(self, batch: PairBatch, texts: Tensor, num_rows: int, report: StepReport) -> Tensor:
        """This rank's part of N x the loss of one source's rows, N = `num_rows`, summed over Matryoshka sizes.

        The parts of all ranks add up to the whole.
        """
        settings, context = self.setup.config.contrastive, self.setup.context
        begin, end = own_rows(batch, context.dp_rank, context.dp_size)
        relations = None
        if batch.task != "sts":
            relations = row_relations(
                batch,
                begin,
                end,
                texts.device,
                with_queries="queries" in settings.in_batch_negatives,
                with_positives=settings.symmetric,
            )
        whole = texts.shape[1]
        dims = settings.matryoshka_dims or [whole]
        dim_weights = settings.matryoshka_weights or [1.0] * len(dims)
        total = texts.new_zeros(())
        for dim, weight in zip(dims, dim_weights, strict=True):
            cut = truncate(texts, dim)
            query, document = cut.split([len(batch.query_ids), len(batch.document_ids)])
            side = _Side(query, document)
            if relations is None:
                # every rank computes the whole loss; a share of it each makes the whole
                loss = self._scored_loss(batch, side) * num_rows / context.dp_size
            else:
                seen = report if dim == max(dims) else None
                loss = self._retrieval_losses(relations, side, seen).sum()
            total = total + weight * loss
        count = num_rows / context.dp_size if relations is None else end - begin
        report.means[f"loss_{batch.task}"] = (total.item(), count)
        return total

    def _retrieval_losses(self, relations: RowRelations, side: _Side, report: StepReport | None) -> Tensor:
        """[q] InfoNCE."""
        settings = self.setup.config.contrastive
        query = side.query.index_select(0, relations.row_query)  # [q, e]
        positive = side.document.index_select(0, relations.positive_document)  # [p, e]
        positive_similarity = (query.index_select(0, relations.positive_row) * positive).sum(-1)
        in_batch = "documents" in settings.in_batch_negatives
        with torch.set_grad_enabled(not in_batch):  # a metric only, where the bank of documents holds them
            hard = side.document.index_select(0, relations.negative_document)
            hard_similarity = (query.index_select(0, relations.negative_row) * hard).sum(-1)  # [m]
        banks, own = [], None
        if in_batch:
            banks.append(Bank(query, side.document, relations.documents))
        else:
            own = OwnNegatives(relations.negative_row, hard_similarity)
        if relations.queries is not None:
            banks.append(Bank(query, side.query, relations.queries))
        if "same_side" in settings.in_batch_negatives:
            first = side.document.index_select(0, relations.first_positive)
            banks.append(Bank(first, side.document, relations.documents))
        loss = info_nce_loss(
            relations.positive_row,
            positive_similarity,
            relations.num_rows,
            banks,
            temperature=settings.temperature,
            own=own,
            margin=settings.false_negative_margin,
        )
        losses = loss.losses
        if relations.positives is not None:
            losses = 0.5 * (losses + self._reverse_losses(relations, positive, positive_similarity, side.query))
        if report is not None:
            _report_retrieval(report, loss, positive_similarity, hard_similarity)
        return losses

    def _reverse_losses(
        self, relations: RowRelations, positive: Tensor, positive_similarity: Tensor, query: Tensor
    ) -> Tensor:
        """[q] loss of finding the query of each positive among the queries of all ranks; mean over a row's positives."""
        settings, num_positives = self.setup.config.contrastive, len(positive)
        assert relations.positives is not None
        losses = info_nce_loss(
            torch.arange(num_positives, device=positive.device),
            positive_similarity,
            num_positives,
            [Bank(positive, query, relations.positives)],
            temperature=settings.temperature,
            margin=settings.false_negative_margin,
        ).losses
        counts = torch.bincount(relations.positive_row, minlength=relations.num_rows)
        shares = losses / counts[relations.positive_row]
        return torch.zeros_like(counts, dtype=losses.dtype).index_add(0, relations.positive_row, shares)

    def _scored_loss(self, batch: PairBatch, side: _Side) -> Tensor:
        """CoSENT over the pairs of all ranks."""
        row_query = torch.from_numpy(batch.row_query).to(side.query.device)
        document = torch.from_numpy(batch.positive[1]).to(side.query.device)
        similarity = (side.query.index_select(0, row_query) * side.document.index_select(0, document)).sum(-1)  # [q]
        scores = torch.from_numpy(batch.scores).to(similarity.device)
        return cosent(similarity, scores, self.setup.config.contrastive.cosent_temperature)

    def _num_own_rows(self, step: PairStep) -> int:
        begin, end = own_rows(step.batches[0], self.setup.context.dp_rank, self.setup.context.dp_size)
        return end - begin

    def after_update(self) -> dict[str, float]:
        """Let the similarities of the step's loss replace mined negatives. All ranks must call, if the weights have changed.

        Returns:
            Metrics, the same on every rank.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return {}
        step, known = seen
        batch, context = step.batches[0], self.setup.context
        mining, table = self.setup.config.mining, self.data.negatives.get(batch.store.name)
        if mining is None or step.step is None or not self.data.negatives:
            return {}
        mined = batch.slots >= 0  # none in a batch of a source that is not mined
        similarity = torch.empty(int(mined.sum()), dtype=torch.float32, device=context.device)
        if known is not None:
            similarity = known
        if context.world_size > 1 and mined.any():
            # one rank of the last pipeline stage speaks for all, so that not one bit differs
            source = context.world_size // context.pp_size * (context.pp_size - 1)
            dist.broadcast(similarity, source, group=context.world_group)
        scored = batch.rows[batch.negative[0, mined]], batch.slots[mined], similarity.cpu().numpy()
        values: dict[str, float] = {}
        if table is not None:
            drift, count = table.drift(*scored)
            values |= {"negatives_drift": drift / count} if count else {}
        if mining.rule != "none":
            values["negatives_replaced"] = float(self.data.update_negatives(batch.store.name, *scored, step.step))
        return values

    def _report_batch(self, step: PairStep, query: Tensor, report: StepReport) -> None:
        """Spread of the queries (all [a, e] of the main batch), and what the texts of this rank cost."""
        context = self.setup.context
        rows = query[:UNIFORMITY_ROWS]
        begin, end = (len(rows) * (context.dp_rank + i) // context.dp_size for i in (0, 1))
        report.log_means["uniformity"] = uniformity_sum(rows[begin:end], rows, begin)
        computed = sum(batch.tokens.numel() for batch in step.micro_batches)
        attended = step.num_tokens
        if not computes_packed(self.setup.config.attention.backend, attention_case(self.setup.config, context.device)):
            attended = sum(len(batch.sequences.to_padded) for batch in step.micro_batches)
        report.totals |= {"tokens": float(step.num_tokens), "attended_pairs": step.attended_pairs}
        report.means["wasted_tokens"] = (computed - step.num_tokens, computed)
        report.means["attention_padding"] = (attended - step.num_tokens, attended)
        report.means["truncated_texts"] = (step.num_truncated, sum(step.num_embedded))


def _mined_similarity(batch: PairBatch, query: Tensor, document: Tensor) -> Tensor:
    """[mined negatives] cosine of each mined negative of the batch with its query."""
    row, place = batch.negative[:, batch.slots >= 0]
    own, other = (torch.from_numpy(index).to(query.device) for index in (batch.row_query[row], place))
    return (query.index_select(0, own) * document.index_select(0, other)).sum(-1)


def _report_retrieval(
    report: StepReport, loss: ContrastiveLoss, positive_similarity: Tensor, hard_similarity: Tensor
) -> None:
    """Metrics of this rank's rows; the same names on every rank, whatever it has."""
    num_rows, num_positives = len(loss.losses), len(positive_similarity)
    num_negatives = int(loss.num_negatives.sum().item())
    positive = positive_similarity.detach()
    report.means |= {
        "in_batch_accuracy": (float(loss.correct.sum().item()), num_rows),
        "positive_similarity": (positive.sum().item(), num_positives),
        "negative_similarity": (loss.negative_total.sum().item(), num_negatives),
        "alignment": (alignment(positive).sum().item(), num_positives),
        "negatives_per_query": (float(num_negatives), num_rows),
        "masked_negatives": (float(loss.num_masked.sum().item()), num_rows),
        "hard_negative_similarity": (hard_similarity.detach().sum().item(), len(hard_similarity)),
    }
