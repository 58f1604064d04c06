"""Find texts that repeat other texts: by word set (exact Jaccard join) and by word sequence (rolling hashes).

Used to keep copies of held-out functions out of training data; everything is exact up to 64-bit hash collisions and
independent of the order of Python's hashing.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_conan.data.prepare import split_words

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
_BASE_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


def near_duplicates(candidates: Sequence[str], references: Sequence[str], threshold: float) -> np.ndarray:
    """Which candidates have the word set of some reference, nearly.

    Words are what whitespace separates. Sets with Jaccard similarity >= t share one of their |x| - ceil(t|x|) + 1
    rarest words (prefix filter), so only those are looked up.

    Returns:
        bool [len(candidates)]: Jaccard similarity with at least one reference >= threshold. Empty texts are never one.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be in (0, 1]")
    candidate_sets = [frozenset(text.split()) for text in candidates]
    reference_sets = [frozenset(text.split()) for text in references]
    frequency = Counter(word for words in (*candidate_sets, *reference_sets) for word in words)

    def prefix(words: frozenset[str]) -> list[str]:
        rarest_first = sorted(words, key=lambda word: (frequency[word], word))
        return rarest_first[: len(words) - math.ceil(threshold * len(words)) + 1]

    postings: dict[str, list[int]] = defaultdict(list)
    for row, words in enumerate(reference_sets):
        if words:
            for word in prefix(words):
                postings[word].append(row)
    found = np.zeros(len(candidates), dtype=bool)
    for row, words in enumerate(candidate_sets):
        if words:
            rows = {other for word in prefix(words) for other in postings.get(word, ())}
            found[row] = any(_is_similar(words, reference_sets[other], threshold) for other in rows)
    return found


def _is_similar(a: frozenset[str], b: frozenset[str], threshold: float) -> bool:
    if min(len(a), len(b)) < threshold * max(len(a), len(b)):  # cheap, and rules out most
        return False
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) >= threshold


class WordSequences:
    """Word sequences of many texts, hashed so that any run of n words is found by one number.

    Words are split and lower-cased as in `prepare.split_words`, without dropping any.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        rows = [split_words(text) for text in texts]
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)  # [number of texts]
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        # Python's hash() of a word would differ between processes.
        codes = {word: _word_hash(word) for word in {word for row in rows for word in row}}
        words = np.array([codes[word] for row in rows for word in row], dtype=np.uint64)
        # Hash of words[i : i + n] = sum of words[i + j] * base**j; all arithmetic is modulo 2**64.
        powers = np.cumprod(np.full(len(words), _BASE))
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words * powers, dtype=np.uint64)])
        self._unshift = np.cumprod(np.full(len(words), _BASE_INVERSE))
        self._text_of = np.repeat(np.arange(len(self.lengths)), self.lengths)  # [number of words]

    def run_starts(self, num_words: int) -> np.ndarray:
        """Positions int64 [m] (over all texts joined) at which `num_words` words of one text begin."""
        starts = np.arange(len(self._text_of))
        return starts[starts + num_words <= self._offsets[self._text_of + 1]]

    def run_hashes(self, starts: np.ndarray, num_words: int) -> np.ndarray:
        """Hashes uint64 [m] of the runs of `num_words` words at `starts`."""
        return (self._sums[starts + num_words] - self._sums[starts]) * self._unshift[starts]

    def text_of(self, starts: np.ndarray) -> np.ndarray:
        """Numbers int64 [m] of the texts that the positions lie in."""
        return self._text_of[starts]

    def text_starts(self) -> np.ndarray:
        """Position of the first word of each text: int64 [number of texts]."""
        return self._offsets[:-1]


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def shared_run_share(candidates: WordSequences, references: WordSequences, num_words: int = 12) -> np.ndarray:
    """Share of each candidate's runs of `num_words` words that occur in any reference: float64 [candidates]."""
    starts = candidates.run_starts(num_words)
    known = np.isin(
        candidates.run_hashes(starts, num_words), references.run_hashes(references.run_starts(num_words), num_words)
    )
    text_of = candidates.text_of(starts)
    total = np.bincount(text_of, minlength=len(candidates.lengths))
    shared = np.bincount(text_of, weights=known, minlength=len(candidates.lengths))
    return shared / np.maximum(total, 1)


def contains_whole(candidates: WordSequences, phrases: WordSequences, min_words: int) -> np.ndarray:
    """Which candidates contain a whole phrase of at least `min_words` words, word for word: bool [candidates]."""
    found = np.zeros(len(candidates.lengths), dtype=bool)
    long_enough = phrases.lengths >= min_words
    phrase_starts, phrase_lengths = phrases.text_starts()[long_enough], phrases.lengths[long_enough]
    # Few positions begin like any phrase; only those are compared at every phrase length.
    starts = candidates.run_starts(min_words)
    beginnings = phrases.run_hashes(phrase_starts, min_words)
    starts = starts[np.isin(candidates.run_hashes(starts, min_words), beginnings)]
    text_of = candidates.text_of(starts)
    room = candidates.text_starts()[text_of] + candidates.lengths[text_of] - starts  # words left in the text
    for num_words in np.unique(phrase_lengths).tolist():
        whole = phrases.run_hashes(phrase_starts[phrase_lengths == num_words], num_words)
        fits = room >= num_words
        found[text_of[fits][np.isin(candidates.run_hashes(starts[fits], num_words), whole)]] = True
    return found
