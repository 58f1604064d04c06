"""Rows of text pairs: the schemas of data_tools/README.md, one `PairRow` whatever the task."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_conan.data.text_files import (
    BadLine,
    Record,
    checked_text,
    filled_text,
    missing_key,
    parse_object,
    text_field,
)

TASKS = ("retrieval", "sts", "sft", "classification", "bitext", "pairclass")
TRAINED_AS = {"bitext": "retrieval", "pairclass": "sts"}
"""Rows of the first are stored as rows of the second."""
COLUMNS = {
    "retrieval": ("query", "instruction", "positive", "pos", "negative", "neg"),
    "sts": ("text1", "text2", "score"),
    "sft": ("instruction", "input", "output"),
    "classification": ("text", "label"),
    "bitext": ("text1", "text2"),
    "pairclass": ("text1", "text2", "label"),
}
"""Keys that are read."""


@dataclass(frozen=True)
class PairRow:
    """One row of input, whatever the task."""

    query: str
    positives: list[str]
    negatives: list[str] = field(default_factory=list)
    score: float = math.nan
    label: str | None = None
    """Class of the query, with task classification."""

    @property
    def texts(self) -> list[str]:
        """Query, positives, negatives."""
        return [self.query, *self.positives, *self.negatives]

    def distinct(self) -> PairRow:
        """The same with each positive and negative once, and without negatives that are also positives."""
        positives = dict.fromkeys(self.positives)
        negatives = [text for text in dict.fromkeys(self.negatives) if text not in positives]
        return replace(self, positives=list(positives), negatives=negatives)


def parse_row(task: str, record: Record) -> PairRow | None:
    """A line or row of a task's schema; None for a blank line. Raises BadLine."""
    row = parse_object(record)
    if row is None:
        return None
    if task == "retrieval":
        return _retrieval_row(row)
    if task == "classification":
        return PairRow(query=filled_text(row, "text"), positives=[], label=_label(row))
    if task == "sft":
        details = text_field(row, "input") if row.get("input") is not None else ""
        prompt = f"{filled_text(row, 'instruction')}\n{details}\n"
        return PairRow(query=prompt, positives=[filled_text(row, "output")])
    scores = {"sts": _score, "pairclass": _same_meaning}
    return PairRow(
        query=filled_text(row, "text1"),
        positives=[filled_text(row, "text2")],
        score=scores[task](row) if task in scores else math.nan,
    )


def _retrieval_row(row: dict[str, Any]) -> PairRow:
    query = filled_text(row, "query")
    if row.get("instruction") is not None:
        query = f"{filled_text(row, 'instruction')}\n{query}"
    positives = _text_list(row, ("positive", "pos"), required=True)
    return PairRow(query, positives, _text_list(row, ("negative", "neg"), required=False))


def _text_list(row: dict[str, Any], keys: tuple[str, ...], *, required: bool) -> list[str]:
    """Texts under the one of `keys` that is there; a single string counts as a list of one."""
    given = [key for key in keys if row.get(key) is not None]
    if len(given) > 1:
        raise BadLine("two keys", f"keys {' and '.join(map(repr, given))} mean the same; keep one")
    values: list[object] = []
    if given:
        content = row[given[0]]
        values = content if isinstance(content, list) else [content]
    texts = [checked_text(value, given[0]) for value in values]
    if required and not texts:
        raise BadLine("missing key", f"key {keys[0]!r} is missing or empty; each row needs at least one text there")
    if not all(text.strip() for text in texts):
        raise BadLine("empty text", f"key {given[0]!r} holds an empty text; drop it")
    return texts


def _score(row: dict[str, Any]) -> float:
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not _is_finite(score):
        raise BadLine("no score", f"key 'score' must be a finite number, found {score!r:.60}")
    return float(score)


def _is_finite(score: float) -> bool:
    """Within the range of the float32 that it is stored as."""
    return abs(score) < 3.4e38  # false for nan; no float() of huge integers


def _same_meaning(row: dict[str, Any]) -> float:
    label = row.get("label")
    if label not in (0, 1, "0", "1") or isinstance(label, float):
        raise BadLine("no label", f"key 'label' must be 1 (same meaning) or 0, found {label!r:.60}")
    return float(label)


def _label(row: dict[str, Any]) -> str:
    """The name under `label`; an integer is named by its digits."""
    if "label" not in row:
        raise missing_key(row, "label")
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise BadLine("wrong type", f"key 'label' must be a string or an integer, found {label!r:.60}")
    name = checked_text(str(label), "label")
    if not name.strip():
        raise BadLine("empty text", "key 'label' is empty; drop the row or fill it")
    return name
