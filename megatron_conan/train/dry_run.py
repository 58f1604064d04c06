"""The largest batch of a run, before its first step: too little memory shows there, with the remedy."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from torch import Tensor

from megatron_conan.config import RunConfig
from megatron_conan.data.packing import PackedTexts, pack_texts
from megatron_conan.mining.rows import CGROUP
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.metrics import memory_gib
from megatron_conan.train.pair_data import pad_multiple
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import embed_texts, evaluating

if TYPE_CHECKING:
    from megatron_conan.train.loop import Trainer

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc")
"""What torch's and CUDA's libraries say, if they raise no error of its own kind."""


@dataclass
class _Attempt:
    """What is tried, for the message if it fails."""

    what: str = "the optimizer's state beside weights and gradients"
    keys: tuple[str, ...] = ()
    """What makes it smaller: `section.key=value`."""


def dry_run(trainer: Trainer) -> None:
    """Run forward and backward of the largest batch there can be, and embed mining's or evaluation's largest.

    Adam's moments, which torch allocates at the first update only, are stood in for. Training afterwards is bitwise what
    it is without. All ranks must call, before their first step. Rank 0 tells in a line what the fullest rank took.

    Raises:
        ValueError: on the ranks whose memory is too small, with the remedy. The others may wait for them in vain.
    """
    config, context, attempt = trainer.setup.config, trainer.setup.context, _Attempt()
    device, before = context.device, trainer.soft_mask.value
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _telling_out_of_memory(trainer.setup, attempt), _random_state_kept(device):
        if config.soft_mask.schedule != "constant":
            trainer.soft_mask.set(0.5)  # half open costs most
        moments = [torch.zeros_like(p) for p in _parameters_without_state(trainer) for _ in range(2)]
        attempt.what = "a largest batch"
        largest = trainer.parts.data.largest_batch()
        shape = f"{largest.num_tokens:,} tokens in {largest.num_micro_batches} micro-batch"
        shape += "es" if largest.num_micro_batches > 1 else ""
        attempt.what = f"the largest batch ({shape}, texts of up to {largest.longest:,} tokens)"
        attempt.keys = _smaller_batches(config, largest.longest)
        trainer.parts.forward_backward(trainer.chunks, largest.batch)
        _take_what_an_update_takes(trainer)
        for name, section in (("mining", config.mining), ("evaluation", config.evaluation)):
            if section is not None:
                attempt.what = f"the largest batch of {name} ({name}.max_tokens={section.max_tokens:,})"
                attempt.keys = (f"{name}.max_tokens={section.max_tokens // 2}",)
                _embed_largest(trainer, section.max_tokens)
        del moments, largest
    trainer.soft_mask.set(before)
    _clear_gradients(trainer)
    _tell(shape, context)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _parts(trainer: Trainer) -> list[Any]:
    """The optimizers with parameters on this rank."""
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def _parameters_without_state(trainer: Trainer) -> Iterator[Tensor]:
    """Parameters as the optimizer holds them (in fp32, this rank's part) that it has no moments of yet."""
    for part in _parts(trainer):
        for group in part.param_groups:
            yield from (parameter for parameter in group["params"] if not part.optimizer.state.get(parameter))


def _take_what_an_update_takes(trainer: Trainer) -> None:
    """On a GPU torch's Adam holds one tensor more for each parameter of a group while it updates them together."""
    if trainer.setup.context.device.type != "cuda" or HAVE_APEX_OR_TE:
        return
    for part in _parts(trainer):
        for group in part.param_groups:
            held = [torch.empty_like(parameter) for parameter in group["params"]]
            del held


def _embed_largest(trainer: Trainer, max_tokens: int) -> None:
    """One batch of the longest texts for each pipeline stage, forward only."""
    setup, context = trainer.setup, trainer.setup.context
    longest = min(max(setup.config.max_query_length, setup.config.max_document_length), max_tokens)
    count, rest = divmod(max_tokens, longest)
    lengths = [longest] * count + [rest] * (rest > 0)
    multiple = pad_multiple(setup.config.parallel.tensor)

    def tokens(text: int) -> np.ndarray:
        return np.arange(lengths[text], dtype=np.int32) % setup.tokenizer.size

    packed: PackedTexts = pack_texts(
        range(len(lengths)),
        tokens,
        np.zeros(len(lengths), np.int64),
        pad_id=setup.tokenizer.pad_id,
        pad_multiple=multiple,
    ).to(context.device)
    with evaluating(trainer.chunks):
        embed_texts(trainer.chunks, [packed] * context.pp_size, context)


def _clear_gradients(trainer: Trainer) -> None:
    """As they were, with megatron-core's notes of which gradients are ready."""
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
        for group in chunk.bucket_groups:
            group.is_first_batch, group.golden_per_param_grad_ready_counts = True, {}
    trainer.optimizer.zero_grad()


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _telling_out_of_memory(setup: Setup, attempt: _Attempt) -> Iterator[None]:
    """Turn any error of memory into a ValueError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_known and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        used, total = memory_in_use(setup.context.device)
        asked = re.search(r"(?i)tried to allocate ([\d.]+) ?(\w+)", str(error))
        more = ""
        if asked:
            number, unit = float(asked[1]), asked[2]
            more = f" when {number / 2**30:.1f} GiB" if unit == "bytes" else f" when {asked[1]} {unit}"
            more += " more were asked for"
        keys = [*attempt.keys, *_smaller_share(setup.config, setup.context)]
        raise ValueError(
            f"out of memory before step 1: {attempt.what} doesn't fit on rank {setup.context.rank} ({setup.context.device}), "
            f"{used:.1f} of {total:.1f} GiB were in use{more}; set {', or '.join(keys)} (train.dry_run=false if no such batch "
            "can come)"
        ) from None


def _smaller_batches(config: RunConfig, longest: int) -> tuple[str, ...]:
    """Settings with which the largest batch is about half as large."""
    train, keys = config.train, []
    if train.micro_batch_tokens is not None and train.micro_batch_tokens > longest:
        keys.append(f"train.micro_batch_tokens={max(train.micro_batch_tokens // 2, longest)}")
    elif train.micro_batch_size is not None and train.micro_batch_size > 1:
        size = train.micro_batch_size
        divisor = max(d for d in range(1, size // 2 + 1) if size % d == 0)  # still divides the global batch
        keys.append(f"train.micro_batch_size={divisor}")
    elif train.micro_batch_size is not None and config.is_contrastive:
        keys.append(f"train.micro_batch_tokens={longest} in place of train.micro_batch_size")
    name = "max_document_length" if config.is_contrastive else "seq_length"
    return (*keys, f"data.{name}={longest // 2}")


def _smaller_share(config: RunConfig, context: ParallelContext) -> list[str]:
    """Settings with which a rank holds less of the model."""
    parallel = config.parallel
    keys = [f"parallel.tensor={2 * parallel.tensor} or parallel.pipeline={2 * parallel.pipeline} (on more ranks)"]
    if context.dp_size > 1 and not parallel.distributed_optimizer:
        keys.append("parallel.distributed_optimizer=true")
    return keys


def memory_in_use(device: torch.device) -> tuple[float, float]:
    """(most that was in use, all there is) of a GPU, or of the machine by this process, in GiB.

    A GPU's includes what CUDA, NCCL and other processes hold.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return memory_gib(device) + others / 2**30, total / 2**30
    limits = [psutil.virtual_memory().total]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    file = CGROUP / "memory.max"
    if file.is_file() and (text := file.read_text(encoding="utf-8").strip()).isdigit():
        limits.append(int(text))
    return memory_gib(device), min(limits) / 2**30


def _tell(shape: str, context: ParallelContext) -> None:
    used, total = memory_in_use(context.device)
    most = torch.tensor(used, device=context.device)
    if context.world_size > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=context.world_group)
    if context.rank == 0:
        print(f"largest batch: {shape}, {most.item():.1f} of {total:.1f} GiB", file=sys.stderr, flush=True)
