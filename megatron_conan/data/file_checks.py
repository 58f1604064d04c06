"""Damage of P.bin and P.idx: every number of the index against Megatron's format, every token against the vocabulary.

Files are read in blocks, so memory does not grow with them. What is wrong becomes a finding; nothing is raised for it. The
layout of P.idx is told in data/indexed_files.py. Files of others may have documents of several sequences, and a multimodal
index ends with an int8 mode a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_conan.data.command_line import Progress
from megatron_conan.data.indexed_files import DTYPE_CODES, HEADER, MAGIC, VERSION, bin_path, idx_path

MOST_SHOWN = 20
"""Findings that are told apart; further ones are counted."""
BLOCK = 1 << 20
"""Numbers of an index or array in memory at a time."""
SCAN_BYTES = 4 << 20
"""Bytes of P.bin in memory at a time."""
FLOAT_CODES = {6: "float64", 7: "float32"}
"""megatron-core's other dtype codes."""
OLD_MAGIC = b"TNTIDX"
COPY_ANEW = "copy it anew, or write the files anew"
WRITE_ANEW = "write the files anew"


@dataclass(frozen=True)
class Finding:
    """One piece of damage."""

    file: Path
    where: str
    problem: str
    """What was found and what was expected."""
    remedy: str

    def __str__(self) -> str:
        place = f"{self.file}: {self.where}: " if self.where else f"{self.file}: "
        return place + self.problem + (f"; {self.remedy}" if self.remedy else "")


@dataclass
class Findings:
    """What is damaged in the files of one prefix."""

    shown: list[Finding] = field(default_factory=list)
    """The first MOST_SHOWN."""
    total: int = 0
    is_unsafe: bool = False
    """The files can't be read any further."""

    def add(self, file: Path, where: str, problem: str, remedy: str = WRITE_ANEW, *, is_unsafe: bool = False) -> None:
        """Take a finding."""
        if len(self.shown) < MOST_SHOWN:
            self.shown.append(Finding(file, where, problem, remedy))
        self.total += 1
        self.is_unsafe |= is_unsafe


@dataclass(frozen=True)
class Wrong:
    """Numbers that are not as they must be."""

    first: int
    """Place of the first."""
    count: int

    def __str__(self) -> str:
        return f" (and {self.count - 1:,} more places)" if self.count > 1 else ""


def search(count: int, is_wrong: Callable[[slice], np.ndarray]) -> Wrong | None:
    """Find wrong ones among `count` places; `is_wrong(block)` is [size of the block] bool. None if there are none."""
    first, total = -1, 0
    for start in range(0, count, BLOCK):
        places = np.flatnonzero(is_wrong(slice(start, min(start + BLOCK, count))))
        if len(places) and not total:
            first = start + int(places[0])
        total += len(places)
    return Wrong(first, total) if total else None


def after(block: slice) -> slice:
    """The places behind those of a block."""
    return slice(block.start + 1, block.stop + 1)


@dataclass(frozen=True)
class Index:
    """P.idx, memory-mapped."""

    prefix: Path
    dtype: np.dtype
    """Of the tokens in P.bin."""
    lengths: np.ndarray
    """[sequences] int32 tokens of each."""
    pointers: np.ndarray
    """[sequences] int64 byte of P.bin at which each begins."""
    bounds: np.ndarray
    """[documents + 1] int64: document d is made of the sequences from bound d to bound d + 1."""
    has_modes: bool
    """An int8 mode a sequence stands at the end: the index of a multimodal corpus."""
    num_tokens: int
    """Sum of the lengths."""

    @property
    def num_sequences(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.bounds) - 1

    def starts(self, begin: int, end: int) -> np.ndarray:
        """[end - begin + 1] int64: tokens of P.bin at which the documents begin .. end - 1 start, and where the last ends."""
        bounds = self.bounds[begin : end + 1]
        starts = np.full(len(bounds), self.num_tokens)
        has_next = bounds < self.num_sequences
        starts[has_next] = self.pointers[bounds[has_next]] // self.dtype.itemsize
        return starts

    @cached_property
    def tokens(self) -> np.ndarray:
        """[num_tokens] all tokens of P.bin, memory-mapped."""
        if not self.num_tokens:  # numpy can't map an empty file
            return np.empty(0, self.dtype)
        return np.asarray(np.memmap(bin_path(self.prefix), self.dtype, "r"))

    def document(self, number: int) -> np.ndarray:
        """[length] tokens of one document, a view of the file."""
        start, end = self.starts(number, number + 1).tolist()
        return self.tokens[start:end]


