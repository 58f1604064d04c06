"""Soft-mask attention by our backends beside what one would use instead, in one run.

On a CUDA machine: the kernel against `two_pass`, compiled FlexAttention and torch's attention with a dense bias, and against
torch's flash and cuDNN attention without a mask, in bf16 at the 1.4B model's heads; medians on the GPU's clock with a cold L2
cache. TFLOP/s are of the products that the mask asks for (4 l^2 d a head, half at alpha = 0), shares are of a large bf16
matrix product in the same run. (Nothing of this has run on a GPU yet.)

Elsewhere: fp32 on the CPU, forward and forward with backward. CPU-seconds of the fastest of several runs that take turns;
ratios are to torch's full attention without a mask, shares are of the arithmetic that a matrix product of 1024 does in the
same time, in the same run. Alphas of 0, .5 and 1 are known to the host, as in training; "learned" is one alpha a head, with
its gradient. "MB" is what forward and backward add at most to what is there.

    python benchmarks/soft_mask_attention.py --output soft_mask_attention.json      # a CPU: some minutes
    python benchmarks/soft_mask_attention.py --quick                                # below a minute on a CPU
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import attention_on_gpu as gpu
import attention_peers as peers
import torch
from attention_peers import FULL_BACKWARD, LEARNED, Call, Problem
from recording import (
    Row,
    gemm_flops_per_second,
    in_fresh_process,
    least_cpu_seconds,
    memory_growth,
    print_table,
    write_record,
)

HEAD_DIM = 64
NUM_TOKENS = 2048
SIZES = ((32, 64, 4), (8, 256, 4), (2, 1024, 4), (1, 4096, 1))
"""(b, s, n)."""
QUICK_SIZES = SIZES[:2]
OPENINGS: tuple[float | str, ...] = (0.0, 0.5, 1.0, LEARNED)
SECONDS = 600
"""What a memory measurement may take."""
FLEX = "FlexAttention"


def cpu_problem(size: tuple[int, int, int], opening: float | str) -> Problem:
    """Form row, but constant where alpha is learned."""
    b, s, n = size
    return peers.make_problem(
        (b, s), (n, n), HEAD_DIM, "constant" if opening == LEARNED else "row", opening, "cpu", torch.float32
    )


def cpu_calls(problem: Problem, with_flex: bool) -> dict[str, Call]:
    """Every implementation's call; torch's without a mask last."""
    calls = {name: peers.ours(problem, name) for name in ("two_pass", "sdpa", "reference")}  # type: ignore[arg-type]
    if problem.opening not in (0.0, 1.0, LEARNED):
        calls["SDPA, bias given"] = peers.sdpa_given_bias(problem)
    if with_flex:
        calls[FLEX] = peers.flex(problem, peers.flex_block_mask(problem))
    calls["SDPA causal"] = peers.sdpa_without_mask(problem, causal=True)
    calls["SDPA full"] = peers.sdpa_without_mask(problem, causal=False)
    return calls


def check_results(calls: dict[str, Call], problem: Problem) -> dict[str, float]:
    """Largest difference of every implementation's output from the definition's. FlexAttention compiles here."""
    with torch.no_grad():
        expected = calls["reference"]()
        found = {}
        for name, call in calls.items():
            if name not in ("SDPA causal", "SDPA full"):
                found[name] = (call() - expected).abs().max().item()
    assert max(found.values()) < 1e-4, f"an implementation is off: {found}; alpha {problem.opening}"
    return found


def train(call: Call, problem: Problem, masked: bool) -> None:
    """Forward and backward."""
    out = call()
    leaves = problem.leaves if masked else [problem.q, problem.k, problem.v]
    torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)


def infer(call: Call) -> None:
    """Forward alone."""
    with torch.no_grad():
        call()


def cpu_lines(
    size: tuple[int, int, int], opening: float | str, repetitions: int, with_flex: bool, gemm: float
) -> list[Row]:
    """One line an implementation."""
    problem = cpu_problem(size, opening)
    calls = cpu_calls(problem, with_flex)
    differences = check_results(calls, problem)
    forward = least_cpu_seconds({name: partial(infer, call) for name, call in calls.items()}, repetitions)
    both = least_cpu_seconds(
        {name: partial(train, call, problem, name in differences) for name, call in calls.items() if name != FLEX},
        repetitions,
    )
    lines: list[Row] = []
    for name, seconds in forward.items():
        flops = problem.forward_flops
        if name not in differences:
            flops = replace(problem, opening=0.0 if name == "SDPA causal" else 1.0).forward_flops
        line: Row = {"length": size[1], "batch": size[0], "heads": size[2], "alpha": opening, "implementation": name}
        line |= {"forward ms": 1e3 * seconds, "/ full": seconds / forward["SDPA full"]}
        line["share of GEMM"] = flops / seconds / gemm
        if name in both:
            line |= {"with backward ms": 1e3 * both[name], "with backward / full": both[name] / both["SDPA full"]}
            line["share of GEMM, with backward"] = (1 + FULL_BACKWARD) * flops / both[name] / gemm
        else:
            line |= dict.fromkeys(("with backward ms", "with backward / full", "share of GEMM, with backward"), "")
        lines.append({**line, "difference": differences.get(name, "")})
    return lines


def measure_memory(size: tuple[int, int, int], opening: float | str, threads: int) -> dict[str, float]:
    """MB that forward and backward add, by implementation; for a process of its own."""
    torch.set_num_threads(threads)
    small = cpu_problem((1, 32, size[2]), opening)
    for name, call in cpu_calls(small, with_flex=False).items():
        train(call, small, not name.startswith("SDPA c") and name != "SDPA full")
    problem = cpu_problem(size, opening)
    found = {}
    for name, call in cpu_calls(problem, with_flex=False).items():
        masked = name not in ("SDPA causal", "SDPA full")
        found[name] = memory_growth(partial(train, call, problem, masked), keeping=False)["mb"]
    return found


def cpu_table(arguments: argparse.Namespace, gemm: float) -> list[Row]:
    """All sizes and openings."""
    sizes, repetitions = (QUICK_SIZES, 5) if arguments.quick else (SIZES, arguments.repetitions)
    lines: list[Row] = []
    for size in sizes:
        for opening in OPENINGS:
            print(f"length {size[1]}, alpha {opening} ...", file=sys.stderr, flush=True)
            new = cpu_lines(size, opening, repetitions, arguments.flex and not arguments.quick, gemm)
            memory: Any = {}
            if not arguments.quick:
                memory = in_fresh_process(SECONDS, measure_memory, size, opening, arguments.threads)
                if isinstance(memory, str):
                    print(f"no memory measured: {memory}", file=sys.stderr)
                    memory = {}
            lines += [{**line, "MB": memory.get(line["implementation"], "")} for line in new]
    return lines


def run_on_cpu(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    torch.set_num_threads(arguments.threads)
    gemm = gemm_flops_per_second()
    lines = cpu_table(arguments, gemm)
    after = gemm_flops_per_second()
    print_table(f"fp32 on {arguments.threads} thread(s), head dim {HEAD_DIM}, form row, learned: constant", lines)
    print(f"\nGEMM: {gemm / 1e9:.1f} GFLOP a CPU-second before, {after / 1e9:.1f} after", flush=True)
    if arguments.output:
        settings = {"head_dim": HEAD_DIM, "num_threads": arguments.threads, "dtype": "float32"}
        settings |= {"gemm_gflops": gemm / 1e9, "gemm_gflops_after": after / 1e9}
        write_record(arguments.output, settings, {"cpu": lines})


def run_on_gpu(arguments: argparse.Namespace) -> None:
    """Measure, print and write; what is measured is written at once."""
    grid = gpu.Grid(head_dims=arguments.head_dims, lengths=arguments.lengths)
    if arguments.quick:
        grid = gpu.Grid(head_dims=(112,), lengths=(2048, 8192), openings=(("row", 0.0), ("row", 0.5), ("row", 1.0)))
    stopwatch = gpu.Stopwatch(arguments.repetitions)
    limit = gpu.gemm_tflops(stopwatch)
    settings = {"grid": asdict(grid), "gemm_tflops": limit, "gpu": gpu.gpu_name_and_clocks()}
    print(settings)
    tables: dict[str, list[Row]] = {"block masks": gpu.block_mask_table(grid)}
    print_table("What FlexAttention's BlockMask costs, before the first call", tables["block masks"])
    makers: dict[str, Callable[..., Any]] = {"packed": gpu.packed_table, "padded": gpu.padded_table}
    for name, make in makers.items():
        tables[name] = []
        for lines in make(grid, limit, stopwatch):
            tables[name] += lines
            if arguments.output:
                write_record(arguments.output, settings, tables)
        print_table(f"{name}; shares of {limit:.0f} TFLOP/s, a bf16 product of 8192", tables[name])
    settings["gemm_tflops_after"] = gpu.gemm_tflops(stopwatch)
    if arguments.output:
        write_record(arguments.output, settings, tables)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes, without FlexAttention and memory on a CPU")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: the GPU where there is one")
    parser.add_argument("--repetitions", type=int, default=20, help="of every measurement")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument(
        "--no-flex", dest="flex", action="store_false", help="without FlexAttention on a CPU: needs g++"
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(gpu.HEAD_DIMS), help="on a GPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(gpu.LENGTHS), help="on a GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args(words)


def main() -> None:
    """On the GPU where there is one."""
    arguments = parse_arguments()
    if arguments.device == "auto" and torch.cuda.is_available():
        run_on_gpu(arguments)
    else:
        run_on_cpu(arguments)


if __name__ == "__main__":
    main()
