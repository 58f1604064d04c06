"""Time and memory of InfoNCE over blocks: one large batch, and against plain torch where that fits.

Every measurement runs in a fresh process, forward and backward, in fp32 on the CPU. "GEMMs" are the four matrix products that
no implementation avoids which doesn't keep the logits (logits, logits again, two gradients), alone and at the same block
size, in the same process. Ratios are of CPU-seconds, the two sides timed by turns: seconds depend on who else uses the
machine. Few threads make steadier figures, since a thread that waits for another also counts.

    python benchmarks/info_nce.py                       # 65,536 x 65,536: some minutes on two cores
    python benchmarks/info_nce.py --rows 16384 --output info_nce.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from recording import print_table, write_record
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from megatron_conan.loss.blockwise import BLOCK_SIZE, Exclusions
from megatron_conan.loss.contrastive import Bank, info_nce_loss

TEMPERATURE, MARGIN = 0.02, 0.1


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    loss: str
    """"blockwise", "margin" (blockwise with a margin) or "plain"."""
    num_rows: int
    dim: int
    block_size: int
    num_threads: int
    repeats: int
    """The fastest run counts."""


@dataclass(frozen=True)
class Measurement:
    """Of forward and backward."""

    seconds: float
    cpu_seconds: float
    gemm_seconds: float
    gemm_cpu_seconds: float
    peak_mb: float
    """Resident memory of the whole process at its peak, of which ..."""
    base_mb: float
    """... were there before: Python, torch and the embeddings."""


def make_pairs(num_rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Queries and documents ([q, e] each), row by row similar."""
    generator = torch.Generator().manual_seed(0)
    query = normalize(torch.randn(num_rows, dim, generator=generator), dim=-1)
    document = normalize(query + torch.randn(num_rows, dim, generator=generator) * dim**-0.5, dim=-1)
    return query.requires_grad_(), document.requires_grad_()


def plain_loss(query: Tensor, document: Tensor, case: Case) -> Tensor:
    """Cross entropy over the matrix of all similarities."""
    return cross_entropy(query @ document.T / TEMPERATURE, torch.arange(case.num_rows))


def blockwise_loss(query: Tensor, document: Tensor, case: Case) -> Tensor:
    """The same, block by block."""
    row = torch.arange(case.num_rows)
    excluded = Exclusions.nothing(case.num_rows, case.num_rows).with_pairs(torch.stack([row, row]))
    result = info_nce_loss(
        row,
        (query * document).sum(dim=-1),
        case.num_rows,
        [Bank(query, document, excluded)],
        temperature=TEMPERATURE,
        margin=MARGIN if case.loss == "margin" else None,
        block_size=case.block_size,
    )
    return result.losses.mean()


def multiply(query: Tensor, document: Tensor, size: int) -> None:
    """The four matrix products alone."""
    to_query, to_document = torch.zeros_like(query), torch.zeros_like(document)
    buffer = torch.empty(min(size, len(query)) * min(size, len(document)))
    for q, to_q in zip(query.split(size), to_query.split(size), strict=True):
        for d, to_d in zip(document.split(size), to_document.split(size), strict=True):
            logits = buffer[: len(q) * len(d)].view(len(q), len(d))
            torch.mm(q, d.T, out=logits)
            torch.mm(q, d.T, out=logits)
            to_q.addmm_(logits, d)
            to_d.addmm_(logits.T, q)


def peak_mb() -> float:
    """Of this process alone; the maximum of getrusage may be that of the one that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds and CPU-seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(case: Case) -> Measurement:
    """Runs in a process of its own."""
    torch.set_num_threads(case.num_threads)
    query, document = make_pairs(case.num_rows, case.dim)
    loss = plain_loss if case.loss == "plain" else blockwise_loss
    base, peak = peak_mb(), 0.0
    losses, gemms = [], []
    for _ in range(case.repeats):
        losses.append(timed(lambda: loss(query, document, case).backward()))
        peak = peak or peak_mb()  # before the GEMMs, whose memory is not the loss's
        gemms.append(timed(lambda: multiply(query.detach(), document.detach(), case.block_size)))
    (seconds, cpu_seconds), (gemm_seconds, gemm_cpu_seconds) = (
        [min(column) for column in zip(*times, strict=True)] for times in (losses, gemms)
    )
    return Measurement(seconds, cpu_seconds, gemm_seconds, gemm_cpu_seconds, peak, base)


def run(case: Case) -> Measurement:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, case).result()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536, help="queries, and documents, of the large batch")
    parser.add_argument(
        "--compare", type=int, nargs="*", default=[4096, 8192], help="sizes at which to compare with plain torch"
    )
    parser.add_argument("--dim", type=int, default=256, help="embedding dim")
    parser.add_argument("--block-size", type=int, default=BLOCK_SIZE)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="of the comparison; the large batch runs once")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    arguments = parse_arguments()
    settings = {"dim": arguments.dim, "block_size": arguments.block_size, "num_threads": arguments.threads}
    cases = [
        Case(loss, rows, repeats=arguments.repeats, **settings)
        for rows in arguments.compare
        for loss in ("plain", "blockwise", "margin")
    ]
    cases.append(Case("blockwise", arguments.rows, repeats=1, **settings))
    results: list[tuple[Case, Measurement]] = []
    for case in cases:
        print(f"{case.loss}, {case.num_rows:,} rows ...", file=sys.stderr, flush=True)
        results.append((case, run(case)))
    found = {(case.loss, case.num_rows): measurement for case, measurement in results}
    rows = []
    for case, measured in results:
        plain = found.get(("plain", case.num_rows))
        extra = measured.peak_mb - measured.base_mb
        rows.append(
            {
                "loss": case.loss,
                "rows": case.num_rows,
                "CPU-seconds": measured.cpu_seconds,
                "/ its GEMMs": measured.cpu_seconds / measured.gemm_cpu_seconds,
                "/ plain torch": measured.cpu_seconds / plain.cpu_seconds if plain else "",
                "process peak, MB": measured.peak_mb,
                "added by the loss, MB": extra,
                "/ plain torch's": extra / (plain.peak_mb - plain.base_mb) if plain else "",
            }
        )
    print_table(f"InfoNCE, forward and backward: dim {arguments.dim}, blocks of {arguments.block_size}", rows)
    if arguments.output:
        write_record(arguments.output, settings, {"info_nce": rows})


if __name__ == "__main__":
    main()
