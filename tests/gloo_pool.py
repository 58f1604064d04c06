"""A pool of long-lived processes that tests run torch.distributed (gloo, CPU) code in.

Importing torch and megatron-core takes many seconds a process, so the processes live as long as the pytest run; every
`run` makes fresh process groups of exactly the asked size and destroys them afterwards.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

MAX_WORKERS = 4
# A rank that failed breaks its peers' connections; they get this long to notice before the pool is killed.
GRACE_SECONDS = 20.0
# A process without groups has about a dozen; looking for what keeps groups alive takes a fraction of a second.
USUAL_THREADS = 40
# The processes stay on the CPU also where there is a GPU; one thread each, so that they share few cores well.
WORKER_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class RemoteTraceback(Exception):
    """The traceback of an error raised in a worker, as text."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"\n--- rank {rank} ---\n{text}")


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    stack_file: Path


@dataclass
class _Reply:
    value: Any
    error: BaseException | None
    trace: str


class WorkerPool:
    """Runs a function in `world_size` processes with torch.distributed initialised on gloo."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._folder = Path(tempfile.mkdtemp(prefix="gloo_pool_"))
        self._num_runs = 0

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call `fn(*args)` in every one of `world_size` processes and return what each rank returned.

        Args:
            fn: a module-level function; its rank comes from torch.distributed.get_rank().
            world_size: number of ranks, 1 to 4.
            args: picklable; every rank gets its own copy.
            timeout: seconds after which the pool is killed (the next run starts a new one).

        Raises the first error that a rank raised, with the remote traceback as its cause; TimeoutError with every
        stuck rank's stack; RuntimeError where a process died.
        """
        if not 1 <= world_size <= MAX_WORKERS:
            raise ValueError(f"world_size={world_size} must be 1 to {MAX_WORKERS}")
        self._start(world_size)
        workers = self._workers[:world_size]
        self._num_runs += 1
        store = self._folder / f"store_{self._num_runs}"
        for rank, worker in enumerate(workers):
            job = pickle.dumps((sys.path, store, rank, world_size, timeout, pickle.dumps((fn, args))))
            worker.connection.send_bytes(job)
        replies, first_failed = self._collect(workers, timeout)
        if not all(worker in self._workers and _is_clean(worker) for worker in workers):
            self.close()
        if first_failed is not None:
            reply = replies[first_failed]
            assert reply.error is not None
            raise reply.error from RemoteTraceback(first_failed, reply.trace)
        return [replies[rank].value for rank in range(world_size)]

    def close(self) -> None:
        """End all processes; the next run starts new ones."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def remove(self) -> None:
        """End all processes and delete the pool's folder."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, count: int) -> None:
        if any(not worker.process.is_alive() for worker in self._workers):
            self.close()
        spawn = multiprocessing.get_context("spawn")
        with _environment(WORKER_ENVIRONMENT):
            for number in range(len(self._workers), count):
                ours, theirs = spawn.Pipe()
                stack_file = self._folder / f"stack_{number}.txt"
                process = spawn.Process(target=_serve, args=(theirs, stack_file), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours, stack_file))

    def _collect(self, workers: list[_Worker], timeout: float) -> tuple[dict[int, _Reply], int | None]:
        """Wait for every rank's reply. A failed rank is told to leave its groups at once, which frees its peers."""
        ranks = {worker.connection: rank for rank, worker in enumerate(workers)}
        replies: dict[int, _Reply] = {}
        first_failed: int | None = None
        deadline = time.monotonic() + timeout
        while len(replies) < len(workers):
            pending = [connection for connection, rank in ranks.items() if rank not in replies]
            ready = wait(pending, max(deadline - time.monotonic(), 0))
            if not ready:
                if first_failed is None:
                    raise TimeoutError(self._kill_stuck(workers, replies, timeout))
                self.close()
                return replies, first_failed
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = ranks[connection]
                try:
                    reply = replies[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    workers[rank].process.join(1)
                    code = workers[rank].process.exitcode
                    self.close()
                    raise RuntimeError(f"the process of rank {rank} died with exit code {code}") from None
                if reply.error is not None:
                    connection.send_bytes(b"clean")
                    if first_failed is None:
                        first_failed = rank
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank, reply in replies.items():
            if reply.error is None:
                workers[rank].connection.send_bytes(b"clean")
        return replies, first_failed

    def _kill_stuck(self, workers: list[_Worker], replies: dict[int, _Reply], timeout: float) -> str:
        stuck = [rank for rank in range(len(workers)) if rank not in replies]
        for rank in stuck:
            pid = workers[rank].process.pid
            if pid is not None and workers[rank].process.is_alive():
                os.kill(pid, signal.SIGUSR2)
        time.sleep(0.5)
        stacks = "\n".join(f"--- rank {rank} ---\n{workers[rank].stack_file.read_text()}" for rank in stuck)
        self.close()
        return f"ranks {stuck} of {len(workers)} did not finish within {timeout:g} s\n{stacks}"


def _is_clean(worker: _Worker) -> bool:
    try:
        return worker.connection.poll(GRACE_SECONDS) and pickle.loads(worker.connection.recv_bytes()) == "clean"
    except EOFError:
        return False


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(connection: Connection, stack_file: Path) -> None:
    """The life of a worker: a job, its reply, the word to clean up, "clean"; until the pipe closes."""
    # megatron-core writes checkpoints from child processes, which a daemon may not have; to the parent it stays one,
    # so that pytest never waits for it
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    import torch

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with stack_file.open("w") as stacks:
        # not SIGUSR1: that asks a training run to stop
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        while True:
            try:
                job = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(_run_job(job))
            connection.recv_bytes()
            try:
                _destroy_groups()
            except Exception:
                traceback.print_exc()
                connection.send_bytes(pickle.dumps("unclean"))
                return
            connection.send_bytes(pickle.dumps("clean"))


def _run_job(job: bytes) -> bytes:
    import torch.distributed as dist

    path, store_file, rank, world_size, timeout, call = pickle.loads(job)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    try:
        sys.path[:] = path
        store = dist.FileStore(str(store_file), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        fn, args = pickle.loads(call)
        return pickle.dumps(_Reply(fn(*args), None, ""))
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps(_Reply(None, error, trace))


def _destroy_groups() -> None:
    """Leave nothing of a run behind: megatron-core keeps its groups and calculators in module globals."""
    import torch.distributed as dist

    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    calculator = sys.modules.get("megatron.core.num_microbatches_calculator")
    if calculator is not None:
        calculator.destroy_num_microbatches_calculator()
    rerun = sys.modules.get("megatron.core.rerun_state_machine")
    if rerun is not None:
        rerun.destroy_rerun_state_machine()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # a trainer is a ring of references, and holds groups, whose threads would go on
    if psutil.Process().num_threads() > USUAL_THREADS:
        _free_sharded_optimizers()


def _free_sharded_optimizers() -> None:
    """Cut the cycles that keep a sharded optimizer alive, and with it the model, the groups and dozens of busy threads.

    Its shards are views of parameters with a history, which leads, through C++, where Python's garbage collector sees
    nothing, back to the hooks on these parameters.
    """
    for thing in gc.get_objects():
        if type(thing).__name__ == "DistributedOptimizer":
            vars(thing).clear()
    gc.collect()
