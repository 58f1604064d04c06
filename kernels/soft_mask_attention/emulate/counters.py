"""What an emulated launch has cost."""

from __future__ import annotations

import ctypes
from ctypes import c_int64
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


class Transactions(ctypes.Structure):
    """What a memory had to do, and the least it could have done for the same bytes. `Transactions` of counters.h."""

    _fields_: ClassVar = [("actual", c_int64), ("minimum", c_int64)]

    actual: int
    minimum: int

    def __repr__(self) -> str:
        return f"{self.actual} / {self.minimum}"


class Counters(ctypes.Structure):
    """`Counters` of counters.h, where wavefronts and sectors are explained. Sums over the launch."""

    _fields_: ClassVar = [
        *((name, c_int64) for name in ("blocks", "block_barriers", "mma", "exp2", "log2")),
        *((name, c_int64) for name in ("bytes_copied", "bytes_zero_filled", "bytes_stored")),
        *((name, Transactions) for name in ("load_matrix", "copies", "stores", "words")),
        *((name, Transactions) for name in ("sectors_read", "sectors_written")),
    ]

    blocks: int
    block_barriers: int
    """Passed by all threads of a block together: once a block, not once a thread."""
    mma: int
    """Tensor-core products, 16 x 8 x 16: once a warp."""
    exp2: int
    """Calls, once a lane; log2 likewise."""
    log2: int
    bytes_copied: int
    """From global to shared memory, by asynchronous copies; zero-filled ones read nothing."""
    bytes_zero_filled: int
    bytes_stored: int
    """From shared to global memory, 16 at a time."""
    load_matrix: Transactions
    """Wavefronts of shared memory for ldmatrix."""
    copies: Transactions
    """Wavefronts to write what asynchronous copies bring."""
    stores: Transactions
    """Wavefronts to read what is stored 16 bytes at a time."""
    words: Transactions
    """Wavefronts to write single words."""
    sectors_read: Transactions
    """Sectors of global memory that the copies touch."""
    sectors_written: Transactions
    """Sectors that stores of 16 bytes touch."""

    def __repr__(self) -> str:
        return f"Counters({', '.join(f'{name}={getattr(self, name)!r}' for name, _ in self._fields_)})"


@dataclass
class LaunchCounters:
    """A launch's totals, and how often each 16 bytes of its tensors were accessed; plain loads and stores are not seen.

    The tensors are int32 and shaped like the kernel's, but with d/8 columns. Where q, k and v share storage, each shows
    the reads of all.
    """

    total: Counters
    q_reads: Tensor
    k_reads: Tensor
    v_reads: Tensor
    out_writes: Tensor
