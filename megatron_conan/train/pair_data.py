"""Data of the contrastive stages: the rows of a step, and the texts that this rank embeds for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_conan.config.tree import SourceConfig
from megatron_conan.data.blending import Blend, blend_sources
from megatron_conan.data.format import TextKind, prompt_name
from megatron_conan.data.packing import PackedTexts, deal_texts, pack_texts, split_texts
from megatron_conan.data.pair_batch import PairBatch, build_pair_batch
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.sampler import SourceSchedule, sample_indices
from megatron_conan.mining.table import NegativesTable
from megatron_conan.model.attention import attention_case, computes_packed
from megatron_conan.train.largest_batch import LargestBatch, LargestRows, largest_parts, max_in_flight, most_a_row
from megatron_conan.train.mix import blended, scheduled_samples, source_weights
from megatron_conan.train.setup import Setup


@dataclass(frozen=True)
class PairStep:
    """A step's global batch, and this rank's share of its texts."""

    step: int | None
    """Number of the step, from 1; None for a dry run, of which the negatives hear nothing."""
    batches: list[PairBatch]
    """The rows of one source; with `contrastive.batch_balance` also those of an sts source. Their texts are counted
    through: queries, then documents, batch after batch."""
    micro_batches: list[PackedTexts]
    """This rank's texts; at least one micro-batch, which may hold a dummy text only."""
    num_embedded: list[int]
    """Texts of each micro-batch; 0 for a dummy."""
    sizes: list[int]
    """Texts each data-parallel rank embeds."""
    gathered: np.ndarray
    """[all texts] numbers of the texts in the order in which the ranks embed them."""
    num_tokens: int
    """Tokens of this rank's texts."""
    attended_pairs: float
    """Sum of the squares of their lengths: what attention costs grows with it."""
    num_truncated: int
    """Texts of this rank that lost tokens."""


