"""Texts to embeddings with the live model, spread over all ranks.

Shapes: `n` texts of a batch, `t` packed tokens, `e` embedding dim, `m` rows that this rank keeps.
The plan (which texts form a batch, in which order) depends on the lengths only, never on the number of ranks, so every
layout runs the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_conan.data.command_line import Progress
from megatron_conan.data.packing import PackedTexts, pack_texts
from megatron_conan.mining.exchange import gather_counts, gather_rows
from megatron_conan.mining.rows import RowStore, Scratch, check_room
from megatron_conan.parallel.context import ParallelContext

Embed = Callable[[list[np.ndarray]], torch.Tensor]
"""Batches of text ids -> [all their texts, e] unit vectors, fp32; see `encode_corpus`."""
EmbedPacked = Callable[[list[PackedTexts]], torch.Tensor]
"""Packed texts, of one width -> [all their texts, e] unit vectors, fp32."""

PIPELINE_ROUNDS = 4
"""Batches that go through the pipeline together, a stage: the more, the less it idles."""
ROUNDS_TOGETHER = 64
"""No rank goes further ahead than this: after an interruption one may have all its rows and another none, and a wait must stay
below the process group's timeout."""
QUERY_BLOCK = 16384
"""Queries (of all ranks) that are embedded, then searched, together."""
NUM_IDS_SHOWN = 5


@dataclass(frozen=True)
class EmbeddedTexts:
    """The rows of the embedding matrix that this rank keeps."""

    ids: np.ndarray
    """[m] int64 text ids, rising."""
    embeddings: np.ndarray
    """[m, e] float32, possibly memory-mapped."""


