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

from megatron_conan.data.text_files import LineError, checked_text

MINIMUM_CLASSES = 2


def label_field(offset: int, row: dict[str, Any]) -> str:
    """The name under `label`; an integer is named by its digits. Raises LineError."""
    if "label" not in row:
        found = ", ".join(map(repr, row)) or "no keys"
        raise LineError(offset, f"key 'label' is missing (found {found})")
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise LineError(offset, f"key 'label' must be a string or an integer, found {label!r}")
    name = checked_text(offset, str(label), "label")
    if not name.strip():
        raise LineError(offset, "key 'label' is empty; drop the row or fill it")
    return name


@dataclass(frozen=True)
class ClassRows:
    """The rows of task classification and how many lines of input are none."""

    text_ids: np.ndarray
    """[R] int64, in order of first appearance."""
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


class LabelledTexts:
    """Distinct texts and their classes, in order of first appearance."""

    def __init__(self) -> None:
        self._class_numbers: dict[str, int] = {}
        self._class_of_text: dict[int, int] = {}
        self._num_repeated = 0
        self._num_conflicting = 0

    def add(self, text_id: int, label: str) -> None:
        """Take a line of input; of the lines with one text the first counts."""
        known = self._class_of_text.get(text_id)
        if known is None:
            self._class_of_text[text_id] = self._class_numbers.setdefault(label, len(self._class_numbers))
        elif known == self._class_numbers.get(label):
            self._num_repeated += 1
        else:
            self._num_conflicting += 1

    def rows(self) -> ClassRows:
        """The texts that are not alone in their class."""
        text_ids = np.array(list(self._class_of_text), dtype=np.int64)
        classes = np.array(list(self._class_of_text.values()), dtype=np.int64)
        shared = np.bincount(classes, minlength=len(self._class_numbers)) > 1
        kept = shared[classes]
        numbers = np.cumsum(shared) - 1  # dropped classes leave no gap
        return ClassRows(
            text_ids=text_ids[kept],
            labels=numbers[classes[kept]].astype(np.int32),
            names=[name for name, number in self._class_numbers.items() if shared[number]],
            num_repeated=self._num_repeated,
            num_conflicting=self._num_conflicting,
            num_single=int(len(kept) - kept.sum()),
        )


def check_classes(inputs: Sequence[Path], rows: ClassRows) -> None:
    """Raise ValueError if there is nothing to tell apart."""
    if len(rows.names) < MINIMUM_CLASSES:
        raise ValueError(
            f"{', '.join(map(str, inputs))}: {len(rows.names)} of the labels have two texts or more, but a row needs "
            f"another text of its label and one of another label; give at least {MINIMUM_CLASSES} labels with two "
            f"distinct texts each (dropped: {rows.num_repeated} repeated rows, {rows.num_conflicting} conflicting ones, "
            f"{rows.num_single} alone with their label)"
        )
