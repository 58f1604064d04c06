"""Reading documents and rows from files in chunks, with errors that name file and line.

.jsonl: one JSON object a line; lines of white space only are skipped and counted.
.txt: one document a line; an empty line is an empty document. Lines end with LF or CRLF.
.parquet: one object a row, its columns the keys.
The first two may be compressed (.gz, .zst). Files are cut into chunks that processes read on their own: spans of whole lines
where a file can be read from anywhere, blocks of lines that the parent has unpacked where it can't, row groups of parquet.
Imports neither torch nor megatron, so that the processes which tokenise a corpus start quickly.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from megatron_conan.data.input_files import InputFile

SMALLEST_CHUNK_BYTES, LARGEST_CHUNK_BYTES = 128 << 10, 8 << 20
LARGEST_BLOCK_BYTES = 2 << 20
"""Of a compressed file, whose chunks wait in memory."""
CHUNKS = 64
"""Chunks that even a small corpus is cut into, so that many workers have something to do."""
LONGEST_LINE_BYTES = 1 << 30
"""Longer lines are refused: they are no text, and one alone would fill the memory."""

MOST_LEVELS = 100
"""Deeper JSON is refused. Python refuses it too, but at a depth that depends on who calls, so not alike in all passes."""
MOST_SHOWN_KEYS = 12
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[][{}]', re.DOTALL)

Record = bytes | dict[str, Any]
"""A line without its end, or a row of parquet."""
Parsed = TypeVar("Parsed")


class BadLine(ValueError):
    """What is wrong with a line; `kind` is what such lines are counted under."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Chunk:
    """Some whole lines or rows of a file."""

    file: InputFile
    file_number: int
    """Place of the file among the inputs."""
    number: int
    """Place of the chunk in its file."""
    start: int
    """Byte where it begins; of parquet, the row group."""
    end: int
    """Byte where it ends."""
    work: int
    """Its share of the file's bytes on disk."""
    data: bytes | None = field(default=None, repr=False)
    """The lines themselves, of a compressed file."""

    @property
    def key(self) -> tuple[int, int]:
        """Its place among all chunks of the inputs."""
        return self.file_number, self.number


@dataclass(frozen=True)
class Fault:
    """A line that can't be used."""

    line: int
    """From 1, within its chunk."""
    kind: str
    reason: str
    content: Record


