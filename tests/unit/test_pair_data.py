"""Steps of the contrastive stages: all ranks make one batch, each text is embedded once, a step depends on its number alone."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_builder import GLOBAL_BATCH, LENGTHS, PROMPTS, builder, context, stores
from pair_stores import write_store

from megatron_conan.config.tree import SourceConfig
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.contrastive import Contrastive
from megatron_conan.train.pair_data import Pairs, PairStep, pad_multiple, source_weights

__all__ = ["builder", "stores"]

MIX: dict[str, dict[str, Any]] = {"small": {}, "labelled": {}, "scored": {}}
BALANCE = {"contrastive": {"batch_balance": {"scored_batch_size": 7}}}


def contents(step: PairStep) -> list[Any]:
    """Everything of a step, comparable."""
    batches = [
        [getattr(batch, name).tolist() for name in ("rows", "query_ids", "document_ids", "positive", "negative")]
        for batch in step.batches
    ]
    names = [batch.store.name for batch in step.batches]
    micro = [(m.tokens.tolist(), m.sequences.lengths.tolist(), m.prompt_lengths.tolist()) for m in step.micro_batches]
    return [names, batches, micro, step.num_embedded, step.sizes, step.gathered.tolist()]


def formatted_texts(step: PairStep, tokenizer: Tokenizer, prompts: dict[str, tuple[str, str]]) -> list[list[int]]:
    """Tokens of all texts of a step as they are counted: prompt, text cut to fit, EOS. `prompts` by source."""
    result = []
    for batch in step.batches:
        for kind, ids, prompt in zip(
            ("query", "document"), (batch.query_ids, batch.document_ids), prompts[batch.store.name], strict=True
        ):
            before = tokenizer.encode(PROMPTS[prompt])
            for text_id in ids.tolist():
                body = tokenizer.encode(batch.store.text(text_id))
                result.append([*(before + body)[: LENGTHS[kind] - 1], tokenizer.eos_id])
    return result


DEFAULT_PROMPTS = {
    "small": ("query", "document"),
    "large": ("query", "document"),
    "scored": ("sts", "sts"),
    "labelled": ("classification", "classification"),
}


def embedded_texts(step: PairStep) -> list[list[int]]:
    """Tokens of the texts of this rank's micro-batches, in order; dummies left out."""
    found = []
    for micro_batch, count in zip(step.micro_batches, step.num_embedded, strict=True):
        bounds = micro_batch.sequences.cu_seqlens.tolist()
        row = micro_batch.tokens[0].tolist()
        texts = [row[begin:end] for begin, end in pairwise(bounds)]
        assert len(texts) == max(count, 1)
        found += texts[:count]
    return found


def check_grid(make: Any, tokenizer: Tokenizer, dp_size: int, pp_size: int, number: int) -> list[PairStep]:
    """Steps of all dp ranks; each text is embedded by one of them."""
    shares = []
    for dp_rank in range(dp_size):
        stages = [make(context(dp_rank, dp_size, pp_rank, pp_size)).batch(number) for pp_rank in range(pp_size)]
        assert all(contents(stage) == contents(stages[0]) for stage in stages)
        shares.append(stages[0])
    texts = formatted_texts(shares[0], tokenizer, DEFAULT_PROMPTS)
    dealt = shares[0].gathered.tolist()
    assert sorted(dealt) == list(range(len(texts)))
    for dp_rank, step in enumerate(shares):
        assert contents(step)[:2] == contents(shares[0])[:2]
        assert step.gathered.tolist() == dealt
        assert step.sizes == shares[0].sizes
        begin = sum(step.sizes[:dp_rank])
        own = dealt[begin : begin + step.sizes[dp_rank]]
        assert sum(step.num_embedded) == len(own)
        assert embedded_texts(step) == [texts[i] for i in own]
        assert step.num_tokens == sum(len(texts[i]) for i in own)
    assert sum(shares[0].sizes) == len(texts)
    return shares


