"""Texts to embeddings with the live model, spread over all ranks.

Shapes: `n` texts of a batch, `s` padded tokens, `e` embedding dim, `m` rows that this rank keeps.
The plan (which texts form a batch, in which order) depends on the lengths only, never on the number of ranks, so every
layout runs the same batches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_conan.data.batch import TextBatch, collate_texts
from megatron_conan.mining.exchange import gather_counts, gather_rows
from megatron_conan.parallel.context import ParallelContext

Embed = Callable[[TextBatch], torch.Tensor]

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class EmbeddedTexts:
    """The rows of the embedding matrix that this rank keeps."""

    ids: np.ndarray
    """[m] int64 text ids."""
    embeddings: np.ndarray
    """[m, e] float32; [0, 0] where the rank ran no batch."""


def plan_batches(lengths: np.ndarray, max_tokens: int, pad_multiple: int = 8) -> list[np.ndarray]:
    """Group texts of similar length into batches, longest first.

    Args:
        lengths: [n] tokens of every text.
        max_tokens: most padded tokens (texts x padded length) of a batch.
        pad_multiple: what the padded length is rounded up to.

    Returns the positions of every batch, int64. Raises ValueError where one text alone exceeds max_tokens.
    """
    if len(lengths) == 0:
        return []
    padded = -(-np.asarray(lengths, dtype=np.int64) // pad_multiple) * pad_multiple
    order = np.argsort(-padded, kind="stable")
    longest = int(padded[order[0]])
    if longest > max_tokens:
        raise ValueError(
            f"max_tokens={max_tokens} is below the longest text, {longest} tokens with padding; "
            f"use at least {longest}, or shorten max_document_length / max_query_length"
        )
    batches = []
    start = 0
    while start < len(order):
        count = max_tokens // max(int(padded[order[start]]), 1)
        batches.append(order[start : start + count])
        start += count
    return batches


def encode_corpus(
    embed: Embed,
    sequences: Callable[[int], np.ndarray],
    ids: np.ndarray,
    lengths: np.ndarray,
    context: ParallelContext,
    *,
    max_tokens: int,
    pad_id: int,
    pad_multiple: int = 8,
    prompt_length: int = 0,
    progress: str = "",
) -> EmbeddedTexts:
    """Embed every text once; each rank of the world ends with a disjoint part of the rows.

    Data-parallel ranks take the batches of the plan in turn. The tensor and pipeline ranks of one data-parallel rank
    run the same batches together and keep every tp x pp-th row each. No data-parallel collective runs here, so parts
    may be uneven or empty.

    Args:
        embed: TextBatch [n, s] -> [n, e] normalised float32 on every tp and pp rank of the data-parallel rank; its
            collectives stay within that data-parallel rank.
        sequences: text id -> formatted token ids.
        ids: [N] int64 text ids, the same on all ranks.
        lengths: [N] tokens of every formatted sequence, in the order of ids.
        max_tokens: most padded tokens of a batch.
        prompt_length: tokens of the prompt that all sequences begin with.
        progress: what the progress line on rank 0's stderr calls the work; empty for none.
    """
    if len(ids) != len(lengths):
        raise ValueError(f"{len(ids)} ids but {len(lengths)} lengths; give one length an id")
    batches = plan_batches(lengths, max_tokens, pad_multiple)[context.dp_rank :: context.dp_size]
    model_rank = context.pp_rank * context.tp_size + context.tp_rank
    model_size = context.pp_size * context.tp_size
    reporter = _Progress(progress if context.rank == 0 else "", sum(int(lengths[batch].sum()) for batch in batches))
    kept_ids: list[np.ndarray] = []
    kept_rows: list[np.ndarray] = []
    num_rows = 0
    for positions in batches:
        batch_ids = ids[positions]
        texts = [sequences(int(text_id)) for text_id in batch_ids]
        batch = collate_texts(texts, pad_id, pad_multiple, prompt_length)
        embeddings = _embed_batch(embed, batch.to(context.device))
        keep = slice((model_rank - num_rows) % model_size, None, model_size)
        kept_ids.append(batch_ids[keep])
        kept_rows.append(embeddings[keep].float().cpu().numpy())
        num_rows += len(positions)
        reporter.add(int(lengths[positions].sum()), len(positions))
    reporter.finish()
    if not batches:
        return EmbeddedTexts(np.empty(0, np.int64), np.empty((0, 0), np.float32))
    return EmbeddedTexts(np.concatenate(kept_ids).astype(np.int64), np.concatenate(kept_rows))


def encode_texts(
    embed: Embed,
    sequences: Sequence[np.ndarray],
    context: ParallelContext,
    *,
    max_tokens: int,
    pad_id: int,
    pad_multiple: int = 8,
    prompt_length: int = 0,
    progress: str = "",
) -> np.ndarray:
    """Embed texts and give every rank all of them, in input order: [len(sequences), e] float32 ([0, 0] for none).

    For sets that fit into one rank's memory (evaluation); all ranks must call, with the same sequences.
    """
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    part = encode_corpus(
        embed,
        lambda position: sequences[position],
        np.arange(len(sequences)),
        lengths,
        context,
        max_tokens=max_tokens,
        pad_id=pad_id,
        pad_multiple=pad_multiple,
        prompt_length=prompt_length,
        progress=progress,
    )
    shapes = gather_counts(part.embeddings.shape, context.world_group, context.world_size, context.device)
    counts, width = shapes[:, 0].tolist(), int(shapes[:, 1].max())
    rows = part.embeddings if len(part.ids) else np.empty((0, width), np.float32)
    positions = np.concatenate(gather_rows(part.ids, counts, context.world_group, context.device))
    gathered = np.concatenate(gather_rows(rows, counts, context.world_group, context.device))
    result = np.empty_like(gathered)
    result[positions] = gathered
    return result


def _embed_batch(embed: Embed, batch: TextBatch) -> torch.Tensor:
    with torch.no_grad():
        embeddings = embed(batch)
    if embeddings.dim() != 2 or len(embeddings) != len(batch.lengths):
        raise ValueError(f"embed returned shape {tuple(embeddings.shape)} for {len(batch.lengths)} texts")
    return embeddings


class _Progress:
    """Lines with the share done and the time left, at most one every PROGRESS_SECONDS, and one at the end."""

    def __init__(self, label: str, num_tokens: int) -> None:
        self._label = label
        self._num_tokens = num_tokens
        self._tokens_done = 0
        self._texts_done = 0
        self._start = self._last = time.monotonic()

    def add(self, num_tokens: int, num_texts: int) -> None:
        self._tokens_done += num_tokens
        self._texts_done += num_texts
        now = time.monotonic()
        if self._label and now - self._last >= PROGRESS_SECONDS:
            self._last = now
            share = self._tokens_done / max(self._num_tokens, 1)
            left = (now - self._start) * (1 - share) / share
            print(f"{self._label}: {share:.0%}, {left:.0f} s left", file=sys.stderr, flush=True)

    def finish(self) -> None:
        if self._label:
            seconds = time.monotonic() - self._start
            rate = self._tokens_done / max(seconds, 1e-9)
            print(
                f"{self._label}: {self._texts_done} texts on rank 0 in {seconds:.1f} s, {rate:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
