"""The CUDA tables of soft_mask_attention.py. Nothing here has run on a GPU yet."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import attention_peers as peers
import torch
from attention_peers import FULL_BACKWARD, LEARNED, Call, Problem
from recording import Row
from torch.nn.attention import SDPBackend

HEADS = (32, 8)
"""(n, g) of configs/conan_1.4b."""
NUM_TOKENS = 16384
HEAD_DIMS = (64, 112, 128)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
OPENINGS: tuple[tuple[str, float | str], ...] = (
    *((form, alpha) for form in ("row", "constant") for alpha in (0.0, 0.5, 1.0)),
    ("constant", LEARNED),
)
FLUSHED_BYTES = 256 << 20
"""More than any L2 cache holds."""
HEAD_START_CYCLES = 1_000_000
"""Of the GPU's clock, about half a millisecond: what a call launches is then queued before the first of it starts."""


@dataclass(frozen=True)
class Grid:
    """What to measure."""

    head_dims: Sequence[int] = HEAD_DIMS
    lengths: Sequence[int] = LENGTHS
    openings: Sequence[tuple[str, float | str]] = OPENINGS
    heads: tuple[int, int] = HEADS
    num_tokens: int = NUM_TOKENS
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


class Stopwatch:
    """Milliseconds of calls on the GPU, by events, with a cold L2 cache."""

    def __init__(self, repetitions: int = 20) -> None:
        self.repetitions = repetitions
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        """Medians: milliseconds on the GPU, and milliseconds until the call returns to Python."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        device, host = [], []
        for _ in range(self.repetitions):
            self.flushed.zero_()
            torch.cuda._sleep(HEAD_START_CYCLES)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            began = time.perf_counter()
            call()
            host.append(1e3 * (time.perf_counter() - began))
            end.record()
            end.synchronize()  # or the queue fills up, and the host waits within a call
            device.append(start.elapsed_time(end))
        return statistics.median(device), statistics.median(host)


def gpu_name_and_clocks() -> dict[str, Any]:
    """Chip, driver, CUDA, and the clocks while it multiplies."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(500):
        torch.mm(a, a)
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    # by UUID: nvidia-smi counts all GPUs there are, torch the visible ones
    identity = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    found: dict[str, Any] = {"torch name": torch.cuda.get_device_name(), "torch CUDA": torch.version.cuda}
    found |= {"cuDNN": torch.backends.cudnn.version(), "capability": torch.cuda.get_device_capability()}
    try:
        command = ["nvidia-smi", f"--id={identity}", f"--query-gpu={fields}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        found |= dict(zip(fields.split(","), (word.strip() for word in said.split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        found["nvidia-smi"] = _reason(error)
    torch.cuda.synchronize()
    return found


def gemm_tflops(stopwatch: Stopwatch, size: int = 8192) -> float:
    """bf16 TFLOP/s of one large matrix product: the limit that shares are of."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / stopwatch(lambda: torch.mm(a, b))[0] / 1e9


def padded_table(grid: Grid, limit_tflops: float, stopwatch: Callable[..., tuple[float, float]]) -> Iterator[list[Row]]:
    """Lines of every head dim and length, equal lengths in a batch of `num_tokens`."""
    for head_dim in grid.head_dims:
        for length in grid.lengths:
            rows = (max(1, grid.num_tokens // length), length)
            for form, opening in grid.openings:
                problem = peers.make_problem(rows, grid.heads, head_dim, form, opening, grid.device, grid.dtype)
                where = {"head dim": head_dim, "length": length, "form": form, "alpha": opening}
                yield _lines(problem, where, limit_tflops, stopwatch, (form, opening) == grid.openings[0])


def packed_table(grid: Grid, limit_tflops: float, stopwatch: Callable[..., tuple[float, float]]) -> Iterator[list[Row]]:
    """Lines of every head dim: one packed batch, lengths from 16 to an eighth of it, uniform in the logarithm."""
    generator = torch.Generator().manual_seed(0)
    sizes: list[int] = []
    while (left := grid.num_tokens - sum(sizes)) > 0:
        drawn = 16 * (grid.num_tokens / 8 / 16) ** torch.rand((), generator=generator).item()
        sizes.append(min(int(drawn), left))
    for head_dim in grid.head_dims:
        for form, opening in grid.openings:
            problem = peers.make_problem(
                (grid.num_tokens,), grid.heads, head_dim, form, opening, grid.device, grid.dtype, sizes
            )
            where = {"head dim": head_dim, "length": f"{len(sizes)} packed", "form": form, "alpha": opening}
            yield _lines(problem, where, limit_tflops, stopwatch, (form, opening) == grid.openings[0])


def candidates(problem: Problem, unmasked: bool) -> dict[str, Callable[[], Call]]:
    """What prepares each implementation's call; the kernel first. `unmasked`: also attention without a mask."""
    makers: dict[str, Callable[[], Call]] = {
        "kernel": partial(peers.ours, problem, "kernel"),
        "two_pass": partial(peers.ours, problem, "two_pass"),
        "FlexAttention": lambda: peers.flex(problem, peers.flex_block_mask(problem)),
    }
    if problem.cu_seqlens is not None:
        if unmasked:
            makers["varlen causal"] = partial(peers.varlen_without_mask, problem, True)
            makers["varlen full"] = partial(peers.varlen_without_mask, problem, False)
        return makers
    makers["sdpa backend"] = partial(_if_it_fits, problem, partial(peers.ours, problem, "sdpa"))
    if problem.opening not in (0.0, 1.0, LEARNED):
        makers["SDPA, bias given"] = partial(_if_it_fits, problem, partial(peers.sdpa_given_bias, problem))
    stock = (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)) if unmasked else ()
    for name, backend in stock:
        for causal in (True, False):
            kind = f"{name} {'causal' if causal else 'full'}"
            makers[kind] = partial(peers.sdpa_without_mask, problem, causal, backend)
            if name == "cuDNN":
                makers[f"{kind}, keys repeated"] = partial(peers.sdpa_without_mask, problem, causal, backend, True)
    return makers


