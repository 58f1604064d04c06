"""Ordered map over processes, for the tokenising tools."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def process_map(function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    """Results of `function` in the order of `tasks`; the first failing task in that order raises its error.

    Args:
        function: a module-level function; runs in this process if `num_workers` is 1, else in spawned ones.
        tasks: read as results are consumed, at most 2 x num_workers ahead.
        num_workers: at least 1.

    Raises:
        ValueError: num_workers is below 1, or a process died.
    """
    if num_workers < 1:
        raise ValueError(f"workers={num_workers} must be at least 1")
    if num_workers == 1:
        yield from map(function, tasks)
        return
    # spawned, not forked: the caller may hold threads
    pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    running: deque[Future[Result]] = deque()
    try:
        for future in _submitted(pool, function, tasks):
            running.append(future)
            if len(running) >= 2 * num_workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of {num_workers} tokenising processes was killed, often for lack of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submitted(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task]
) -> Iterator[Future[Result]]:
    """Results to come of each task; an error in reading tasks stands behind those of the tasks before it."""
    try:
        for task in tasks:
            with _interrupts_blocked():
                future = pool.submit(function, task)
            yield future
    except (ValueError, OSError) as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        yield failed


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Interrupts are the parent's: processes that are started here never see one, not even while they import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Where the parent is killed, its processes end too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
