"""What megatron-core asks of CUDA on a CPU is listed here, line by line; anything new fails this test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_pool import WorkerPool
from layouts import tiny_config, train_run

EXPECTED = {
    ("Tensor.cuda", "megatron.core.models.common.language_module.language_module"),  # tied embeddings over a pipeline
    ("Tensor.cuda", "megatron.core.optimizer.distrib_optimizer"),
    ("Tensor.type", "megatron.core.optimizer.clip_grads"),
    ("Tensor.type", "megatron.core.optimizer.distrib_optimizer"),
    ("cuda.current_device", "megatron.core.dist_checkpointing.strategies.state_dict_saver"),
    ("cuda.current_device", "megatron.core.optimizer.distrib_optimizer"),
    ("cuda.current_device", "megatron.core.distributed.param_and_grad_buffer"),
    ("cuda.current_device", "megatron.core.pipeline_parallel.p2p_communication"),
    ("cuda.current_device", "megatron.core.tensor_parallel.layers"),  # sequence parallelism
    ("cuda.current_device", "megatron.core.tensor_parallel.mappings"),  # sequence parallelism
    ("cuda.current_device", "megatron.core.utils"),
    ("cuda.get_rng_state", "megatron.core.tensor_parallel.random"),
    ("cuda.manual_seed", "megatron.core.tensor_parallel.random"),
    ("cuda.synchronize", "megatron.core.pipeline_parallel.p2p_communication"),
    ("random._get_cuda_rng_state", "megatron.core.tensor_parallel.random"),
    ("random._set_cuda_rng_state", "megatron.core.tensor_parallel.random"),
    ("tensor(device='cuda')", "megatron.core.optimizer.optimizer"),
    ("tensor(device='cuda')", "megatron.core.utils"),
    ("zeros(device='cuda')", "megatron.core.optimizer.clip_grads"),
    ("zeros(device='cuda')", "megatron.core.pipeline_parallel.schedules"),
}
"""(what was asked, by which module) over all layouts of `LAYOUTS`."""

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"distributed_optimizer": True, "overlap_grad_reduce": True}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
]


def _hits_of_run(config: Any) -> set[tuple[str, str]]:
    from megatron_conan.parallel import cpu

    cpu.hits.clear()
    train_run(config)
    return set(cpu.hits)


def test_only_listed_stand_ins_are_used(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    found = set()
    for i, (world, parallel) in enumerate(LAYOUTS):
        train = {"steps": 2, "micro_batch_size": 2, "global_batch_size": 8}
        config = tiny_config("pretrain", tiny_data, tmp_path / str(i), parallel=parallel, train=train)
        for rank in workers.run(_hits_of_run, world, config):
            found |= rank
    unlisted, unused = found - EXPECTED, EXPECTED - found
    assert not unlisted, f"megatron-core uses stand-ins that are not listed: {sorted(unlisted)}"
    assert not unused, f"listed, but no longer used: {sorted(unused)}"


def _ask_for_unlisted() -> str:
    from megatron.core.tensor_parallel import mappings

    from megatron_conan.config.tree import ParallelConfig
    from megatron_conan.parallel.context import build_context

    build_context(ParallelConfig())
    with pytest.raises(AttributeError) as error:
        mappings.torch.cuda.mem_get_info()
    return str(error.value)


def test_an_unlisted_request_names_itself(workers: WorkerPool) -> None:
    (message,) = workers.run(_ask_for_unlisted, 1)
    assert "torch.cuda.mem_get_info" in message
    assert "parallel/cpu.py" in message


def _torch_outside_is_untouched() -> tuple[bool, bool]:
    from megatron_conan.config.tree import ParallelConfig
    from megatron_conan.parallel.context import build_context

    build_context(ParallelConfig())
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()
    return torch.zeros(1).type() == "torch.FloatTensor", torch.cuda.is_available()


def test_torch_itself_stays_as_it_is(workers: WorkerPool) -> None:
    assert workers.run(_torch_outside_is_untouched, 1) == [(True, False)]
