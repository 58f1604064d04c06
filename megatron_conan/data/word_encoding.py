"""Tokenising many texts: the same tokens as SentencePiece's, with each frequent word encoded once.

No piece of our tokenizers has a space behind another character, so no merge of byte-pair encoding crosses the border between a
word and the space behind it, and what is between two such borders is encoded alike wherever it stands. Texts are therefore cut
there, and the tokens of short words are kept: natural text repeats them. Others are encoded all the same.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from itertools import chain

import numpy as np
import sentencepiece

from megatron_conan.data.indexed_files import token_dtype
from megatron_conan.data.tokenizer import Tokenizer

WORD = re.compile(" *[^ ]+| +")
LONGEST_KEPT_WORD = 24
"""Characters."""
MOST_KEPT_WORDS = 50_000
"""Some 10 MB a process; more make it no faster."""


class WordEncoder:
    """Encodes texts for one tokenizer, remembering words.

    Args:
        tokenizer: any; texts are encoded whole where it is no byte-pair encoding, a piece has a space behind another
            character, or texts are changed first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.size)
        self.cuts_words = _can_cut(tokenizer)
        self._code = {2: "H", 4: "i"}[self.dtype.itemsize]
        self._tokens: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str], *, append_eod: bool = False) -> tuple[bytes, np.ndarray]:
        """Tokenise texts.

        Args:
            texts: any.
            append_eod: end each with EOS.

        Returns:
            (tokens of all texts behind one another as the bytes of the .bin file, lengths [texts] int32).

        Raises:
            ValueError: a text holds lone surrogates.
        """
        words = [self._words(text) for text in texts]
        rare = self._encode_words(set(chain.from_iterable(words)))
        tokens_of = self._tokens.__getitem__
        end = [np.array([self.tokenizer.eos_id], self.dtype).tobytes()] if append_eod else []
        encoded = [b"".join([*map(tokens_of, of_text), *end]) for of_text in words]
        for word in rare:
            del self._tokens[word]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)) // self.dtype.itemsize
        return b"".join(encoded), lengths.astype(np.int32)

    def _words(self, text: str) -> list[str]:
        """What is encoded apart. A literal U+2581 is a space to SentencePiece, which may merge it with real ones."""
        return WORD.findall(text) if self.cuts_words and "\u2581" not in text else [text]

    def _encode_words(self, words: set[str]) -> list[str]:
        """Have the tokens of all these words at hand. Returns those that are not to be kept."""
        missing = list(words.difference(self._tokens))
        ids = self.tokenizer.encode_batch(missing) if missing else []
        room = MOST_KEPT_WORDS - len(self._tokens)
        self._tokens.update(zip(missing, [array(self._code, of_word).tobytes() for of_word in ids], strict=True))
        kept = [word for word in missing if len(word) <= LONGEST_KEPT_WORD][: max(room, 0)]
        return [*set(missing).difference(kept)]


def _can_cut(tokenizer: Tokenizer) -> bool:
    """Whether words can be encoded apart."""
    pieces = tokenizer.pieces()
    gets_space = pieces[tokenizer.encode("a")[0]].startswith("\u2581")
    probe = "  \uff21  \ufb01 "  # what normalisers change
    is_kept = tokenizer.decode(tokenizer.encode(probe)) == probe
    crosses = any(re.search("[^\u2581]\u2581", piece) for piece in pieces)
    return is_kept and not gets_space and not crosses and _is_bpe(tokenizer)


def _is_bpe(tokenizer: Tokenizer) -> bool:
    """Whether scores are ranks of merges. What a unigram model finds best depends, by rounding, on all that stands before."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    return all(processor.get_score(i).is_integer() for i in range(tokenizer.size))
