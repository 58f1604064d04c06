"""InfoNCE as a pure function of embeddings.

Shapes: `q` rows (queries), `p` their positives, `m` own negatives, `k` candidates of a bank, `e` embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_conan.loss.blockwise import BLOCK_SIZE, Exclusions, NegativeStatistics, negative_logsumexp


@dataclass(frozen=True)
class Bank:
    """Candidates that are negatives of every row, seen from one anchor a row."""

    anchor: Tensor
    """[q, e] unit vectors."""
    candidate: Tensor
    """[k, e] unit vectors."""
    excluded: Exclusions
    """Of [q] anchors and [k] candidates; a row's positives must be among them."""


@dataclass(frozen=True)
class OwnNegatives:
    """Negatives of single rows, where negatives from the batch make no sense."""

    row: Tensor
    """[m] int64."""
    similarity: Tensor
    """[m] cosine to the row; carries the gradient."""


@dataclass(frozen=True)
class ContrastiveLoss:
    """Losses and what was seen on the way. All but `losses` is detached."""

    losses: Tensor
    """[q] fp32, one loss a row; carries the gradient."""
    correct: Tensor
    """[q] bool: every positive of the row scored above every negative that counts, and there is one."""
    num_negatives: Tensor
    """[q] int64, negatives that count."""
    num_masked: Tensor
    """[q] int64, left out because of the margin."""
    negative_total: Tensor
    """[q] fp32, sum of the cosines of the negatives that count."""


def info_nce_loss(
    positive_row: Tensor,
    positive_similarity: Tensor,
    num_rows: int,
    banks: Sequence[Bank],
    *,
    temperature: float,
    own: OwnNegatives | None = None,
    margin: float | None = None,
    block_size: int = BLOCK_SIZE,
) -> ContrastiveLoss:
    """-log(exp(s) / (exp(s) + Z)), the mean over each row's positives (van den Oord et al. 2018).

    s is the positive's cosine / temperature, Z the sum of exp(cosine / temperature) over the row's negatives that count, of
    all banks together. A row without any has loss 0. Computed in fp32 (fp64 for fp64 input).

    Args:
        positive_row: [p] int64, the row of each positive. Every row has at least one.
        positive_similarity: [p] cosines; carry the gradient.
        num_rows: q.
        banks: negatives of all rows; may be empty.
        temperature: divisor of the cosines.
        own: negatives of single rows.
        margin: a candidate that scores above the row's lowest positive + margin doesn't count: it is probably a positive
            that nobody labelled (Qwen3-Embedding, arXiv 2506.05176, eq. 2, with 0.1).
        block_size: of the banks' blocks of logits.
    """
    similarity = positive_similarity.to(torch.promote_types(positive_similarity.dtype, torch.float32))
    lowest = similarity.new_full((num_rows,), torch.inf)
    lowest = lowest.scatter_reduce(0, positive_row, similarity.detach(), "amin")  # [q]
    ceiling = None if margin is None else lowest + margin
    parts = [
        negative_logsumexp(bank.anchor, bank.candidate, temperature, bank.excluded, ceiling, block_size=block_size)
        for bank in banks
    ]
    if own is not None:
        parts.append(_own_logsumexp(own, num_rows, temperature, ceiling))
    rows = torch.arange(num_rows, device=similarity.device)
    logsumexps = torch.cat([similarity.new_empty(0), *(part for part, _ in parts)])
    negatives = _logsumexp_by_row(logsumexps, rows.repeat(len(parts)), num_rows)  # [q]
    # -log(e^s / (e^s + e^z)) = log(1 + e^(z - s)); exact and without NaN for z = -inf
    difference = negatives[positive_row] - similarity / temperature
    terms = torch.logaddexp(torch.zeros_like(difference), difference)  # [p]
    losses = torch.zeros_like(negatives).index_add(0, positive_row, terms)
    losses = losses / torch.bincount(positive_row, minlength=num_rows)
    seen = _add_statistics([statistics for _, statistics in parts], lowest)
    return ContrastiveLoss(losses, (lowest > seen.highest) & (seen.count > 0), seen.count, seen.masked, seen.total)


def _own_logsumexp(
    own: OwnNegatives, num_rows: int, temperature: float, ceiling: Tensor | None
) -> tuple[Tensor, NegativeStatistics]:
    """`negative_logsumexp` ([q]) for negatives of single rows."""
    similarity = own.similarity.to(torch.promote_types(own.similarity.dtype, torch.float32))
    seen, zeros = similarity.detach(), similarity.new_zeros(num_rows)
    above = torch.zeros_like(seen, dtype=torch.bool) if ceiling is None else seen > ceiling[own.row]
    logits = (similarity / temperature).masked_fill(above, -torch.inf)
    highest = (zeros - torch.inf).scatter_reduce(0, own.row, seen.masked_fill(above, -torch.inf), "amax")
    statistics = NegativeStatistics(
        count=torch.bincount(own.row[~above], minlength=num_rows),
        masked=torch.bincount(own.row[above], minlength=num_rows),
        highest=highest,
        total=zeros.index_add(0, own.row, seen.masked_fill(above, 0)),
    )
    return _logsumexp_by_row(logits, own.row, num_rows), statistics


def _logsumexp_by_row(logits: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """[q] log-sum-exp of the logits ([m]) of each row ([m] int64). -inf, with zero gradients, for rows without any."""
    highest = logits.new_full((num_rows,), -torch.inf).scatter_reduce(0, row, logits.detach(), "amax")
    shift = highest.masked_fill(highest == -torch.inf, 0)
    sums = torch.zeros_like(shift).index_add(0, row, torch.exp(logits - shift[row]))
    empty = highest == -torch.inf
    return (sums.masked_fill(empty, 1).log() + shift).masked_fill(empty, -torch.inf)


def _add_statistics(parts: list[NegativeStatistics], like: Tensor) -> NegativeStatistics:
    """The statistics of all parts as one; `like` is [q], for where there is no part."""
    count = torch.zeros_like(like, dtype=torch.int64)
    result = NegativeStatistics(count, count, torch.full_like(like, -torch.inf), torch.zeros_like(like))
    for part in parts:
        result = NegativeStatistics(
            result.count + part.count,
            result.masked + part.masked,
            torch.maximum(result.highest, part.highest),
            result.total + part.total,
        )
    return result
