"""Numbers for the distinct ones of many texts, by digests on disk, with memory that does not grow with their number.

A text is known by 16 bytes of BLAKE2b: among 10^12 texts the chance that any two different ones share them is 1 in 10^14.
Shapes: `n` texts, `d` distinct ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

DIGEST_BYTES = 16
DIGEST = np.dtype([("high", ">u8"), ("low", ">u8")])
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8")])
BUCKET_TEXTS = 1 << 18
"""Texts that are compared at a time (some 15 MB); more where there are more than MOST_BUCKETS times as many."""
MOST_BUCKETS = 1024
BLOCK_TEXTS = 1 << 18


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def text_digests(texts: Iterable[str]) -> bytes:
    """The digests of texts, one behind the other."""
    return b"".join(map(text_digest, texts))


def number_texts(digests: Path, folder: Path, *, bucket_texts: int = BUCKET_TEXTS) -> tuple[np.ndarray, np.ndarray]:
    """Find which texts are the first of their kind, and number the distinct ones in the order of their first appearance.

    Works off buckets of texts that begin with the same bits, so takes some 30 MB of memory up to 250 million texts; needs 33
    bytes of disk a text.

    Args:
        digests: file of n digests of 16 bytes.
        folder: for files of its own: those returned are in it.

    Returns:
        (is_first [n] bool, number [n] int64 in 0 .. d - 1), memory-mapped.
    """
    total = digests.stat().st_size // DIGEST_BYTES
    if not total:
        return np.empty(0, bool), np.empty(0, np.int64)
    is_first, number = _zeros(folder / "is_first", bool, total), _zeros(folder / "number", np.int64, total)
    # at first `number` holds the position of the first text alike
    for bucket in _buckets(digests, total, folder, bucket_texts):
        order = np.lexsort((bucket["position"], bucket["low"], bucket["high"]))
        ordered = bucket[order]
        begins = np.ones(len(ordered), bool)
        begins[1:] = (ordered["high"][1:] != ordered["high"][:-1]) | (ordered["low"][1:] != ordered["low"][:-1])
        first = ordered["position"][begins]
        is_first[first] = True
        number[ordered["position"]] = first[np.cumsum(begins) - 1]
    rank = _zeros(folder / "rank", np.int64, total)
    before = 0
    for start in range(0, total, BLOCK_TEXTS):
        block = slice(start, start + BLOCK_TEXTS)
        rank[block] = before + np.cumsum(is_first[block]) - 1
        before += int(np.count_nonzero(is_first[block]))
        number[block] = rank[number[block]]  # of texts at or before this block
    del rank
    (folder / "rank").unlink()
    is_first.flush()
    number.flush()
    return is_first, number


def _zeros(path: Path, dtype: type, size: int) -> np.memmap:
    """[size] zeros in a file. Its place on the disk is taken at once: a full one would later kill this process, by SIGBUS."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype=dtype, mode="r+", shape=(size,))


def _buckets(digests: Path, total: int, folder: Path, bucket_texts: int) -> Iterable[np.ndarray]:
    """[texts of the bucket] RECORD arrays that hold all texts; equal ones are in the same."""
    content = np.memmap(digests, dtype=DIGEST, mode="r", shape=(total,))
    num_buckets = min(-(-total // bucket_texts), MOST_BUCKETS)
    if num_buckets == 1:
        yield _records(content, 0)
        return
    paths = [folder / f"bucket-{i:04d}" for i in range(num_buckets)]
    for path in paths:
        path.unlink(missing_ok=True)
    for start in range(0, total, BLOCK_TEXTS):
        block = _records(content[start : start + BLOCK_TEXTS], start)
        bucket = ((block["high"] >> np.uint64(32)) * np.uint64(num_buckets)) >> np.uint64(32)
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(num_buckets + 1, dtype=np.uint64))
        for i, path in enumerate(paths):
            with path.open("ab") as file:  # ndarray.tofile keeps quiet about a full disk
                file.write(block[order[ends[i] : ends[i + 1]]].tobytes())
    for path in paths:
        yield np.fromfile(path, dtype=RECORD)
        path.unlink()


def _records(digests: np.ndarray, start: int) -> np.ndarray:
    """Digests with their positions, which begin at `start`."""
    records = np.empty(len(digests), RECORD)
    records["high"], records["low"] = digests["high"], digests["low"]
    records["position"] = np.arange(start, start + len(digests))
    return records
