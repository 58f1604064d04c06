"""Turning rows of text pairs into a text store and a table of ids: the files that `pairs.PairStore` reads.

Every distinct text is tokenised once and known by its number, so a corpus to mine from is a set of numbers. No text is held in
memory: a first pass over the files notes a digest of every text, from which texts get their numbers, and a second one
tokenises each where it is first met. A killed run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.data.binarize import (
    DigestedChunk,
    DocumentSettings,
    TextSource,
    TokenFiles,
    TokenizedChunk,
    TokenizeTask,
    digest_chunk,
    part_paths,
    publish_outputs,
    read_first,
    tokenize_chunk,
)
from megatron_conan.data.documents import DocumentFormat
from megatron_conan.data.indexed_files import token_dtype
from megatron_conan.data.input_files import ROW_FORMATS, InputFile, find_inputs
from megatron_conan.data.label_files import ClassRows, check_classes, rows_of_classes
from megatron_conan.data.numbering import text_digests
from megatron_conan.data.pair_arrays import TASK_ARRAYS, PairArrays
from megatron_conan.data.pair_rows import COLUMNS, TASKS, TRAINED_AS, PairRow, parse_row
from megatron_conan.data.passes import ChunkPass, Inputs, Report
from megatron_conan.data.resumable import PartialOutput, partial_output
from megatron_conan.data.text_files import Chunk, Fault, Record, parse_records
from megatron_conan.data.tokenizer import Tokenizer

PAIR_FORMAT = "megatron_conan pairs 2"
ROW_FILES = {"positives": "<i4", "negatives": "<i4", "score": "<f4", "label": "<i4"}
"""What the first pass notes of every row: numbers of positives and negatives, score, label."""


@dataclass(frozen=True)
class RowTexts:
    """The texts of rows of a task."""

    task: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys that are read."""
        return COLUMNS[self.task]

    def texts(self, file: InputFile, record: Record) -> list[str] | None:
        """Query, positives, negatives. Raises BadLine."""
        row = parse_row(self.task, record)
        return None if row is None else row.distinct().texts


