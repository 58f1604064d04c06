"""The rank's side of writing a checkpoint in the background: copy the tensors into shared memory, and let a process write."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import select
import subprocess
import sys
from typing import Any

from torch import Tensor

from megatron_conan.train.checkpoint_worker import LENGTH, REQUEST, Staged, Written

ALIGNMENT = 64
DIED = "the process that writes checkpoints has died"


def can_write_in_background() -> bool:
    """Whether this system has what it takes: anonymous shared memory (Linux)."""
    return hasattr(os, "memfd_create")


class BackgroundWriter:
    """Writes one request at a time while this process goes on.

    The buffer stays from request to request, so that its pages are there already. It lies in anonymous shared memory: nothing
    is left of it when the processes are gone, and the size of /dev/shm doesn't matter.
    """

    def __init__(self) -> None:
        """Start the process, which gets ready while the caller goes on."""
        self._descriptor = -1
        self._buffer: mmap.mmap | None = None
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                f"from megatron_conan.train.checkpoint_worker import main; main({os.getpid()})",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # Ctrl-C is for the rank
        )

    def submit(self, buckets: list[Any], transforms: list[Any]) -> None:
        """Copy what is to be written, and have it written. The tensors may be changed afterwards.

        Args:
            buckets: as in `write_buckets`; the tensors on any device.
            transforms: as there.
        """
        placed: list[tuple[Staged, Tensor]] = []
        end = 0

        def place(tensor: Tensor) -> Staged:
            nonlocal end
            staged = Staged(end, tuple(tensor.shape), tensor.dtype)
            placed.append((staged, tensor.detach()))
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
            return staged

        layout = [
            (path, name, (bytes_items, [(item, place(tensor)) for item, tensor in tensor_items]))
            for path, name, (bytes_items, tensor_items) in buckets
        ]
        request = pickle.dumps((layout, transforms))
        buffer = self._room_for(end + len(request))
        for staged, tensor in placed:
            staged.read(buffer).copy_(tensor)
        buffer[end : end + len(request)] = request
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(REQUEST.pack(self._descriptor, len(buffer), end, len(request)))
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `result` tells

    def is_done(self) -> bool:
        """Whether `result` has something to say."""
        assert self._process.stdout is not None
        poll = select.poll()  # select() knows no descriptors above 1,023
        poll.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(0))

    def result(self) -> Written:
        """What became of the request; waits for it."""
        stream = self._process.stdout
        assert stream is not None
        header = stream.read(LENGTH.size)
        answer = stream.read(LENGTH.unpack(header)[0]) if len(header) == LENGTH.size else b""
        if not answer:
            status = self._process.wait()
            return Written({}, {}, f"{DIED} (exit status {status})")
        written: Written = pickle.loads(answer)
        return written

    def close(self) -> None:
        """End the process, after what it is writing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `result` told, if it was asked
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor, self._buffer = -1, None

    def _room_for(self, size: int) -> mmap.mmap:
        if self._buffer is None or len(self._buffer) < size:
            if self._descriptor >= 0:
                os.close(
                    self._descriptor
                )  # tensors of the last request may still look at the buffer: it goes with them
            size = -(-size * 9 // 8 // mmap.PAGESIZE) * mmap.PAGESIZE  # requests differ a little
            self._descriptor = os.memfd_create("checkpoint")
            os.ftruncate(self._descriptor, size)
            self._buffer = mmap.mmap(self._descriptor, size)
        return self._buffer
