"""Damage of the P.*.npy files of pair data: their sizes, offsets, text ids, orders and classes (data_tools/README.md).

Arrays are checked in blocks of rows. Legend: R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError

import numpy as np

from megatron_conan.data.file_checks import COPY_ANEW, Findings, after, search

DTYPES = {
    "query": "int64",
    "query_order": "int64",
    "positives": "int64",
    "positives_offsets": "int64",
    "negatives": "int64",
    "negatives_offsets": "int64",
    "corpus": "int64",
}
TASK_DTYPES: dict[str, dict[str, str]] = {
    "retrieval": {},
    "sts": {"score": "float32"},
    "classification": {"label": "int32", "label_rows": "int64", "label_offsets": "int64"},
    "sft": {},
}
"""Arrays that only rows of a task have."""


def array_path(prefix: Path, name: str) -> Path:
    """P.NAME.npy of the prefix P."""
    return prefix.with_name(f"{prefix.name}.{name}.npy")


def load_arrays(prefix: Path, task: str, findings: Findings) -> dict[str, np.ndarray]:
    """Map the arrays of a task into memory, by name; those that are missing or damaged are left out and found."""
    arrays = {}
    for name, dtype in {**DTYPES, **TASK_DTYPES[task]}.items():
        path = array_path(prefix, name)
        if not path.is_file():
            findings.add(path, "", "missing", is_unsafe=True)
            continue
        try:
            values = np.lib.format.open_memmap(path, mode="r")
        except (
            ValueError,
            OSError,
            EOFError,
            SyntaxError,
            TokenError,
        ) as error:  # what numpy raises for damaged headers
            problem = f"cut off or no .npy file ({' '.join(str(error).split())})"
            findings.add(path, "", problem, COPY_ANEW, is_unsafe=True)
            continue
        if values.dtype != dtype or values.ndim != 1:
            problem = f"found {values.dtype} with {values.ndim} dimensions, expected {dtype} with 1"
            findings.add(path, "header", problem, is_unsafe=True)
            continue
        size, needed = path.stat().st_size, values.offset + values.nbytes
        if size != needed:
            findings.add(path, "size", f"found {size:,} bytes, expected {needed:,}", COPY_ANEW, is_unsafe=True)
        arrays[name] = np.asarray(values)
    return arrays


class ArrayChecks:
    """The checks of all arrays of a prefix.

    Args:
        prefix: P.
        task: what a row is.
        arrays: all of them, of the right types.
        num_texts: texts in P.bin.
        findings: takes what is wrong.
    """

    def __init__(
        self, prefix: Path, task: str, arrays: Mapping[str, np.ndarray], num_texts: int, findings: Findings
    ) -> None:
        self.prefix, self.task, self.arrays, self.num_texts, self.findings = prefix, task, arrays, num_texts, findings
        self.num_rows = len(arrays["query"])

    def run(self) -> None:
        """Check all; stops where sizes or offsets don't fit."""
        names = [name for name in ("query_order", "score", "label", "label_rows") if name in self.arrays]
        for name in names:
            self._check_size(name, self.num_rows)
        for name in ("positives", "negatives"):
            self._check_size(f"{name}_offsets", self.num_rows + 1)
            self._check_offsets(f"{name}_offsets", len(self.arrays[name]), "row")
        if "label" in self.arrays:
            self._check_offsets("label_offsets", self.num_rows, "class")
        if self.findings.is_unsafe:
            return
        self._check_range("query", "row", self.num_texts, "texts")
        for name in ("positives", "negatives"):
            self._check_range(name, "value", self.num_texts, "texts")
        self._check_range("corpus", "document", self.num_texts, "texts")
        self._check_rows()
        self._check_order()
        if "label" in self.arrays:
            self._check_labels()

    def _add(self, name: str, where: str, problem: str, *, is_unsafe: bool = False) -> None:
        self.findings.add(array_path(self.prefix, name), where, problem, is_unsafe=is_unsafe)

    def _check_size(self, name: str, expected: int) -> None:
        if len(self.arrays[name]) != expected:
            problem = f"found {len(self.arrays[name]):,} values, expected {expected:,} ({self.num_rows:,} rows)"
            self._add(name, "size", problem, is_unsafe=True)

    def _check_offsets(self, name: str, num_values: int, what: str) -> None:
        """They must rise from 0 to `num_values`."""
        offsets = self.arrays[name]
        if not len(offsets) or offsets[0] != 0:
            found = f"the first is {offsets[0]}" if len(offsets) else "there are none"
            self._add(name, f"{what} 0", f"{found}, expected 0", is_unsafe=True)
            return
        falls = search(len(offsets) - 1, lambda block: offsets[after(block)] < offsets[block])
        if falls:
            ends = (
                f"ends at {offsets[falls.first + 1]}, expected at least {offsets[falls.first]}, where it begins{falls}"
            )
            self._add(name, f"{what} {falls.first}", ends, is_unsafe=True)
        if offsets[-1] != num_values:
            self._add(
                name, "end", f"the last is {offsets[-1]}, expected {num_values}, the number of values", is_unsafe=True
            )

    def _check_range(self, name: str, what: str, limit: int, of: str) -> bool:
        """Values must be within [0, limit)."""
        values = self.arrays[name]
        outside = search(len(values), lambda block: (values[block] < 0) | (values[block] >= limit))
        if outside is None:
            return True
        where = f"{what} {outside.first}"
        if f"{name}_offsets" in self.arrays and what == "value":
            row = int(np.searchsorted(self.arrays[f"{name}_offsets"], outside.first, side="right")) - 1
            where = f"row {row}, {where}"
        problem = f"found {values[outside.first]}, expected 0 to {limit - 1} ({limit:,} {of}){outside}"
        self._add(name, where, problem, is_unsafe=True)
        return False

    def _check_rows(self) -> None:
        """Numbers of positives, the corpus, and scores."""
        offsets, corpus = self.arrays["positives_offsets"], self.arrays["corpus"]

        def is_wrong(block: slice) -> np.ndarray:
            counts = offsets[after(block)] - offsets[block]
            if self.task == "retrieval":
                return counts == 0
            return counts != (0 if self.task == "classification" else 1)

        wrong = search(self.num_rows, is_wrong)
        if wrong:
            found = offsets[wrong.first + 1] - offsets[wrong.first]
            expected = {"retrieval": "1 or more", "classification": "0"}.get(self.task, "1")
            self._add("positives_offsets", f"row {wrong.first}", f"{found} positives, expected {expected}{wrong}")
        falls = search(len(corpus) - 1, lambda block: corpus[after(block)] <= corpus[block])
        if falls:
            problem = f"found {corpus[falls.first + 1]} behind {corpus[falls.first]}, expected ascending ids{falls}"
            self._add("corpus", f"document {falls.first + 1}", problem)
        elif not self.findings.is_unsafe:
            self._check_corpus()
        if "score" in self.arrays:
            score = self.arrays["score"]
            infinite = search(len(score), lambda block: ~np.isfinite(score[block]))
            if infinite:
                problem = f"score {score[infinite.first]}, expected a finite number{infinite}"
                self._add("score", f"row {infinite.first}", problem)

    def _check_corpus(self) -> None:
        """All positives, negatives and labelled texts must be documents."""
        corpus = self.arrays["corpus"]
        for name in ("query",) if self.task == "classification" else ("positives", "negatives"):
            values = self.arrays[name]

            def is_missing(block: slice, values: np.ndarray = values) -> np.ndarray:
                places = np.searchsorted(corpus, values[block])
                found = places < len(corpus)
                found[found] = corpus[places[found]] == values[block][found]
                return ~found

            missing = search(len(values), is_missing)
            if missing:
                where = array_path(self.prefix, name)
                problem = f"text {values[missing.first]} is missing, value {missing.first} of {where}{missing}"
                self._add("corpus", "documents", problem)

    def _check_order(self) -> None:
        """query_order must sort the rows by (query, row); then it holds every row exactly once."""
        query, order = self.arrays["query"], self.arrays["query_order"]
        if self.findings.is_unsafe or not self._check_range("query_order", "place", self.num_rows, "rows"):
            return

        def is_wrong(block: slice) -> np.ndarray:
            first, second = order[block], order[after(block)]
            falls = query[second] < query[first]
            return falls | ((query[second] == query[first]) & (second <= first))

        wrong = search(self.num_rows - 1, is_wrong)
        if wrong:
            first, second = int(order[wrong.first]), int(order[wrong.first + 1])
            problem = (
                f"row {second} (query {query[second]}) stands behind row {first} (query {query[first]}), expected "
                f"each row once, by query and row{wrong}"
            )
            self._add("query_order", f"place {wrong.first + 1}", problem)

    def _check_labels(self) -> None:
        """Every row must stand once in `label_rows`, under its class, rows of a class ascending."""
        label, rows, offsets = (self.arrays[name] for name in ("label", "label_rows", "label_offsets"))
        num_classes = len(offsets) - 1
        small = search(num_classes, lambda block: offsets[after(block)] - offsets[block] < 2)
        if small:
            found = offsets[small.first + 1] - offsets[small.first]
            self._add("label_offsets", f"class {small.first}", f"{found} rows, expected 2 or more{small}")
        in_range = self._check_range("label", "row", num_classes, "classes")
        if not self._check_range("label_rows", "place", self.num_rows, "rows") or not in_range:
            return

        def owner(block: slice) -> np.ndarray:
            return np.searchsorted(offsets, np.arange(block.start, block.stop), side="right") - 1

        wrong = search(self.num_rows, lambda block: label[rows[block]] != owner(block))
        if wrong:
            row = int(rows[wrong.first])
            under = owner(slice(wrong.first, wrong.first + 1))[0]
            problem = f"row {row}, which P.label.npy has in class {label[row]}, stands in class {under}{wrong}"
            self._add("label_rows", f"place {wrong.first}", problem)
        falls = search(
            self.num_rows - 1,
            lambda block: (rows[after(block)] <= rows[block]) & (owner(after(block)) == owner(block)),
        )
        if falls:
            problem = (
                f"row {rows[falls.first + 1]} behind row {rows[falls.first]}, expected ascending rows in a class{falls}"
            )
            self._add("label_rows", f"place {falls.first + 1}", problem)
