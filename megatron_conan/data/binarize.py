"""Tokenising text into Megatron `.bin/.idx` files on several processes, with the same bytes for any number of them.

Files are cut into spans of whole lines; each span becomes a part on disk, and the parts are joined in order.
Imports neither torch nor megatron, so that the processes start quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_conan.data.command_line import Progress, publish, staging_folder, write_json
from megatron_conan.data.indexed_files import token_dtype, write_index
from megatron_conan.data.process_map import process_map
from megatron_conan.data.text_files import (
    FileSpan,
    LineError,
    check_inputs,
    line_error,
    read_texts,
    split_into_spans,
)
from megatron_conan.data.tokenizer import Tokenizer

DOCUMENT_FORMAT = "megatron_conan documents 1"
SPAN_BYTES = 8 << 20
"""Largest span; smaller ones are cut where that keeps all workers busy."""
SMALLEST_SPAN_BYTES = 128 << 10
BATCH_CHARACTERS = 1 << 20
"""Text handed to SentencePiece at a time."""


@dataclass(frozen=True)
class SpanTask:
    """One span to tokenise into `part`."""

    span: FileSpan
    text_key: str
    tokenizer_path: Path
    tokenizer_sha256: str
    append_eod: bool
    part: Path


@dataclass(frozen=True)
class TokenizedSpan:
    """What a span became: `part` holds the tokens, one sequence behind the other."""

    task: SpanTask
    lengths: np.ndarray
    """[documents] int32 tokens of each."""
    text_bytes: int


@lru_cache(maxsize=1)
def cached_tokenizer(path: Path, sha256: str) -> Tokenizer:
    """The tokenizer, read once a process. Raises ValueError if the file is no longer the one with this digest."""
    tokenizer = Tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise ValueError(f"tokenizer model {path} changed while text was being tokenised; run this again")
    return tokenizer


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, append_eod: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise texts.

    Returns:
        (tokens of all texts behind one another [t], lengths [texts] int32), tokens in the type of the .bin file.
    """
    sequences = tokenizer.encode_batch(texts)
    if append_eod:
        for sequence in sequences:
            sequence.append(tokenizer.eos_id)
    lengths = np.fromiter(map(len, sequences), dtype=np.int32, count=len(sequences))
    total = int(lengths.sum(dtype=np.int64))
    tokens = np.fromiter(chain.from_iterable(sequences), dtype=token_dtype(tokenizer.size), count=total)
    return tokens, lengths


def in_batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Group texts into lists of about `characters` characters."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text) + 1
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def tokenize_span(task: SpanTask) -> TokenizedSpan:
    """Tokenise one span into its part file. Raises ValueError with file and line."""
    tokenizer = cached_tokenizer(task.tokenizer_path, task.tokenizer_sha256)
    lengths: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    text_bytes = 0
    try:
        with task.part.open("wb") as part:
            for texts in in_batches(read_texts(task.span, task.text_key), BATCH_CHARACTERS):
                tokens, text_lengths = encode_texts(tokenizer, texts, append_eod=task.append_eod)
                tokens.tofile(part)
                lengths.append(text_lengths)
                text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    except LineError as error:
        raise line_error(task.span.path, error) from None
    return TokenizedSpan(task, np.concatenate(lengths), text_bytes)


class TokenWriter:
    """Appends tokens to a .bin file and keeps what the index and the summary need."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._lengths: list[np.ndarray] = [np.empty(0, dtype=np.int32)]

    def write(self, tokens: memoryview | bytes) -> None:
        """Append token bytes."""
        self._file.write(tokens)
        self._hash.update(tokens)

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Append sequence lengths [n]."""
        self._lengths.append(lengths)

    def lengths(self) -> np.ndarray:
        """[sequences] int32."""
        return np.concatenate(self._lengths)

    def sha256(self) -> str:
        """Digest of all token bytes."""
        return self._hash.hexdigest()


def preprocess_documents(
    inputs: Sequence[Path],
    tokenizer_path: Path,
    output_prefix: Path,
    *,
    text_key: str = "text",
    num_workers: int = 1,
    append_eod: bool = False,
) -> dict[str, Any]:
    """Write P.bin, P.idx and P.json: one sequence a document, in input order.

    Args:
        inputs: .jsonl or .txt files.
        tokenizer_path: the .model file.
        output_prefix: P.
        text_key: key of the text in .jsonl.
        num_workers: processes; changes nothing in the output.
        append_eod: end every document with one EOS token.

    Returns:
        The summary, as in P.json.

    Raises:
        ValueError: bad input (with file and line), or nothing to write. Then no file is left and older ones stay.
    """
    check_inputs(inputs)
    if num_workers < 1:
        raise ValueError(f"workers={num_workers} must be at least 1")
    tokenizer = Tokenizer(tokenizer_path)
    with staging_folder(output_prefix) as folder:
        with (folder / "out.bin").open("wb") as file:
            writer = TokenWriter(file)
            parts = (folder / f"part-{number:06d}" for number in count())
            tasks = [
                SpanTask(span, text_key, tokenizer_path, tokenizer.sha256, append_eod, part)
                for span, part in zip(_spans(inputs, num_workers), parts, strict=False)
            ]
            text_bytes = _join_parts(tasks, writer, num_workers)
        lengths = writer.lengths()
        num_tokens = int(lengths.sum(dtype=np.int64))
        if not num_tokens:
            raise ValueError(
                f"{', '.join(map(str, inputs))}: {len(lengths)} documents without a single token; "
                "there is nothing to write"
            )
        summary = {
            "format": DOCUMENT_FORMAT,
            "documents": len(lengths),
            "tokens": num_tokens,
            "bytes": text_bytes,
            "dtype": token_dtype(tokenizer.size).name,
            "append_eod": append_eod,
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_size": tokenizer.size,
            "tokens_sha256": writer.sha256(),
        }
        write_index(folder / "out.idx", lengths, token_dtype(tokenizer.size))
        write_json(folder / "out.json", summary)
        publish(folder, output_prefix, [".bin", ".idx", ".json"])
    return summary


def _spans(inputs: Sequence[Path], num_workers: int) -> list[FileSpan]:
    """All files, cut into enough spans to keep the workers busy."""
    total = sum(path.stat().st_size for path in inputs)
    span_bytes = min(SPAN_BYTES, max(SMALLEST_SPAN_BYTES, total // (4 * num_workers)))
    return [span for path in inputs for span in split_into_spans(path, span_bytes)]


def _join_parts(tasks: Sequence[SpanTask], writer: TokenWriter, num_workers: int) -> int:
    """Tokenise all spans and append them in order; returns the bytes of text."""
    progress = Progress("tokenising", sum(task.span.end - task.span.start for task in tasks), "tokens")
    text_bytes = 0
    for result in process_map(tokenize_span, tasks, num_workers):
        with result.task.part.open("rb") as part:
            while block := part.read(1 << 22):
                writer.write(block)
        result.task.part.unlink()
        writer.add_lengths(result.lengths)
        text_bytes += result.text_bytes
        progress.advance(result.task.span.end - result.task.span.start, int(result.lengths.sum(dtype=np.int64)))
    progress.finish()
    return text_bytes
