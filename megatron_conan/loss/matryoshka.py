"""Embeddings that may be cut short (Kusupati et al. 2022, arXiv 2205.13147): a loss is computed at several widths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def truncate(embeddings: Tensor, dim: int) -> Tensor:
    """The first `dim` columns of unit vectors, of unit length again.

    Args:
        embeddings: [n, e] unit vectors.
        dim: columns to keep, at most e.

    Returns:
        [n, dim] fp32 (fp64 for fp64 input); `embeddings` itself where dim is e.
    """
    if dim == embeddings.shape[1]:
        return embeddings
    return normalize(embeddings[:, :dim].to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)
