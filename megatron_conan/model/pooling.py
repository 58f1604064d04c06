"""From token vectors to one unit-length embedding a text.

Shapes: `s` sequence, `b` texts of a padded batch; `t` tokens and `n` texts of a packed one; `h` hidden.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

PoolingMode = Literal["mean", "weighted_mean", "last"]


def pooling_weights(
    position: Tensor, length: Tensor, prompt_length: Tensor | int, mode: PoolingMode, include_prompt: bool
) -> Tensor:
    """Weight of each token in its text's embedding, fp32; the weights of a text sum to 1.

    Args:
        position: place of each token in its text, from 0; tokens at or beyond `length` weigh 0.
        length: length of each token's text (broadcastable to `position`), prompt and EOS included.
        prompt_length: tokens of each text's prompt, at its start (broadcastable).
        mode: mean over the tokens; mean with the weights 1, 2, .. length by position (Muennighoff 2022, SGPT); or the last
            token alone, the EOS that every formatted text ends with.
        include_prompt: whether the prompt's tokens enter the means.
    """
    first = torch.zeros_like(length) if include_prompt else torch.zeros_like(length) + prompt_length
    inside = (position >= first) & (position < length)
    if mode == "mean":
        return inside / (length - first).float()
    if mode == "weighted_mean":
        total = (length * (length + 1) - first * (first + 1)) / 2  # sum of first+1 .. length
        return inside * (position + 1) / total.float()
    if mode == "last":
        return (position == length - 1).float()
    raise ValueError(f"unknown pooling mode {mode!r}; known are mean, weighted_mean, last")


def pool_padded(
    hidden: Tensor, lengths: Tensor, mode: PoolingMode, prompt_length: Tensor | int = 0, include_prompt: bool = True
) -> Tensor:
    """Pool right-padded texts, in fp32.

    Args:
        hidden: [s, b, h] token vectors.
        lengths: [b] true lengths, at least 1.
        mode: see `pooling_weights`.
        prompt_length: [b], or one number for all.
        include_prompt: see `pooling_weights`.

    Returns:
        [b, h] fp32, of any length.
    """
    if mode == "last":
        return hidden[lengths - 1, torch.arange(hidden.shape[1], device=hidden.device)].float()  # [b, h]
    position = torch.arange(hidden.shape[0], device=hidden.device)[:, None]  # [s, 1]
    weights = pooling_weights(position, lengths, prompt_length, mode, include_prompt)  # [s, b]
    return torch.einsum("sbh,sb->bh", hidden.float(), weights)


def pool_packed(
    hidden: Tensor,
    position: Tensor,
    lengths: Tensor,
    mode: PoolingMode,
    prompt_lengths: Tensor,
    include_prompt: bool = True,
) -> Tensor:
    """Pool texts that stand one behind the other, in fp32; what follows the last one is left out.

    Args:
        hidden: [t or more, h] token vectors.
        position: [t] int64 place of each token in its text, from 0; t is the sum of the lengths.
        lengths: [n] int64 lengths in the order of the texts, at least 1.
        mode: see `pooling_weights`.
        prompt_lengths: [n] int64.
        include_prompt: see `pooling_weights`.

    Returns:
        [n, h] fp32, of any length.
    """
    ends = lengths.cumsum(0)
    if mode == "last":
        return hidden.index_select(0, ends - 1).float()
    num_tokens = int(position.shape[0])
    text = torch.repeat_interleave(
        torch.arange(len(lengths), device=hidden.device), lengths, output_size=num_tokens
    )  # [t] text of each token
    weights = pooling_weights(position, lengths[text], prompt_lengths[text], mode, include_prompt)  # [t]
    return _WeightedSums.apply(hidden[:num_tokens], weights, text, lengths)


class _WeightedSums(torch.autograd.Function):
    """Weighted sum of each text's tokens, fp32. Deterministic also on a GPU, which adding by index is not.

    Its gradient is a gather, which is faster than that of segment_reduce.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """[t, h], [t], [t] and [n] -> [n, h]."""
        ctx.save_for_backward(weights, text)
        ctx.dtype = hidden.dtype
        return torch.segment_reduce(hidden.float() * weights[:, None], "sum", lengths=lengths, axis=0, unsafe=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, text = ctx.saved_tensors
        tokens = gradients[0].index_select(0, text).mul_(weights[:, None])  # [n, h] -> [t, h]
        return tokens.to(ctx.dtype), None, None, None
