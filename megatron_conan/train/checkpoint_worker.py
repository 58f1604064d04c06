"""Writing a rank's files of a checkpoint, in the rank itself or in a process beside it that lets training go on.

The process takes requests from its standard input: where in a shared buffer the rank has put its tensors and what to write of
them. It answers on its standard output, and ends with the rank: by SIGKILL if that is killed, so that nothing is written any
more when the run is started again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import queue
import signal
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_conan.data.durable import sync
from megatron_conan.train.checkpoint_files import file_sum

LENGTH = struct.Struct("<Q")
REQUEST = struct.Struct("<iQQQ")
"""What stands on standard input: descriptor of the buffer in the rank, its size, where the request begins, its length."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Staged:
    """Where in the shared buffer a tensor lies."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, buffer: mmap.mmap) -> torch.Tensor:
        """The tensor, as a view of the buffer."""
        count = 1
        for size in self.shape:
            count *= size
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)


@dataclass(frozen=True)
class Written:
    """What became of a rank's part of a checkpoint."""

    results: dict[int, Any]
    """By bucket what megatron-core notes of the written items."""
    sums: dict[str, str]
    """File name -> SHA-256."""
    error: str | None = None
    """Why it could not be written."""


def write_buckets(buckets: list[Any], transforms: list[Any]) -> Written:
    """Write one file a bucket, each in a thread of its own, and sum them up.

    Args:
        buckets: megatron-core's (path, name, (bytes items, tensor items)) of this rank.
        transforms: torch's, as megatron-core hands them on.
    """
    if not buckets:
        return Written({}, {})
    with ThreadPoolExecutor(len(buckets)) as pool:
        answers = list(pool.map(lambda i: _write_bucket(i, buckets[i], transforms), range(len(buckets))))
    errors = [answer for answer in answers if isinstance(answer, Exception)]
    if errors:
        return Written({}, {}, _reason(errors[0]))
    for path, _, _ in buckets:
        sync(Path(path))  # megatron-core syncs before the last of its buffer is written
    sums = {Path(path).name: file_sum(Path(path)) for path, _, _ in buckets}
    return Written(dict(enumerate(answers)), sums)


def _reason(error: BaseException) -> str:
    """The system's error behind one of torch, which names positions in its file where the disk is full."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return f"{type(cause or error).__name__}: {cause or error}"


def _write_bucket(index: int, bucket: Any, transforms: list[Any]) -> Any:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    results: queue.Queue[tuple[int, Any]] = queue.Queue()
    pending: queue.Queue[int] = queue.Queue()
    pending.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, results, pending, use_fsync=True)
    return results.get()[1]


def main(rank: int) -> None:
    """Serve the rank that started this process; `rank` is its process id."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:
        return  # it died meanwhile
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank, which decides
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed here must not be taken for an answer

    from megatron_conan.parallel import hide_engine_warnings

    hide_engine_warnings()
    from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: F401  (before the first request)

    _serve(rank, requests, answers)


def _serve(rank: int, requests: BinaryIO, answers: BinaryIO) -> None:
    opened: tuple[int, int] | None = None
    buffer: mmap.mmap | None = None
    while len(header := requests.read(REQUEST.size)) == REQUEST.size:
        descriptor, size, start, length = REQUEST.unpack(header)
        if buffer is None or opened != (descriptor, size):
            with Path(f"/proc/{rank}/fd/{descriptor}").open("r+b") as shared:
                buffer, opened = mmap.mmap(shared.fileno(), size), (descriptor, size)
        buckets, transforms = pickle.loads(buffer[start : start + length])
        try:
            written = write_buckets([_with_tensors(bucket, buffer) for bucket in buckets], transforms)
        except Exception as error:  # whatever it is, the rank must hear of it
            written = Written({}, {}, _reason(error))
        answer = pickle.dumps(written)
        answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()


def _with_tensors(bucket: Any, buffer: mmap.mmap) -> Any:
    path, name, (bytes_items, tensor_items) = bucket
    return path, name, (bytes_items, [(item, staged.read(buffer)) for item, staged in tensor_items])
