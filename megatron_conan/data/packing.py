"""Texts packed one behind the other, and the micro-batches that they are put into.

Shapes: `n` texts, `t` tokens of a packed micro-batch, `p` tokens of the same texts padded for attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GROUP_RATIO = 0.75
"""Attention that knows no packing takes texts in padded groups; the shortest text of a group has at least this share of its
longest one's tokens. Smaller means fewer, larger calls and more padding."""


@dataclass(frozen=True)
class PaddedGroup:
    """Texts that attention takes together, right padded."""

    num_texts: int
    width: int
    """Tokens of the longest."""
    lengths: Tensor | None
    """[num_texts] int64; None if all are as long as the longest."""


@dataclass(frozen=True)
class PackedSequences:
    """Where the texts of one packed row begin and end; takes the place of lengths [b] of a padded batch."""

    lengths: Tensor
    """[n] int64."""
    cu_seqlens: Tensor
    """[n + 1] int32, starts of the texts and the end of the last."""
    max_length: int
    """Tokens of the longest text."""
    position: Tensor
    """[sum of lengths] int64, place of each token in its text."""
    num_tokens: int
    """t, with what follows the last text."""
    groups: list[PaddedGroup]
    """All texts, in their order, for attention that knows no packing."""
    to_padded: Tensor
    """[p] int64: packed token at each place of the padded groups (flattened, one behind the other); 0 where it is padding."""
    padding: Tensor
    """[number of padded places] int64."""
    to_packed: Tensor
    """[t] int64: place in the padded groups of each packed token; 0 behind the last text."""

    def to(self, device: torch.device | str) -> PackedSequences:
        """The same on `device`."""
        moved = [
            PaddedGroup(g.num_texts, g.width, None if g.lengths is None else g.lengths.to(device)) for g in self.groups
        ]
        tensors = (self.lengths, self.cu_seqlens, self.position)
        indices = (self.to_padded, self.padding, self.to_packed)
        lengths, cu_seqlens, position = (x.to(device, non_blocking=True) for x in tensors)
        to_padded, padding, to_packed = (x.to(device, non_blocking=True) for x in indices)
        return PackedSequences(
            lengths, cu_seqlens, self.max_length, position, self.num_tokens, moved, to_padded, padding, to_packed
        )


@dataclass(frozen=True)
class PackedTexts:
    """A micro-batch of texts in one row."""

    tokens: Tensor
    """[1, t] int64; behind the last text come pad tokens, which attend to nothing and are attended by nothing."""
    sequences: PackedSequences
    prompt_lengths: Tensor
    """[n] int64 tokens of each text's prompt."""

    def to(self, device: torch.device | str) -> PackedTexts:
        """The same on `device`."""
        return PackedTexts(
            self.tokens.to(device, non_blocking=True),
            self.sequences.to(device),
            self.prompt_lengths.to(device, non_blocking=True),
        )


def pack_sequences(lengths: np.ndarray, num_tokens: int | None = None) -> PackedSequences:
    """Lay out texts of these lengths one behind the other.

    Args:
        lengths: [n] at least 1 each; best in falling or rising order, so that attention's padded groups are tight.
        num_tokens: t, at least their sum; their sum if not given.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    total = int(lengths.sum())
    num_tokens = total if num_tokens is None else num_tokens
    if len(lengths) == 0 or lengths.min() < 1 or num_tokens < total:
        raise ValueError(f"{len(lengths)} texts of {total} tokens can't be packed into {num_tokens}")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(total) - np.repeat(starts[:-1], lengths)
    groups, to_padded, to_packed, padding = [], [], np.zeros(num_tokens, np.int64), []
    place = 0
    for begin, end in _length_groups(lengths):
        own = lengths[begin:end]
        width = int(own.max())
        column = np.arange(width)
        real = column < own[:, None]  # [b, s]
        source = np.where(real, starts[begin:end, None] + column, 0)
        to_padded.append(source.ravel())
        places = place + np.arange(real.size).reshape(real.shape)
        to_packed[source[real]] = places[real]
        padding.append(places[~real])
        groups.append(PaddedGroup(len(own), width, None if real.all() else torch.from_numpy(own.copy())))
        place += real.size
    return PackedSequences(
        lengths=torch.from_numpy(lengths),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_length=int(lengths.max()),
        position=torch.from_numpy(position),
        num_tokens=num_tokens,
        groups=groups,
        to_padded=torch.from_numpy(np.concatenate(to_padded)),
        padding=torch.from_numpy(np.concatenate(padding)),
        to_packed=torch.from_numpy(to_packed),
    )


def _length_groups(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Runs of neighbouring texts whose shortest is at least GROUP_RATIO of the longest: [begin, end) pairs."""
    groups, begin = [], 0
    low = high = int(lengths[0])
    for i, length in enumerate(lengths.tolist()):
        low, high = min(low, length), max(high, length)
        if low < GROUP_RATIO * high:
            groups.append((begin, i))
            begin, low, high = i, length, length
    groups.append((begin, len(lengths)))
    return groups


