"""Exact search over one rank's documents: faiss on the host, or faiss on the GPU within a budget of memory.

Shapes: `n` documents, `e` embedding dim, `b` queries, `k` results a query.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from megatron_conan.model.backends import import_faiss

# GPU faiss returns at most 2048 neighbours, and one more than asked for is needed to see a tie at the end of the list.
GPU_MAX_K = 2047
GPU_SCRATCH_BYTES = 512 << 20
"""What GPU faiss may use for intermediate results, within the budget."""

SearchRows = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries [b, e], k) -> (scores [b, k] falling, rows [b, k]); k is at most the number of rows."""


@dataclass(frozen=True)
class SearchSettings:
    """What a search may use of the GPU; without effect on the host."""

    gpu_memory_gib: float | None = None
    """Memory, in GiB; half of what is free if None."""
    gpu_fp16: bool = False
    """Keep the documents in fp16 on the GPU."""


class LocalSearch(Protocol):
    """A search over one rank's documents."""

    max_k: int
    """The largest k that `search` takes beside the one for ties."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query: (scores [b, k] float32, falling, rows [b, k] int64); of equal rows any."""

    def close(self) -> None:
        """Give the memory back."""


class HostSearch:
    """Search in place, without a copy: the documents may be memory-mapped."""

    max_k = int(np.iinfo(np.int32).max)

    def __init__(self, rows: np.ndarray) -> None:
        """`rows` [n, e] float32."""
        self._faiss, self._rows = import_faiss(), rows

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See LocalSearch."""
        return self._faiss.knn(queries, self._rows, k, self._faiss.METRIC_INNER_PRODUCT)

    def close(self) -> None:
        """Nothing was taken."""


class GpuSearch:
    """Search on this rank's GPU. Documents beyond the budget go there in slices, anew for each block of queries."""

    max_k = GPU_MAX_K

    def __init__(self, rows: np.ndarray, device: torch.device, settings: SearchSettings) -> None:
        """`rows` [n, e] float32."""
        faiss = import_faiss()
        torch.cuda.empty_cache()  # torch keeps what training freed, and faiss can't see that
        free, _ = torch.cuda.mem_get_info(device)
        budget = int(settings.gpu_memory_gib * 2**30) if settings.gpu_memory_gib is not None else free // 2
        if budget > free:
            raise ValueError(
                f"mining.gpu_memory_gib={settings.gpu_memory_gib} is more than the {free / 2**30:.2f} GiB that are free on "
                f"{device}; lower it"
            )
        scratch = min(GPU_SCRATCH_BYTES, budget // 4)
        row_bytes = rows.shape[1] * (2 if settings.gpu_fp16 else 4)
        self._rows, self._slice = rows, max((budget - scratch) // max(row_bytes, 1), 1)
        self._resources: Any = faiss.StandardGpuResources()
        self._resources.setTempMemory(scratch)
        config = faiss.GpuIndexFlatConfig()
        config.device = device.index or 0
        config.useFloat16 = settings.gpu_fp16
        self._index: Any = faiss.GpuIndexFlatIP(self._resources, rows.shape[1], config)
        if len(rows) <= self._slice:
            self._index.add(rows)
        else:
            slices = -(-len(rows) // self._slice)
            print(
                f"mining: {len(rows):,} documents don't fit into {budget / 2**30:.2f} GiB of {device}: searched in {slices} "
                "slices, which is slower (mining.gpu_memory_gib, mining.gpu_fp16)",
                file=sys.stderr,
                flush=True,
            )

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See LocalSearch."""
        if len(self._rows) <= self._slice:
            return self._index.search(queries, k)

        def search_slice(begin: int, end: int, k: int) -> tuple[np.ndarray, np.ndarray]:
            self._index.reset()
            self._index.add(np.ascontiguousarray(self._rows[begin:end]))
            return self._index.search(queries, k)

        return search_slices(search_slice, len(self._rows), self._slice, k)

    def close(self) -> None:
        """Give index and scratch memory back to the GPU."""
        self._index = self._resources = None


def largest_k(device: torch.device) -> int:
    """The largest k that a search on this device takes beside the one for ties."""
    return GPU_MAX_K if _has_gpu_faiss(device) else HostSearch.max_k


def check_window(window: int | None, device: torch.device) -> None:
    """Refuse a window that the device can't return, before anything is encoded. Raises ValueError."""
    if window is not None and window > largest_k(device):
        raise ValueError(
            f"a window of {window:,} documents is more than GPU faiss returns ({largest_k(device):,}); lower mining.window "
            "(--window)"
        )


def local_search(rows: np.ndarray, device: torch.device, settings: SearchSettings) -> LocalSearch:
    """On the GPU where faiss has one and the rank has one, else on the host."""
    return GpuSearch(rows, device, settings) if len(rows) and _has_gpu_faiss(device) else HostSearch(rows)


def _has_gpu_faiss(device: torch.device) -> bool:
    return device.type == "cuda" and getattr(import_faiss(), "get_num_gpus", int)() > 0


def search_slices(
    search_slice: Callable[[int, int, int], tuple[np.ndarray, np.ndarray]], num_rows: int, size: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of all rows from searches over slices of them.

    Args:
        search_slice: (begin, end, k) -> (scores [b, k], rows within the slice [b, k]).
        num_rows: of all slices.
        size: rows of a slice; the last may be smaller.
        k: at most `num_rows`.
    """
    scores, rows = [], []
    for begin in range(0, num_rows, size):
        end = min(begin + size, num_rows)
        found, places = search_slice(begin, end, min(k, end - begin))
        scores.append(found)
        rows.append(places + begin)
    all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(all_scores, order, axis=1), np.take_along_axis(all_rows, order, axis=1)
