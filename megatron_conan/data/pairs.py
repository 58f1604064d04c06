"""Pair data on disk (queries, positives, negatives as ids of one text store) and batches made from it.

Legend: R rows, q queries of a batch, K slots for negatives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_conan.data.batch import PairBatch, collate_texts
from megatron_conan.data.format import format_text
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


def build_pair_batch(
    store: PairStore,
    rows: np.ndarray,
    *,
    tokenizer: Tokenizer,
    max_query_length: int,
    max_document_length: int,
    rng: Sequence[int],
    negatives: np.ndarray | None = None,
    num_negatives: int = 0,
    pad_multiple: int = 8,
) -> PairBatch:
    """Make a batch of some rows.

    Args:
        store: pair data of task retrieval or sts.
        rows: [q] row numbers.
        tokenizer: gives pad and EOS ids.
        max_query_length: tokens of a query, EOS included.
        max_document_length: tokens of a document, EOS included.
        rng: non-negative numbers that, with the row, settle every random choice, e.g. (seed, step): which of several
            positives, and which negatives if the file has more than `num_negatives`. A row's choice does not depend on
            the rest of the batch, so it is the same in every parallel layout.
        negatives: [q, K] text ids from a table of mined negatives, -1 for an empty slot; None takes the file's own.
        num_negatives: most negatives a query gets from the file; ignored if `negatives` is given.
        pad_multiple: padded lengths are multiples of this.
    """
    if store.task == "sft":
        raise ValueError(f"{store.prefix} holds sft rows, which are no pairs; use it in the sft stage")
    row_numbers = np.asarray(rows, dtype=np.int64)
    num_queries = len(row_numbers)
    if negatives is not None and negatives.shape[:1] != (num_queries,):
        raise ValueError(f"negatives has shape {negatives.shape}; expected [{num_queries}, K], one line a row")
    query_ids = np.array([store.query(row) for row in row_numbers], dtype=np.int64)
    document_ids = [_choose(store.positives(row), 1, (*rng, int(row), 0)) for row in row_numbers]
    document_query = [np.arange(num_queries, dtype=np.int64)]
    slots = [np.full(num_queries, -1, dtype=np.int64)]
    for query, row in enumerate(row_numbers):
        if negatives is None:
            ids = _choose(store.negatives(row), num_negatives, (*rng, int(row), 1))
            used_slots = np.full(len(ids), -1, dtype=np.int64)
        else:
            used_slots = np.flatnonzero(negatives[query] >= 0)
            ids = negatives[query, used_slots]
        document_ids.append(ids)
        document_query.append(np.full(len(ids), query, dtype=np.int64))
        slots.append(used_slots)
    documents = np.concatenate(document_ids).astype(np.int64) if document_ids else np.empty(0, np.int64)

    def texts(ids: np.ndarray, max_length: int) -> list[np.ndarray]:
        return [format_text(store.tokens(i), max_length, tokenizer.eos_id) for i in ids]

    return PairBatch(
        source=store.name,
        task=store.task,
        rows=torch.from_numpy(row_numbers.copy()),
        query_ids=torch.from_numpy(query_ids),
        query=collate_texts(texts(query_ids, max_query_length), tokenizer.pad_id, pad_multiple),
        document=collate_texts(texts(documents, max_document_length), tokenizer.pad_id, pad_multiple),
        document_ids=torch.from_numpy(documents),
        document_query=torch.from_numpy(np.concatenate(document_query)),
        is_positive=torch.arange(len(documents)) < num_queries,
        slots=torch.from_numpy(np.concatenate(slots).astype(np.int64)),
        scores=torch.tensor([store.score(row) for row in row_numbers], dtype=torch.float32),
    )


def _choose(ids: np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """At most `count` of the ids, in their order; a random choice by `key` if there are more."""
    if len(ids) <= count:
        return ids
    return ids[np.sort(np.random.default_rng(list(key)).choice(len(ids), count, replace=False))]


def _read_summary(prefix: Path) -> dict[str, Any]:
    path = prefix.with_name(prefix.name + ".json")
    command = (
        f"python data_tools/preprocess_pairs.py --task retrieval|sts|sft --input F [F ...] --tokenizer-model M "
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