def deal_texts(lengths: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Share texts among data-parallel ranks: longest first, to and fro, so that all get nearly the same number of tokens.

    Args:
        lengths: [n] tokens of each text.

    Returns:
        For each rank the texts it embeds, longest first; possibly none.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    turn, seat = np.divmod(np.arange(len(order)), num_ranks)
    rank = np.where(turn % 2 == 0, seat, num_ranks - 1 - seat)
    return [order[rank == r] for r in range(num_ranks)]


def split_texts(lengths: np.ndarray, max_tokens: int | None = None, num_parts: int | None = None) -> list[np.ndarray]:
    """Cut a run of texts into micro-batches of nearly the same number of tokens, in order.

    Args:
        lengths: [n] tokens of each text.
        max_tokens: no micro-batch has more; at least the longest text.
        num_parts: alternatively, the number of micro-batches (fewer if there are fewer texts).

    Returns:
        Positions of each micro-batch's texts; none is empty, no list for no texts.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return []
    total, longest = int(lengths.sum()), int(lengths.max())
    if max_tokens is None:
        assert num_parts is not None
        middle = np.cumsum(lengths) - lengths / 2
        part = np.minimum((middle * min(num_parts, len(lengths)) / total).astype(np.int64), num_parts - 1)
        return [np.flatnonzero(part == p) for p in np.unique(part)]
    if longest > max_tokens:
        raise ValueError(f"a text of {longest} tokens does not fit into micro-batches of {max_tokens}")
    parts = _fill(lengths, max_tokens)
    even = -(-total // len(parts)) + longest  # a target with which no more micro-batches should come out
    if even < max_tokens:
        evened = _fill(lengths, even)
        parts = evened if len(evened) <= len(parts) else parts
    return parts


def _fill(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Texts in order, as many as fit into each micro-batch."""
    ends = np.cumsum(lengths)
    parts, begin = [], 0
    while begin < len(lengths):
        used = ends[begin - 1] if begin else 0
        end = int(np.searchsorted(ends, used + max_tokens, side="right"))
        parts.append(np.arange(begin, end))
        begin = end
    return parts


def pack_texts(
    texts: Sequence[int] | np.ndarray,
    tokens_of: Callable[[int], np.ndarray],
    prompt_lengths: np.ndarray,
    *,
    pad_id: int,
    num_tokens: int | None = None,
    pad_multiple: int = 1,
) -> PackedTexts:
    """Make a packed micro-batch.

    Args:
        texts: the texts' numbers, in the order they are packed; without any, one text of one pad token is made, so that
            every rank has a micro-batch.
        tokens_of: formatted tokens of a text.
        prompt_lengths: [all texts] tokens of each text's prompt.
        pad_id: fills what is left of `num_tokens`.
        num_tokens: t; if not given, the texts' tokens rounded up to a multiple of `pad_multiple`.
    """
    sequences = [tokens_of(int(text)) for text in texts] or [np.array([pad_id], np.int32)]
    prompts = np.asarray(prompt_lengths)[np.asarray(texts, dtype=np.int64)] if len(texts) else np.zeros(1)
    flat = np.concatenate(sequences)
    if num_tokens is None:
        num_tokens = -(-len(flat) // pad_multiple) * pad_multiple
    tokens = np.full((1, num_tokens), pad_id, dtype=np.int64)
    tokens[0, : len(flat)] = flat
    layout = pack_sequences(np.array([len(sequence) for sequence in sequences]), num_tokens)
    return PackedTexts(torch.from_numpy(tokens), layout, torch.from_numpy(prompts.astype(np.int64)))
