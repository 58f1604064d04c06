"""Batches as named fields with shapes. Legend: b micro-batch, s sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class LMBatch:
    """Sequences for next-token prediction."""

    tokens: torch.Tensor
    """[b, s] int64, inputs."""
    labels: torch.Tensor
    """[b, s] int64, `labels[:, i]` follows `tokens[:, i]`."""
    loss_mask: torch.Tensor
    """[b, s] float32, 1 where the label counts."""
    lengths: torch.Tensor
    """[b] int64, number of real input tokens."""

    def to(self, device: torch.device | str) -> LMBatch:
        """The same batch on `device`."""
        return LMBatch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
        )