def chunk_bytes(files: Sequence[InputFile]) -> int:
    """Size of the chunks that files are best cut into; a function of the files alone."""
    total = sum(file.size for file in files)
    return min(LARGEST_CHUNK_BYTES, max(SMALLEST_CHUNK_BYTES, total // CHUNKS))


def cut_into_chunks(files: Sequence[InputFile], size: int, after: tuple[int, int] | None = None) -> Iterator[Chunk]:
    """All chunks of files, in order.

    Args:
        files: the inputs.
        size: about this many bytes of text a chunk.
        after: key of a chunk; only those behind it are given.

    Raises:
        ValueError: a file is damaged, or changed since it was found; chunks before that are given.
    """
    for number, file in enumerate(files):
        if after is not None and number < after[0]:
            continue
        cut = _cut_parquet if file.format == ".parquet" else _cut_packed if file.compression else _cut_plain
        file.check_unchanged()
        for chunk in cut(file, number, size):
            if after is None or chunk.key > after:
                yield chunk
        file.check_unchanged()


def _cut_plain(file: InputFile, file_number: int, size: int) -> Iterator[Chunk]:
    """Spans of about `size` bytes, each ending behind a line."""
    start = number = 0
    with file.path.open("rb") as stream:
        while start < file.size:
            stream.seek(min(start + max(size, 1), file.size) - 1)
            while (piece := stream.readline(1 << 24)) and not piece.endswith(b"\n"):
                pass
            end = stream.tell()
            yield Chunk(file, file_number, number, start, end, end - start)
            start, number = end, number + 1


def _cut_packed(file: InputFile, file_number: int, size: int) -> Iterator[Chunk]:
    """Blocks of lines of a compressed file."""
    size = min(size, LARGEST_BLOCK_BYTES)
    start = number = packed = 0
    with file.path.open("rb") as raw:
        try:
            if not file.size:
                raise EOFError("it is empty")
            with _unpacked(raw, file.compression) as stream:
                while data := stream.read(size):
                    while not data.endswith(b"\n") and (rest := stream.readline(1 << 24)):
                        data += rest
                        if len(data) > LONGEST_LINE_BYTES + size:
                            raise ValueError(
                                f"{file.path}: a line of more than {LONGEST_LINE_BYTES >> 20} MiB is no text"
                            )
                    position = raw.tell()
                    yield Chunk(file, file_number, number, start, start + len(data), position - packed, data)
                    start, number, packed = start + len(data), number + 1, position
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{file.path}: damaged {file.compression} file behind {start:,} bytes of text ({error}); get it anew"
            ) from None


def _unpacked(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    import pyarrow  # not needed for plain files, and slow to import

    return io.BufferedReader(
        _ArrowStream(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")), 1 << 20
    )


class _ArrowStream(io.RawIOBase):
    """pyarrow's stream as one that can be buffered: its own `readline` is missing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _cut_parquet(file: InputFile, file_number: int, size: int) -> Iterator[Chunk]:
    """Row groups; `size` plays no part, as a group can't be read in parts."""
    with _parquet(file.path) as table:
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            work = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
            yield Chunk(file, file_number, number, number, number + 1, work)


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file, or is damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def records(chunk: Chunk, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Record]]:
    """(number from 1 within the chunk, content) of each line or row.

    Args:
        chunk: what to read.
        columns: of parquet read these alone, as far as they are there.

    Raises:
        ValueError: the file is damaged.
    """
    if chunk.file.format == ".parquet":
        yield from enumerate(_parquet_rows(chunk, columns), 1)
        return
    with chunk.file.path.open("rb") if chunk.data is None else io.BytesIO(chunk.data) as stream:
        if chunk.data is None:
            stream.seek(chunk.start)
        left, number = chunk.end - chunk.start, 0
        while left > 0 and (line := stream.readline(LONGEST_LINE_BYTES)):
            left -= len(line)
            number += 1
            if number == 1 and chunk.start == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) == LONGEST_LINE_BYTES:
                raise ValueError(f"{chunk.file.path}: a line of more than {LONGEST_LINE_BYTES >> 20} MiB is no text")
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _parquet_rows(chunk: Chunk, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow

    with _parquet(chunk.file.path) as table:
        names = [
            name for name in columns or () if name in table.schema_arrow.names
        ] or None  # all, so that an error shows them
        try:
            for batch in table.iter_batches(256, row_groups=[chunk.start], columns=names, use_threads=False):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{chunk.file.path}: row group {chunk.start} can't be read: {_first_line(error)}; get the file anew"
            ) from None


def parse_records(
    chunk: Chunk,
    parse: Callable[[Record], Parsed | None],
    faults: list[Fault],
    *,
    stop_at_fault: bool,
    columns: Sequence[str] | None = None,
    count: list[int] | None = None,
) -> Iterator[Parsed]:
    """What `parse` makes of the records of a chunk; what it refuses goes to `faults`.

    Args:
        chunk: what to read.
        parse: raises BadLine, or returns None for what is to be passed over.
        faults: is extended.
        stop_at_fault: read nothing behind the first fault.
        columns: as in `records`.
        count: one number, raised by one a record.
    """
    for number, record in records(chunk, columns):
        if count is not None:
            count[0] += 1
        try:
            parsed = parse(record)
        except BadLine as error:
            faults.append(Fault(number, error.kind, error.reason, record))
            if stop_at_fault:
                return
            continue
        if parsed is not None:
            yield parsed


def read_all(
    file: InputFile, parse: Callable[[Record], Parsed | None], columns: Sequence[str] | None = None
) -> Iterator[Parsed]:
    """What `parse` makes of a whole file, on this process. Raises ValueError with file and line at the first bad one."""
    before = 0
    for chunk in cut_into_chunks([file], LARGEST_CHUNK_BYTES):
        faults: list[Fault] = []
        count = [0]
        yield from parse_records(chunk, parse, faults, stop_at_fault=True, columns=columns, count=count)
        for fault in faults:
            raise fault_error(file, before, fault)
        before += count[0]


def place_of(file: InputFile, line: int) -> str:
    """`FILE:LINE`, as errors and records of rejected lines name it; rows of parquet count from 1 too."""
    return f"{file.path}: row {line}" if file.format == ".parquet" else f"{file.path}:{line}"


def fault_error(file: InputFile, lines_before: int, fault: Fault) -> ValueError:
    """The error to show a user; `lines_before` counts the lines before the fault's chunk."""
    return ValueError(f"{place_of(file, lines_before + fault.line)}: {fault.reason}")


def parse_object(record: Record) -> dict[str, Any] | None:
    """The JSON object of a line or the row itself; None for a line of white space. Raises BadLine."""
    if isinstance(record, dict):
        return record
    if not record or record.isspace():
        return None
    text = decode_utf8(record)
    if _is_too_deep(text):
        raise BadLine("malformed JSON", f"malformed JSON: more than {MOST_LEVELS} levels deep")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine("malformed JSON", f"malformed JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise BadLine("malformed JSON", f"malformed JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadLine("no object", f"expected a JSON object, found {type(row).__name__}")
    return row


def _is_too_deep(text: str) -> bool:
    """Whether JSON has more than MOST_LEVELS levels."""
    if text.count("[") + text.count("{") <= MOST_LEVELS:
        return False
    level = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        mark = found[0][0]
        level += (mark in "[{") - (mark in "]}")
        if level > MOST_LEVELS:
            return True
    return False


def decode_utf8(line: bytes) -> str:
    """The text of a line. Raises BadLine."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(
            "not UTF-8", f"not valid UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
        ) from None


def text_field(row: dict[str, Any], key: str) -> str:
    """The text under `key`. Raises BadLine if it is missing, no string, or not writable as UTF-8."""
    if key not in row:
        raise missing_key(row, key)
    return checked_text(row[key], key)


def missing_key(row: dict[str, Any], key: str) -> BadLine:
    """What is wrong with a row without `key`, with some of the keys it has."""
    found = [f"{name!r:.40}" for name in islice(row, MOST_SHOWN_KEYS)] or ["no keys"]
    more = [f"{len(row) - MOST_SHOWN_KEYS:,} more"] if len(row) > MOST_SHOWN_KEYS else []
    return BadLine("missing key", f"key {key!r} is missing (found {', '.join(found + more)})")


def filled_text(row: dict[str, Any], key: str) -> str:
    """`text_field` that is more than white space. Raises BadLine."""
    text = text_field(row, key)
    if not text.strip():
        raise BadLine("empty text", f"key {key!r} is empty; drop the row or fill it")
    return text


def checked_text(value: object, key: str) -> str:
    """`value`, if it is text that UTF-8 can hold. Raises BadLine."""
    if not isinstance(value, str):
        raise BadLine("wrong type", f"key {key!r} holds {type(value).__name__}, not a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"key {key!r} is not valid UTF-8 text: lone surrogate U+{ord(value[error.start]):04X}"
            raise BadLine("lone surrogate", reason) from None
    return value
