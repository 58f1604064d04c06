"""Turning rows of text pairs into a text store and a table of ids: the files that `pairs.PairStore` reads.

Every distinct text is tokenised once and known by its number, so a corpus to mine from is a set of numbers.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.data.binarize import TokenWriter, cached_tokenizer, encode_texts, in_batches
from megatron_conan.data.command_line import Progress, publish, staging_folder, write_json
from megatron_conan.data.indexed_files import token_dtype, write_index
from megatron_conan.data.label_files import ClassRows, LabelledTexts, check_classes, label_field
from megatron_conan.data.process_map import process_map
from megatron_conan.data.text_files import (
    LineError,
    check_inputs,
    checked_text,
    line_error,
    read_objects,
    read_texts,
    text_field,
    whole_file,
)
from megatron_conan.data.tokenizer import Tokenizer

PAIR_FORMAT = "megatron_conan pairs 2"
TASKS = ("retrieval", "sts", "sft", "classification")
CHUNK_CHARACTERS = 2 << 20
"""Text handed to a tokenising process at a time."""


@dataclass(frozen=True)
class PairRow:
    """One row of input, whatever the task."""

    query: str
    positives: list[str]
    negatives: list[str] = field(default_factory=list)
    score: float = math.nan
    label: str | None = None
    """Class of the query, with task classification."""


class PairTable:
    """Ids of all texts and rows, in order of first appearance."""

    def __init__(self) -> None:
        self.text_ids: dict[str, int] = {}
        self.query = array("q")
        self.positives = array("q")
        self.positives_offsets = array("q", [0])
        self.negatives = array("q")
        self.negatives_offsets = array("q", [0])
        self.score = array("f")
        self.documents: set[int] = set()
        self.negatives_dropped = 0
        self.classes: ClassRows | None = None
        self._labelled = LabelledTexts()

    def add_row(self, row: PairRow) -> None:
        """Append a row; repeated documents count once, and a negative that is also a positive is dropped.

        A row with a label is not appended before `add_labelled_rows`.
        """
        if row.label is not None:
            self._labelled.add(self.add_document(row.query), row.label)
            return
        self.query.append(self._id(row.query))
        positives = list(dict.fromkeys(row.positives))
        negatives = [text for text in dict.fromkeys(row.negatives) if text not in positives]
        self.negatives_dropped += len(row.negatives) - len(negatives)
        self.positives.extend(map(self.add_document, positives))
        self.negatives.extend(map(self.add_document, negatives))
        self.positives_offsets.append(len(self.positives))
        self.negatives_offsets.append(len(self.negatives))
        self.score.append(row.score)

    def add_labelled_rows(self) -> ClassRows:
        """Append the labelled texts that have another text of their class; call it once, behind the last row."""
        self.classes = self._labelled.rows()
        num_rows = len(self.classes.text_ids)
        self.query.extend(self.classes.text_ids.tolist())
        self.positives_offsets.extend([0] * num_rows)
        self.negatives_offsets.extend([0] * num_rows)
        return self.classes

    def add_document(self, text: str) -> int:
        """Id of a text that belongs to the corpus."""
        text_id = self._id(text)
        self.documents.add(text_id)
        return text_id

    def _id(self, text: str) -> int:
        return self.text_ids.setdefault(text, len(self.text_ids))


def parse_row(task: str, offset: int, row: dict[str, Any]) -> PairRow:
    """One JSON object of a task's schema (data_tools/README.md). Raises LineError."""
    if task == "retrieval":
        return PairRow(
            query=_filled_text(offset, row, "query"),
            positives=_text_list(offset, row, ("positive", "pos"), required=True),
            negatives=_text_list(offset, row, ("negative", "neg"), required=False),
        )
    if task == "sts":
        return PairRow(
            query=_filled_text(offset, row, "text1"),
            positives=[_filled_text(offset, row, "text2")],
            score=_score(offset, row),
        )
    if task == "classification":
        return PairRow(query=_filled_text(offset, row, "text"), positives=[], label=label_field(offset, row))
    details = text_field(offset, row, "input") if row.get("input") is not None else ""
    prompt = f"{_filled_text(offset, row, 'instruction')}\n{details}\n"
    return PairRow(query=prompt, positives=[_filled_text(offset, row, "output")])


