"""CoSENT: ranks pairs by their labelled similarity."""

from __future__ import annotations

import torch
from torch import Tensor


def cosent(similarities: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """log(1 + sum over all (a, b) with score_a > score_b of exp((cos_b - cos_a) / temperature)).

    Source: Conan-embedding (arXiv 2408.15710), after Su's CoSENT.

    Args:
        similarities: [p] fp32 cosine similarity of each pair; the pairs of all ranks.
        scores: [p] labels; only their order counts.
        temperature: divisor of the differences.

    Returns:
        Scalar fp32.
    """
    differences = (similarities[None, :] - similarities[:, None]) / temperature  # [a, b]: cos_b - cos_a
    differences = differences.masked_fill(scores[:, None] <= scores[None, :], -torch.inf)
    zero = differences.new_zeros(1)
    return torch.logsumexp(torch.cat([zero, differences.flatten()]), dim=0)
