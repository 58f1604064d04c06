"""Saving checkpoints, in the background where that can be: megatron-core's dist_checkpointing, sealed and then named.

A checkpoint is written to a temporary name, its files are summed up, it is renamed, and only then named by `latest`. At most
one is being written at a time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_conan.config import RunConfig
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.checkpoint import sharded_state
from megatron_conan.train.checkpoint_files import STATE, checkpoint_name, commit, seal, temporary_folder
from megatron_conan.train.checkpoint_worker import Written, write_buckets
from megatron_conan.train.checkpoint_writer import DIED, BackgroundWriter, can_write_in_background
from megatron_conan.train.optimizer_state import OPTIMIZER_SHARDING
from megatron_conan.train.run_folder import WriteError, write_atomically

TORCH_WRITES = ("inline_container", "iostream")
"""What torch names instead of a full disk, in RuntimeErrors."""


@dataclass
class _Saving:
    """A checkpoint that is being written."""

    folder: Path
    finalize: list[Callable[[], None]]
    """megatron-core's, which write the index of all files from `results`."""
    results: SimpleQueue[Any]
    state: dict[str, Any]
    written: Written | None = None


class Checkpointer:
    """Saves a run's checkpoints. All ranks must call all methods but `is_written`, in the same order."""

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        """Get ready to save; with `checkpoint.asynchronous` start the process that writes, if the run has use for it."""
        self._settings, self._context = config.checkpoint, context
        self._folder = config.run_dir / "checkpoints"
        self._saving: _Saving | None = None
        # what data-parallel ranks hold alike is shared out among them
        self._strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), context.dp_group, do_cache_distribution=True
        )
        self._writer: BackgroundWriter | None = None
        every = config.checkpoint.every
        several = every is not None and every < config.train.steps  # nothing goes on beside the last one
        if config.checkpoint.asynchronous and several and can_write_in_background():
            self._writer = BackgroundWriter()

    def save(
        self, step: int, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, state: dict[str, Any]
    ) -> None:
        """Save weights, optimizer and `state` after `step`: in the background, or at once where there is none.

        Args:
            step: optimizer steps done.
            chunks: this rank's model chunks.
            optimizer: their optimizer.
            state: small JSON values that describe the run at this step; rank 0's are saved.

        Raises:
            OSError: on all ranks, if this or the last checkpoint could not be written; the ones before it are there.
        """
        self.finish()
        folder = self._folder / checkpoint_name(step)
        temporary = temporary_folder(folder)
        self._on_rank_0(folder, partial(_make_way, temporary))
        # Results are handed over in this process: megatron-core's own queue is a process that lives on when this one is killed.
        results: SimpleQueue[Any] = SimpleQueue()
        filesystem_async._results_queue = results
        with self._giving_up(folder):
            request = dist_checkpointing.save(
                sharded_state(chunks, optimizer, is_loading=False),
                str(temporary),
                content_metadata=dict(OPTIMIZER_SHARDING),
                sharded_strategy=self._strategy,
                async_sharded_save=True,
            )
        assert request is not None
        self._saving = _Saving(folder, request.finalize_fns, results, {"step": step, **state})
        buckets, transforms = _work(request)
        if self._writer is None:
            self._saving.written = write_buckets(_on_host(buckets), transforms)
            self.finish()
        elif buckets:
            self._writer.submit(buckets, transforms)
        else:
            self._saving.written = Written({}, {})

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self._saving is not None

    def is_written(self) -> bool:
        """Whether this rank's part of the checkpoint is written, so that `finish` needn't wait for this rank."""
        saving = self._saving
        if saving is None or saving.written is not None:
            return True
        assert self._writer is not None
        return self._writer.is_done()

    def finish(self) -> None:
        """Wait for what is being written, and give it its name.

        Raises:
            OSError: on all ranks, if some rank's part could not be written. Nothing of it is left then.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        if saving.written is None:
            assert self._writer is not None
            saving.written = self._writer.result()
        parts: list[Any] = [None] * self._context.world_size
        dist.all_gather_object(parts, (saving.written.sums, saving.written.error), group=self._context.world_group)
        folder, temporary = saving.folder, temporary_folder(saving.folder)
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error is not None]
        with self._giving_up(folder):
            if errors and DIED in errors[0]:
                raise OSError(
                    f"checkpoint {folder} could not be written: {errors[0]}, perhaps for want of memory. Start the same "
                    "command again: it goes on from the last checkpoint; checkpoint.asynchronous=false needs none"
                )
            if errors:
                raise WriteError(f"checkpoint {folder}", self._folder, errors[0])
            if saving.written.results:
                saving.results.put(saving.written.results)
            for finalize in saving.finalize:
                finalize()

        def name_it() -> None:
            write_atomically(temporary / STATE, json.dumps(saving.state, indent=2) + "\n")
            seal(temporary, {name: total for sums, _ in parts for name, total in sums.items()})
            commit(folder, self._settings.keep_last, self._settings.keep_every)

        self._on_rank_0(folder, name_it)

    def close(self) -> None:
        """End the process that writes. What it is writing and `finish` hasn't named is given up; any rank may call."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _on_rank_0(self, folder: Path, work: Callable[[], None]) -> None:
        """Have rank 0 see to files while the others wait; all raise OSError if it can't."""
        told: list[str | None] = [None]
        if self._context.rank == 0:
            try:
                with self._giving_up(folder):
                    work()
            except OSError as error:
                told = [str(error)]
        dist.broadcast_object_list(told, src=0, group=self._context.world_group, device=self._context.device)
        if told[0] is not None:
            raise OSError(told[0])

    @contextlib.contextmanager
    def _giving_up(self, folder: Path) -> Iterator[None]:
        """What the disk refuses is told as such, with nothing half-written left behind."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and not any(word in str(error) for word in TORCH_WRITES):
                raise
            if self._context.rank == 0:
                shutil.rmtree(temporary_folder(folder), ignore_errors=True)
            if isinstance(error, WriteError) or DIED in str(error):
                raise
            raise WriteError(f"checkpoint {folder}", self._folder, error) from error


def _make_way(temporary: Path) -> None:
    """An empty folder, and nothing left of earlier ones: of this checkpoint, or of a run that was killed."""
    for left in temporary.parent.glob(".step_*.tmp"):
        shutil.rmtree(left, ignore_errors=True)  # of another one, what can't go stays until the next
    temporary.mkdir(parents=True)


def _work(request: AsyncRequest) -> tuple[list[Any], list[Any]]:
    """What this rank has to write, and torch's transforms on the way."""
    if request.async_fn is None:
        return [], []
    _, buckets, _ = request.async_fn_args
    transforms, _ = request.async_fn.args  # a partial of megatron-core's function
    return buckets, transforms


def _on_host(buckets: list[Any]) -> list[Any]:
    return [
        (path, name, (bytes_items, [(item, tensor.to("cpu")) for item, tensor in tensor_items]))
        for path, name, (bytes_items, tensor_items) in buckets
    ]
