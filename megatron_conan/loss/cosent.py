"""CoSENT: ranks pairs by their labelled similarity."""

from __future__ import annotations

import torch
from torch import Tensor


def cosent(similarities: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """log(1 + sum over all (a, b) with score_a > score_b of exp((cos_b - cos_a) / temperature)).

    Time O(p log p), memory O(p): with the pairs sorted by score, the b of each a are a prefix. In fp64 inside, which costs
    nothing at this size: in fp32, gradients of the cumulative sum are off by 5e-4 at temperature 1e-4.

    Source: Conan-embedding (arXiv 2408.15710), after Su's CoSENT.

    Args:
        similarities: [p] cosine similarity of each pair; the pairs of all ranks.
        scores: [p] labels; only their order counts.
        temperature: divisor of the differences.

    Returns:
        Scalar fp32 (fp64 for fp64 similarities).
    """
    ordered, order = scores.sort()
    logits = similarities.double()[order] / temperature
    nothing = logits.new_full((1,), -torch.inf)
    prefixes = torch.cat([nothing, logits.logcumsumexp(dim=0)])  # [p + 1]: over the first i pairs
    lower = prefixes[torch.searchsorted(ordered, ordered)]  # [p] over all pairs of a strictly lower score
    loss = torch.logsumexp(torch.cat([logits.new_zeros(1), lower - logits]), dim=0)
    return loss.to(torch.promote_types(similarities.dtype, torch.float32))
