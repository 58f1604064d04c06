"""The emulated device: each primitive against what the PTX documentation says of it, and every hazard reported."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_conan.kernels.soft_mask_attention.emulate import build
from megatron_conan.kernels.soft_mask_attention.emulate.forward import ORDERS

SOURCE = Path(__file__).with_name("emulated_kernels.cpp")
FAILED = 999
LANES = np.arange(32)


@dataclass
class Kernels:
    """The kernels of emulated_kernels.cpp."""

    library: ctypes.CDLL

    def run(
        self,
        name: str,
        given: np.ndarray | None = None,
        out_bytes: int = 4096,
        *,
        parameter: int = 0,
        blocks: int = 1,
        threads: int = 32,
        shared_bytes: int = 1024,
        order: str = "ascending",
        seed: int = 0,
    ) -> np.ndarray:
        """Returns the output's bytes; raises RuntimeError with the emulation's message."""
        source = aligned(4096)
        if given is not None:
            source = aligned(given.nbytes)
            source[:] = given.view(np.uint8).reshape(-1)
        out, message = aligned(out_bytes), ctypes.create_string_buffer(1024)
        code = self.library.run_kernel(
            name.encode(),
            parameter,
            blocks,
            threads,
            ctypes.c_int64(shared_bytes),
            ORDERS.index(order),
            ctypes.c_uint64(seed),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_int64(source.nbytes),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_int64(out.nbytes),
            message,
            ctypes.c_int64(len(message)),
        )
        if code != 0:
            assert code == (FAILED if "not possible" not in message.value.decode() else 9)
            raise RuntimeError(message.value.decode())
        assert message.value == b""
        return out

    def fails(self, name: str, match: str, **arguments: object) -> None:
        """Asserts that the kernel fails with that message under every order, and that the next one runs."""
        for order in ORDERS:
            for seed in range(3 if order == "random" else 1):
                with pytest.raises(RuntimeError, match=match):
                    self.run(name, order=order, seed=seed, **arguments)
        self.run("shuffle", np.zeros(32, np.float32))


def aligned(size: int) -> np.ndarray:
    """[size] zeros at a multiple of 16 bytes."""
    buffer = np.zeros(size + 16, np.uint8)
    return buffer[-buffer.ctypes.data % 16 :][:size]


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """With the context switch of this machine, and with the one for all others."""
    definitions = ["SOFT_MASK_UCONTEXT=1"] if request.param == "ucontext" else []
    return Kernels(build.load_library(SOURCE, definitions))


@pytest.fixture(params=range(2))
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


# ---- what the primitives compute


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix(kernels, random, transposed, order):
    """PTX, ldmatrix: lanes 8 i .. 8 i + 7 address the rows of matrix i; lane l gets elements 2 (l % 4), + 1 of row l / 4."""
    rows = random.integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    addressed = random.integers(0, 32, 32, dtype=np.int32)  # any order, also the same row twice
    given = np.concatenate([addressed.view(np.uint8), rows.reshape(-1).view(np.uint8)])
    name = "load_matrix_transposed" if transposed else "load_matrix"
    got = kernels.run(name, given, 512, order=order).view(np.uint16).reshape(32, 4, 2)  # lane, register, half
    matrices = rows[addressed].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    for lane in range(32):
        for i in range(4):
            assert got[lane, i].tolist() == matrices[i, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()


def fragments(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PTX, matrix fragments for mma.m16n8k16 with 16-bit elements: a [16, 16] -> [32, 8], b [16, 8] -> [32, 4]."""
    group, thread = LANES // 4, LANES % 4
    of_a = [a[group + (0 if i < 2 or 4 <= i < 6 else 8), thread * 2 + i % 2 + (0 if i < 4 else 8)] for i in range(8)]
    of_b = [b[thread * 2 + i % 2 + (0 if i < 2 else 8), group] for i in range(4)]
    return np.stack(of_a, 1), np.stack(of_b, 1)


