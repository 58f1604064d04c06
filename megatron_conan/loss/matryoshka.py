"""Embeddings that may be cut short (Kusupati et al. 2022, arXiv 2205.13147): a loss is computed at several widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def check_dims(dims: Sequence[int], width: int) -> None:
    """ValueError unless `dims` are distinct widths from 1 to `width`, that of the whole embedding."""
    wrong = [dim for dim in dims if not 1 <= dim <= width]
    if wrong:
        raise ValueError(f"matryoshka dims {list(dims)}: {wrong} not in 1..{width}, the embedding's width; remove them")
    if len(set(dims)) < len(dims):
        raise ValueError(f"matryoshka dims {list(dims)} must be distinct; name each one once")


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
