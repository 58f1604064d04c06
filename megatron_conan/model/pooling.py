"""From token vectors to one unit-length embedding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def pool(hidden: Tensor, lengths: Tensor, mode: Literal["mean", "last"]) -> Tensor:
    """Pool right-padded sequences and normalise, in fp32.

    Args:
        hidden: [s, b, h] token vectors.
        lengths: [b] true lengths, at least 1.
        mode: mean over the sequence's tokens, or its last token (the EOS that every formatted text ends with).

    Returns:
        [b, h] fp32 with unit length.
    """
    hidden = hidden.float()
    if mode == "mean":
        inside = (torch.arange(hidden.shape[0], device=hidden.device)[:, None] < lengths).to(hidden.dtype)  # [s, b]
        pooled = torch.einsum("sbh,sb->bh", hidden, inside) / lengths[:, None]
    elif mode == "last":
        pooled = hidden[lengths - 1, torch.arange(hidden.shape[1], device=hidden.device)]  # [b, h]
    else:
        raise ValueError(f"unknown pooling mode {mode!r}; known are mean, last")
    return torch.nn.functional.normalize(pooled, dim=-1)
