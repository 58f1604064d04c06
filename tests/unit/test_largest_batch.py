"""No batch of a run is larger than the one that a dry run takes."""

import dataclasses

import numpy as np
import pytest
from pair_builder import GLOBAL_BATCH, LENGTHS, builder, context, stores

from megatron_conan.data.packing import pack_sequences, split_texts
from megatron_conan.train.largest_batch import largest_parts
from megatron_conan.train.pair_data import Pairs

__all__ = ["builder", "stores"]

SIZES = {
    "by rows": {"micro_batch_size": 3, "micro_batch_tokens": None},
    "one row": {"micro_batch_size": 1, "micro_batch_tokens": None},
    "by tokens": {"micro_batch_size": None, "micro_batch_tokens": 90},
    "all at once": {"micro_batch_size": None, "micro_batch_tokens": 4000},
}
SOURCES = {
    "retrieval": {"small": {}, "large": {"batch_size": 9}},
    "scored": {"scored": {}},
    "labelled": {"labelled": {}},
    "beside": {"small": {}, "labelled": {}, "scored": {}},
}
BALANCE = {"contrastive": {"batch_balance": {"scored_batch_size": 5}}}
PLACES = {
    "one": context(),
    "dp 1 of 3": context(dp_rank=1, dp_size=3),
    "pp2": context(pp_size=2),
}


def sizes(step):
    """What memory depends on."""
    packed = [batch.sequences for batch in step.micro_batches]
    return {
        "tokens of a micro-batch": max(len(s.position) for s in packed),
        "tokens of a micro-batch, padded": max(batch.tokens.shape[1] for batch in step.micro_batches),
        "places of the padded groups": max(len(s.to_padded) for s in packed),
        "tokens of a text": max(s.max_length for s in packed),
        "texts that this rank embeds": sum(step.num_embedded),
        "texts": sum(step.sizes),
        **{f"rows {i}": len(batch.rows) for i, batch in enumerate(step.batches)},
        **{f"queries {i}": len(batch.query_ids) for i, batch in enumerate(step.batches)},
        **{f"documents {i}": len(batch.document_ids) for i, batch in enumerate(step.batches)},
        **{f"positives {i}": batch.positive.shape[1] for i, batch in enumerate(step.batches)},
        **{f"negatives {i}": batch.negative.shape[1] for i, batch in enumerate(step.batches)},
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sources", SOURCES)
def test_no_step_is_larger(builder, sources, size, place):
    more = BALANCE if sources == "beside" else {}
    data = Pairs(builder.setup(SOURCES[sources], PLACES[place], train=SIZES[size], **more))
    largest = data.largest_batch()
    limits = sizes(largest.batch)
    most = dict.fromkeys(limits, 0)
    for number in range(1, 25):
        for what, found in sizes(data.batch(number)).items():
            # where few texts make a micro-batch, some other lengths are padded a little more
            limit = limits[what] * (1.05 if what == "places of the padded groups" else 1)
            assert found <= limit, f"step {number}: {what}"
            most[what] = max(most[what], found)
    # and it is not larger than needed: the longest texts come, and so do all rows
    assert most["tokens of a text"] == limits["tokens of a text"] == largest.longest <= max(LENGTHS.values())
    assert most["rows 0"] == limits["rows 0"] <= GLOBAL_BATCH
    first = largest.batch.micro_batches[: largest.num_micro_batches]
    assert sum(len(batch.sequences.position) for batch in first) == largest.num_tokens
    if size == "by tokens":
        assert all(len(batch.sequences.position) == 90 for batch in first)


def test_a_largest_step_is_a_step_like_others(builder):
    """Its fields agree with each other; it names no step, so that negatives hear nothing of it."""
    for dp_rank in (0, 1):
        data = builder.pairs({"small": {}}, context(dp_rank=dp_rank, dp_size=2))
        largest, step = data.largest_batch().batch, data.batch(1)
        assert largest.step is None
        for each in (largest, step):
            assert each.num_embedded == [len(batch.sequences.lengths) for batch in each.micro_batches]
            assert sum(each.num_embedded) == each.sizes[dp_rank]
            assert sorted(each.gathered) == list(range(sum(batch.num_texts for batch in each.batches)))
            for batch in each.batches:
                assert batch.query_ids.shape == (batch.row_query.max() + 1,)
                assert len(batch.document_ids) == max(batch.positive[1].max(), batch.negative[1].max()) + 1
                assert (np.diff(batch.positive[0]) >= 0).all()
        assert {f.name for f in dataclasses.fields(largest)} == set(vars(step))


def test_a_source_of_more_texts_is_the_largest(builder):
    """Not the first, nor the one with the longest texts: the one with most tokens a step."""
    few, many = {"small": {"batch_size": 3}, "large": {"batch_size": 30}}, {"small": {"batch_size": 30}, "large": {}}
    for sources, expected in ((few, "large"), (many, "small")):
        (batch,) = builder.pairs(sources).largest_batch().batch.batches
        assert (batch.store.name, len(batch.rows)) == (expected, 30)


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("max_tokens", [200, 257, 400])
def test_full_micro_batches_are_as_full_as_any(is_padded, max_tokens):
    """Against random texts of at most these lengths."""
    rng = np.random.default_rng(max_tokens)
    longest = np.repeat([60, 40, 7], [20, 5, 8])
    parts, lengths = largest_parts(longest, 2, max_tokens=max_tokens, num_parts=None, is_padded=is_padded)
    assert sorted(np.concatenate(parts)) == list(range(len(longest)))
    assert (lengths <= longest).all()
    assert all(lengths[part].sum() == max_tokens for part in parts[:2])
    padded = len(pack_sequences(lengths[parts[0]]).to_padded)
    assert padded == max_tokens or is_padded
    for _ in range(300):
        drawn = -np.sort(-rng.integers(1, longest + 1))
        for part in split_texts(drawn, max_tokens):
            assert drawn[part].sum() <= max_tokens
            if is_padded:
                assert len(pack_sequences(drawn[part]).to_padded) <= padded
