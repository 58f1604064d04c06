"""Tokenising documents into Megatron `.bin/.idx` files on several processes, with the same bytes for any number of them.

Files are cut into chunks; each chunk becomes a part on disk, and the parts are joined in order. A killed run goes on with what
was joined. Memory does not grow with the corpus. Imports neither torch nor megatron, so that the processes start quickly.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_conan.data.documents import DocumentFormat
from megatron_conan.data.indexed_files import token_dtype, write_index
from megatron_conan.data.input_files import REJECTED, InputFile, find_inputs
from megatron_conan.data.numbering import DIGEST_BYTES, number_texts, text_digests
from megatron_conan.data.passes import ChunkPass, Inputs, Report
from megatron_conan.data.resumable import PartialOutput, partial_output
from megatron_conan.data.text_files import Chunk, Fault, Record, parse_records
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.word_encoding import WordEncoder

DOCUMENT_FORMAT = "megatron_conan documents 1"
WRITTEN = ("documents", "tokens", "bytes")
LEFT_OUT = ("duplicates", "too_short", "too_long")
"""What documents are counted under."""
BATCH_CHARACTERS = 1 << 17
"""Text handed to SentencePiece at a time."""


@dataclass(frozen=True)
class DocumentSettings:
    """What decides which documents are written, and how."""

    source: TextSource
    append_eod: bool = False
    min_tokens: int = 0
    """Documents with fewer tokens (without EOS) are left out."""
    max_tokens: int | None = None
    """So are documents with more."""
    dedup: bool = False
    """A document that was there before is left out."""

    def check(self) -> None:
        """Raise ValueError for limits that leave nothing."""
        if self.min_tokens < 0 or (self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1)):
            raise ValueError(
                f"min_tokens={self.min_tokens} and max_tokens={self.max_tokens} leave no document; give 0 <= min <= max"
            )


class TextSource(Protocol):
    """Which texts a line or row holds."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys that are read."""

    def texts(self, file: InputFile, record: Record) -> list[str] | None:
        """The texts of a record, in order; None for a blank line. Raises BadLine."""


@dataclass(frozen=True)
class TokenizeTask:
    """A chunk to tokenise into the file `part`."""

    chunk: Chunk
    settings: DocumentSettings
    tokenizer_path: Path
    tokenizer_sha256: str
    stop_at_fault: bool
    part: Path
    is_first: np.ndarray | None
    """[documents] bool: which are not there before; None keeps all."""


@dataclass(frozen=True)
class TokenizedChunk:
    """What a chunk became: `part` holds the tokens, one document behind the other."""

    report: Report
    part: Path
    lengths: np.ndarray
    """[documents] int32 tokens of each."""
    counts: dict[str, int]

    @property
    def count(self) -> int:
        """Tokens."""
        return self.counts["tokens"]


@dataclass(frozen=True)
class DigestedChunk:
    """Digests of all documents of a chunk."""

    report: Report
    digests: bytes
    count: int
    """Documents."""


@lru_cache(maxsize=1)
def cached_encoder(path: Path, sha256: str) -> WordEncoder:
    """The encoder of a tokenizer, made once a process. Raises ValueError if the file no longer has this digest."""
    tokenizer = Tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise ValueError(f"tokenizer model {path} changed while text was being tokenised; run this again")
    return WordEncoder(tokenizer)


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


