"""Retrieval rows in .jsonl files: read as numbers of texts, written again with mined negatives.

Shapes: `R` rows, `n` documents.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.data.documents import DocumentFormat
from megatron_conan.data.input_files import InputFile, find_inputs
from megatron_conan.data.pair_rows import PairRow, parse_row
from megatron_conan.data.ragged import Ragged
from megatron_conan.data.text_files import Record, parse_object, read_all
from megatron_conan.mining.pools import MiningSource, Pools, shortened
from megatron_conan.mining.select import REASONS, SHORT_REASONS

SCORE_DIGITS = 6
ROW_FORMATS = (".jsonl",)
"""Of what `find_inputs` knows; rows are written again as they were."""


@dataclass(frozen=True)
class NumberedRows:
    """Every distinct text once, known by its number in the order of first appearance, and rows of such numbers."""

    texts: list[str]
    row_query: np.ndarray
    """[R] int64."""
    row_positives: Ragged
    """R lists, as they stand in the rows."""
    document_ids: np.ndarray
    """[n] int64, rising: positives, the rows' own negatives, and further documents."""

    def source(self, name: str) -> MiningSource:
        """What is to be mined; `name` is for messages."""
        return MiningSource.of_rows(
            name, self.row_query, self.row_positives, self.document_ids, lambda text_id: shortened(self.texts[text_id])
        )


def read_rows(inputs: Sequence[Path], corpus: Sequence[Path] = (), text_key: str = "text") -> NumberedRows:
    """Read retrieval rows (.jsonl) and further documents (.jsonl with the text under `text_key`, or .txt).

    Raises ValueError for files that are missing or empty, and for rows that can't be read, with file and line.
    """
    numbers: dict[str, int] = {}
    is_document = bytearray()
    row_query, positives, offsets = array("q"), array("q"), array("q", [0])

    def number_of(text: str, *, document: bool) -> int:
        number = numbers.setdefault(text, len(numbers))
        if number == len(is_document):
            is_document.append(document)
        elif document:
            is_document[number] = True
        return number

    for file in find_inputs(inputs, ROW_FORMATS):
        for _, row in _parsed_rows(file):
            row_query.append(number_of(row.query, document=False))
            positives.extend(number_of(text, document=True) for text in row.positives)
            offsets.append(len(positives))
            for text in row.negatives:
                number_of(text, document=True)
    if not row_query:
        raise ValueError(f"{', '.join(map(str, inputs))}: no rows")
    for file in find_inputs(corpus):
        is_empty = True
        for text in _documents(file, text_key):
            number_of(text, document=True)
            is_empty = False
        if is_empty:
            raise ValueError(f"{file.path}: no documents")
    return NumberedRows(
        list(numbers),
        np.frombuffer(row_query, np.int64),
        Ragged(np.frombuffer(positives, np.int64), np.frombuffer(offsets, np.int64)),
        np.flatnonzero(np.frombuffer(is_document, np.uint8)),
    )


def write_mined_rows(
    path: Path,
    inputs: Sequence[Path],
    rows: NumberedRows,
    source: MiningSource,
    pools: Pools,
    *,
    with_scores: bool = False,
) -> None:
    """Write the rows of `inputs` in their order, with the texts of their query's pool as negatives, best first.

    Negatives stand under the row's own key (`negative` or `neg`); all other keys stay.

    Args:
        pools: the scores of `source.positives` are its `compared_scores`, where scores are wanted.
        with_scores: each row also gets `positive_scores`, in the order of its positives, and `negative_scores`.

    Raises ValueError for inputs that have changed since they were read.
    """
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for input_file in find_inputs(inputs, ROW_FORMATS):
            for content, row in _parsed_rows(input_file):
                if number == len(rows.row_query) or row.query != rows.texts[rows.row_query[number]]:
                    raise ValueError(f"{input_file.path} changed while it was mined; start again")
                place = source.query_of_row[number]
                found = pools.ids[place]
                found = found[found >= 0].tolist()
                content[_negative_key(content)] = [rows.texts[text_id] for text_id in found]
                if with_scores:
                    order = np.searchsorted(_list(source.positives, place), _list(rows.row_positives, number))
                    content["positive_scores"] = _rounded(pools.compared_scores[place, order])
                    content["negative_scores"] = _rounded(pools.scores[place, : len(found)])
                file.write(_one_line(content))
                number += 1
    if number != len(rows.row_query):
        raise ValueError(f"{', '.join(map(str, inputs))} lost rows while they were mined; start again")


def write_short_queries(path: Path, rows: NumberedRows, source: MiningSource, pools: Pools) -> None:
    """Write a line for every distinct query with fewer negatives than asked for, and what turned the others down."""
    wanted = pools.ids.shape[1]
    with path.open("w", encoding="utf-8") as file:
        for place in np.flatnonzero(pools.short_reasons >= 0):
            counts = zip(REASONS, pools.rejected[place].tolist(), strict=True)
            content = {
                "query": rows.texts[source.query_ids[place]],
                "found": int((pools.ids[place] >= 0).sum()),
                "wanted": wanted,
                "reason": SHORT_REASONS[pools.short_reasons[place]],
                "rejected": {reason: count for reason, count in counts if count},
            }
            file.write(_one_line(content))


def _parsed_rows(file: InputFile) -> Iterator[tuple[dict[str, Any], PairRow]]:
    """The rows of a file as they stand there, and parsed. Raises ValueError with file and line."""

    def parse(record: Record) -> tuple[dict[str, Any], PairRow] | None:
        content = parse_object(record)
        row = None if content is None else parse_row("retrieval", content)
        return None if content is None or row is None else (content, row)

    yield from read_all(file, parse)


def _documents(file: InputFile, text_key: str) -> Iterator[str]:
    """The documents of a file that are not blank. Raises ValueError with file and line."""
    source = DocumentFormat(text_key=text_key)
    for texts in read_all(file, partial(source.texts, file), source.columns):
        yield from (text for text in texts if text.strip())


def _negative_key(content: dict[str, Any]) -> str:
    """The key under which the row keeps negatives; `neg` beside `pos` where it has none."""
    for key in ("negative", "neg"):
        if content.get(key) is not None:
            return key
    return "neg" if "neg" in content or ("negative" not in content and "pos" in content) else "negative"


def _list(lists: Ragged, number: int) -> np.ndarray:
    return lists.values[lists.offsets[number] : lists.offsets[number + 1]]


def _rounded(scores: np.ndarray) -> list[float]:
    return [round(score, SCORE_DIGITS) for score in scores.tolist()]


def _one_line(content: dict[str, Any]) -> str:
    """The object as a line of JSON, readable text as it is; escaped where another key holds what UTF-8 can't."""
    line = json.dumps(content, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(content)
    return line + "\n"
