"""The process pool itself: groups of the asked size, errors with their type, recovery after a hang or a death."""

import os
import time
import traceback
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from gloo_pool import USUAL_THREADS, WorkerPool
from layouts import tiny_config, train_run

from megatron_conan.config import RunConfig


def sum_of_ranks(offset: int) -> tuple[int, int, float]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value.item()


def fail_on_one(failing_rank: int) -> None:
    if dist.get_rank() == failing_rank:
        raise ValueError(f"wrong on rank {failing_rank}")
    dist.barrier()  # would wait for ever: the failing rank never comes


def sleep_on_one(seconds: float) -> int:
    if dist.get_rank() == 1:
        time.sleep(seconds)
    return os.getpid()


def die() -> None:
    os._exit(3)


def test_sizes_follow_one_another_in_the_same_processes(workers: WorkerPool) -> None:
    for world_size in (2, 4, 1, 2):
        expected = sum(range(world_size)) + 10.0 * world_size
        assert workers.run(sum_of_ranks, world_size, 10) == [(r, world_size, expected) for r in range(world_size)]
    assert workers.run(sleep_on_one, 2, 0.0) == workers.run(sleep_on_one, 2, 0.0)


def test_error_keeps_its_type_and_frees_the_other_ranks(workers: WorkerPool) -> None:
    before = workers.run(sleep_on_one, 2, 0.0)
    start = time.monotonic()
    with pytest.raises(ValueError, match="wrong on rank 1") as caught:
        workers.run(fail_on_one, 2, 1)
    assert "in fail_on_one" in "".join(traceback.format_exception(caught.value))
    assert time.monotonic() - start < 30
    assert workers.run(sleep_on_one, 2, 0.0) == before


def test_recovers_from_a_hang_and_a_death() -> None:
    pool = WorkerPool()
    try:
        pool.run(sum_of_ranks, 2, 0)
        with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2.*(.|\n)*sleep_on_one"):
            pool.run(sleep_on_one, 2, 600.0, timeout=3.0)
        with pytest.raises(RuntimeError, match="died with exit code 3"):
            pool.run(die, 1)
        assert pool.run(sum_of_ranks, 1, 0) == [(0, 1, 0.0)]
    finally:
        pool.remove()


def tensor_parallel_ranks(tensor_parallel: int) -> list[int]:
    from megatron.core import parallel_state

    assert not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    return dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())


def test_megatron_groups_are_gone_after_a_run(workers: WorkerPool) -> None:
    assert workers.run(tensor_parallel_ranks, 2, 2) == [[0, 1], [0, 1]]
    assert workers.run(tensor_parallel_ranks, 2, 1) == [[0], [1]]


def train_and_count_threads(config: RunConfig) -> int:
    train_run(config)
    return psutil.Process().num_threads()


def count_threads() -> int:
    return psutil.Process().num_threads()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_threads_of_a_sharded_optimizer_are_gone_after_a_run(
    precision: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """They would be hundreds after some such runs, and busy ones."""
    train = {"steps": 1, "precision": precision}
    config = tiny_config("pretrain", tiny_data, tmp_path / "run", parallel={"distributed_optimizer": True}, train=train)
    during = workers.run(train_and_count_threads, 2, config)
    assert min(during) > USUAL_THREADS
    assert max(workers.run(count_threads, 2)) < USUAL_THREADS
