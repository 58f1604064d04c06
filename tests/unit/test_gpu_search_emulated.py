"""The GPU's search with GPU faiss emulated on the host: an account of its memory, and the real one's refusals."""

from __future__ import annotations

from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from rank_contexts import context_of

from megatron_conan.mining import local_search
from megatron_conan.mining.encode import EmbeddedTexts
from megatron_conan.mining.local_search import GpuSearch, HostSearch, SearchSettings, check_window
from megatron_conan.mining.shards import ShardedIndex

CUDA = torch.device("cuda", 0)
WIDTH = 8


class Gpu:
    """One GPU, in bytes."""

    def __init__(self, free: int) -> None:
        self.free, self.used, self.peak, self.resources, self.largest_k, self.num_adds = free, 0, 0, 0, 0, 0

    def take(self, num_bytes: int) -> None:
        self.used += num_bytes
        self.peak = max(self.peak, self.used)
        assert self.used <= self.free, "out of memory"


def emulated_faiss(gpu: Gpu) -> SimpleNamespace:
    class Resources:
        def __init__(self) -> None:
            self.temporary = 0
            gpu.resources += 1

        def setTempMemory(self, size: int) -> None:
            gpu.take(size - self.temporary)
            self.temporary = size

        def __del__(self) -> None:
            gpu.resources -= 1
            gpu.used -= self.temporary

    class Config:
        device, useFloat16 = -1, False

    class Index:
        def __init__(self, resources: Resources, dims: int, config: Config) -> None:
            assert isinstance(resources, Resources)
            assert config.device == 0
            self.resources, self.config, self.index = resources, config, faiss.IndexFlatIP(dims)
            self.bytes = 0

        def add(self, rows: np.ndarray) -> None:
            assert rows.flags.c_contiguous
            gpu.num_adds += 1
            own = rows.size * (2 if self.config.useFloat16 else 4)
            self.bytes += own
            gpu.take(own)
            self.index.add(rows.astype(np.float16).astype(np.float32) if self.config.useFloat16 else rows)

        def reset(self) -> None:
            gpu.used -= self.bytes
            self.bytes = 0
            self.index.reset()

        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            assert 1 <= k <= 2048, "GPU index only supports min/max-K selection up to 2048"
            gpu.largest_k = max(gpu.largest_k, k)
            return self.index.search(queries, k)

        def __del__(self) -> None:
            gpu.used -= self.bytes

    return SimpleNamespace(
        StandardGpuResources=Resources, GpuIndexFlatConfig=Config, GpuIndexFlatIP=Index, get_num_gpus=lambda: 1,
        knn=faiss.knn, METRIC_INNER_PRODUCT=faiss.METRIC_INNER_PRODUCT,
    )  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(8 << 10)
    emulated = emulated_faiss(gpu)
    monkeypatch.setattr(local_search, "import_faiss", lambda: emulated)
    monkeypatch.setattr(local_search, "GPU_SCRATCH_BYTES", {False: 1 << 10, True: 1 << 10})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu.free - gpu.used, gpu.free))
    return gpu


def vectors(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, (count, WIDTH)).astype(np.float32)


# 8 KiB free, half of it the budget, of which 1 KiB is scratch: 3 KiB hold 96 rows of 32 bytes, or 192 of 16.
@pytest.mark.parametrize(
    ("count", "fp16", "budget", "num_adds"),
    [
        (96, False, None, 1),
        (97, False, None, 2),
        (192, True, None, 1),
        (193, True, None, 2),
        (200, False, 7 / 2**20, 2),
    ],
)
def test_documents_beyond_the_budget_go_there_in_slices(
    gpu: Gpu, count: int, fp16: bool, budget: float | None, num_adds: int
) -> None:
    rows, queries = vectors(count, 1), vectors(5, 2)
    search = GpuSearch(rows, CUDA, SearchSettings(budget, fp16))
    scores, places = search.search(queries, 9)
    expected = HostSearch(rows).search(queries, 9)[0]
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(np.take_along_axis(queries @ rows.T, places, axis=1), scores)
    assert gpu.num_adds == num_adds
    assert gpu.peak <= (4 << 10 if budget is None else budget * 2**30)
    search.search(queries, 9)  # slices come anew
    assert gpu.num_adds == (1 if num_adds == 1 else 2 * num_adds)
    search.close()
    assert (gpu.used, gpu.resources) == (0, 0)


def test_more_than_is_free_is_refused(gpu: Gpu) -> None:
    GpuSearch(vectors(9, 1), CUDA, SearchSettings(8 / 2**20)).close()
    with pytest.raises(ValueError, match=r"mining\.gpu_memory_gib is 0\.00 GiB, but cuda:0 has 0\.00 GiB free"):
        GpuSearch(vectors(9, 1), CUDA, SearchSettings(8.01 / 2**20))
    with pytest.raises(ValueError, match=r"a search takes at least 0\.00 GiB; set mining\.gpu_memory_gib"):
        GpuSearch(vectors(9, 1), CUDA, SearchSettings(1.99 / 2**20))


def test_a_window_beyond_gpu_faiss_is_refused(gpu: Gpu) -> None:
    check_window(2047, CUDA)
    check_window(None, CUDA)
    with pytest.raises(ValueError, match="a window of 2,048 documents is more than GPU faiss returns"):
        check_window(2048, CUDA)
    check_window(2048, torch.device("cpu"))


def test_the_index_gives_memory_back_and_searches_long_lists_on_the_host(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.free = 1 << 20
    rows, queries = vectors(2500, 1), vectors(4, 2)
    context = context_of(1)
    object.__setattr__(context, "device", CUDA)  # a lone rank moves nothing there
    with ShardedIndex(EmbeddedTexts(np.arange(2500), rows), context, settings=SearchSettings(gpu_fp16=True)) as index:
        assert gpu.used == (1 << 10) + 2500 * WIDTH * 2  # scratch, and documents in fp16
        assert gpu.num_adds == 1
        assert index.max_k == 2047
        with pytest.raises(ValueError, match="k=2048 must be 1 to 2047"):
            index.search(queries, 2048)
        whole = faiss.IndexFlatIP(WIDTH)
        whole.add(rows)
        (block,) = index.search_blocks(queries, np.full(4, 2047))
        assert gpu.largest_k == 2048  # one more shows a tie at the end
        np.testing.assert_array_equal(block.scores, whole.search(queries, 2047)[0])
        (block,) = index.search_blocks(queries, np.array([3, 2400, 3, 3]))
        assert gpu.largest_k == 2048
        np.testing.assert_array_equal(block.scores, whole.search(queries, 2400)[0])
    assert (gpu.used, gpu.resources) == (0, 0)