def plan_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Group texts of similar length into batches, longest first.

    Args:
        lengths: [n] tokens of every text.
        max_tokens: most tokens of a batch.

    Returns the positions of every batch, int64. Raises ValueError where one text alone exceeds max_tokens.
    """
    if len(lengths) == 0:
        return []
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    longest = int(lengths[order[0]])
    if longest > max_tokens:
        raise ValueError(
            f"max_tokens={max_tokens} is below the longest text, {longest} tokens; use at least {longest}, or shorten "
            "max_document_length / max_query_length"
        )
    ends = np.cumsum(lengths[order])
    batches, begin = [], 0
    while begin < len(order):
        used = ends[begin - 1] if begin else 0
        end = int(np.searchsorted(ends, used + max_tokens, side="right"))
        batches.append(order[begin:end])
        begin = end
    return batches


def packed_embed(
    embed: EmbedPacked,
    sequences: Callable[[int], np.ndarray],
    device: torch.device,
    *,
    pad_id: int,
    pad_multiple: int = 8,
    prompt_length: int = 0,
) -> Embed:
    """A function from batches of text ids to embeddings, by a model that takes packed tokens.

    Args:
        embed: the model; its collectives stay within one data-parallel rank.
        sequences: text id -> formatted token ids.
        prompt_length: tokens of the prompt that all sequences begin with.
    """

    def embed_ids(batches: list[np.ndarray]) -> torch.Tensor:
        texts = [[sequences(int(text_id)) for text_id in batch] for batch in batches]
        longest = max(sum(len(text) for text in batch) for batch in texts)
        width = -(-longest // pad_multiple) * pad_multiple  # pipeline stages expect activations of one shape
        packed = [
            pack_texts(
                range(len(batch)),
                batch.__getitem__,
                np.full(len(batch), prompt_length),
                pad_id=pad_id,
                num_tokens=width,
            ).to(device)
            for batch in texts
        ]
        return embed(packed)

    return embed_ids


def encode_corpus(
    embed: Embed,
    ids: np.ndarray,
    lengths: np.ndarray,
    context: ParallelContext,
    *,
    width: int,
    max_tokens: int,
    scratch: Scratch | None = None,
    progress: str = "",
    describe: Callable[[int], str] = str,
) -> EmbeddedTexts:
    """Embed every text once; each rank of the world ends with a disjoint part of the rows.

    Data-parallel ranks take the batches of the plan in turn. The tensor and pipeline ranks of one data-parallel rank
    run the same batches together and keep every tp x pp-th row each. Parts may be uneven or empty.
    All ranks of the world must call.

    Args:
        embed: gives the same on every tp and pp rank of the data-parallel rank; its collectives stay within that.
        ids: [N] int64 text ids, none twice, the same on all ranks.
        lengths: [N] tokens of every formatted sequence, in the order of ids.
        width: e.
        max_tokens: most tokens of a batch.
        scratch: where the rows are kept, and left for a run that goes on after an interruption; None for memory.
        progress: what the progress line on rank 0's stderr calls the work; empty for none.
        describe: text id -> words for an error message.

    Raises:
        ValueError: on all ranks, if embeddings are not finite (naming texts) or don't fit into memory or on disk.
    """
    encoder = _Encoder(embed, np.asarray(ids, np.int64), lengths, context, width, max_tokens, progress, describe)
    part = encoder.encode(encoder.batches, scratch)
    encoder.finish()
    return part


def encode_blocks(
    embed: Embed,
    ids: np.ndarray,
    lengths: np.ndarray,
    context: ParallelContext,
    *,
    width: int,
    max_tokens: int,
    block_size: int = QUERY_BLOCK,
    progress: str = "",
    describe: Callable[[int], str] = str,
) -> Iterator[EmbeddedTexts]:
    """The same in blocks of some `block_size` texts (of all ranks), for texts whose embeddings are needed once.

    Every rank gets equally many blocks, some of them possibly empty, and must take all.
    """
    encoder = _Encoder(embed, np.asarray(ids, np.int64), lengths, context, width, max_tokens, progress, describe)
    begin = num_texts = 0
    for end, batch in enumerate(encoder.batches, 1):
        num_texts += len(batch)
        if num_texts >= block_size or end == len(encoder.batches):
            yield encoder.encode(encoder.batches[begin:end])
            begin, num_texts = end, 0
    encoder.finish()


def encode_texts(
    embed: EmbedPacked,
    sequences: Sequence[np.ndarray],
    context: ParallelContext,
    *,
    width: int,
    max_tokens: int,
    pad_id: int,
    pad_multiple: int = 8,
    prompt_length: int = 0,
    progress: str = "",
) -> np.ndarray:
    """Embed texts and give every rank all of them, in input order: [len(sequences), e] float32.

    For sets that fit into one rank's memory (evaluation); all ranks must call, with the same sequences.
    """
    part = encode_corpus(
        packed_embed(
            embed,
            sequences.__getitem__,
            context.device,
            pad_id=pad_id,
            pad_multiple=pad_multiple,
            prompt_length=prompt_length,
        ),
        np.arange(len(sequences)),
        np.array([len(sequence) for sequence in sequences], dtype=np.int64),
        context,
        width=width,
        max_tokens=max_tokens,
        progress=progress,
    )
    counts = gather_counts([len(part.ids)], context.world_group, context.world_size, context.device)[:, 0].tolist()
    positions = np.concatenate(gather_rows(part.ids, counts, context.world_group, context.device))
    gathered = np.concatenate(gather_rows(part.embeddings, counts, context.world_group, context.device))
    result = np.empty_like(gathered)
    result[positions] = gathered
    return result


class _Encoder:
    """Encodes batches of one plan, and tells how far it is."""

    def __init__(
        self,
        embed: Embed,
        ids: np.ndarray,
        lengths: np.ndarray,
        context: ParallelContext,
        width: int,
        max_tokens: int,
        progress: str,
        describe: Callable[[int], str],
    ) -> None:
        if len(ids) != len(lengths):
            raise ValueError(f"{len(ids)} ids but {len(lengths)} lengths; give one length an id")
        self._embed, self._ids, self._lengths, self._context = embed, ids, lengths, context
        self._width, self._label, self._describe = width, progress, describe
        self.batches = plan_batches(lengths, max_tokens)
        own_tokens = sum(int(lengths[batch].sum()) for batch in self.batches[context.dp_rank :: context.dp_size])
        self._bar = Progress(progress, own_tokens, "texts") if progress and context.rank == 0 else None

    def finish(self) -> None:
        """Say that all is done."""
        if self._bar:
            self._bar.finish()

    def encode(self, batches: list[np.ndarray], scratch: Scratch | None = None) -> EmbeddedTexts:
        """Embed these batches on all ranks together; this rank's rows."""
        context, ids, width = self._context, self._ids, self._width
        own = batches[context.dp_rank :: context.dp_size]
        per_round = 1 if context.pp_size == 1 else PIPELINE_ROUNDS * context.pp_size
        rounds = [own[i : i + per_round] for i in range(0, len(own), per_round)]
        model_rank, model_size = context.pp_rank * context.tp_size + context.tp_rank, context.pp_size * context.tp_size
        own_ids = ids[np.concatenate([np.empty(0, np.int64), *own])[model_rank::model_size]]  # in the order of encoding
        order = np.argsort(own_ids, kind="stable")
        own_ids, row_of = own_ids[order], np.argsort(order, kind="stable")  # row of the i-th kept text
        what = f"the embeddings of {len(ids):,} texts{f' ({self._label})' if self._label else ''}"
        check_room(len(own_ids) * width * 4, what, context, scratch)
        store = RowStore(len(own_ids), width, context, scratch)
        skipped = _agreed_rounds(store, context)
        seen = num_kept = 0
        bad_ids: list[int] = []
        for number in range(-(-len(batches[:: context.dp_size]) // per_round)):  # the most that any rank has
            if number % ROUNDS_TOGETHER == ROUNDS_TOGETHER - 1:
                context.barrier()
            part = rounds[number] if number < len(rounds) else []
            count, num_tokens = sum(map(len, part)), sum(int(self._lengths[batch].sum()) for batch in part)
            share = range((model_rank - seen) % model_size, count, model_size)
            rows = row_of[num_kept : num_kept + len(share)]
            seen, num_kept = seen + count, num_kept + len(share)
            if number < skipped and self._bar:
                self._bar.total -= num_tokens
            if skipped <= number < len(rounds):
                embeddings = _embed_batches(self._embed, [ids[batch] for batch in part], width)
                found = embeddings[share.start :: share.step].float().cpu().numpy()
                bad_ids += own_ids[rows[~np.isfinite(found).all(axis=1)]].tolist()
                store.rows[rows] = found
                if not bad_ids:
                    store.save(number + 1, last=number + 1 == len(rounds))
                if self._bar:
                    self._bar.advance(num_tokens, count)
        _refuse_infinite(bad_ids, context, self._describe)
        return EmbeddedTexts(own_ids, store.rows)


def _embed_batches(embed: Embed, batches: list[np.ndarray], width: int) -> torch.Tensor:
    with torch.no_grad():
        embeddings = embed(batches)
    num_texts = sum(len(batch) for batch in batches)
    if tuple(embeddings.shape) != (num_texts, width):
        raise ValueError(f"embed returned shape {tuple(embeddings.shape)} for {num_texts} texts and width {width}")
    return embeddings


def _agreed_rounds(store: RowStore, context: ParallelContext) -> int:
    """Rounds that all tensor and pipeline ranks of this data-parallel rank have on disk: they run the others together."""
    own = [context.dp_rank, store.rounds_done if len(store.rows) else np.iinfo(np.int64).max]
    gathered = gather_counts(own, context.world_group, context.world_size, context.device)
    return int(gathered[gathered[:, 0] == context.dp_rank, 1].min())


def _refuse_infinite(bad_ids: list[int], context: ParallelContext, describe: Callable[[int], str]) -> None:
    """Raise on all ranks where one has embeddings that are not finite."""
    shown = sorted(bad_ids)[:NUM_IDS_SHOWN]
    padded = shown + [-1] * (NUM_IDS_SHOWN - len(shown))
    described = gather_counts([len(bad_ids), *padded], context.world_group, context.world_size, context.device)
    if described[:, 0].any():
        named = sorted(described[:, 1:][described[:, 1:] >= 0].tolist())[:NUM_IDS_SHOWN]
        raise ValueError(
            f"embeddings of {int(described[:, 0].sum())} texts are not finite, among them "
            f"{', '.join(describe(text_id) for text_id in named)}; the model has diverged or these texts overflow: lower the "
            "learning rate or look at the texts"
        )
