"""The .npy files of pair data: ids of texts by row, in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.data.durable import save_array, save_blocks
from megatron_conan.data.label_files import ClassRows
from megatron_conan.data.ragged import ranges

TASK_ARRAYS = ("score", "label", "label_rows", "label_offsets")
"""Arrays that only some tasks have."""
BLOCK_ROWS = 1 << 20


class PairArrays:
    """The .npy files, written in blocks of rows."""

    def __init__(self, folder: Path, number: np.ndarray, rows: dict[str, np.ndarray], num_texts: int) -> None:
        """`number` [texts met] gives the ids of all texts in the order they were met: row after row, then the corpus."""
        self.folder, self.number, self.rows = folder, number, rows
        self.names: list[str] = []
        counts = 1 + rows["positives"].astype(np.int64) + rows["negatives"]
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        """[rows + 1] where the texts of each row begin."""
        self.is_document = np.zeros(num_texts, bool)

    def write(self, classes: ClassRows | None, *, stores_scores: bool) -> None:
        """Write all."""
        self.is_document[self.number[self.starts[-1] :]] = True
        if classes is None:
            self._write_blocks("query", self.starts[:-1], self.starts[:-1] + 1)
        else:
            # all labelled texts are documents, but not all of them are rows; a line has one text
            self.is_document[self.number[: self.starts[-1]]] = True
            self._write_blocks("query", classes.lines, classes.lines + 1)
            self.rows = {name: values[classes.lines] for name, values in self.rows.items()}
            self.starts = np.append(classes.lines, classes.lines[-1:] + 1)
        query = np.load(self.folder / "out.query.npy", mmap_mode="r")
        self._save("query_order", np.argsort(query, kind="stable"))
        begins = self.starts[:-1] + 1
        for name in ("positives", "negatives"):
            ends = begins + self.rows[name]
            self._save(f"{name}_offsets", np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - begins)]))
            self._write_blocks(name, begins, ends)
            begins = ends
        for name in ("positives", "negatives"):
            for block in self._blocks(name):
                self.is_document[block] = True
        self._save("corpus", np.flatnonzero(self.is_document).astype(np.int64))
        if stores_scores:
            self._save("score", self.rows["score"])
        if classes is not None:
            for name, values in classes.arrays().items():
                self._save(name, values)

    def counts(self, lengths: np.ndarray) -> dict[str, Any]:
        """Counts and mean lengths in tokens, for P.json."""
        counts: dict[str, int] = {}
        means: dict[str, float] = {}
        for name, key in (("query", "query"), ("positives", "positive"), ("negatives", "negative")):
            counts[name] = sum(map(len, self._blocks(name)))
            total = sum(int(lengths[block].sum(dtype=np.int64)) for block in self._blocks(name))
            means[f"mean_{key}_length"] = round(total / counts[name], 2) if counts[name] else 0.0
        return {
            "rows": counts["query"],
            "texts": len(lengths),
            "documents": int(np.count_nonzero(self.is_document)),
            "positives": counts["positives"],
            "negatives": counts["negatives"],
            **means,
        }

    def _save(self, name: str, values: np.ndarray) -> None:
        save_array(self.folder / f"out.{name}.npy", values)
        self.names.append(name)

    def _write_blocks(self, name: str, begins: np.ndarray, ends: np.ndarray) -> None:
        """Write the ids of the texts met from `begins` to `ends` ([rows] each), row after row."""
        slices = (slice(start, start + BLOCK_ROWS) for start in range(0, len(begins), BLOCK_ROWS))
        blocks = (self.number[ranges(begins[rows], ends[rows])[1]] for rows in slices)
        save_blocks(self.folder / f"out.{name}.npy", np.dtype(np.int64), (int((ends - begins).sum()),), blocks)
        self.names.append(name)

    def _blocks(self, name: str) -> Iterator[np.ndarray]:
        values = np.load(self.folder / f"out.{name}.npy", mmap_mode="r")
        for start in range(0, len(values), BLOCK_ROWS):
            yield np.array(values[start : start + BLOCK_ROWS])
