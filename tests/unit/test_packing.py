"""Packing: where each token goes and comes back from, texts dealt to ranks and cut into micro-batches evenly."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_conan.data.packing import (
    GROUP_RATIO,
    deal_texts,
    pack_sequences,
    pack_texts,
    split_texts,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def by_length(lengths: list[int], order: str) -> np.ndarray:
    """As they come, or as micro-batches have them."""
    return np.array({"as drawn": lengths, "falling": sorted(lengths, reverse=True), "rising": sorted(lengths)}[order])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=LENGTHS, order=st.sampled_from(["as drawn", "falling", "rising"]), tail=st.integers(0, 9))
def test_padded_and_back(drawn, order, tail):
    """Every token has one place among the padded, which is in its text's line; all other places are padding."""
    lengths = by_length(drawn, order)
    packed = pack_sequences(lengths, int(lengths.sum()) + tail)
    total = int(lengths.sum())
    assert packed.num_tokens == total + tail == len(packed.to_packed)
    assert packed.lengths.tolist() == lengths.tolist()
    assert packed.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths.tolist())]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_length == max(drawn)
    assert packed.position.tolist() == [i for length in lengths for i in range(length)]

    text_of, padded_lines, start = np.repeat(np.arange(len(lengths)), lengths), [], 0
    first = 0
    for group in packed.groups:
        own = lengths[first : first + group.num_texts]
        assert own.tolist() == ([group.width] * group.num_texts if group.lengths is None else group.lengths.tolist())
        assert group.width == own.max()
        assert own.min() >= GROUP_RATIO * group.width
        for i in range(group.num_texts):
            padded_lines.append((first + i, start + i * group.width, group.width))
        start += group.num_texts * group.width
        first += group.num_texts
    assert first == len(lengths)
    assert start == len(packed.to_padded)

    padding = []
    for text, begin, width in padded_lines:
        for i in range(width):
            if i < lengths[text]:
                token = int(packed.to_padded[begin + i])
                assert (text_of[token], int(packed.position[token])) == (text, i)
                assert int(packed.to_packed[token]) == begin + i
            else:
                padding.append(begin + i)
                assert packed.to_padded[begin + i] == 0
    assert packed.padding.tolist() == padding
    assert packed.to_packed[total:].tolist() == [0] * tail


def test_groups_are_no_finer_than_needed():
    """The next text would break the ratio: 8 to 6 is .75 exactly, 5 is less."""
    packed = pack_sequences(np.array([8, 7, 6, 5, 4, 4, 1]))
    assert [(group.num_texts, group.width) for group in packed.groups] == [(3, 8), (3, 5), (1, 1)]
    assert [group.lengths is None for group in packed.groups] == [False, False, True]
    rising = pack_sequences(np.array([3, 4, 5, 6]))
    assert [(group.num_texts, group.width) for group in rising.groups] == [(2, 4), (2, 6)]
    alike = pack_sequences(np.full(9, 5))
    assert [(group.num_texts, group.width, group.lengths) for group in alike.groups] == [(9, 5, None)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_sorted_texts_have_little_padding(lengths):
    """A text of a group has at least .75 of its width."""
    packed = pack_sequences(np.array(sorted(lengths, reverse=True)))
    assert sum(lengths) >= GROUP_RATIO * len(packed.to_padded)
    assert len(packed.groups) <= 1 + np.log(max(lengths)) / -np.log(GROUP_RATIO)


@pytest.mark.parametrize(("lengths", "num_tokens"), [([], None), ([], 8), ([3, 0], None), ([3, 4], 6), ([-1], 5)])
def test_what_cannot_be_packed_is_refused(lengths, num_tokens):
    with pytest.raises(ValueError, match=rf"{len(lengths)} texts of .* tokens can't be packed into"):
        pack_sequences(np.array(lengths, np.int64), num_tokens)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 300), max_size=60), num_ranks=st.integers(1, 9))
def test_ranks_get_nearly_as_many_tokens(lengths, num_ranks):
    """Every text is dealt once; the most tokens and the least differ by no more than the longest text."""
    dealt = deal_texts(np.array(lengths, np.int64), num_ranks)
    assert len(dealt) == num_ranks
    assert sorted(itertools.chain.from_iterable(share.tolist() for share in dealt)) == list(range(len(lengths)))
    sums = [sum(lengths[text] for text in share) for share in dealt]
    assert max(sums) - min(sums) <= max(lengths, default=0)
    counts = [len(share) for share in dealt]
    assert max(counts) - min(counts) <= 1
    for share in dealt:
        own = [lengths[text] for text in share]
        assert own == sorted(own, reverse=True)
    again = deal_texts(np.array(lengths, np.int64), num_ranks)
    assert [share.tolist() for share in again] == [share.tolist() for share in dealt]


def test_dealing_by_hand():
    """To and fro: 9 8 | 6 7 | 5 4; of equal texts the first comes first."""
    dealt = deal_texts(np.array([4, 9, 6, 8, 5, 7]), 2)
    assert [share.tolist() for share in dealt] == [[1, 2, 4], [3, 5, 0]]
    assert [share.tolist() for share in deal_texts(np.array([5, 5, 5]), 2)] == [[0], [1, 2]]


