"""One optimizer step through megatron-core's schedule, and one forward pass that embeds texts.

Shapes: `b` micro-batch, `s` sequence, `t` packed tokens, `n` texts, `h` hidden, `e` embedding dim.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_conan.data.packing import PackedTexts
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.checkpoint import unwrap
from megatron_conan.train.phases import Phases

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, "StepReport"]]
ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, LossFunction | None]]


Sum = float | Tensor


@dataclass
class StepReport:
    """What a micro-batch tells about itself; sums, so that ranks and micro-batches can be added up.

    Those that lie on a device stay there: asking for them would make the device wait for the next micro-batch's launch.
    """

    means: dict[str, tuple[Sum, Sum]] = field(default_factory=dict)
    """name -> (sum, count): reported as sum / count over the global batch."""
    totals: dict[str, Sum] = field(default_factory=dict)
    """name -> sum over the global batch."""
    log_means: dict[str, tuple[Sum, Sum]] = field(default_factory=dict)
    """name -> (sum, count): reported as log(sum / count) over the global batch."""


def run_schedule(
    chunks: list[DistributedDataParallel],
    forward_step: ForwardStep,
    micro_batches: Sequence[Any],
    *,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
) -> list[Any]:
    """One pass over the micro-batches through megatron-core's schedule. All ranks must call.

    Args:
        chunks: this rank's model chunks.
        forward_step: gives a micro-batch's output and the function that makes a loss of it (None: the output is kept).
        micro_batches: this rank's.
        seq_length: s of the activations [s, b, h] between pipeline stages.
        micro_batch_size: b of the same.
        forward_only: no backward pass.

    Returns:
        On the last pipeline stage what each micro-batch left: its report, or its output.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def train_step(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    forward_backward: Callable[[], list[StepReport]],
    context: ParallelContext,
    phases: Phases,
) -> dict[str, float]:
    """Forward, backward and update over one global batch. All ranks must call.

    Args:
        chunks: this rank's model chunks.
        optimizer: their optimizer.
        forward_backward: accumulates the gradients of the batch.
        context: this rank's place.
        phases: takes the seconds.

    Returns:
        Means and totals over the global batch by name, and `grad_norm` (before clipping); equal on all ranks. Where the loss
        or the gradient norm is not finite nothing was updated.
    """
    with phases.within("forward_backward"):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        values = reduce_reports(forward_backward(), context)
    with phases.within("optimizer"):
        values["grad_norm"] = update(optimizer, math.isfinite(values["loss"]))
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)  # the update is part of the step's seconds
    return values


@torch.no_grad()
def update(optimizer: MegatronOptimizer, wanted: bool) -> float:
    """What megatron-core's `optimizer.step()` does, but nothing if it isn't `wanted` or the gradient norm isn't finite.

    All ranks must call. Returns the gradient norm before clipping.
    """
    found_inf = optimizer.prepare_grads()
    grad_norm = math.inf if found_inf else float(optimizer.get_grad_norm() or 0.0)
    if not wanted or not math.isfinite(grad_norm):
        return grad_norm
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm


def reduce_reports(reports: Sequence[StepReport], context: ParallelContext) -> dict[str, float]:
    """Add up the micro-batches' reports over data-parallel ranks. All ranks must call; only the last stage has any."""
    values: dict[str, float] = {}
    if context.is_last_stage:
        means = sorted({name for report in reports for name in report.means | report.log_means})
        totals = sorted({name for report in reports for name in report.totals})
        logs = {name for report in reports for name in report.log_means}
        pairs = [[(report.means | report.log_means).get(name, (0.0, 0.0)) for report in reports] for name in means]
        sums: list[Sum] = [sum(value) for pair in pairs for value in zip(*pair, strict=True)]
        sums += [sum(report.totals.get(name, 0.0) for report in reports) for name in totals]
        reduced = _one_tensor(sums, context.device)
        if context.dp_size > 1:
            dist.all_reduce(reduced, group=context.dp_group)
        numbers = reduced.tolist()
        for i, name in enumerate(means):
            if numbers[2 * i + 1] > 0:
                mean = numbers[2 * i] / numbers[2 * i + 1]
                values[name] = math.log(mean) if name in logs else mean
        values.update(zip(totals, numbers[2 * len(means) :], strict=True))
    if context.pp_size > 1:
        assert context.pp_group is not None
        box = [values]
        last = dist.get_process_group_ranks(context.pp_group)[-1]
        dist.broadcast_object_list(box, src=last, group=context.pp_group, device=context.device)
        values = box[0]
    return values


def _one_tensor(sums: Sequence[Sum], device: torch.device) -> Tensor:
    """[len(sums)] float64, without waiting for those that lie on the device."""
    numbers = torch.tensor([0.0 if isinstance(s, Tensor) else s for s in sums], dtype=torch.float64, device=device)
    for i, value in enumerate(sums):
        if isinstance(value, Tensor):
            numbers[i] = value.to(device)
    return numbers


@torch.no_grad()
def embed_texts(
    chunks: list[DistributedDataParallel], micro_batches: Sequence[PackedTexts], context: ParallelContext
) -> Tensor:
    """Embed packed texts with the live weights, through the pipeline if there is one.

    All tensor and pipeline ranks of a data-parallel rank must call, with the same micro-batches.

    Args:
        chunks: this rank's model chunks.
        micro_batches: all with the same number t of tokens; under sequence parallelism t must be divisible by tp.
        context: this rank's place.

    Returns:
        [n of all micro-batches, e] fp32, unit length, the same on every tensor and pipeline rank.
    """

    def embed(batch: PackedTexts, model: torch.nn.Module) -> Tensor:
        return model(batch.tokens, batch.sequences, embed=True, prompt_lengths=batch.prompt_lengths)

    if context.pp_size == 1:
        return torch.cat([embed(batch, chunks[0]) for batch in micro_batches])
    # the interleaved schedule takes whole rounds of micro-batches
    fill = -len(micro_batches) % context.pp_size if len(chunks) > 1 else 0
    outputs = run_schedule(
        chunks,
        lambda batches, model: (embed(next(batches), model), None),
        [*micro_batches, *[micro_batches[-1]] * fill],
        seq_length=micro_batches[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=True,
    )
    assert context.pp_group is not None
    if context.is_last_stage:
        embeddings = torch.cat(outputs[: len(micro_batches)])
    else:
        num_texts = sum(len(batch.sequences.lengths) for batch in micro_batches)
        width = unwrap(chunks[0]).embedding_dim
        embeddings = torch.empty((num_texts, width), dtype=torch.float32, device=context.device)
    dist.broadcast(embeddings, src=dist.get_process_group_ranks(context.pp_group)[-1], group=context.pp_group)
    return embeddings


@contextlib.contextmanager
def evaluating(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Put the model into evaluation mode for the body."""
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()
