"""Reading documents from .jsonl and .txt files, with errors that name file and line.

.jsonl: one JSON object a line, the text under a key; lines of white space only are skipped.
.txt: one document a line; an empty line is an empty document. Lines end with LF or CRLF.
Imports neither torch nor megatron, so that the processes which tokenise a corpus start quickly.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class FileSpan:
    """Whole lines of one file: the bytes from `start` to `end`."""

    path: Path
    start: int
    end: int


class LineError(ValueError):
    """A line that can't be read. `offset` is the byte at which it starts; `line_error` turns that into a number."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset = offset
        self.reason = reason


def line_error(path: Path, error: LineError) -> ValueError:
    """The error to show a user: `file:line: reason`, the line counted only now."""
    with path.open("rb") as file:
        remaining, line_number = error.offset, 1
        while remaining:
            piece = file.read(min(remaining, 1 << 24))
            if not piece:
                break
            line_number += piece.count(b"\n")
            remaining -= len(piece)
    return ValueError(f"{path}:{line_number}: {error.reason}")


def check_inputs(paths: Sequence[Path], suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raise ValueError for an input that is missing, no file, or of an unknown format."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"input {path} does not exist or is not a file")
        if path.suffix not in suffixes:
            raise ValueError(f"input {path}: unknown format {path.suffix!r}; use {' or '.join(suffixes)}")


def split_into_spans(path: Path, span_bytes: int) -> list[FileSpan]:
    """Cut a file into spans of about `span_bytes`, each ending behind a line."""
    size = path.stat().st_size
    spans: list[FileSpan] = []
    start = 0
    with path.open("rb") as file:
        while start < size:
            file.seek(min(start + max(span_bytes, 1), size) - 1)
            file.readline()
            end = file.tell()
            spans.append(FileSpan(path, start, end))
            start = end
    return spans


def whole_file(path: Path) -> FileSpan:
    """The span that covers all of a file."""
    return FileSpan(path, 0, path.stat().st_size)


def read_texts(span: FileSpan, text_key: str) -> Iterator[str]:
    """Documents of a span in file order. Raises LineError."""
    if span.path.suffix == ".txt":
        for offset, line in _read_lines(span):
            yield _decode_utf8(offset, line)
        return
    for offset, row in read_objects(span):
        yield text_field(offset, row, text_key)


def read_objects(span: FileSpan) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset of the line, JSON object) of each line of a .jsonl span. Raises LineError."""
    for offset, line in _read_lines(span):
        if line and not line.isspace():
            yield offset, _parse_object(offset, line)


def text_field(offset: int, row: dict[str, Any], key: str) -> str:
    """The text under `key`. Raises LineError if it is missing, no string, or not writable as UTF-8."""
    if key not in row:
        found = ", ".join(repr(name) for name in row) or "no keys"
        raise LineError(offset, f"key {key!r} is missing (found {found})")
    return checked_text(offset, row[key], key)


def checked_text(offset: int, value: object, key: str) -> str:
    """`value`, if it is text that UTF-8 can hold. Raises LineError."""
    if not isinstance(value, str):
        raise LineError(offset, f"key {key!r} holds {type(value).__name__}, not a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"key {key!r} is not valid UTF-8 text: lone surrogate U+{ord(value[error.start]):04X}"
            raise LineError(offset, reason) from None
    return value


def _read_lines(span: FileSpan) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its end) of each line; a byte order mark at the start of the file is dropped."""
    offset = span.start
    with span.path.open("rb") as file:
        file.seek(offset)
        while offset < span.end:
            line = file.readline()
            if not line:
                break
            start, offset = offset, offset + len(line)
            if start == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            yield start, line.removesuffix(b"\n").removesuffix(b"\r")


def _decode_utf8(offset: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(
            offset, f"not valid UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
        ) from None


def _parse_object(offset: int, line: bytes) -> dict[str, Any]:
    text = _decode_utf8(offset, line)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise LineError(offset, f"malformed JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise LineError(offset, f"malformed JSON: {error}") from None
    if not isinstance(row, dict):
        raise LineError(offset, f"expected a JSON object, found {type(row).__name__}")
    return row
