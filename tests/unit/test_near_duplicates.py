"""Near-duplicate search against plain definitions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_conan.data.near_duplicates import WordSequences, contains_whole, near_duplicates, shared_run_share

WORDS = st.lists(st.sampled_from("abcdefgh"), max_size=8).map(" ".join)


@settings(deadline=None)
@given(st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=8), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_near_duplicates_equals_all_pairs(candidates: list[str], references: list[str], threshold: float) -> None:
    def similar(a: set[str], b: set[str]) -> bool:
        return bool(a) and len(a & b) / len(a | b) >= threshold

    expected = [any(similar(set(c.split()), set(r.split())) for r in references) for c in candidates]
    assert near_duplicates(candidates, references, threshold).tolist() == expected


def runs(text: str, num_words: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + num_words]) for i in range(len(words) - num_words + 1)]


@settings(deadline=None)
@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6), st.integers(1, 4))
def test_shared_runs_equal_tuples(candidates: list[str], references: list[str], num_words: int) -> None:
    known = {run for text in references for run in runs(text, num_words)}
    expected = [
        sum(run in known for run in runs(text, num_words)) / max(len(runs(text, num_words)), 1) for text in candidates
    ]
    share = shared_run_share(WordSequences(candidates), WordSequences(references), num_words)
    np.testing.assert_allclose(share, expected)


@settings(deadline=None)
@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6))
def test_contains_whole_equals_substring(candidates: list[str], phrases: list[str]) -> None:
    expected = [any(len(p.split()) >= 2 and f" {p} " in f" {c} " for p in phrases) for c in candidates]
    assert contains_whole(WordSequences(candidates), WordSequences(phrases), 2).tolist() == expected
