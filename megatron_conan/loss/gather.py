"""Bring the embeddings of all data-parallel ranks together, and their gradients back.

Over the dp group only: over the world, tensor-parallel ranks would bring every row twice.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(local: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the ranks' rows, without a gradient.

    Args:
        local: [m, ...] this rank's rows.
        sizes: row counts of all ranks.
        group: the dp group. All its ranks must call.

    Returns:
        [sum(sizes), ...], the same on every rank.
    """
    if len(sizes) == 1:
        return local
    padded = local.new_zeros((max(sizes), *local.shape[1:]))
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def return_gradient(gradient: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Add the ranks' gradients with respect to gathered rows up, and keep this rank's rows: the adjoint of `gather_rows`.

    Args:
        gradient: [sum(sizes), ...] derivative of this rank's part of the loss; overwritten.
        sizes: row counts of all ranks.
        group: the dp group. All its ranks must call.

    Returns:
        [m, ...] derivative of the whole loss with respect to this rank's rows.
    """
    if len(sizes) == 1:
        return gradient
    assert group is not None
    dist.all_reduce(gradient, group=group)
    start = sum(sizes[: group.rank()])
    return gradient[start : start + sizes[group.rank()]]
