"""A rank's place in any layout, for functions that use the world group only and no groups of megatron-core."""

import torch
import torch.distributed as dist

from megatron_conan.parallel.context import ParallelContext


def context_of(world_size: int, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> ParallelContext:
    """Ranks in megatron-core's order, tp fastest, then dp, then pp; these functions use the world group only."""
    rank = dist.get_rank() if world_size > 1 else 0
    dp_size = world_size // (tensor_parallel * pipeline_parallel)
    return ParallelContext(
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        tp_rank=rank % tensor_parallel,
        tp_size=tensor_parallel,
        tp_group=None,
        pp_rank=rank // (tensor_parallel * dp_size),
        pp_size=pipeline_parallel,
        pp_group=None,
        dp_rank=rank // tensor_parallel % dp_size,
        dp_size=dp_size,
        dp_group=None,
        world_group=dist.group.WORLD if world_size > 1 else None,
    )
