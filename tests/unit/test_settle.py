"""The loss that a config asks for, against the same written out row by row in plain torch: value and gradient."""

from typing import Any

import numpy as np
import pytest
import torch
from pair_builder import builder, stores
from torch import Tensor
from torch.nn.functional import normalize

from megatron_conan.config.tree import ContrastiveConfig
from megatron_conan.data.pair_batch import PairBatch
from megatron_conan.train.contrastive import Contrastive

__all__ = ["builder", "stores"]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"false_negative_margin": 0.1},
    "all negatives": {"in_batch_negatives": ["documents", "queries", "same_side"], "false_negative_margin": 0.2},
    "own negatives": {"in_batch_negatives": [], "num_hard_negatives": 2},
    "symmetric": {"symmetric": True, "false_negative_margin": 0.1},
    "sizes": {"matryoshka_dims": [8, 64, 16], "matryoshka_weights": [0.3, 0.7, 2.0]},
    "weights": {
        "task_weights": {"retrieval": 3.0, "classification": 5.0, "sts": 0.3},
        "batch_balance": {"scored_batch_size": 7, "weight": 0.6},
        "cosent_temperature": 0.2,
    },
}


def scored_loss(batch: PairBatch, query: Tensor, document: Tensor, c: ContrastiveConfig) -> Tensor:
    cosine = (query[batch.row_query] * document[batch.positive[1]]).sum(-1)
    higher = torch.from_numpy(batch.scores[:, None] > batch.scores[None, :])
    return torch.log(1 + torch.exp((cosine[None, :] - cosine[:, None]) / c.cosent_temperature)[higher].sum())


def info_nce(positive: Tensor, negatives: list[Tensor], ceiling: float, temperature: float) -> Tensor:
    kept = [x for x in negatives if x.item() <= ceiling]
    logits = torch.stack([positive, *kept]) / temperature
    return logits.logsumexp(0) - logits[0]


def retrieval_loss(batch: PairBatch, query: Tensor, document: Tensor, c: ContrastiveConfig) -> Tensor:
    related = set(zip(*batch.related.tolist(), strict=True))
    known = {a: {d for q, d in related if q == a} for a in range(len(query))}
    margin = np.inf if c.false_negative_margin is None else c.false_negative_margin

    def is_positive(a: int, d: int) -> bool:
        if batch.query_labels is None:
            return (a, d) in related
        return batch.query_labels[a] == batch.document_labels[d] or (a, d) in related

    def are_alike(a: int, b: int) -> bool:
        if batch.query_labels is not None and batch.query_labels[a] == batch.query_labels[b]:
            return True
        return a == b or bool(known[a] & known[b])

    losses = []
    for row, a in enumerate(batch.row_query.tolist()):
        positives = batch.positive[1, batch.positive[0] == row].tolist()
        cosines = [query[a] @ document[d] for d in positives]
        ceiling = min(x.item() for x in cosines) + margin
        others = [d for d in range(len(document)) if not is_positive(a, d)]
        negatives: list[Tensor] = []
        if "documents" in c.in_batch_negatives:
            negatives += [query[a] @ document[d] for d in others]
        else:
            negatives += [query[a] @ document[d] for d in batch.negative[1, batch.negative[0] == row].tolist()]
        if "queries" in c.in_batch_negatives:
            negatives += [query[a] @ query[b] for b in range(len(query)) if not are_alike(a, b)]
        if "same_side" in c.in_batch_negatives:
            negatives += [document[positives[0]] @ document[d] for d in others]
        loss = torch.stack([info_nce(x, negatives, ceiling, c.temperature) for x in cosines]).mean()
        if c.symmetric:
            back = [
                info_nce(
                    x,
                    [document[d] @ query[b] for b in range(len(query)) if b != a and not is_positive(b, d)],
                    x.item() + margin,
                    c.temperature,
                )
                for x, d in zip(cosines, positives, strict=True)
            ]
            loss = (loss + torch.stack(back).mean()) / 2
        losses.append(loss)
    return torch.stack(losses).mean()


def whole_loss(batches: list[PairBatch], texts: Tensor, c: ContrastiveConfig) -> Tensor:
    parts, start = [], 0
    for i, batch in enumerate(batches):
        own = texts[start : start + batch.num_texts]
        start += batch.num_texts
        loss_of = scored_loss if batch.task == "sts" else retrieval_loss
        loss = torch.zeros((), dtype=texts.dtype)
        dims = c.matryoshka_dims or [texts.shape[1]]
        for dim, weight in zip(dims, c.matryoshka_weights or [1.0] * len(dims), strict=True):
            cut = normalize(own[:, :dim], dim=-1)
            loss = loss + weight * loss_of(batch, *cut.split([len(batch.query_ids), len(batch.document_ids)]), c)
        balance = c.batch_balance.weight if c.batch_balance and i else 1.0
        parts.append(balance * getattr(c.task_weights, batch.task) * loss)
    return torch.stack(parts).sum()


@pytest.mark.parametrize("source", ["small", "labelled", "scored"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_is_the_configs(builder, options, source):
    contrastive = {"temperature": 0.1, **OPTIONS[options]}
    if contrastive.get("batch_balance") and source == "scored":
        pytest.skip("scored pairs stand beside another source")
    names = {source: {}, "scored": {}} if contrastive.get("batch_balance") else {source: {}}
    data = builder.pairs(names, contrastive=contrastive)
    step = data.batch(1)
    generator = torch.Generator().manual_seed(1)
    texts = normalize(torch.randn(sum(step.sizes), 64, generator=generator) + 0.7, dim=-1)  # as counted
    settled = Contrastive(data.setup, data).settle(step, texts[step.gathered])
    expected = texts.double().requires_grad_()
    loss = whole_loss(step.batches, expected, data.setup.config.contrastive)
    loss.backward()
    num_rows = len(step.batches[0].rows)
    total, count = settled.report.means["loss"]
    assert count == num_rows
    assert total / count == pytest.approx(loss.item(), rel=1e-5)

    # along the sphere: at the full size the engine takes the vectors as unit ones
    def tangent(gradient: Tensor) -> Tensor:
        x = texts.double()[step.gathered]
        return gradient - (gradient * x).sum(-1, keepdim=True) * x

    found = tangent(settled.gradient.double() / num_rows)
    reference = tangent(expected.grad[step.gathered])
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6 * reference.abs().max().item() + 1e-7)
