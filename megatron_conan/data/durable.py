"""Files that survive a power cut, and tell of a full disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def sync(path: Path) -> None:
    """Have the disk take a file's content, or the renames in a folder, before anything that relies on them is written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file. Raises OSError if there is no room for it."""
    save_blocks(path, array.dtype, array.shape, [array])


def save_blocks(path: Path, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write the .npy file of an array that comes in blocks of its first dimension. Raises OSError if there is no room for it.

    `np.save` and `ndarray.tofile` keep quiet about a disk that is full at the very end.
    """
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)