def byte_length(text: str) -> int:
    """UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode())


class ChunkTexts:
    """The texts of a chunk, and what there is to report once they are read."""

    def __init__(self, chunk: Chunk, source: TextSource, *, stop_at_fault: bool) -> None:
        self.chunk, self.source, self.stop_at_fault = chunk, source, stop_at_fault
        self.faults: list[Fault] = []
        self._lines = [0]

    def __iter__(self) -> Iterator[str]:
        for texts in parse_records(
            self.chunk,
            partial(self.source.texts, self.chunk.file),
            self.faults,
            stop_at_fault=self.stop_at_fault,
            columns=self.source.columns,
            count=self._lines,
        ):
            yield from texts

    def report(self) -> Report:
        """Once all are read."""
        return Report(self.chunk.key, self.chunk.work, self._lines[0], self.faults)


def digest_chunk(task: tuple[Chunk, TextSource, bool]) -> DigestedChunk:
    """Digests of a chunk's texts: (chunk, source, stop at a fault)."""
    chunk, source, stop_at_fault = task
    texts = ChunkTexts(chunk, source, stop_at_fault=stop_at_fault)
    digests = text_digests(texts)
    return DigestedChunk(texts.report(), digests, len(digests) // DIGEST_BYTES)


def tokenize_chunk(task: TokenizeTask) -> TokenizedChunk:
    """Tokenise a chunk into its part file. Raises ValueError for a damaged file."""
    encoder = cached_encoder(task.tokenizer_path, task.tokenizer_sha256)
    settings = task.settings
    documents = ChunkTexts(task.chunk, settings.source, stop_at_fault=task.stop_at_fault)
    lengths: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    counts = dict.fromkeys((*WRITTEN, *LEFT_OUT), 0)

    def wanted() -> Iterator[str]:
        for number, text in enumerate(documents):
            if task.is_first is None or task.is_first[number]:
                yield text
            else:
                counts["duplicates"] += 1

    with task.part.open("wb") as part:
        for texts in in_batches(wanted(), BATCH_CHARACTERS):
            tokens, text_lengths = encoder.encode(texts, append_eod=settings.append_eod)
            kept = _within_limits(text_lengths - settings.append_eod, settings, counts)
            if not kept.all():
                of_kept = np.repeat(kept, text_lengths)
                tokens = np.frombuffer(tokens, encoder.dtype)[of_kept].tobytes()
                text_lengths = text_lengths[kept]
                texts = [text for text, keep in zip(texts, kept.tolist(), strict=True) if keep]
            part.write(tokens)
            lengths.append(text_lengths)
            counts["bytes"] += sum(map(byte_length, texts))
            counts["tokens"] += len(tokens) // encoder.dtype.itemsize
            counts["documents"] += len(texts)
    return TokenizedChunk(documents.report(), task.part, np.concatenate(lengths), counts)


def _within_limits(lengths: np.ndarray, settings: DocumentSettings, counts: dict[str, int]) -> np.ndarray:
    """[documents] bool; the others are counted."""
    too_short = lengths < settings.min_tokens
    too_long = np.zeros_like(too_short) if settings.max_tokens is None else lengths > settings.max_tokens
    counts["too_short"] += int(too_short.sum())
    counts["too_long"] += int(too_long.sum())
    return ~(too_short | too_long)


class TokenFiles:
    """out.bin, which grows, with the lengths beside it and the digest of all tokens."""

    def __init__(self, partial_output: PartialOutput, dtype: np.dtype) -> None:
        self.partial, self.dtype = partial_output, dtype
        self._bin, self._lengths = partial_output.file("out.bin"), partial_output.file("lengths")
        self._hash = hashlib.sha256()
        if self._bin.tell():
            with (partial_output.folder / "out.bin").open("rb") as done:
                while block := done.read(1 << 22):
                    self._hash.update(block)

    def append(self, part: Path, lengths: np.ndarray) -> None:
        """Append a part, and remove its file."""
        with part.open("rb") as source:
            while block := source.read(1 << 22):
                self._bin.write(block)
                self._hash.update(block)
        self._lengths.write(lengths.astype("<i4", copy=False).tobytes())
        part.unlink()

    def finish(self) -> tuple[np.ndarray, str]:
        """Write out.idx. Returns (lengths [sequences] int32, memory-mapped; SHA-256 of all tokens)."""
        self.partial.close_files()
        path = self.partial.folder / "lengths"
        lengths = np.memmap(path, "<i4", mode="r") if path.stat().st_size else np.empty(0, np.int32)
        write_index(self.partial.folder / "out.idx", lengths, self.dtype)
        return lengths, self._hash.hexdigest()


def part_paths(folder: Path) -> Iterator[Path]:
    """Names of part files, which no other process uses; what a killed run left behind is removed."""
    for path in folder.glob("part-*"):
        path.unlink(missing_ok=True)
    number = 0
    while True:
        yield folder / f"part-{os.getpid()}-{number:06d}"
        number += 1


def preprocess_documents(
    inputs: Sequence[str | Path],
    tokenizer_path: Path,
    output_prefix: Path,
    *,
    text_key: str = "text",
    num_workers: int = 1,
    append_eod: bool = False,
    document_format: str = "text",
    languages: tuple[str, str] | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    dedup: bool = False,
    on_error: str = "fail",
    restart: bool = False,
) -> dict[str, Any]:
    """Write P.bin, P.idx and P.json: one sequence a document, in input order.

    Args:
        inputs: .jsonl, .txt or .parquet files, folders of them, or patterns.
        tokenizer_path: the .model file.
        output_prefix: P.
        text_key: key of the text.
        num_workers: processes; changes nothing in the output.
        append_eod: end every document with one EOS token.
        document_format: text, or bitext (`documents.DocumentFormat`).
        languages: of bitext rows that don't name theirs.
        min_tokens: documents with fewer are left out.
        max_tokens: documents with more are left out.
        dedup: leave out documents whose text was there before.
        on_error: fail at the first bad line, or skip such lines, which are then copied to P.rejected.jsonl.
        restart: drop what an interrupted run has done, instead of going on with it.

    Returns:
        The summary, as in P.json.

    Raises:
        ValueError: bad input (with file and line), or nothing to write. Older files of this prefix stay then.
    """
    if num_workers < 1:
        raise ValueError(f"workers={num_workers} must be at least 1")
    source = DocumentFormat(document_format, text_key, languages)
    settings = DocumentSettings(source, append_eod, min_tokens, max_tokens, dedup)
    settings.check()
    files = Inputs(find_inputs(inputs), on_error)
    source.check(files.files)
    tokenizer = Tokenizer(tokenizer_path)
    job = {
        "makes": DOCUMENT_FORMAT,
        "inputs": files.identity(),
        "tokenizer": tokenizer.sha256,
        "settings": {**asdict(settings), "source": asdict(source)},
    }
    with partial_output(output_prefix, job, restart=restart) as output:
        if output.is_complete:
            return output.finish()
        is_first, starts = _find_first(output, files, settings, num_workers)
        tokens = ChunkPass(output, "tokenise", files, keep_faults=True)
        written = TokenFiles(output, token_dtype(tokenizer.size))

        def absorb(result: TokenizedChunk) -> None:
            written.append(result.part, result.lengths)
            tokens.add(result.counts)
            tokens.add({name: result.counts[name] for name in WRITTEN}, result.report.key)

        tasks = (
            TokenizeTask(
                chunk,
                settings,
                tokenizer_path,
                tokenizer.sha256,
                files.stop_at_fault,
                part,
                None if is_first is None else np.array(is_first[starts[number] : starts[number + 1]]),
            )
            for (number, chunk), part in zip(tokens.chunks(), part_paths(output.folder), strict=False)
        )
        tokens.run("tokenising", "tokens", tokenize_chunk, tasks, absorb, num_workers)
        lengths, sha256 = written.finish()
        counts = {**dict.fromkeys(WRITTEN, 0), **tokens.counts}
        if not counts["tokens"]:
            output.forget()
            raise ValueError(_nothing_to_write(inputs, tokens))
        summary = {
            "format": DOCUMENT_FORMAT,
            **{name: counts[name] for name in WRITTEN},
            "dtype": token_dtype(tokenizer.size).name,
            "append_eod": append_eod,
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_size": tokenizer.size,
            "tokens_sha256": sha256,
            "longest_document": int(lengths.max()),
            "left_out": {name: counts[name] for name in LEFT_OUT if counts.get(name)},
            "rejected": tokens.rejected,
            "inputs": tokens.inputs_counts(WRITTEN),
        }
        publish_outputs(output, [".bin", ".idx"], summary)
    return summary


def publish_outputs(
    output: PartialOutput, suffixes: list[str], summary: dict[str, Any], stale: Sequence[str] = ()
) -> None:
    """`PartialOutput.publish`, with the rejected lines if there are any."""
    if summary["rejected"]:
        output.publish([*suffixes, REJECTED], summary, stale)
    else:
        output.publish(suffixes, summary, [*stale, REJECTED])


def _nothing_to_write(inputs: Sequence[str | Path], tokens: ChunkPass) -> str:
    rejected = f", {sum(tokens.rejected.values())} lines rejected" if tokens.rejected else ""
    left_out = "".join(
        f", {tokens.counts[name]} {name.replace('_', ' ')}" for name in LEFT_OUT if tokens.counts.get(name)
    )
    return (
        f"{', '.join(map(str, inputs))}: {tokens.counts.get('documents', 0)} documents without a single token"
        f"{left_out}{rejected}; there is nothing to write"
    )


def _find_first(
    output: PartialOutput, files: Inputs, settings: DocumentSettings, num_workers: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """(is_first [documents] bool or None, starts [chunks + 1] int64: the first document of each chunk), for `dedup`."""
    if not settings.dedup:
        return None, np.empty(0, np.int64)
    digests = ChunkPass(output, "compare", files, keep_faults=False)

    def absorb(result: DigestedChunk) -> None:
        output.file("digests").write(result.digests)
        output.file("chunk_documents").write(np.array([result.count], "<i8").tobytes())

    tasks = ((chunk, settings.source, files.stop_at_fault) for _, chunk in digests.chunks())
    digests.run("comparing", "documents", digest_chunk, tasks, absorb, num_workers)
    return read_first(output, "chunk_documents")[:2]


def read_first(output: PartialOutput, per_chunk: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number what the file `digests` holds.

    Returns:
        (is_first [n], starts [chunks + 1] int64 from the file `per_chunk` of counts, number [n]), see `number_texts`.
    """
    for name in ("digests", per_chunk):
        output.file(name).flush()
    is_first, number = number_texts(output.folder / "digests", output.folder)
    counts = np.fromfile(output.folder / per_chunk, "<i8")
    return is_first, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]), number