@pytest.mark.parametrize("sections", [{}, BALANCE], ids=["one source", "balanced"])
@pytest.mark.parametrize(("dp_size", "pp_size"), [(1, 1), (2, 1), (3, 1), (4, 2), (2, 4)])
def test_all_ranks_make_one_batch_and_embed_each_text_once(builder, tokenizer, dp_size, pp_size, sections):
    """Prompts and truncation included: the tokens are compared."""
    for number in (1, 2, 3, 9):
        one = builder.pairs(MIX, **sections).batch(number)
        shares = check_grid(lambda place: builder.pairs(MIX, place, **sections), tokenizer, dp_size, pp_size, number)
        assert contents(shares[0])[:2] == contents(one)[:2]


def test_micro_batches_hold_no_more_tokens_than_asked(builder):
    """Rounded up to a multiple of 8; of one width through a pipeline."""
    counts = set()
    for place in (context(), context(1, 2), context(0, 1, 1, 2), context(1, 2, 0, 2)):
        for number in range(1, 9):
            step = builder.pairs(MIX, place, **BALANCE).batch(number)
            counts.add(len(step.micro_batches))
            widths = [micro_batch.tokens.shape[1] for micro_batch in step.micro_batches]
            assert max(widths) <= 200
            assert not any(width % 8 for width in widths)
            used = [int(micro_batch.sequences.lengths.sum()) for micro_batch in step.micro_batches]
            rounded = [-(-tokens // 8) * 8 for tokens in used]
            assert widths == ([max(rounded)] * len(used) if place.pp_size > 1 else rounded)
            for micro_batch, width in zip(step.micro_batches, widths, strict=True):
                assert micro_batch.sequences.num_tokens == width
    assert len(counts) > 2


@pytest.mark.parametrize(("size", "dp_size", "expected"), [(12, 1, 1), (4, 1, 3), (3, 2, 2), (1, 4, 3), (5, 1, 3)])
def test_micro_batches_of_so_many_rows(builder, size, dp_size, expected):
    train = {"micro_batch_size": size, "micro_batch_tokens": None}
    for dp_rank in range(dp_size):
        step = builder.pairs({"large": {}}, context(dp_rank, dp_size), train=train).batch(1)
        assert len(step.micro_batches) == expected


def test_a_rank_without_texts_gets_a_dummy(builder, tokenizer):
    train = {"global_batch_size": 2}
    contrastive = {"num_positives": 1, "num_hard_negatives": 0}

    def make(place: ParallelContext) -> Pairs:
        return builder.pairs({"large": {}}, place, train=train, contrastive=contrastive)

    shares = check_grid(make, tokenizer, 6, 1, 1)
    assert [step.num_embedded for step in shares] == [[1]] * 4 + [[0]] * 2
    assert [step.num_tokens for step in shares[4:]] == [0, 0]
    for step in shares[4:]:
        assert step.micro_batches[0].tokens.tolist() == [[tokenizer.pad_id] * 8]


def test_the_interleaved_pipeline_gets_whole_rounds(builder, tokenizer):
    parallel = {"pipeline": 2, "virtual_pipeline": 2}
    tokens = {"train": {"micro_batch_tokens": 130}}
    seen = set()
    for number in range(1, 7):
        plain = builder.pairs(MIX, context(0, 1, 1, 2), **tokens).batch(number)
        step = builder.pairs(MIX, context(0, 1, 1, 2), parallel=parallel, **tokens).batch(number)
        num_dummies = len(plain.micro_batches) % 2
        seen.add(num_dummies)
        assert len(step.micro_batches) == len(plain.micro_batches) + num_dummies
        assert step.num_embedded == plain.num_embedded + [0] * num_dummies
        assert embedded_texts(step) == embedded_texts(plain)
        assert len({micro_batch.tokens.shape for micro_batch in step.micro_batches}) == 1
    assert seen == {0, 1}
    train = {"global_batch_size": 2}
    contrastive = {"num_positives": 1, "num_hard_negatives": 0}
    last = builder.pairs(
        {"large": {}}, context(5, 6, 0, 2), parallel=parallel, train=train, contrastive=contrastive
    ).batch(1)
    assert last.num_embedded == [0, 0]


@pytest.mark.parametrize("sections", [{}, BALANCE], ids=["one source", "balanced"])
def test_a_step_depends_on_its_number_alone(builder, sections):
    in_order = builder.pairs(MIX, **sections)
    expected = {number: contents(in_order.batch(number)) for number in range(1, 80)}
    other = builder.pairs(MIX, **sections)
    for number in (5, 3, 79, 3, 1, 40):
        assert contents(other.batch(number)) == expected[number]
    assert expected[1] != expected[2]
    seeded = builder.pairs(MIX, train={"seed": 7}, **sections)
    assert contents(seeded.batch(1)) != expected[1]


def test_every_row_comes_once_an_epoch(builder):
    """Each source counts its own batches, of its own size."""
    data = builder.pairs({"small": {}, "scored": {"batch_size": 5}})
    rows: dict[str, list[int]] = {"small": [], "scored": []}
    sizes = set()
    for number in range(1, 60):
        (batch,) = data.batch(number).batches
        rows[batch.store.name] += batch.rows.tolist()
        sizes.add((batch.store.name, len(batch.rows)))
    assert sizes == {("small", GLOBAL_BATCH), ("scored", 5)}
    for name, size in (("small", 40), ("scored", 30)):
        for epoch in range(len(rows[name]) // size):
            assert sorted(rows[name][epoch * size : (epoch + 1) * size]) == list(range(size))
        assert len(rows[name]) // size >= 3
        assert rows[name][:size] != rows[name][size : 2 * size]


def test_a_row_draws_other_positives_another_time(builder):
    """One of its two or three positives, not always the same: the choice depends on the step, too."""
    data = builder.pairs({"small": {}}, contrastive={"num_positives": 1})
    drawn: dict[int, set[int]] = {}
    for step in range(1, 41):  # 12 epochs
        batch = data.batch(step).batches[0]
        for i, row in enumerate(batch.rows.tolist()):
            drawn.setdefault(row, set()).add(int(batch.document_ids[batch.positive[1, i]]))
    several = [row for row in range(40) if len(data.stores[0].positives(row)) > 1]
    assert sum(len(drawn[row]) > 1 for row in several) > 0.9 * len(several)


def sources_drawn(data: Pairs, num_steps: int) -> dict[str, int]:
    names = [data.batch(number).batches[0].store.name for number in range(1, num_steps + 1)]
    return {name: names.count(name) for name in data.by_name}


def test_scored_pairs_stand_beside_every_batch(builder):
    """With the section they never come alone; without it they are a source like the others."""
    data = builder.pairs(MIX, **BALANCE)
    seen, scored_rows = set(), []
    for number in range(1, 65):
        main, beside = data.batch(number).batches
        assert (main.task != "sts", beside.store.name, len(beside.rows)) == (True, "scored", 7)
        assert len(main.rows) == GLOBAL_BATCH
        seen.add(main.store.name)
        scored_rows += beside.rows.tolist()
    assert seen == {"small", "labelled"}
    for epoch in range(64 * 7 // 30):
        assert sorted(scored_rows[epoch * 30 : (epoch + 1) * 30]) == list(range(30))
    plain = builder.pairs(MIX)
    assert all(len(plain.batch(number).batches) == 1 for number in range(1, 20))
    assert min(sources_drawn(plain, 64).values()) > 10


@pytest.mark.parametrize(("names", "said"), [(["scored"], "sts sources only"), (["small", "large"], "no sts source")])
def test_balance_needs_both_kinds(builder, names, said):
    with pytest.raises(
        ValueError, match=rf"contrastive\.batch_balance .* data\.sources holds {said}; add one, or remove"
    ):
        builder.pairs({name: {} for name in names}, **BALANCE)


@pytest.mark.parametrize(
    ("sources", "temperature", "expected"),
    [
        ({"small": {}, "large": {}}, 1.0, [0.2, 0.8]),
        ({"small": {}, "large": {}}, 2.0, [1 / 3, 2 / 3]),
        ({"small": {}, "large": {}}, 1e6, [0.5, 0.5]),
        ({"small": {"weight": 3}, "large": {"weight": 1}}, 1.0, [0.75, 0.25]),
        ({"small": {"weight": 3}, "large": {"weight": 1}}, 2.0, [0.75, 0.25]),
        ({"small": {"weight": 1}, "large": {"weight": 2}, "labelled": {"weight": 5}}, 1.0, [1 / 8, 2 / 8, 5 / 8]),
    ],
)
def test_sources_come_as_often_as_asked(builder, sources, temperature, expected):
    """In every 32 steps to within one of the share; so in 320 to within 10."""
    counts = sources_drawn(builder.pairs(sources, data={"source_temperature": temperature}), 320)
    for found, share in zip(counts.values(), expected, strict=True):
        assert abs(found - 320 * share) <= 10


def test_weights_beside_scored_pairs_are_those_of_the_others(builder):
    sources = {"small": {"weight": 3}, "large": {"weight": 1}, "scored": {"weight": 50}}
    counts = sources_drawn(builder.pairs(sources, **BALANCE), 320)
    assert counts["scored"] == 0
    assert abs(counts["small"] - 240) <= 10


def test_weights_for_some_sources_only_are_refused(builder):
    with pytest.raises(ValueError, match=r"data\.sources: .*large gives no weight but others do; give all sources one"):
        builder.pairs({"small": {"weight": 1}, "large": {}})
    sources = [SourceConfig(prefix=Path(name), weight=weight) for name, weight in (("a", 2.0), ("b", 0.5))]
    assert source_weights(sources) == [2.0, 0.5]
    assert source_weights([without_weight(source) for source in sources]) is None
    with pytest.raises(ValueError, match=r"data\.sources: a gives no weight"):
        source_weights([without_weight(sources[0]), sources[1]])


def without_weight(source: SourceConfig) -> SourceConfig:
    return source.model_copy(update={"weight": None})


def test_two_sources_of_one_name_are_refused(builder, tmp_path, tokenizer):
    (tmp_path / "other").mkdir()
    rows = [{"query": "q", "positive": "p"}]
    twin = write_store(tmp_path / "other", "small", tokenizer, "retrieval", rows)
    builder.stores = builder.stores | {"twin": twin}
    with pytest.raises(ValueError, match=r"two sources are called alike \(small, small\); rename a file prefix"):
        builder.pairs({"small": {}, "twin": {}})


def test_a_sources_own_prompts_win(builder, tokenizer):
    for more, prompts in (
        ({}, ("query", "document")),
        ({"query_prompt": "own"}, ("own", "document")),
        ({"document_prompt": "own"}, ("query", "own")),
        ({"query_prompt": "own", "document_prompt": "sts"}, ("own", "sts")),
    ):
        step = builder.pairs({"small": more}).batch(1)
        texts = formatted_texts(step, tokenizer, {"small": prompts})
        assert embedded_texts(step) == [texts[i] for i in step.gathered]
        num_queries = len(step.batches[0].query_ids)
        sizes = [len(tokenizer.encode(PROMPTS[prompts[int(i >= num_queries)]])) for i in step.gathered]
        assert torch.cat([batch.prompt_lengths for batch in step.micro_batches]).tolist() == sizes


@pytest.mark.parametrize("name", ["small", "scored", "labelled"])
def test_what_a_step_costs_is_counted(builder, tokenizer, name):
    """Truncated texts; tokens computed that belong to no text, in all layers and in attention."""
    setup = builder.setup({name: {}})
    data = Pairs(setup)
    for number in (1, 2):
        step = data.batch(number)
        batch = step.batches[0]
        raw, truncated = [], 0
        for i in range(batch.num_texts):
            kind, text_id = batch.text(i)
            prompt = tokenizer.encode(PROMPTS[DEFAULT_PROMPTS[name][kind == "document"]])
            raw.append(len(prompt) + len(tokenizer.encode(batch.store.text(text_id))) + 1)
            truncated += raw[-1] > LENGTHS[kind]
            raw[-1] = min(raw[-1], LENGTHS[kind])
        assert 0 < truncated < batch.num_texts
        assert step.num_truncated == truncated
        assert step.num_tokens == sum(raw)

        own = torch.nn.functional.normalize(torch.randn(batch.num_texts, 64), dim=-1)
        report = Contrastive(setup, data).settle(step, own).report
        computed = sum(-(-int(m.sequences.lengths.sum()) // 8) * 8 for m in step.micro_batches)
        attended = sum(g.num_texts * g.width for m in step.micro_batches for g in m.sequences.groups)
        assert report.totals == {"tokens": sum(raw), "attended_pairs": sum(length**2 for length in raw)}
        assert report.means["truncated_texts"] == (truncated, batch.num_texts)
        assert report.means["wasted_tokens"] == (computed - sum(raw), computed)
        assert report.means["attention_padding"] == (attended - sum(raw), attended)


class Table:
    """Stands in for mined negatives: remembers which rows were asked for."""

    def __init__(self, store: PairStore) -> None:
        self.store, self.asked = store, []

    def current(self, rows: np.ndarray) -> np.ndarray:
        """[rows, 2]: one negative of the corpus, and an empty slot."""
        self.asked.append(rows)
        return np.stack([self.store.corpus_ids[rows], np.full(len(rows), -1)], axis=1)


def test_mined_negatives_are_those_in_use_when_a_step_is_asked_for(builder):
    data = builder.pairs({"large": {}})
    assert (data.batch(1).batches[0].slots == -1).all()
    table = Table(data.by_name["large"])
    data.negatives["large"] = table  # type: ignore[assignment]
    (batch,) = data.batch(1).batches
    assert [rows.tolist() for rows in table.asked] == [batch.rows.tolist()]
    kept = batch.rows[batch.negative[0]]
    assert batch.document_ids[batch.negative[1]].tolist() == table.store.corpus_ids[kept].tolist()
    assert len(kept) > 0
    assert (batch.slots == 0).all()


def test_widths_are_multiples_of_8_and_of_tp():
    assert [pad_multiple(size) for size in (1, 2, 8, 3, 12, 16)] == [8, 8, 8, 24, 24, 16]


def test_sft_rows_are_refused(builder, tmp_path, tokenizer):
    rows = [{"instruction": "say", "output": "word"}] * 20
    builder.stores = builder.stores | {"sft": write_store(tmp_path, "sft", tokenizer, "sft", rows)}
    with pytest.raises(ValueError, match="holds sft rows"):
        builder.pairs({"sft": {}}).batch(1)


def test_settings_no_step_could_train_on_are_refused(builder, tokenizer, tmp_path):
    """At the start, not when such a source is first drawn."""
    bare = write_store(tmp_path, "bare", tokenizer, "retrieval", [{"query": "q", "pos": ["p"]}])
    builder.stores = builder.stores | {"bare": bare}
    own_only = {"in_batch_negatives": [], "num_hard_negatives": 1}
    with pytest.raises(
        ValueError, match=r"bare holds no negatives, and contrastive\.in_batch_negatives=\[\] gives none"
    ):
        builder.pairs({"small": {}, "bare": {}}, contrastive=own_only)
    balanced = {"batch_balance": {"scored_batch_size": 3}}
    with pytest.raises(ValueError, match=r"scored_batch_size=3 and the source's batch_size=9 exclude each other"):
        builder.pairs({"small": {}, "scored": {"batch_size": 9}}, contrastive=balanced)
