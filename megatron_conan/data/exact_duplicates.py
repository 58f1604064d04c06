"""Which of many items are copies of an earlier one, by digests of their bytes on disk; memory does not grow with them.

Shapes: `n` items.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_conan.data.numbering import DIGEST_BYTES, number_texts

BLOCK = 1 << 16


@dataclass(frozen=True)
class Copies:
    """Items that were there before."""

    is_first: np.ndarray
    """[n] bool, memory-mapped: not the same as an earlier one."""
    frequent: list[tuple[int, int]]
    """(first item, items alike), the most frequent first, only those that come twice or more."""
    count: int
    """Copies."""


@contextmanager
def find_copies(contents: Iterable[bytes | memoryview], num_frequent: int = 5) -> Iterator[Copies]:
    """Compare items by 16-byte BLAKE2b digests, in a temporary folder (41 bytes an item) that is gone at the end.

    Args:
        contents: bytes of each item.
        num_frequent: how many of the most frequent ones to name.
    """
    with tempfile.TemporaryDirectory(prefix="inspect-dataset-") as name:
        folder = Path(name)
        rest = iter(contents)
        with (folder / "digests").open("wb") as file:
            while block := [hashlib.blake2b(item, digest_size=DIGEST_BYTES).digest() for item in islice(rest, BLOCK)]:
                file.write(b"".join(block))
        is_first, number = number_texts(folder / "digests", folder)
        firsts = sum(int(np.count_nonzero(is_first[i : i + BLOCK])) for i in range(0, len(is_first), BLOCK))
        yield Copies(is_first, _frequent(folder, is_first, number, firsts, num_frequent), len(is_first) - firsts)


def _frequent(
    folder: Path, is_first: np.ndarray, number: np.ndarray, num_distinct: int, num_frequent: int
) -> list[tuple[int, int]]:
    """(first item, items alike) of the most frequent ones; `is_first` and `number` [n] as `number_texts` gives them."""
    if num_distinct == len(is_first):
        return []
    times = np.memmap(folder / "times", np.int64, "w+", shape=(num_distinct,))
    for start in range(0, len(number), BLOCK):
        values, counts = np.unique(number[start : start + BLOCK], return_counts=True)
        times[values] += counts
    best = np.empty((0, 2), np.int64)  # [most frequent] (first item, items alike)
    before = 0
    for start in range(0, len(is_first), BLOCK):
        firsts = start + np.flatnonzero(is_first[start : start + BLOCK])
        alike = times[before : before + len(firsts)]
        before += len(firsts)
        repeated = alike > 1
        best = np.concatenate([best, np.stack([firsts[repeated], alike[repeated]], axis=1)])
        best = best[np.argsort(-best[:, 1], kind="stable")[:num_frequent]]
    return [(first, count) for first, count in best.tolist()]