def _lines(
    problem: Problem,
    where: Row,
    limit_tflops: float,
    stopwatch: Callable[..., tuple[float, float]],
    with_unmasked: bool,
) -> list[Row]:
    """One line an implementation, forward and backward; an error stands in the line of who made it."""
    print(", ".join(f"{key} {value}" for key, value in where.items()), "...", file=sys.stderr, flush=True)
    lines: list[Row] = []
    first: torch.Tensor | None = None
    for name, make in candidates(problem, with_unmasked).items():
        unmasked = name.split()[0] in ("flash", "cuDNN", "varlen")
        opening = (0.0 if "causal" in name else 1.0) if unmasked else problem.opening
        flops = replace(problem, opening=opening).forward_flops
        line: Row = {**where, "implementation": name}
        line |= dict.fromkeys(
            ("ms", "TFLOP/s", "share", "host ms", "backward ms", "backward TFLOP/s", "difference"), ""
        )
        line |= {"error": ""}
        try:
            call = make()
            with torch.no_grad():
                out = call()
                milliseconds, line["host ms"] = stopwatch(call)
            line |= {"ms": milliseconds, "TFLOP/s": flops / milliseconds / 1e9}
            line["share"] = flops / milliseconds / 1e9 / limit_tflops
            if not unmasked:
                first = out if first is None else first
                line["difference"] = (out.float() - first.float()).abs().max().item()
            del out
            line["backward ms"] = stopwatch(_backward(call, problem, not unmasked))[0]
            line["backward TFLOP/s"] = FULL_BACKWARD * flops / line["backward ms"] / 1e9
        except Exception as error:  # whatever a peer fails with belongs into the table; the others go on
            line["error"] = _reason(error)
        lines.append(line)
    return _with_ratios(lines)


def _with_ratios(lines: list[Row]) -> list[Row]:
    """How many times the kernel's time each line takes."""
    kernel = lines[0]
    for line in lines:
        for key, ratio in (("ms", "ms / kernel"), ("backward ms", "backward / kernel")):
            line[ratio] = line[key] / kernel[key] if line[key] != "" and kernel[key] != "" else ""
        line["error"] = line.pop("error")  # last
    return lines


def _backward(call: Call, problem: Problem, with_alpha: bool) -> Callable[[], object]:
    """The backward pass of one forward pass, again and again."""
    out = call()
    direction = torch.randn_like(out)
    leaves = problem.leaves if with_alpha else [problem.q]  # without a mask nothing depends on alpha
    return lambda: torch.autograd.grad(out, leaves, direction, retain_graph=True)


def _if_it_fits(problem: Problem, make: Callable[[], Call]) -> Call:
    """Leaves the dense mask out where it would exceed half of the free memory: six copies in fp32 while it is made."""
    heads = problem.q.shape[2] if problem.opening == LEARNED else 1
    needed = 6 * 4 * heads * sum(size**2 for size in problem.sizes)
    if problem.q.is_cuda and problem.opening not in (0.0, 1.0):
        free = torch.cuda.mem_get_info()[0]
        if needed > free / 2:
            raise MemoryError(f"left out: the mask would take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    return make()


def block_mask_table(grid: Grid) -> list[Row]:
    """What FlexAttention's BlockMask costs: once for every new set of lengths."""
    lines: list[Row] = []
    for length in grid.lengths:
        for sizes in (None, [length] * max(1, grid.num_tokens // length)):
            rows = (grid.num_tokens,) if sizes else (max(1, grid.num_tokens // length), length)
            n_g = (1, 1)
            line: Row = {"length": length, "mask": "packed" if sizes else "causal", "ms": "", "error": ""}
            try:
                problem = peers.make_problem(
                    rows, n_g, 64, "row", 0.5 if sizes else 0.0, grid.device, grid.dtype, sizes
                )
                if sizes is not None and sum(sizes) != rows[0]:
                    continue
                taken = []
                for _ in range(4):
                    began = time.perf_counter()
                    peers.flex_block_mask(problem)
                    if problem.q.is_cuda:
                        torch.cuda.synchronize()
                    taken.append(1e3 * (time.perf_counter() - began))
                line["ms"] = min(taken)
            except Exception as error:
                line["error"] = _reason(error)
            lines.append(line)
    return lines


def _reason(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}".replace("|", "/")
