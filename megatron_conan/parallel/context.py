"""The rank's place in the grid, as one frozen object that is passed explicitly."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_conan.config.tree import ParallelConfig
from megatron_conan.parallel import cpu


@dataclass(frozen=True)
class ParallelContext:
    """Groups, ranks and sizes of one process. Order of ranks as in megatron-core: tp fastest, then dp, then pp."""

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup | None
    pp_rank: int
    pp_size: int
    pp_group: dist.ProcessGroup | None
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup | None
    world_group: dist.ProcessGroup | None

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding (first pipeline stage)."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output side (last pipeline stage)."""
        return self.pp_rank == self.pp_size - 1

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.world_group)


def initialize_distributed(timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group that torchrun describes (NCCL on GPUs, gloo on CPU); a lone process makes its own.

    Returns:
        This rank's device.
    """
    # some containers switch TF32 on: similarities are promised in fp32
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def build_context(parallel: ParallelConfig, device: torch.device | None = None) -> ParallelContext:
    """Build megatron-core's groups for this layout, in place of earlier ones.

    Every rank of the world must call; torch.distributed must be up.

    Args:
        parallel: sizes; their product must divide the world size (`config.checks`).
        device: this rank's device; CPU, or the current CUDA device, if not given.
    """
    cpu.install()
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else cpu.CPU
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
    )
    return ParallelContext(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        world_group=dist.group.WORLD,
    )


def destroy_context() -> None:
    """Take megatron-core's groups and the process group down."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
