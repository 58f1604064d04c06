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

from megatron_conan.mining.exchange import gather_counts, gather_rows
from megatron_conan.model.backends import import_faiss
from megatron_conan.parallel.context import ParallelContext

# GPU faiss returns at most 2048 neighbours, and one more than asked for is needed to see a tie at the end of the list.
GPU_MAX_K = 2047
GPU_SCRATCH_BYTES = {False: 3 << 29, True: 5 << 29}
"""What GPU faiss uses within the budget, by `gpu_fp16`: two tiles of 512 x 262,144 scores (twice as wide with fp16), queries
and results. Its own scratch memory takes at most 1.5 GiB of that; the rest is allocated for each call."""
GPU_SCRATCH_LIMIT = 3 << 29


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
        """`rows` [n, e] float32. Raises ValueError for a budget that is not there."""
        faiss = import_faiss()
        budget = gpu_budget(device, settings)
        scratch = GPU_SCRATCH_BYTES[settings.gpu_fp16]
        row_bytes = rows.shape[1] * (2 if settings.gpu_fp16 else 4)
        self._rows, self._slice = rows, max((budget - scratch) // max(row_bytes, 1), 1)
        self._resources: Any = faiss.StandardGpuResources()
        self._resources.setTempMemory(min(scratch, GPU_SCRATCH_LIMIT))
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


def gpu_budget(device: torch.device, settings: SearchSettings) -> int:
    """Bytes that a search may take of a GPU, now. Raises ValueError if that is too little, or more than is free."""
    torch.cuda.empty_cache()  # torch keeps what training freed, and faiss can't see that
    free, _ = torch.cuda.mem_get_info(device)
    budget = int(settings.gpu_memory_gib * 2**30) if settings.gpu_memory_gib is not None else free // 2
    least = 2 * GPU_SCRATCH_BYTES[settings.gpu_fp16]  # as much for documents as for the search itself
    if budget > free or budget < least:
        given = "half of what is free" if settings.gpu_memory_gib is None else "mining.gpu_memory_gib"
        raise ValueError(
            f"{given} is {budget / 2**30:.2f} GiB, but {device} has {free / 2**30:.2f} GiB free, and a search takes at least "
            f"{least / 2**30:.2f} GiB; set mining.gpu_memory_gib (--gpu-memory-gib) between them, or free memory"
        )
    return budget


def check_search(window: int | None, settings: SearchSettings, context: ParallelContext) -> None:
    """Refuse what the devices can't search, before anything is encoded. All ranks must call; all raise ValueError."""
    check_window(window, context.device)
    problem = ""
    try:
        if _has_gpu_faiss(context.device):
            gpu_budget(context.device, settings)
    except ValueError as error:
        problem = str(error)
    agree(problem, context)


def agree(problem: str, context: ParallelContext) -> None:
    """Raise ValueError on all ranks if one has a problem, with the words of the first that has. All ranks must call."""
    words = np.frombuffer(problem.encode(), np.uint8)
    counts = gather_counts([len(words)], context.world_group, context.world_size, context.device)[:, 0].tolist()
    if any(counts):
        told = gather_rows(words, counts, context.world_group, context.device)
        raise ValueError(next(part.tobytes().decode() for part in told if len(part)))


def check_window(window: int | None, device: torch.device) -> None:
    """Refuse a window that the device can't return, or a missing faiss. Raises ValueError or ImportError."""
    import_faiss()
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
        num_rows: of all slices, at least 1.
        size: rows of a slice; the last may be smaller.
        k: at most `num_rows`.
    """
    best: tuple[np.ndarray, np.ndarray] | None = None
    for begin in range(0, num_rows, size):
        end = min(begin + size, num_rows)
        scores, rows = search_slice(begin, end, min(k, end - begin))
        rows = rows + begin
        if best is not None:
            scores, rows = np.concatenate([best[0], scores], axis=1), np.concatenate([best[1], rows], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    assert best is not None
    return best
