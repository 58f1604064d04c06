"""The files of a prefix, documents or pairs, opened for a look at them: damage becomes findings, P.json is compared too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.data.binarize import DOCUMENT_FORMAT
from megatron_conan.data.file_checks import (
    COPY_ANEW,
    WRITE_ANEW,
    Findings,
    Index,
    Scan,
    check_index,
    read_index,
    scan_tokens,
)
from megatron_conan.data.indexed_files import bin_path, idx_path, token_dtype
from megatron_conan.data.pair_checks import TASK_DTYPES, ArrayChecks, array_path, load_arrays
from megatron_conan.data.pair_files import PAIR_FORMAT
from megatron_conan.data.tokenizer import Tokenizer

KIND_NAMES = {str: "a string", int: "a number", dict: "an object", list: "a list"}
KINDS = {DOCUMENT_FORMAT: "documents", PAIR_FORMAT: "pairs"}
BLOCK = 1 << 16
"""Documents or rows whose numbers are in memory at a time."""


@dataclass
class Dataset:
    """The files of one prefix."""

    prefix: Path
    kind: str
    """documents, or pairs (rows of texts)."""
    summary: dict[str, Any] | None
    """P.json; None for files without one."""
    tokenizer: Tokenizer | None
    findings: Findings
    index: Index | None = None
    """None if it is damaged."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Pairs: P.NAME.npy by name."""

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below it; None if neither P.json nor a tokenizer tells."""
        if self.tokenizer is not None:
            return self.tokenizer.size
        size = (self.summary or {}).get("tokenizer_size")
        return size if isinstance(size, int) and size > 0 else None

    @property
    def whole_index(self) -> Index:
        """The index of files that are safe to read."""
        assert self.index is not None
        return self.index

    @property
    def num_items(self) -> int:
        """Documents or rows."""
        return len(self.arrays["query"]) if self.kind == "pairs" else self.whole_index.num_documents

    @property
    def unit(self) -> str:
        """What an item is called, in the plural."""
        return "rows" if self.kind == "pairs" else "documents"


def open_dataset(prefix: Path, tokenizer: Tokenizer | None) -> Dataset:
    """Open the files of a prefix and check all but the tokens.

    Raises:
        ValueError: there are no files of this prefix, or P.json names another tokenizer.
    """
    _check_prefix(prefix)
    findings = Findings()
    summary = _read_summary(prefix, findings)
    is_pairs = array_path(prefix, "query").exists() if summary is None else summary["format"] == PAIR_FORMAT
    if is_pairs and summary is None:
        findings.is_unsafe = True
        if not findings.total:
            findings.add(_summary_path(prefix), "", "missing")
    dataset = Dataset(prefix, "pairs" if is_pairs else "documents", summary, tokenizer, findings)
    if tokenizer is not None and summary is not None:
        _check_tokenizer(prefix, summary, tokenizer)
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            findings.add(path, "", "missing", is_unsafe=True)
    if not findings.is_unsafe:
        dataset.index = read_index(prefix, findings)
    if dataset.index is not None:
        check_index(dataset.index, findings, one_sequence=summary is not None)
        _check_dtype(dataset.index, dataset)
    if is_pairs and summary is not None:
        _check_arrays(dataset)
    if not findings.is_unsafe and summary is not None:
        _compare(dataset, _pair_counts(dataset) if is_pairs else _document_counts(dataset))
    return dataset


def check_tokens(dataset: Dataset) -> Scan:
    """Read all tokens of files that are otherwise safe to read, and compare their digest with P.json."""
    scan = scan_tokens(dataset.whole_index, dataset.vocab_size, dataset.findings)
    if dataset.summary is not None and dataset.summary.get("tokens_sha256") != scan.sha256:
        problem = f"found {scan.sha256}, expected {dataset.summary.get('tokens_sha256')} as in {_summary_path(dataset.prefix)}"
        remedy = f"P.bin changed after it was written: {COPY_ANEW}"
        dataset.findings.add(bin_path(dataset.prefix), "SHA-256 of the tokens", problem, remedy)
    return scan


def _summary_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def _check_prefix(prefix: Path) -> None:
    """Raise ValueError unless there are files of this prefix."""
    if not prefix.name:
        raise ValueError(f"--prefix {prefix} must end with a file name, e.g. {prefix / 'corpus'}")
    if idx_path(prefix).exists() or bin_path(prefix).exists():
        return
    stem = prefix.with_suffix("")
    if prefix.suffix and (idx_path(stem).exists() or bin_path(stem).exists()):
        raise ValueError(f"--prefix {prefix} must be what comes before the ending; give --prefix {stem}")
    raise ValueError(
        f"--prefix {prefix}: neither {idx_path(prefix)} nor {bin_path(prefix)} exists; give the --output-prefix of "
        "preprocess.py or preprocess_pairs.py"
    )


def _read_summary(prefix: Path, findings: Findings) -> dict[str, Any] | None:
    """P.json; None if there is none, or, with a finding, if it is none of ours."""
    path = _summary_path(prefix)
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        findings.add(path, "", f"no JSON ({error})", COPY_ANEW)
        return None
    found = summary.get("format") if isinstance(summary, dict) else None
    if not isinstance(found, str) or found not in KINDS:
        findings.add(path, "format", f"found {found!r}, expected one of {', '.join(map(repr, KINDS))}")
        return None
    _check_types(path, summary, findings)
    if found == PAIR_FORMAT and not _is_task(summary.get("task")):
        expected = ", ".join(TASK_DTYPES)
        findings.add(path, "task", f"found {summary.get('task')!r}, expected one of {expected}", is_unsafe=True)
    return summary


def _is_task(task: object) -> bool:
    return isinstance(task, str) and task in TASK_DTYPES


def _check_types(path: Path, summary: Mapping[str, Any], findings: Findings) -> None:
    """Entries of P.json that are read without being compared with anything."""
    expected: dict[str, type] = {"tokenizer_sha256": str, "tokenizer_size": int, "rejected": dict, "inputs": list}
    if summary["format"] == DOCUMENT_FORMAT:
        expected |= {"bytes": int, "left_out": dict}
    for name, kind in expected.items():
        found = summary.get(name)
        if not isinstance(found, kind) or isinstance(found, bool):
            findings.add(path, name, f"found {found!r:.60}, expected {KIND_NAMES[kind]}")
        elif isinstance(found, dict) and not all(isinstance(number, int) for number in found.values()):
            findings.add(path, name, f"found {found!r:.60}, expected a number for each name")


def _check_tokenizer(prefix: Path, summary: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Raise ValueError for another tokenizer than the one the files were written with."""
    if summary.get("tokenizer_sha256") != tokenizer.sha256:
        raise ValueError(
            f"{prefix} was written with the tokenizer of sha256 {summary.get('tokenizer_sha256')} (size "
            f"{summary.get('tokenizer_size')}), but {tokenizer.path} has {tokenizer.sha256} (size {tokenizer.size}); give "
            "that tokenizer, or leave out --tokenizer-model"
        )


