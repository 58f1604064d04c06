"""Labelled texts: which of them become rows, and the arrays that give a row's class and a class's rows.

A row needs another text of its class to be drawn as its positive, and a text of another class as its negative.
Legend: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MINIMUM_CLASSES = 2


@dataclass(frozen=True)
class ClassRows:
    """The rows of task classification and how many lines of input are none."""

    lines: np.ndarray
    """[R] int64, rising: the lines of input that are rows. Each distinct text is one, the first line with it."""
    labels: np.ndarray
    """[R] int32 class of each row; classes are numbered by their first rows."""
    names: list[str]
    """[classes], in order of their numbers."""
    num_repeated: int
    num_conflicting: int
    num_single: int

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written beside the other arrays, by name (data_tools/README.md)."""
        sizes = np.bincount(self.labels, minlength=len(self.names))
        return {
            "label": self.labels,
            "label_rows": np.argsort(self.labels, kind="stable").astype(np.int64),
            "label_offsets": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        }

    def counts(self) -> dict[str, Any]:
        """What is added to P.json."""
        sizes = np.bincount(self.labels, minlength=len(self.names)).tolist()
        return {
            "repeated_rows": self.num_repeated,
            "conflicting_rows": self.num_conflicting,
            "single_rows": self.num_single,
            "classes": len(self.names),
            "labels": dict(zip(self.names, sizes, strict=True)),
        }


def rows_of_classes(text_ids: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> ClassRows:
    """Choose the lines that become rows: the first with each text, unless no other text has its label.

    Args:
        text_ids: [lines] int64, numbered by first appearance.
        labels: [lines] int32 label of each line, into `names`.
        names: all labels.
    """
    _, first, text = np.unique(text_ids, return_index=True, return_inverse=True)
    own = labels[first]  # of the distinct texts, in order of first appearance
    alike = int(np.count_nonzero(labels == own[text])) - len(own)
    is_shared = np.bincount(own, minlength=len(names)) > 1
    kept = is_shared[own]
    used, begins, classes = np.unique(own[kept], return_index=True, return_inverse=True)
    order = np.argsort(begins)  # classes by their first rows
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return ClassRows(
        lines=first[kept].astype(np.int64),
        labels=rank[classes],
        names=[names[number] for number in used[order]],
        num_repeated=alike,
        num_conflicting=len(labels) - len(own) - alike,
        num_single=int(len(kept) - kept.sum()),
    )


def check_classes(inputs: Sequence[str | Path], rows: ClassRows) -> None:
    """Raise ValueError if there is nothing to tell apart."""
    if len(rows.names) < MINIMUM_CLASSES:
        raise ValueError(
            f"{', '.join(map(str, inputs))}: {len(rows.names)} of the labels have two texts or more, but a row needs "
            f"another text of its label and one of another label; give at least {MINIMUM_CLASSES} labels with two "
            f"distinct texts each (dropped: {rows.num_repeated} repeated rows, {rows.num_conflicting} conflicting ones, "
            f"{rows.num_single} alone with their label)"
        )