@dataclass(frozen=True)
class CorpusTexts:
    """Documents that belong to no row; those of white space only are none."""

    format: DocumentFormat

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys that are read."""
        return self.format.columns

    def texts(self, file: InputFile, record: Record) -> list[str] | None:
        """The document, if it is one. Raises BadLine."""
        texts = self.format.texts(file, record)
        return [text for text in texts if text.strip()] if texts else None


@dataclass(frozen=True)
class ReadRows:
    """What the first pass makes of a chunk of rows."""

    report: Report
    digests: bytes
    """Of all texts, row after row."""
    rows: dict[str, np.ndarray]
    """[rows] by the names of ROW_FILES; labels into `names`."""
    names: list[str]
    """Labels in order of first appearance."""
    negatives_dropped: int

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.rows["positives"])


def read_rows(task: tuple[Chunk, str, bool]) -> ReadRows:
    """Read a chunk of rows: (chunk, task, stop at a fault)."""
    chunk, name, stop_at_fault = task
    faults: list[Fault] = []
    lines, dropped = [0], 0
    names: dict[str, int] = {}
    digests: list[bytes] = []
    columns: dict[str, list[Any]] = {column: [] for column in ROW_FILES}
    for row in parse_records(
        chunk, partial(parse_row, name), faults, stop_at_fault=stop_at_fault, columns=COLUMNS[name], count=lines
    ):
        distinct = row.distinct()
        digests.append(text_digests(distinct.texts))
        dropped += len(row.negatives) - len(distinct.negatives)
        values = (len(distinct.positives), len(distinct.negatives), row.score, _label_number(names, row))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    arrays = {column: np.array(columns[column], dtype) for column, dtype in ROW_FILES.items()}
    report = Report(chunk.key, chunk.work, lines[0], faults)
    return ReadRows(report, b"".join(digests), arrays, list(names), dropped)


def _label_number(names: dict[str, int], row: PairRow) -> int:
    return -1 if row.label is None else names.setdefault(row.label, len(names))


class PairTable:
    """What the first pass gathers: rows in the files of `partial`, and the digests of all texts.

    Args:
        output: of the job.
        task: what a row is.
        rows: files of rows.
        corpus: files of further documents.
        text_key: key of their text.
    """

    def __init__(self, output: PartialOutput, task: str, rows: Inputs, corpus: Inputs, text_key: str) -> None:
        self.output, self.task = output, task
        self.sources: tuple[TextSource, TextSource] = (RowTexts(task), CorpusTexts(DocumentFormat("text", text_key)))
        self.inputs = (rows, corpus)
        self.rows = ChunkPass(output, "rows", rows, keep_faults=True)
        self.corpus = ChunkPass(output, "corpus", corpus, keep_faults=True)
        self._names: dict[str, int] = self._saved_names()

    @property
    def num_rows(self) -> int:
        """Rows read."""
        return self.rows.counts.get("rows", 0)

    def read(self, num_workers: int) -> None:
        """Read all files, or what an interrupted run has left of them."""
        stop = self.inputs[0].stop_at_fault
        rows = ((chunk, self.task, stop) for _, chunk in self.rows.chunks())
        self.rows.run("reading", "rows", read_rows, rows, self._absorb_rows, num_workers)
        documents = ((chunk, self.sources[1], stop) for _, chunk in self.corpus.chunks())
        if self.inputs[1].files:
            self.corpus.run("reading", "documents", digest_chunk, documents, self._absorb_documents, num_workers)

    def tokenize(
        self, written: TokenFiles, tokenizer: Tokenizer, is_first: np.ndarray, starts: np.ndarray, workers: int
    ) -> None:
        """Tokenise every text where it is first met.

        Args:
            written: takes the tokens.
            tokenizer: the tokenizer.
            is_first: [texts met] bool.
            starts: [chunks + 1] first text of each chunk.
            workers: processes.
        """
        before = 0
        for name, source, inputs in zip(("tokenise", "tokenise corpus"), self.sources, self.inputs, strict=True):
            tokens = ChunkPass(self.output, name, inputs, keep_faults=False)

            def absorb(result: TokenizedChunk) -> None:
                written.append(result.part, result.lengths)

            tasks = self._token_tasks(tokens, DocumentSettings(source), tokenizer, is_first, starts[before:])
            if inputs.files:
                tokens.run("tokenising", "tokens", tokenize_chunk, tasks, absorb, workers)
            before += tokens.num_chunks

    def _token_tasks(
        self,
        tokens: ChunkPass,
        settings: DocumentSettings,
        tokenizer: Tokenizer,
        is_first: np.ndarray,
        starts: np.ndarray,
    ) -> Iterator[TokenizeTask]:
        for (number, chunk), part in zip(tokens.chunks(), part_paths(self.output.folder), strict=False):
            wanted = np.array(is_first[starts[number] : starts[number + 1]])
            # what is rejected was told by the first pass
            yield TokenizeTask(chunk, settings, tokenizer.path, tokenizer.sha256, False, part, wanted)

    def row_numbers(self, name: str) -> np.ndarray:
        """[rows] what the first pass noted under a name of ROW_FILES."""
        self.output.file(f"row_{name}").flush()
        return np.fromfile(self.output.folder / f"row_{name}", ROW_FILES[name])

    @property
    def label_names(self) -> list[str]:
        """All labels, in order of first appearance."""
        return list(self._names)

    def _absorb_rows(self, result: ReadRows) -> None:
        new = [name for name in result.names if name not in self._names]
        for name in new:
            self._names[name] = len(self._names)
            self.output.file("labels").write((json.dumps(name) + "\n").encode("ascii"))
        numbers = np.array([self._names[name] for name in result.names], np.int32)
        for name, values in result.rows.items():
            kept = numbers[values] if name == "label" and len(numbers) else values
            self.output.file(f"row_{name}").write(kept.tobytes())
        self._absorb_digests(result.digests)
        self.rows.add({"rows": result.count, "negatives_dropped": result.negatives_dropped})
        self.rows.add({"rows": result.count}, result.report.key)

    def _absorb_documents(self, result: DigestedChunk) -> None:
        self._absorb_digests(result.digests)
        self.corpus.add({"documents": result.count}, result.report.key)

    def _absorb_digests(self, digests: bytes) -> None:
        self.output.file("digests").write(digests)
        self.output.file("chunk_texts").write(np.array([len(digests) // 16], "<i8").tobytes())

    def _saved_names(self) -> dict[str, int]:
        self.output.file("labels")  # cut back to what was committed
        names = (self.output.folder / "labels").read_text(encoding="ascii").splitlines()
        return {json.loads(name): number for number, name in enumerate(names)}


def preprocess_pairs(
    task: str,
    inputs: Sequence[str | Path],
    tokenizer_path: Path,
    output_prefix: Path,
    *,
    corpus: Sequence[str | Path] = (),
    text_key: str = "text",
    num_workers: int = 1,
    on_error: str = "fail",
    restart: bool = False,
) -> dict[str, Any]:
    """Write the files of a PairStore.

    Args:
        task: one of TASKS.
        inputs: .jsonl or .parquet files of the task's rows, folders of them, or patterns.
        tokenizer_path: the .model file.
        output_prefix: P.
        corpus: files of documents that belong to no row but may be mined.
        text_key: key of the text in `corpus`.
        num_workers: processes; changes nothing in the output.
        on_error: fail at the first bad line, or skip such lines, which are then copied to P.rejected.jsonl.
        restart: drop what an interrupted run has done, instead of going on with it.

    Returns:
        The summary, as in P.json.

    Raises:
        ValueError: bad input (with file and line), no rows, or fewer than two classes. Older files of this prefix stay then.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; use one of {', '.join(TASKS)}")
    if num_workers < 1:
        raise ValueError(f"workers={num_workers} must be at least 1")
    rows = Inputs(find_inputs(inputs, ROW_FORMATS), on_error)
    documents = Inputs(find_inputs(corpus), on_error)
    tokenizer = Tokenizer(tokenizer_path)
    job = {
        "makes": PAIR_FORMAT,
        "task": task,
        "inputs": rows.identity(),
        "corpus": documents.identity(),
        "text_key": text_key,
        "tokenizer": tokenizer.sha256,
    }
    with partial_output(output_prefix, job, restart=restart) as output:
        if output.is_complete:
            return output.finish()
        table = PairTable(output, task, rows, documents, text_key)
        table.read(num_workers)
        if not table.num_rows:
            output.forget()
            rejected = f" ({sum(table.rows.rejected.values())} lines rejected)" if table.rows.rejected else ""
            raise ValueError(f"{', '.join(map(str, inputs))}: no rows{rejected}")
        is_first, starts, number = read_first(output, "chunk_texts")
        classes = _classes(table, number, inputs) if task == "classification" else None
        written = TokenFiles(output, token_dtype(tokenizer.size))
        table.tokenize(written, tokenizer, is_first, starts, num_workers)
        numbers = {name: table.row_numbers(name) for name in ROW_FILES}
        lengths, sha256 = written.finish()
        arrays = PairArrays(output.folder, number, numbers, len(lengths))
        arrays.write(classes, stores_scores=TRAINED_AS.get(task, task) == "sts")
        summary = {
            "format": PAIR_FORMAT,
            "task": TRAINED_AS.get(task, task),
            **arrays.counts(lengths),
            "negatives_dropped": table.rows.counts.get("negatives_dropped", 0),
            "tokens": int(lengths.sum(dtype=np.int64)),
            **(classes.counts() if classes else {}),
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_size": tokenizer.size,
            "tokens_sha256": sha256,
            "rejected": _added(table.rows.rejected, table.corpus.rejected),
            "inputs": [*table.rows.inputs_counts(["rows"]), *table.corpus.inputs_counts(["documents"])],
        }
        suffixes = [".bin", ".idx", *(f".{name}.npy" for name in arrays.names)]
        stale = [f".{name}.npy" for name in TASK_ARRAYS if name not in arrays.names]
        publish_outputs(output, suffixes, summary, stale)
    return summary


def _classes(table: PairTable, number: np.ndarray, inputs: Sequence[str | Path]) -> ClassRows:
    """The lines that become rows. Raises ValueError if there is nothing to tell apart."""
    rows = rows_of_classes(np.array(number[: table.num_rows]), table.row_numbers("label"), table.label_names)
    try:
        check_classes(inputs, rows)
    except ValueError:
        table.output.forget()
        raise
    return rows


def _added(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {
        kind: first.get(kind, 0) + second.get(kind, 0) for kind in chain(first, (k for k in second if k not in first))
    }