def _check_dtype(index: Index, dataset: Dataset) -> None:
    """The tokens' type must hold the vocabulary, and be what our tools choose for it."""
    path, size = idx_path(index.prefix), dataset.vocab_size
    if size is None:
        return
    if np.iinfo(index.dtype).max < size - 1:
        problem = f"{index.dtype.name} cannot hold ids up to {size - 1:,} of the vocabulary"
        dataset.findings.add(path, "dtype code", problem, "write the files anew as int32")
    elif dataset.summary is not None and index.dtype != token_dtype(size):
        problem = f"found {index.dtype.name}, expected {token_dtype(size).name} for a vocabulary of {size:,}"
        dataset.findings.add(path, "dtype code", problem, is_unsafe=True)


def _check_arrays(dataset: Dataset) -> None:
    assert dataset.summary is not None
    task = dataset.summary.get("task")
    if not isinstance(task, str) or task not in TASK_DTYPES:
        return
    dataset.arrays = load_arrays(dataset.prefix, task, dataset.findings)
    if not dataset.findings.is_unsafe:
        ArrayChecks(dataset.prefix, task, dataset.arrays, dataset.whole_index.num_sequences, dataset.findings).run()


def _document_counts(dataset: Dataset) -> dict[str, Any]:
    """What P.json must say of documents."""
    index = dataset.whole_index
    assert dataset.summary is not None
    longest = max((int(index.lengths[i : i + BLOCK].max()) for i in range(0, index.num_sequences, BLOCK)), default=0)
    counts: dict[str, Any] = {"documents": index.num_documents, "tokens": index.num_tokens, "dtype": index.dtype.name}
    return {**counts, "longest_document": longest} if "longest_document" in dataset.summary else counts


def _pair_counts(dataset: Dataset) -> dict[str, Any]:
    """What P.json must say of pairs."""
    index, arrays = dataset.whole_index, dataset.arrays
    counts: dict[str, Any] = {
        "rows": len(arrays["query"]),
        "texts": index.num_sequences,
        "documents": len(arrays["corpus"]),
        "positives": len(arrays["positives"]),
        "negatives": len(arrays["negatives"]),
        "tokens": index.num_tokens,
    }
    if "label_offsets" in arrays:
        counts["classes"] = len(arrays["label_offsets"]) - 1
    return counts


def _compare(dataset: Dataset, counts: Mapping[str, Any]) -> None:
    """Compare P.json with what was counted."""
    path, summary, findings = _summary_path(dataset.prefix), dataset.summary or {}, dataset.findings
    remedy = f"P.json is of another run, or was changed: {WRITE_ANEW}"
    if dataset.tokenizer is not None:
        counts = {**counts, "tokenizer_size": dataset.tokenizer.size}
    for name, expected in counts.items():
        if summary.get(name) != expected:
            findings.add(path, name, f"found {summary.get(name)!r}, expected {expected!r} as in the files", remedy)
    if "label_offsets" in dataset.arrays:
        labels = summary.get("labels")
        found = list(labels.values()) if isinstance(labels, dict) else None
        if found != np.diff(dataset.arrays["label_offsets"]).tolist():
            where = array_path(dataset.prefix, "label_offsets")
            findings.add(path, "labels", f"the rows of the classes are not those of {where}", remedy)
    sums = {name: counts[name] for name in ("documents", "tokens")}
    if dataset.kind == "pairs":
        dropped = [summary.get(name, 0) for name in ("repeated_rows", "conflicting_rows", "single_rows")]
        sums = {"rows": counts["rows"] + sum(number for number in dropped if isinstance(number, int))}
    if input_parts(dataset):
        for name, total in sums.items():
            added = sum(part[name] for part in input_parts(dataset) if isinstance(part.get(name), int))
            if added != total:
                findings.add(path, "inputs", f"their {name} add up to {added:,}, expected {total:,}", remedy)


def input_parts(dataset: Dataset) -> list[dict[str, Any]]:
    """What each input file gave, where P.json tells: {"file", "documents" or "rows", "tokens", "bytes"}."""
    parts = (dataset.summary or {}).get("inputs")
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
