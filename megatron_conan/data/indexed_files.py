"""Megatron's IndexedDataset files, P.bin and P.idx, written and read with numpy alone.

megatron-core's own reader reads these files and ours reads its files; importing that one costs seconds of torch, which
tokenising processes and small tools don't need. Layout of P.idx: magic, version, dtype code, number of sequences,
number of document indices, lengths (int32), byte pointers (int64), document indices (int64). Each sequence is a document.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""megatron-core's DType codes of integer tokens."""
HEADER = struct.Struct("<9sQBQQ")
BLOCK = 1 << 16
"""Sequences whose numbers are in memory at a time."""


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where token ids fit (megatron-core's limit: vocabularies below 65500), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: Path) -> Path:
    """P.bin of the prefix P."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """P.idx of the prefix P."""
    return prefix.with_name(prefix.name + ".idx")


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the .idx file of sequences that lie behind one another in the .bin file.

    Args:
        path: the file to write.
        lengths: [sequences] tokens of each sequence; may be memory-mapped.
        dtype: type of the tokens in the .bin file.
    """
    code = next(code for code, known in DTYPE_CODES.items() if dtype == np.dtype(known))
    num_sequences = len(lengths)
    blocks = [slice(start, start + BLOCK) for start in range(0, num_sequences, BLOCK)]
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, num_sequences, num_sequences + 1))
        for block in blocks:
            file.write(np.ascontiguousarray(lengths[block], dtype="<i4").data)
        pointer = 0
        for block in blocks:
            ends = pointer + np.cumsum(lengths[block], dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[pointer], ends[:-1]]).astype("<i8").data)
            pointer = int(ends[-1])
        for start in range(0, num_sequences + 1, BLOCK):
            file.write(np.arange(start, min(start + BLOCK, num_sequences + 1), dtype="<i8").data)


class IndexedFile:
    """Memory-mapped sequences of P.bin and P.idx.

    Raises:
        ValueError: a file is missing, is of another format, or the two don't belong together.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise ValueError(f"{path} does not exist")
        self.dtype, self.lengths, self._pointers = _read_index(idx_path(prefix))
        num_bytes = bin_path(prefix).stat().st_size
        expected = int(self._pointers[-1] + self.lengths[-1] * self.dtype.itemsize) if len(self) else 0
        if num_bytes != expected:
            raise ValueError(
                f"{bin_path(prefix)} has {num_bytes} bytes where {idx_path(prefix)} needs {expected}: they are of "
                "different runs; write both anew"
            )
        # numpy can't map an empty file
        self._tokens = (
            np.memmap(bin_path(prefix), dtype=self.dtype, mode="r") if num_bytes else np.empty(0, dtype=self.dtype)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        """[length] tokens of one sequence, a view of the file."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {self.prefix}: there are {len(self)}")
        start = int(self._pointers[sequence]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.lengths[sequence])]


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """(token dtype, lengths [n] int32, byte pointers [n] int64), the arrays memory-mapped."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} is not a Megatron index file")
    _, version, code, num_sequences, num_documents = HEADER.unpack(header)
    if version != VERSION or code not in DTYPE_CODES:
        raise ValueError(f"{path}: version {version} with dtype code {code} is not supported")
    if size < HEADER.size + num_sequences * 12 + num_documents * 8:
        raise ValueError(f"{path} is cut off at {size} bytes; write it anew")
    if not num_sequences:
        return np.dtype(DTYPE_CODES[code]), np.empty(0, np.int32), np.empty(0, np.int64)
    lengths = np.memmap(path, dtype="<i4", mode="r", offset=HEADER.size, shape=(num_sequences,))
    pointers_at = HEADER.size + lengths.nbytes
    pointers = np.memmap(path, dtype="<i8", mode="r", offset=pointers_at, shape=(num_sequences,))
    return np.dtype(DTYPE_CODES[code]), lengths, pointers
