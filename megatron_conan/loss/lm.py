"""Next-token loss."""

from __future__ import annotations

from torch import Tensor


def masked_sum(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of per-token losses and their count.

    Args:
        losses: [b, s] fp32.
        loss_mask: [b, s], 1 where the label counts.

    Returns:
        Sum (scalar fp32) and count (scalar int32).
    """
    return (losses * loss_mask).sum(), loss_mask.sum().int()
