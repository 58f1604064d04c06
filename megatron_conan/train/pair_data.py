"""Data of the contrastive stages: the rows of a step, and the texts that this rank embeds for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_conan.config.tree import SourceConfig
from megatron_conan.data.format import TextKind, prompt_name
from megatron_conan.data.packing import PackedTexts, deal_texts, pack_texts, split_texts
from megatron_conan.data.pair_batch import PairBatch, build_pair_batch
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.sampler import SourceSchedule, sample_indices
from megatron_conan.mining.table import NegativesTable
from megatron_conan.train.setup import Setup


@dataclass(frozen=True)
class PairStep:
    """A step's global batch, and this rank's share of its texts."""

    step: int
    """Number of the step, from 1."""
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
        config, context = self.setup.config, self.setup.context
        batches = [stream.batch(step) for stream in self._streams]
        texts = _Texts(self, batches)
        dealt = deal_texts(texts.lengths, context.dp_size)
        own = dealt[context.dp_rank]
        train = config.train
        num_parts = None
        if train.micro_batch_tokens is None:
            assert train.micro_batch_size is not None
            num_rows = sum(len(batch.rows) for batch in batches)
            num_parts = -(-num_rows // (train.micro_batch_size * context.dp_size))
        parts = [own[part] for part in split_texts(texts.lengths[own], train.micro_batch_tokens, num_parts)]
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


class _Stream:
    """An endless sequence of global batches from some sources."""

    def __init__(self, data: Pairs, stores: list[PairStore], batch_size: int) -> None:
        config = data.setup.config
        self.data, self.stores, self.batch_size = data, stores, batch_size
        self.seed, self.settings = config.train.seed, config.contrastive
        weights = source_weights([data.sources[store.name] for store in stores])
        temperature = config.data.source_temperature if weights is None else None
        num_rows = [store.num_rows for store in stores]
        self.schedule = SourceSchedule(num_rows, weights, temperature=temperature, seed=self.seed)

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


class _Texts:
    """The texts of a step, counted through, as the model takes them."""

    def __init__(self, data: Pairs, batches: list[PairBatch]) -> None:
        self._formatter, self._batches = data.formatter, batches
        self._starts = np.cumsum([0] + [batch.num_texts for batch in batches])
        self._prompts = [
            {
                "query": prompt_name(batch.task, "query", data.sources[batch.store.name].query_prompt),
                "document": prompt_name(batch.task, "document", data.sources[batch.store.name].document_prompt),
            }
            for batch in batches
        ]
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


def source_weights(sources: list[SourceConfig]) -> list[float] | None:
    """The sources' weights, or None if none is given. Raises ValueError if only some are."""
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        missing = [str(source.prefix) for source in sources if source.weight is None]
        raise ValueError(
            f"data.sources: {', '.join(missing)} gives no weight but others do; give all sources one, or none"
        )
    return weights or None


def pad_multiple(tensor_size: int) -> int:
    """Numbers of tokens are multiples of 8 (for the kernels) and of tp (for sequence parallelism)."""
    return math.lcm(8, tensor_size)