def greedy(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """As many as fit, one after the other: no cut in this order has fewer parts."""
    parts: list[list[int]] = []
    for i, length in enumerate(lengths):
        if not parts or sum(lengths[j] for j in parts[-1]) + length > max_tokens:
            parts.append([])
        parts[-1].append(i)
    return parts


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 60), max_size=50), room=st.integers(0, 400))
def test_micro_batches_of_so_many_tokens(lengths, room):
    """In order, none too large, no more of them than needed, and none larger than an even share and one text."""
    max_tokens = max(lengths, default=1) + room
    parts = split_texts(np.array(lengths, np.int64), max_tokens)
    assert [i for part in parts for i in part.tolist()] == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in part) for part in parts]
    assert all(0 < tokens <= max_tokens for tokens in sums)
    assert len(parts) == len(greedy(lengths, max_tokens))
    if parts:
        assert max(sums) <= -(-sum(lengths) // len(parts)) + max(lengths)


def test_micro_batches_are_even():
    """Greedily they would have 30, 30, 30, 10 tokens."""
    parts = split_texts(np.ones(100, np.int64), 30)
    assert [len(part) for part in parts] == [26, 26, 26, 22]
    assert [part.tolist() for part in split_texts(np.array([5, 5, 5]), 15)] == [[0, 1, 2]]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 60), max_size=50), num_parts=st.integers(1, 12))
def test_so_many_micro_batches(lengths, num_parts):
    """In order, none empty, at most so many, none larger than an even share and one text."""
    parts = split_texts(np.array(lengths, np.int64), num_parts=num_parts)
    assert [i for part in parts for i in part.tolist()] == list(range(len(lengths)))
    assert all(len(part) for part in parts)
    assert len(parts) <= min(num_parts, len(lengths))
    if parts:
        even = sum(lengths) / min(num_parts, len(lengths))
        assert max(sum(lengths[i] for i in part) for part in parts) <= even + max(lengths)


@pytest.mark.parametrize("size", [1, 7, 24])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
def test_texts_alike_are_cut_into_exactly_so_many(size, num_parts):
    parts = split_texts(np.full(24, size), num_parts=num_parts)
    assert [len(part) for part in parts] == [24 // num_parts] * num_parts


def test_a_text_that_fits_into_no_micro_batch_is_refused():
    with pytest.raises(ValueError, match="a text of 9 tokens does not fit into micro-batches of 8"):
        split_texts(np.array([3, 9, 8]), 8)
    assert split_texts(np.array([], np.int64), 8) == split_texts(np.array([], np.int64), num_parts=3) == []


TOKENS = {3: [11, 12, 13], 5: [21], 8: [31, 32, 33, 34]}
PROMPTS = np.array([9, 9, 9, 2, 9, 0, 9, 9, 1])
"""Tokens of each text's prompt; of texts 3, 5 and 8 that is 2, 0 and 1."""


def tokens_of(text: int) -> np.ndarray:
    return np.array(TOKENS[text], np.int32)


@pytest.mark.parametrize(("size", "expected"), [({}, 8), ({"pad_multiple": 6}, 12), ({"num_tokens": 10}, 10)])
def test_packed_texts_stand_in_order_and_are_filled_up(size, expected):
    packed = pack_texts([8, 3, 5], tokens_of, PROMPTS, pad_id=7, **size)
    assert packed.tokens.tolist() == [[31, 32, 33, 34, 11, 12, 13, 21] + [7] * (expected - 8)]
    assert packed.tokens.dtype == packed.prompt_lengths.dtype == torch.int64
    assert packed.prompt_lengths.tolist() == [1, 2, 0]
    assert packed.sequences.lengths.tolist() == [4, 3, 1]
    assert packed.sequences.num_tokens == expected
    moved = packed.to("cpu")
    for name in ("lengths", "cu_seqlens", "position", "to_padded", "padding", "to_packed"):
        assert torch.equal(getattr(moved.sequences, name), getattr(packed.sequences, name)), name
    assert torch.equal(moved.tokens, packed.tokens)
    assert [(g.num_texts, g.width) for g in moved.sequences.groups] == [(2, 4), (1, 1)]
    assert moved.sequences.num_tokens == expected


@pytest.mark.parametrize(("size", "expected"), [({}, 1), ({"pad_multiple": 8}, 8), ({"num_tokens": 5}, 5)])
@pytest.mark.parametrize("nothing", [[], np.empty(0, np.int64)])
def test_a_micro_batch_of_no_texts_is_one_pad_token(size, expected, nothing):
    packed = pack_texts(nothing, tokens_of, PROMPTS, pad_id=7, **size)
    assert packed.tokens.tolist() == [[7] * expected]
    assert packed.sequences.lengths.tolist() == [1]
    assert packed.prompt_lengths.tolist() == [0]