def read_index(prefix: Path, findings: Findings) -> Index | None:
    """Map P.idx into memory; None with a finding if it is no whole index file."""
    path = idx_path(prefix)
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        old = header.startswith(OLD_MAGIC)
        remedy = (
            "it is of Megatron-LM's older format; write it anew as mmap"
            if old
            else "name a Megatron index, or " + COPY_ANEW
        )
        findings.add(path, "magic", f"found {header[: len(MAGIC)]!r}, expected {MAGIC!r}", remedy, is_unsafe=True)
        return None
    if len(header) < HEADER.size:
        findings.add(path, "header", f"cut off at {size} bytes, expected {HEADER.size}", COPY_ANEW, is_unsafe=True)
        return None
    _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if version != VERSION:
        findings.add(path, "version", f"found {version}, expected {VERSION}", COPY_ANEW, is_unsafe=True)
    if code not in DTYPE_CODES:
        known = ", ".join(f"{known} ({np.dtype(dtype).name})" for known, dtype in DTYPE_CODES.items())
        found = f"{code} ({FLOAT_CODES[code]}, no token ids)" if code in FLOAT_CODES else str(code)
        findings.add(path, "dtype code", f"found {found}, expected one of {known}", COPY_ANEW, is_unsafe=True)
    needed = HEADER.size + num_sequences * 12 + num_bounds * 8
    counts = (
        f"{num_sequences:,} sequences and {num_bounds:,} document indices, as its header says, take {needed:,} bytes"
    )
    if size < needed:
        findings.add(path, "size", f"cut off at {size:,} bytes; {counts}", COPY_ANEW, is_unsafe=True)
    elif size not in (needed, needed + num_sequences):
        findings.add(path, "size", f"{size - needed:,} bytes too many at the end; {counts}", COPY_ANEW, is_unsafe=True)
    if findings.is_unsafe:
        return None
    lengths = _mapped(path, "<i4", HEADER.size, num_sequences)
    return Index(
        prefix=prefix,
        dtype=np.dtype(DTYPE_CODES[code]),
        lengths=lengths,
        pointers=_mapped(path, "<i8", HEADER.size + num_sequences * 4, num_sequences),
        bounds=_mapped(path, "<i8", HEADER.size + num_sequences * 12, num_bounds),
        has_modes=size > needed,
        num_tokens=sum(
            int(lengths[start : start + BLOCK].sum(dtype=np.int64)) for start in range(0, num_sequences, BLOCK)
        ),
    )


def check_index(index: Index, findings: Findings, *, one_sequence: bool) -> None:
    """Check lengths, byte pointers, document indices, and the size of P.bin.

    Args:
        index: whose parts have the right sizes.
        findings: takes what is wrong.
        one_sequence: every document must be one sequence, as in what our tools write.
    """
    path, lengths, pointers = idx_path(index.prefix), index.lengths, index.pointers
    itemsize = index.dtype.itemsize
    negative = search(index.num_sequences, lambda block: lengths[block] < 0)
    if negative:
        text = f"length {lengths[negative.first]}, expected 0 or more{negative}"
        findings.add(path, f"sequence {negative.first}", text, is_unsafe=True)
    if index.num_sequences and pointers[0]:
        findings.add(path, "sequence 0", f"begins at byte {pointers[0]}, expected 0", is_unsafe=True)
    wrong = search(
        index.num_sequences - 1,
        lambda block: pointers[after(block)] != pointers[block] + lengths[block].astype(np.int64) * itemsize,
    )
    if wrong:
        before = wrong.first
        end = int(pointers[before]) + int(lengths[before]) * itemsize
        text = f"begins at byte {pointers[before + 1]}, expected {end}, where sequence {before} ends{wrong}"
        findings.add(path, f"sequence {before + 1}", text, is_unsafe=True)
    _check_bounds(index, findings, one_sequence)
    size, needed = bin_path(index.prefix).stat().st_size, index.num_tokens * itemsize
    if size != needed and not negative:
        kind = "cut off" if size < needed else "too long"
        text = f"{kind}: {size:,} bytes, expected {needed:,}: {index.num_tokens:,} tokens of {itemsize} bytes"
        findings.add(bin_path(index.prefix), "size", text, COPY_ANEW, is_unsafe=True)