def accumulators(c: np.ndarray) -> np.ndarray:
    """The same for c [16, 8] -> [32, 4]."""
    return np.stack([c[LANES // 4 + 8 * (i // 2), LANES % 4 * 2 + i % 2] for i in range(4)], 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "dtype"), [("mma_bf16", torch.bfloat16), ("mma_fp16", torch.float16)])
def test_mma(kernels, random, name, dtype, order):
    a, b, c = (torch.from_numpy(random.standard_normal(shape)) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b, c = a.to(dtype), b.to(dtype), c.float()
    parts = fragments(a.view(torch.int16).numpy(), b.view(torch.int16).numpy())
    given = np.concatenate(
        [*(np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (*parts, accumulators(c.numpy())))]
    )
    got = kernels.run(name, given, 512, order=order).view(np.float32).reshape(32, 4)
    want = accumulators((a.double() @ b.double() + c.double()).numpy())
    # 16 additions of fp32, each of at most 2^-24 of a sum of magnitudes below 100
    np.testing.assert_allclose(got, want, rtol=0, atol=16 * 100 * 2.0**-24)


@pytest.mark.parametrize("name", ["mma_bf16", "mma_fp16"])
def test_mma_passes_nan_and_infinity_on(kernels, name):
    dtype = torch.bfloat16 if name == "mma_bf16" else torch.float16
    a, b = torch.ones(16, 16, dtype=dtype), torch.ones(16, 8, dtype=dtype)
    a[3, 5], a[9, 2], b[7, 4] = float("nan"), float("inf"), 6e-8  # the last is subnormal in fp16
    parts = fragments(a.view(torch.int16).numpy(), b.view(torch.int16).numpy())
    zeros = np.zeros((32, 4), np.float32)
    given = np.concatenate([*(np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (*parts, zeros))])
    got = kernels.run(name, given, 512).view(np.float32).reshape(32, 4)
    np.testing.assert_array_equal(got, accumulators((a.float() @ b.float()).numpy()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask", [0, 1, 2, 4, 8, 16, 31])
def test_shuffle(kernels, mask, order):
    given = np.arange(32, dtype=np.float32)
    got = kernels.run("shuffle", given, 128, parameter=mask, order=order).view(np.float32)
    np.testing.assert_array_equal(got, given[LANES ^ mask])


@pytest.mark.parametrize(("name", "dtype"), [("pack_bf16", torch.bfloat16), ("pack_fp16", torch.float16)])
def test_packing_rounds_to_nearest_even(kernels, random, name, dtype):
    """As torch does: for every 16-bit number, halfway to its neighbours and a little beside, and for arbitrary bits."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).float()
    halfway = (numbers + numbers.roll(1)) / 2
    near = [halfway.nextafter(torch.tensor(x)) for x in (float("-inf"), float("inf"))]
    arbitrary = torch.from_numpy(random.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32).copy())
    values = torch.cat([numbers, halfway, *near, arbitrary])
    got = kernels.run(name, values.numpy(), 2 * len(values), parameter=len(values)).view(np.int16)
    want = values.to(dtype)
    is_nan = want.isnan()
    np.testing.assert_array_equal(got[~is_nan], want.view(torch.int16)[~is_nan].numpy())
    assert (got[is_nan] == 0x7FFF).all()


def test_exp2_and_log2(kernels, random):
    values = np.concatenate([random.uniform(-126, 128, 4096), [0, 1, -1]]).astype(np.float32)
    got = kernels.run("exp2", values, values.nbytes, parameter=len(values)).view(np.float32)
    np.testing.assert_allclose(got, np.exp2(values.astype(np.float64)), rtol=2.0**-22)
    special = np.array([-np.inf, np.inf, -127, -140, -1000, 200, np.nan, 1e-40], np.float32)
    got = kernels.run("exp2", special, special.nbytes, parameter=len(special)).view(np.float32)
    np.testing.assert_array_equal(got, [0, np.inf, 0, 0, 0, np.inf, np.nan, 1])
    values = np.exp2(values)
    values = values[(values > 0) & np.isfinite(values)]
    got = kernels.run("log2", values, values.nbytes, parameter=len(values)).view(np.float32)
    np.testing.assert_allclose(got, np.log2(values.astype(np.float64)), rtol=2.0**-22, atol=2.0**-22)
    special = np.array([0, -0.0, np.inf, -1, np.nan], np.float32)
    got = kernels.run("log2", special, special.nbytes, parameter=len(special)).view(np.float32)
    np.testing.assert_array_equal(got, [-np.inf, -np.inf, np.inf, np.nan, np.nan])


def test_copies_arrive_by_groups_at_the_wait(kernels, random):
    given = random.integers(0, 255, 80, dtype=np.uint8)
    got = kernels.run("copy_groups", given, 8 * 80, shared_bytes=80 * 32).reshape(8, 5, 16)
    whole = given.reshape(5, 16).copy()
    whole[3] = 0  # zero fill
    # before, issued, and after waits for all but 4, 3, 2, 1, 0 of the groups {0, 1} {2} {} {3}; then {4} too
    arrived = [0, 0, 0, 2, 3, 3, 4, 5]
    for step, count in enumerate(arrived):
        np.testing.assert_array_equal(got[step, :count], whole[:count])
        assert (got[step, count:] == 0xFF).all()


@pytest.mark.parametrize("order", ORDERS)
def test_stores_to_and_from_shared_memory(kernels, order):
    got = kernels.run("stores", out_bytes=1024, threads=64, order=order).view(np.uint32)
    np.testing.assert_array_equal(got, np.arange(256))


# ---- the schedule


def test_warps_run_as_far_as_they_can(kernels):
    def steps(order: str, seed: int = 0) -> np.ndarray:
        out = kernels.run("trace", None, 4096, blocks=2, threads=96, order=order, seed=seed).view(np.int32)
        return out[1 : 1 + out[0]]  # 2 blocks x (3 warps x 2 steps, then 3 warps x 1 step) x 32 lanes

    threads = np.arange(96).reshape(3, 32)
    block = np.concatenate([np.repeat(threads, 2, axis=0).reshape(-1), threads.reshape(-1)])
    np.testing.assert_array_equal(steps("ascending"), np.concatenate([block, 1000 + block]))
    np.testing.assert_array_equal(steps("descending"), np.concatenate([1095 - block, 95 - block]))
    seen = set()
    for seed in range(8):
        taken = steps("random", seed)
        seen.add(taken.tobytes())
        assert taken.tobytes() == steps("random", seed).tobytes()
        assert sorted(taken.reshape(2, -1)[:, 0] // 1000) == [0, 1]
        runs = (taken % 1000).reshape(2, 9, 32)  # of each block
        assert (np.sort(runs.reshape(2, -1)) == np.sort(block)).all()
        warps = runs // 32
        assert (warps == warps[..., :1]).all()
        assert (warps[:, 0:6:2] == warps[:, 1:6:2]).all()  # both steps before another warp's
    assert len(seen) == 8


# ---- hazards

PIPELINE = [
    "nothing",
    "commit",
    "wait",
    "barrier after wait",
    "barrier before reuse",
    "last commit",
    "last wait",
    "last barrier",
]


@pytest.mark.parametrize("omitted", PIPELINE)
def test_a_pipeline_needs_every_step(kernels, random, omitted):
    given = random.integers(0, 255, 2048, dtype=np.uint8)
    arguments = {"given": given, "threads": 64, "parameter": PIPELINE.index(omitted)}
    if omitted == "nothing":
        first = {kernels.run("pipeline", order=order, seed=5, **arguments).tobytes() for order in ORDERS}
        assert len(first) == 1
        return
    race = r"race: (reads|writes) offset \d+ of shared memory, (written|read) by .* with no block_barrier in between"
    match = race if "barrier" in omitted else "a copy under way: copy_wait is missing"
    kernels.fails("pipeline", match, **arguments)


@pytest.mark.parametrize(
    ("name", "match", "arguments"),
    [
        ("end_with_copies", "ends with 1 copies under way: copy_commit is missing", {}),
        ("end_with_copies", "ends with 1 copies under way: copy_wait is missing", {"parameter": 1}),
        ("race_of_lanes", "store_(16|shared_4): race: .* with no warp_barrier", {}),
        ("race_through_shuffle", r"store_16: race: reads .* with no warp_barrier", {}),
        ("race_of_own_row", r"load_matrix_x4: race: reads .* \(copy_async_16\) with no warp_barrier", {}),
        ("write_after_read_of_lanes", "store_shared_4: race: writes .* read by other lanes .* no warp_barrier", {}),
        ("write_after_reads", "store_(16|shared_4): race: .* with no warp_barrier", {}),
        ("write_after_reads", "store_(16|shared_4): race: .* with no warp_barrier", {"parameter": 1}),
        ("write_after_write", "store_shared_4: race: writes .* with no warp_barrier", {}),
        ("write_after_write_of_warps", "store_shared_4: race: writes .* with no block_barrier", {"threads": 64}),
        ("write_after_write_of_warps", "race: writes .* with no block_barrier", {"threads": 64, "parameter": 1}),
        ("warp_barrier_between_warps", "store_.*: race: .* with no block_barrier", {"threads": 64}),
        ("copy_onto_copy", r"copy_async_16: writes offset \d+ .*, to which thread \d+ has a copy under way", {}),
        ("wait_behind_barrier", r"race: reads .* \(copy_async_16\) with no warp_barrier", {}),
        ("wait_behind_barrier", r"race: .* with no block_barrier|copy_wait is missing", {"threads": 64}),
        ("shuffle", "shuffle_xor: a lane mask of 32", {"parameter": 32}),
    ],
)
def test_hazards_in_shared_memory(kernels, name, match, arguments):
    kernels.fails(name, match, **arguments)


def test_lanes_may_exchange_behind_a_warp_barrier(kernels):
    for order in ORDERS:
        got = kernels.run("race_of_lanes", parameter=1, out_bytes=128, order=order).view(np.uint32)
        np.testing.assert_array_equal(got, LANES)
        kernels.run("write_after_read_of_lanes", parameter=1, order=order)


@pytest.mark.parametrize(
    ("name", "operation", "size"),
    [
        ("load_at", "load_matrix_x4", 16),
        ("load_transposed_at", "load_matrix_x4_transposed", 16),
        ("copy_at", "copy_async_16", 16),
        ("store_at", "store_16", 16),
        ("store_word_at", "store_shared_4", 4),
    ],
)
def test_accesses_beside_shared_memory_and_misaligned(kernels, name, operation, size):
    arguments = {"threads": 64, "blocks": 3}
    kernels.run(name, parameter=1024 - size, **{**arguments, "blocks": 1})
    for offset in (1024, 1 << 20, -size, 1024 - size // 2):
        match = rf"^{operation}: {size} bytes at offset {offset} of shared memory, which has 1024 bytes \(thread 37, block \("
        kernels.fails(name, match, parameter=offset, **arguments)
    for offset in (34, 32 + size // 2):
        match = rf"^{operation}: offset {offset} of .* not aligned to {size} bytes \(thread 37"
        kernels.fails(name, match, parameter=offset, **arguments)


def test_pointers_beside_shared_memory(kernels):
    kernels.run("beside_shared_memory", parameter=1023)
    for offset in (-1, 1024, 1100):
        kernels.fails("beside_shared_memory", "written beside its 1024 bytes of shared memory", parameter=offset)


def test_global_accesses(kernels):
    kernels.run("global_source", parameter=4080, threads=64)
    kernels.fails(
        "global_source", "copy_async_16: global .* in no buffer to read .thread 37", parameter=4096, threads=64
    )
    kernels.fails("global_source", "copy_async_16: global .* in no buffer to read", parameter=-16, threads=64)
    kernels.fails(
        "global_source", "copy_async_16: global .* not aligned to 16 bytes .thread 37", parameter=8, threads=64
    )
    kernels.run("global_destination", parameter=4080, threads=64)
    kernels.fails("global_destination", "store_16: global .* in no buffer to write", parameter=4096, threads=64)
    kernels.fails("global_destination", "store_16: global .* not aligned", parameter=4, threads=64)
    kernels.fails("store_to_input", "store_16: global .* in no buffer to write")
    kernels.fails("store_twice", "store_16: global address .* is written a second time")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("lane_skips", "divergence: thread .* at shuffle_xor"),
        ("lanes_part", "divergence: thread .* at (warp|block)_barrier"),
        ("lane_skips_block_barrier", "divergence: thread .* at block_barrier"),
        ("warp_skips_block_barrier", "deadlock: warp 0 waits at block_barrier, but 1 warps have ended"),
        ("warp_leaves_later", "deadlock: warp 0 waits at block_barrier, but 1 warps have ended"),
    ],
)
def test_divergence_and_deadlock(kernels, name, match):
    kernels.fails(name, match, threads=64)


def test_an_error_names_its_block(kernels):
    kernels.fails(
        "second_block_fails", r"thread 40 .* its end.*block \(1, 0, 0\)|thread 40 is at its end", blocks=3, threads=64
    )


@pytest.mark.parametrize("launch", [{"threads": 33}, {"threads": 1056}, {"blocks": 0}, {"shared_bytes": 228 << 10}])
def test_launches_that_no_gpu_takes(kernels, launch):
    with pytest.raises(RuntimeError, match="is not possible"):
        kernels.run("shuffle", **launch)


# ---- the build


def test_builds_are_kept_by_content(tmp_path, monkeypatch):
    library = build.build_library(SOURCE)
    changed = library.stat().st_mtime_ns
    assert build.build_library(SOURCE) == library
    assert library.stat().st_mtime_ns == changed
    copy = tmp_path / SOURCE.name
    copy.write_text(SOURCE.read_text() + "\n// changed\n")
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    other = build.build_library(copy)
    assert other.parent.name != library.parent.name
    assert sorted(p.name for p in other.parent.iterdir()) == [other.name]


def test_a_machine_without_compiler_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"needs g\+\+ .* install it"):
        build.build_library(SOURCE)


def test_errors_of_the_compiler_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    source = tmp_path / "broken.cpp"
    source.write_text("int broken() { return unknown; }\n")
    with pytest.raises(RuntimeError, match=r"(?s)does not compile .*broken\.cpp.*unknown"):
        build.build_library(source)
    assert not list((tmp_path / "cache").rglob("*.so"))
