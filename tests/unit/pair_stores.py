"""Small pair files of every task, written by the project's own preprocessing, and rows of a batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer

MAX_ROWS = 40
"""Most rows of a random store."""

ROWS = st.lists(st.integers(0, MAX_ROWS - 1), min_size=1, max_size=12)
"""Rows of a batch; take them modulo the store's number of rows. A row may come twice, as where two epochs meet."""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_store(folder: Path, name: str, tokenizer: Tokenizer, task: str, rows: list[dict[str, Any]]) -> PairStore:
    """The rows through preprocess_pairs and PairStore."""
    preprocess_pairs(task, [write_rows(folder / f"{name}.jsonl", rows)], tokenizer.path, folder / name)
    return PairStore(folder / name, tokenizer)


def random_rows(task: str, seed: int) -> list[dict[str, Any]]:
    """Rows with everything that makes a batch hard.

    Retrieval: few texts for queries and documents alike, so that rows share queries and positives, a negative of one row is a
    positive of another with the same query, and a document is a query's own text.
    """
    rng = np.random.default_rng([seed, 99])
    num_rows = int(rng.integers(8, MAX_ROWS + 1))

    def draw(low: int, high: int) -> list[str]:
        return [f"text {i}" for i in rng.integers(0, 60, int(rng.integers(low, high)))]

    if task == "retrieval":
        return [{"query": f"text {rng.integers(0, 20)}", "pos": draw(1, 5), "neg": draw(0, 7)} for _ in range(num_rows)]
    if task == "sts":
        return [
            {"text1": draw(1, 2)[0], "text2": draw(1, 2)[0], "score": int(rng.integers(0, 5))} for _ in range(num_rows)
        ]
    classes = [{"text": f"class {i % 3}, text {i}", "label": f"c{i % 3}"} for i in range(num_rows)]
    single = [{"text": "alone", "label": "single"}]  # a text that is no row: row numbers and text ids differ
    return [classes[i] for i in rng.permutation(num_rows // 2)] + single + classes[num_rows // 2 :]


def random_stores(folder: Path, tokenizer: Tokenizer, task: str, count: int) -> list[PairStore]:
    """`count` stores of `random_rows`."""
    return [write_store(folder, f"{task}_{i}", tokenizer, task, random_rows(task, i)) for i in range(count)]
