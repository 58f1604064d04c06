"""Pair data on disk: queries, positives and negatives as ids of one text store.

Legend: R rows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.data.indexed_files import IndexedFile
from megatron_conan.data.pair_files import PAIR_FORMAT
from megatron_conan.data.tokenizer import Tokenizer


class PairStore:
    """The files of `data_tools/preprocess_pairs.py`, memory-mapped.

    A text is known by its id, 0 .. num_texts - 1. The corpus that can be mined is `corpus_ids`.

    Args:
        prefix: P, the `--output-prefix` the files were written with.
        tokenizer: the one the files were written with.

    Raises:
        ValueError: files are missing, or were written with another tokenizer.
    """

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer) -> None:
        self.prefix = Path(prefix)
        self.name: str = self.prefix.name
        self.summary = _read_summary(self.prefix)
        self.task: str = self.summary["task"]
        _check_tokenizer(self.prefix, self.summary, tokenizer)
        self._tokenizer = tokenizer
        self._texts = IndexedFile(self.prefix)
        self.query_ids: np.ndarray = self._load("query")
        """[R] int64 text id of each row's query."""
        self.query_order: np.ndarray = self._load("query_order")
        """[R] int64 rows in the order of their queries' ids, with which all rows of a query are found."""
        self.positive_ids: np.ndarray = self._load("positives")
        """int64 text ids of all rows' positives; row r has those from `positive_offsets[r]` to `[r + 1]`."""
        self.positive_offsets: np.ndarray = self._load("positives_offsets")
        """[R + 1] int64."""
        self.negative_ids: np.ndarray = self._load("negatives")
        """int64 text ids of all rows' negatives, with `negative_offsets` as above."""
        self.negative_offsets: np.ndarray = self._load("negatives_offsets")
        """[R + 1] int64."""
        self.scores: np.ndarray | None = self._load("score") if self.task == "sts" else None
        """[R] float32 similarity labels; None for other tasks than sts."""
        classified = self.task == "classification"
        self.labels: np.ndarray | None = self._load("label") if classified else None
        """[R] int32 class of each row; None for other tasks than classification, like the next two."""
        self.label_rows: np.ndarray | None = self._load("label_rows") if classified else None
        """[R] int64 rows grouped by class, ascending within a class."""
        self.label_offsets: np.ndarray | None = self._load("label_offsets") if classified else None
        """[classes + 1] int64: class c has the rows `label_rows` holds from `label_offsets[c]` to `[c + 1]`."""
        self.num_rows: int = len(self.query_ids)
        self.num_texts: int = len(self._texts)
        self.corpus_ids: np.ndarray = self._load("corpus")
        """[documents] int64, ascending ids of the texts that are documents."""

    @property
    def lengths(self) -> np.ndarray:
        """[num_texts] int32 tokens of each text, without EOS."""
        return self._texts.lengths

    def query(self, row: int) -> int:
        """Text id of a row's query (sts: text1; sft: the prompt; classification: the text)."""
        return int(self.query_ids[row])

    def positives(self, row: int) -> np.ndarray:
        """[1 or more] int64 text ids of a row's positives (sts: text2; sft: the output); classification has none."""
        return self.positive_ids[self.positive_offsets[row] : self.positive_offsets[row + 1]]

    def negatives(self, row: int) -> np.ndarray:
        """[0 or more] int64 text ids of the negatives in the file."""
        return self.negative_ids[self.negative_offsets[row] : self.negative_offsets[row + 1]]

    def score(self, row: int) -> float:
        """Similarity label of an sts row; NaN for other tasks."""
        return float(self.scores[row]) if self.scores is not None else math.nan

    def rows_of_label(self, label: int) -> np.ndarray:
        """[2 or more] int64 rows of a class, ascending; only for task classification."""
        if self.label_rows is None or self.label_offsets is None:
            raise ValueError(f"{self.prefix} holds {self.task} rows, which have no labels")
        return self.label_rows[self.label_offsets[label] : self.label_offsets[label + 1]]

    def tokens(self, text_id: int) -> np.ndarray:
        """[length] int32 token ids of a text, without special tokens."""
        return self._texts[int(text_id)].astype(np.int32)

    def text(self, text_id: int) -> str:
        """A text, decoded."""
        return self._tokenizer.decode(self._texts[int(text_id)].tolist())

    def _load(self, name: str) -> np.ndarray:
        path = self.prefix.with_name(f"{self.prefix.name}.{name}.npy")
        if not path.is_file():
            raise ValueError(f"{path} does not exist; write the files of {self.prefix} anew")
        return np.load(path, mmap_mode="r")


def _read_summary(prefix: Path) -> dict[str, Any]:
    path = prefix.with_name(prefix.name + ".json")
    command = (
        f"python data_tools/preprocess_pairs.py --task retrieval|sts|sft|classification --input F [F ...] --tokenizer-model M "
        f"--output-prefix {prefix}"
    )
    if not path.is_file():
        raise ValueError(f"pair data {prefix} is missing: {path} does not exist; make it with: {command}")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("format") != PAIR_FORMAT:
        raise ValueError(
            f"{path} describes {summary.get('format')!r}, not {PAIR_FORMAT!r}; make pair data with: {command}"
        )
    return summary


def _check_tokenizer(prefix: Path, summary: dict[str, Any], tokenizer: Tokenizer) -> None:
    if summary["tokenizer_sha256"] != tokenizer.sha256:
        raise ValueError(
            f"{prefix} was written with the tokenizer of sha256 {summary['tokenizer_sha256']} (size "
            f"{summary['tokenizer_size']}), but {tokenizer.path} has {tokenizer.sha256} (size {tokenizer.size}); use that "
            f"tokenizer, or run data_tools/preprocess_pairs.py again with --tokenizer-model {tokenizer.path}"
        )
