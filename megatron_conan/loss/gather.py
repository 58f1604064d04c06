"""Gather rows of different counts over data-parallel ranks, with the gradient.

Over the dp group only: over the world, tensor-parallel ranks would bring every row twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_sizes(num_rows: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """Every rank's row count. All ranks of `group` must call; None is a lone process."""
    if group is None or group.size() == 1:
        return [num_rows]
    counts = torch.zeros(group.size(), dtype=torch.int64, device=device)
    counts[group.rank()] = num_rows
    dist.all_reduce(counts, group=group)
    return counts.tolist()


def gather_rows(local: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the ranks' rows, without a gradient.

    Args:
        local: [m, ...] this rank's rows.
        sizes: row counts of all ranks (`gather_sizes`).
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


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int], group: dist.ProcessGroup, sum_gradients: bool) -> Tensor:
        ctx.sizes, ctx.group, ctx.sum_gradients = sizes, group, sum_gradients
        return gather_rows(local, sizes, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        if ctx.sum_gradients:
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient, group=ctx.group)
        start = sum(ctx.sizes[: ctx.group.rank()])
        return gradient[start : start + ctx.sizes[ctx.group.rank()]], None, None, None


def gather_with_gradient(
    local: Tensor, sizes: list[int], group: dist.ProcessGroup | None, *, sum_gradients: bool
) -> Tensor:
    """Concatenate the ranks' rows so that gradients flow back to the rank that brought them.

    Args:
        local: [m, e] this rank's rows.
        sizes: row counts of all ranks.
        group: the dp group. All its ranks must call, forward and backward.
        sum_gradients: True where each rank's loss is its own part of the total (gradients of a row add up over ranks);
            False where every rank computes the same total loss (each rank's gradient is whole already).

    Returns:
        [sum(sizes), e].
    """
    if len(sizes) == 1:
        return local
    return _GatherRows.apply(local, sizes, group, sum_gradients)