def preprocess_pairs(
    task: str,
    inputs: Sequence[Path],
    tokenizer_path: Path,
    output_prefix: Path,
    *,
    corpus: Sequence[Path] = (),
    text_key: str = "text",
    num_workers: int = 1,
) -> dict[str, Any]:
    """Write the files of a PairStore.

    Args:
        task: "retrieval", "sts", "sft" or "classification".
        inputs: .jsonl files of the task's rows.
        tokenizer_path: the .model file.
        output_prefix: P.
        corpus: .jsonl or .txt files of documents that belong to no row but may be mined.
        text_key: key of the text in `corpus`.
        num_workers: processes that tokenise; changes nothing in the output.

    Returns:
        The summary, as in P.json.

    Raises:
        ValueError: bad input (with file and line), no rows, or fewer than two classes. Then no file is left and older
            ones stay.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; use one of {', '.join(TASKS)}")
    check_inputs(inputs, suffixes=(".jsonl",))
    check_inputs(corpus)
    tokenizer = Tokenizer(tokenizer_path)
    table = _read_table(task, inputs, corpus, text_key)
    with staging_folder(output_prefix) as folder:
        with (folder / "out.bin").open("wb") as file:
            writer = TokenWriter(file)
            _tokenize_texts(table, tokenizer, writer, num_workers)
        lengths = writer.lengths()
        write_index(folder / "out.idx", lengths, token_dtype(tokenizer.size))
        suffixes = [".bin", ".idx", *_write_arrays(table, task, folder), ".json"]
        summary = {
            "format": PAIR_FORMAT,
            "task": task,
            **_counts(table, lengths),
            **(table.classes.counts() if table.classes else {}),
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_size": tokenizer.size,
            "tokens_sha256": writer.sha256(),
        }
        write_json(folder / "out.json", summary)
        publish(folder, output_prefix, suffixes)
    return summary


def _read_table(task: str, inputs: Sequence[Path], corpus: Sequence[Path], text_key: str) -> PairTable:
    table = PairTable()
    for path in inputs:
        try:
            for offset, row in read_objects(whole_file(path)):
                table.add_row(parse_row(task, offset, row))
        except LineError as error:
            raise line_error(path, error) from None
    if not table.text_ids:
        raise ValueError(f"{', '.join(map(str, inputs))}: no rows")
    if task == "classification":
        check_classes(inputs, table.add_labelled_rows())
    for path in corpus:
        try:
            for text in read_texts(whole_file(path), text_key):
                if text.strip():
                    table.add_document(text)
        except LineError as error:
            raise line_error(path, error) from None
    return table


def _tokenize_texts(table: PairTable, tokenizer: Tokenizer, writer: TokenWriter, num_workers: int) -> None:
    """Append every distinct text in the order of its id."""
    progress = Progress("tokenising", len(table.text_ids), "tokens")
    tasks = ((tokenizer.path, tokenizer.sha256, texts) for texts in in_batches(table.text_ids, CHUNK_CHARACTERS))
    for tokens, lengths in process_map(_encode_chunk, tasks, num_workers):
        writer.write(tokens.tobytes())
        writer.add_lengths(lengths)
        progress.advance(len(lengths), len(tokens))
    progress.finish()


def _encode_chunk(task: tuple[Path, str, list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [t], lengths [texts]) of (tokenizer model, its sha256, texts); raw ids without special tokens."""
    tokenizer_path, tokenizer_sha256, texts = task
    return encode_texts(cached_tokenizer(tokenizer_path, tokenizer_sha256), texts)


def _write_arrays(table: PairTable, task: str, folder: Path) -> list[str]:
    """Write the .npy files; returns their suffixes."""
    arrays: dict[str, np.ndarray] = {
        "query": np.frombuffer(table.query, dtype=np.int64),
        "query_order": np.argsort(np.frombuffer(table.query, dtype=np.int64), kind="stable"),
        "positives": np.array(table.positives, dtype=np.int64),
        "positives_offsets": np.frombuffer(table.positives_offsets, dtype=np.int64),
        "negatives": np.array(table.negatives, dtype=np.int64),
        "negatives_offsets": np.frombuffer(table.negatives_offsets, dtype=np.int64),
        "corpus": np.array(sorted(table.documents), dtype=np.int64),
    }
    if task == "sts":
        arrays["score"] = np.frombuffer(table.score, dtype=np.float32)
    if table.classes is not None:
        arrays |= table.classes.arrays()
    for name, content in arrays.items():
        np.save(folder / f"out.{name}.npy", content)
    return [f".{name}.npy" for name in arrays]


def _counts(table: PairTable, lengths: np.ndarray) -> dict[str, Any]:
    """Counts and mean lengths in tokens, for P.json."""
    query, positives = np.array(table.query, dtype=np.int64), np.array(table.positives, dtype=np.int64)
    negatives = np.array(table.negatives, dtype=np.int64)
    return {
        "rows": len(query),
        "texts": len(lengths),
        "documents": len(table.documents),
        "positives": len(positives),
        "negatives": len(negatives),
        "negatives_dropped": table.negatives_dropped,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "mean_query_length": _mean(lengths[query]),
        "mean_positive_length": _mean(lengths[positives]),
        "mean_negative_length": _mean(lengths[negatives]),
    }


def _mean(lengths: np.ndarray) -> float:
    return round(float(lengths.mean()), 2) if len(lengths) else 0.0


def _filled_text(offset: int, row: dict[str, Any], key: str) -> str:
    text = text_field(offset, row, key)
    if not text.strip():
        raise LineError(offset, f"key {key!r} is empty; drop the row or fill it")
    return text


def _text_list(offset: int, row: dict[str, Any], keys: tuple[str, ...], *, required: bool) -> list[str]:
    """Texts under the one of `keys` that is there; a single string counts as a list of one."""
    given = [key for key in keys if row.get(key) is not None]
    if len(given) > 1:
        raise LineError(offset, f"keys {' and '.join(map(repr, given))} mean the same; keep one")
    values: Iterator[object] | list[object] = []
    if given:
        content = row[given[0]]
        values = content if isinstance(content, list) else [content]
    texts = [checked_text(offset, value, given[0]) for value in values]
    if required and not texts:
        raise LineError(offset, f"key {keys[0]!r} is missing or empty; each row needs at least one text there")
    if not all(text.strip() for text in texts):
        raise LineError(offset, f"key {given[0]!r} holds an empty text; drop it")
    return texts


def _score(offset: int, row: dict[str, Any]) -> float:
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise LineError(offset, f"key 'score' must be a finite number, found {score!r}")
    return float(score)