class Pairs:
    """Pair data: one source a global batch, rows in a seeded order, negatives from the file or from mining."""

    def __init__(self, setup: Setup) -> None:
        """Open the sources."""
        config = setup.config
        self.setup, self.formatter = setup, setup.formatter
        self.stores = [PairStore(source.prefix, setup.tokenizer) for source in config.data.sources]
        names = [store.name for store in self.stores]
        if len(set(names)) < len(names):
            raise ValueError(f"data.sources: two sources are called alike ({', '.join(names)}); rename a file prefix")
        self.by_name = dict(zip(names, self.stores, strict=True))
        self.sources = dict(zip(names, config.data.sources, strict=True))
        self.negatives: dict[str, NegativesTable] = {}
        self.pad_multiple = pad_multiple(config.parallel.tensor)
        for store in self.stores:
            self._check_source(store)
        balance = config.contrastive.batch_balance
        main, scored = self.stores, []
        if balance is not None:
            scored = [store for store in self.stores if store.task == "sts"]
            main = [store for store in self.stores if store.task != "sts"]
            if not scored or not main:
                raise ValueError(
                    "contrastive.batch_balance puts scored pairs beside every retrieval or classification batch, but "
                    f"data.sources holds {'no sts source' if main else 'sts sources only'}; add one, or remove the section"
                )
        self._streams = [_Stream(self, main, config.train.global_batch_size)]
        if balance is not None:
            self._streams.append(_Stream(self, scored, balance.scored_batch_size))

    def _check_source(self, store: PairStore) -> None:
        """Raise ValueError for a source that no step could train on as configured."""
        config, source = self.setup.config, self.sources[store.name]
        settings = config.contrastive
        if store.task == "sft":
            raise ValueError(f"{store.prefix} holds sft rows, which are no pairs; use it in the sft stage")
        if settings.batch_balance is not None and store.task == "sts" and source.batch_size is not None:
            raise ValueError(
                f"{store.prefix}: contrastive.batch_balance.scored_batch_size={settings.batch_balance.scored_batch_size} and "
                f"the source's batch_size={source.batch_size} exclude each other; give one"
            )
        own_only = not settings.in_batch_negatives and config.mining is None and store.task == "retrieval"
        if own_only and not len(store.negative_ids):
            raise ValueError(
                f"{store.prefix} holds no negatives, and contrastive.in_batch_negatives=[] gives none; add section mining, or "
                "in-batch negatives"
            )

    def batch(self, step: int) -> PairStep:
        """Step `step` (from 1). Negatives are those in use at this moment."""
        context = self.setup.context
        batches = [stream.batch(step) for stream in self._streams]
        texts = _Texts(self, batches)
        dealt = deal_texts(texts.lengths, context.dp_size)
        lengths = texts.lengths[dealt[context.dp_rank]]
        parts = split_texts(lengths, self.setup.config.train.micro_batch_tokens, self._num_parts(batches))
        return self._packed(step, batches, texts, dealt, parts)

    @property
    def blends(self) -> list[Blend]:
        """See StageData: one of the main sources, maybe one of scored pairs."""
        return [stream.blend for stream in self._streams]

    def samples_taken(self, step: int) -> dict[str, int]:
        """See StageData."""
        taken: dict[str, int] = {}
        for stream in self._streams:
            taken |= scheduled_samples(stream.schedule, stream.blend, step)
        return taken

    def largest_batch(self) -> LargestBatch:
        """A batch as large as any of the run: of the source with most tokens, all texts as long as its longest."""
        config, context = self.setup.config, self.setup.context
        rows = [stream.largest_rows() for stream in self._streams]
        batches, longest = [each.batch() for each in rows], np.concatenate([each.lengths for each in rows])
        dealt = deal_texts(longest, context.dp_size)
        own = dealt[context.dp_rank]
        num_full = max_in_flight(context, config.parallel.virtual_pipeline is not None)
        parts, lengths = largest_parts(
            longest[own],
            num_full,
            max_tokens=config.train.micro_batch_tokens,
            num_parts=self._num_parts(batches),
            is_padded=not computes_packed(config.attention.backend, attention_case(config, context.device)),
        )
        texts = _MeaninglessTexts(longest, self.setup.tokenizer.size)
        texts.lengths[own] = lengths
        full = parts[:num_full]
        return LargestBatch(
            self._packed(None, batches, texts, dealt, parts),
            num_micro_batches=len(full),
            num_tokens=sum(int(lengths[part].sum()) for part in full),
            longest=int(longest.max()),
        )

    def _num_parts(self, batches: list[PairBatch]) -> int | None:
        """Micro-batches of a step, where their tokens are not given."""
        train = self.setup.config.train
        if train.micro_batch_size is None:
            return None
        num_rows = sum(len(batch.rows) for batch in batches)
        return -(-num_rows // (train.micro_batch_size * self.setup.context.dp_size))

    def _packed(
        self,
        step: int | None,
        batches: list[PairBatch],
        texts: _Texts | _MeaninglessTexts,
        dealt: list[np.ndarray],
        parts: list[np.ndarray],
    ) -> PairStep:
        """`dealt`: texts of each data-parallel rank; `parts`: places of each micro-batch's texts among this rank's."""
        config, context = self.setup.config, self.setup.context
        own = dealt[context.dp_rank]
        parts = [own[part] for part in parts]
        # the interleaved schedule takes whole rounds of micro-batches
        rounds = context.pp_size if config.parallel.virtual_pipeline else 1
        parts += [own[:0]] * (-len(parts) % rounds if parts else rounds)
        # pipeline stages expect activations of one shape
        width = None
        if context.pp_size > 1:
            most = max(max(int(texts.lengths[part].sum()) for part in parts), 1)
            width = -(-most // self.pad_multiple) * self.pad_multiple
        micro_batches = [
            pack_texts(
                part,
                texts.tokens,
                texts.prompt_lengths,
                pad_id=self.setup.tokenizer.pad_id,
                num_tokens=width,
                pad_multiple=self.pad_multiple,
            ).to(context.device)
            for part in parts
        ]
        return PairStep(
            step=step,
            batches=batches,
            micro_batches=micro_batches,
            num_embedded=[len(part) for part in parts],
            sizes=[len(share) for share in dealt],
            gathered=np.concatenate(dealt),
            num_tokens=int(texts.lengths[own].sum()),
            attended_pairs=float(np.square(texts.lengths[own], dtype=np.float64).sum()),
            num_truncated=int(texts.truncated[own].sum()),
        )

    def update_negatives(
        self, source: str, rows: np.ndarray, slots: np.ndarray, similarities: np.ndarray, step: int
    ) -> int:
        """Tell the tables what the loss of a step saw of one source (`NegativesTable.apply_updates`).

        Those of other sources hear of the step too: a rule may be due there. Returns the number of negatives replaced.
        """
        none = slice(0, 0)
        return sum(
            table.apply_updates(rows, slots, similarities, step=step)
            if name == source
            else table.apply_updates(rows[none], slots[none], similarities[none], step=step)
            for name, table in sorted(self.negatives.items())
        )


@dataclass
class _MeaninglessTexts:
    """Takes the place of `_Texts` in a dry run: any tokens, of lengths that can be changed."""

    lengths: np.ndarray
    """[n]."""
    num_ids: int

    def __post_init__(self) -> None:
        self.prompt_lengths, self.truncated = np.zeros_like(self.lengths), np.zeros_like(self.lengths)

    def tokens(self, text: int) -> np.ndarray:
        """[length] int32."""
        return np.arange(self.lengths[text], dtype=np.int32) % self.num_ids


class _Stream:
    """An endless sequence of global batches from some sources."""

    def __init__(self, data: Pairs, stores: list[PairStore], batch_size: int) -> None:
        config = data.setup.config
        self.data, self.stores, self.batch_size = data, stores, batch_size
        self.seed, self.settings = config.train.seed, config.contrastive
        weights = source_weights([data.sources[store.name] for store in stores])
        temperature = config.data.source_temperature if weights is None else None
        num_rows = [store.num_rows for store in stores]
        schedule = SourceSchedule(num_rows, weights, temperature=temperature, seed=self.seed)
        configs = [data.sources[store.name] for store in stores]
        asked = schedule.weights.tolist() if weights is None else weights
        self.blend = blend_sources(blended(configs, asked, num_rows, batch_size), config.train.steps)
        is_limited = self.blend.weights != asked
        self.schedule = SourceSchedule(num_rows, self.blend.weights, seed=self.seed) if is_limited else schedule

    def batch(self, step: int) -> PairBatch:
        source = self.schedule.source_at(step - 1)
        store = self.stores[source]
        size = self.data.sources[store.name].batch_size or self.batch_size
        start = self.schedule.batches_before(step - 1) * size
        rows = sample_indices(store.num_rows, self.seed, start, size)
        table = self.data.negatives.get(store.name)
        return build_pair_batch(
            store,
            rows,
            np.random.Generator(np.random.PCG64([self.seed, step, source])),
            num_positives=self.settings.num_positives,
            num_negatives=self.settings.num_hard_negatives,
            mined=None if table is None else table.current(rows),
        )

    def largest_rows(self) -> LargestRows:
        """Of the source whose batch can have most tokens."""
        return max(map(self._largest_rows_of, self.stores), key=lambda rows: int(rows.lengths.sum()))

    def _largest_rows_of(self, store: PairStore) -> LargestRows:
        source, formatter = self.data.sources[store.name], self.data.formatter
        is_mined = self.data.setup.config.mining is not None and store.task == "retrieval"
        num_positives, num_negatives = most_a_row(store, self.settings, is_mined=is_mined)
        prompts = _prompts(store.task, source)
        lengths: dict[TextKind, np.ndarray] = {"query": store.lengths[store.query_ids], "document": store.lengths}
        longest = {kind: formatter.lengths(raw.max(), kind, prompts[kind]) for kind, raw in lengths.items()}
        return LargestRows(
            store,
            source.batch_size or self.batch_size,
            num_positives,
            num_negatives,
            query_length=int(longest["query"]),
            document_length=int(longest["document"]),
        )


class _Texts:
    """The texts of a step, counted through, as the model takes them."""

    def __init__(self, data: Pairs, batches: list[PairBatch]) -> None:
        self._formatter, self._batches = data.formatter, batches
        self._starts = np.cumsum([0] + [batch.num_texts for batch in batches])
        self._prompts = [_prompts(batch.task, data.sources[batch.store.name]) for batch in batches]
        lengths, prompt_lengths, truncated = [], [], []
        for batch, prompts in zip(batches, self._prompts, strict=True):
            ids_by_kind: dict[TextKind, np.ndarray] = {"query": batch.query_ids, "document": batch.document_ids}
            for kind, ids in ids_by_kind.items():
                raw = batch.store.lengths[ids]
                lengths.append(self._formatter.lengths(raw, kind, prompts[kind]))
                truncated.append(self._formatter.is_truncated(raw, kind, prompts[kind]))
                prompt_lengths.append(np.full(len(ids), len(self._formatter.prompt_tokens(prompts[kind]))))
        self.lengths = np.concatenate(lengths)
        """[n] tokens of each text, prompt and EOS included."""
        self.prompt_lengths = np.concatenate(prompt_lengths)
        self.truncated = np.concatenate(truncated)

    def tokens(self, text: int) -> np.ndarray:
        """[length] int32 tokens of a text."""
        part = int(np.searchsorted(self._starts, text, side="right")) - 1
        batch = self._batches[part]
        kind, text_id = batch.text(text - int(self._starts[part]))
        return self._formatter.format(batch.store.tokens(text_id), kind, self._prompts[part][kind])


def _prompts(task: str, source: SourceConfig) -> dict[TextKind, str]:
    """Names of the prompts before a source's queries and documents."""
    return {
        "query": prompt_name(task, "query", source.query_prompt),
        "document": prompt_name(task, "document", source.document_prompt),
    }


def pad_multiple(tensor_size: int) -> int:
    """Numbers of tokens are multiples of 8 (for the kernels) and of tp (for sequence parallelism)."""
    return math.lcm(8, tensor_size)
