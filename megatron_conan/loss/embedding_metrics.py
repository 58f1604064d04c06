"""Alignment and uniformity of embeddings on the unit sphere (Wang & Isola 2020, arXiv 2005.10242). No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_conan.loss.blockwise import Exclusions, negative_logsumexp


def alignment(positive_similarity: Tensor) -> Tensor:
    """Squared distance of each positive pair, ||x - y||^2 = 2 - 2 cos(x, y). [p] cosines -> [p], lower is better."""
    return 2 - 2 * positive_similarity.detach()


@torch.no_grad()
def uniformity_sum(own: Tensor, everyone: Tensor, own_start: int) -> tuple[float, int]:
    """Sum over pairs of exp(-2 ||x - y||^2), for ranks to add up. Uniformity is log(sum / number), lower is better.

    Args:
        own: [a, e] unit vectors.
        everyone: [b, e] unit vectors.
        own_start: rows own_start .. own_start + a of `everyone` are `own`; a row makes no pair with itself.

    Returns:
        The sum, and the number of (ordered) pairs: a * (b - 1).
    """
    row = torch.arange(len(own), device=own.device)
    excluded = Exclusions.nothing(len(own), len(everyone), own.device).with_pairs(torch.stack([row, own_start + row]))
    # -2 ||x - y||^2 = 4 cos - 4
    logsumexp, seen = negative_logsumexp(own, everyone, 0.25, excluded)
    return float(torch.exp(logsumexp.double() - 4).sum().item()), int(seen.count.sum().item())
