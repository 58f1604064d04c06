"""InfoNCE as a pure function of embeddings.

Shapes: `q` queries of this rank, `d` documents of all ranks, `e` embedding dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class InfoNCE:
    """Losses and what was seen on the way."""

    losses: Tensor
    """[q] fp32, one loss a query; carries the gradient."""
    similarities: Tensor
    """[q, d] fp32 cosine similarities, detached."""
    correct: Tensor
    """[q] bool: the positive scored above every document that was not excluded."""


def info_nce(query: Tensor, document: Tensor, positive: Tensor, excluded: Tensor, temperature: float) -> InfoNCE:
    """-log softmax of the positive among all documents that are not excluded (van den Oord et al. 2018).

    Computed in fp32; similarities are divided by the temperature before anything is masked.

    Args:
        query: [q, e] unit vectors.
        document: [d, e] unit vectors; the documents of all ranks.
        positive: [q] int64, index of each query's positive in `document`.
        excluded: [q, d] bool, documents that must not count as negatives of a query (known positives, duplicates); the
            positive itself never counts as excluded.
        temperature: divisor of the cosine similarities.
    """
    similarities = query.float() @ document.float().T  # [q, e] x [e, d] -> [q, d]
    logits = similarities / temperature
    own = torch.nn.functional.one_hot(positive, document.shape[0]).bool()  # [q, d]
    logits = logits.masked_fill(excluded & ~own, -torch.inf)
    losses = torch.nn.functional.cross_entropy(logits, positive, reduction="none")
    correct = logits.detach().argmax(dim=1) == positive
    return InfoNCE(losses, similarities.detach(), correct)


def excluded_documents(
    query_ids: Tensor, document_ids: Tensor, document_owner_ids: Tensor, known_positive: Tensor
) -> Tensor:
    """Which documents are no negatives of which queries.

    Args:
        query_ids: [q] text ids.
        document_ids: [d] text ids.
        document_owner_ids: [d] text id of the query whose positive the document is; -1 for hard negatives.
        known_positive: [q, d] bool, the data names the document as a positive of the query.

    Returns:
        [q, d] bool: known positives, the positives of another row with the same query text, and the query's own text.
    """
    same_query = query_ids[:, None] == document_owner_ids[None, :]
    same_text = query_ids[:, None] == document_ids[None, :]
    return known_positive | same_query | same_text