def _check_bounds(index: Index, findings: Findings, one_sequence: bool) -> None:
    path, bounds, last = idx_path(index.prefix), index.bounds, index.num_sequences
    where = "document indices"
    if not len(bounds) or bounds[0] != 0:
        found = f"the first is {bounds[0]}" if len(bounds) else "there are none"
        findings.add(path, where, f"{found}, expected 0", is_unsafe=True)
        return
    if bounds[-1] != last:
        findings.add(path, where, f"the last is {bounds[-1]}, expected {last}, the number of sequences", is_unsafe=True)
    falls = search(index.num_documents, lambda block: bounds[after(block)] < bounds[block])
    if falls:
        text = f"index {falls.first + 1} is {bounds[falls.first + 1]}, expected at least {bounds[falls.first]}{falls}"
        findings.add(path, where, text, is_unsafe=True)
    elif one_sequence and bounds[-1] == last:
        other = search(len(bounds), lambda block: bounds[block] != np.arange(block.start, block.stop))
        if other:
            text = (
                f"index {other.first} is {bounds[other.first]}, expected {other.first}: a document is a sequence{other}"
            )
            findings.add(path, where, text, is_unsafe=True)


@dataclass(frozen=True)
class Scan:
    """What reading all tokens told."""

    sha256: str
    highest: int
    """Highest token id; -1 if there are no tokens."""


def scan_tokens(index: Index, vocab_size: int | None, findings: Findings) -> Scan:
    """Read all of P.bin, with progress on stderr, and check that token ids are within the vocabulary.

    Args:
        index: that was found whole.
        vocab_size: token ids must be below it; None checks only that none is negative.
        findings: takes every wrong token.
    """
    path = bin_path(index.prefix)
    progress = Progress(f"reading {path}", index.num_tokens * index.dtype.itemsize, "tokens", is_bytes=True)
    digest, position, highest = hashlib.sha256(), 0, -1
    with path.open("rb") as file:
        while block := file.read(SCAN_BYTES):
            digest.update(block)
            tokens = np.frombuffer(block, index.dtype)
            most = int(tokens.max())
            highest = max(highest, most)
            if tokens.min() < 0 or (vocab_size is not None and most >= vocab_size):
                is_wrong = tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size)
                _add_tokens(index, position, tokens, np.flatnonzero(is_wrong), vocab_size, findings)
            position += len(tokens)
            progress.advance(len(block), len(tokens))
    progress.finish()
    return Scan(digest.hexdigest(), highest)


def _add_tokens(
    index: Index, start: int, tokens: np.ndarray, wrong: np.ndarray, vocab_size: int | None, findings: Findings
) -> None:
    """Take the wrong ones among `tokens` [n], which begin at token `start` of P.bin."""
    expected = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
    told = wrong[: max(MOST_SHOWN - len(findings.shown), 0)].tolist()
    for place in told:
        byte = (start + place) * index.dtype.itemsize
        # of sequences that begin at the same byte only the last is not empty
        sequence = int(np.searchsorted(index.pointers, byte, side="right")) - 1
        position = (byte - int(index.pointers[sequence])) // index.dtype.itemsize
        where = f"sequence {sequence}, position {position}"
        remedy = f"use the tokenizer it was written with, or {COPY_ANEW}"
        findings.add(bin_path(index.prefix), where, f"token id {tokens[place]}, expected {expected}", remedy)
    findings.total += len(wrong) - len(told)


def _mapped(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    """[count] numbers of a file, memory-mapped."""
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset, (count,)))
