"""Batches as named fields with shapes. Legend: b micro-batch, s sequence, n texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class TextBatch:
    """Texts, right padded."""

    tokens: torch.Tensor
    """[n, s] int64, padded on the right with the pad id."""
    lengths: torch.Tensor
    """[n] int64, number of real tokens of each text."""
    prompt_length: int = 0
    """Tokens of the prompt that all of them begin with."""

    def to(self, device: torch.device | str) -> TextBatch:
        """The same batch on `device`."""
        tokens, lengths = (x.to(device, non_blocking=True) for x in (self.tokens, self.lengths))
        return TextBatch(tokens, lengths, self.prompt_length)


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


def collate_texts(
    sequences: Sequence[np.ndarray], pad_id: int, pad_multiple: int = 8, prompt_length: int = 0
) -> TextBatch:
    """Right-pad formatted texts into one batch.

    Args:
        sequences: n arrays of token ids.
        pad_id: fills the positions behind a text.
        pad_multiple: s is the longest length, rounded up to a multiple of this.
        prompt_length: tokens of the prompt that all of them begin with.

    Returns:
        TextBatch with tokens [n, s]; s is 0 if all texts are empty or there are none.
    """
    if pad_multiple < 1:
        raise ValueError(f"pad_multiple={pad_multiple} must be at least 1")
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    width = -(-longest // pad_multiple) * pad_multiple
    tokens = np.full((len(sequences), width), pad_id, dtype=np.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return TextBatch(torch.from_numpy(tokens), torch.from_numpy(lengths), prompt_length)
