"""What tokenised files hold, as lines of text: counts, lengths, the mix, and documents or rows with their tokens.

Everything here reads files that `dataset_checks` found safe to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_conan.data.command_line import Progress
from megatron_conan.data.dataset_checks import BLOCK, Dataset, input_parts
from megatron_conan.data.exact_duplicates import Copies, find_copies
from megatron_conan.data.length_counts import LengthCounts, bucket_name

PLURAL = {"document": "documents", "query": "queries", "positive": "positives", "negative": "negatives"}
BAR_WIDTH = 50
"""Characters of the longest bar."""
MOST_TOKENS = 60
"""Tokens of a text that are shown."""
MOST_START_TOKENS = 16
"""Tokens of a text that is only named."""
MOST_PARTS = 20
"""Input files or classes in a table."""
MOST_TEXTS = 8
"""Positives or negatives of a row that are shown."""


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def measure_lengths(dataset: Dataset) -> dict[str, LengthCounts]:
    """Lengths in tokens: of "document", or of "query", "positive" and "negative", without those of which there are none."""
    index = dataset.whole_index
    if dataset.kind == "documents":
        counts = index.num_documents
        starts = (index.starts(i, min(i + BLOCK, counts)) for i in range(0, counts, BLOCK))
        return {"document": LengthCounts(map(np.diff, starts))} if counts else {}
    measured = {}
    for name, array in (("query", "query"), ("positive", "positives"), ("negative", "negatives")):
        ids = dataset.arrays[array]
        measured[name] = LengthCounts(index.lengths[ids[i : i + BLOCK]] for i in range(0, len(ids), BLOCK))
    return {name: lengths for name, lengths in measured.items() if len(lengths)}


def _texts_a_row(dataset: Dataset) -> dict[str, LengthCounts]:
    """How many positives and negatives rows have."""
    counted = {}
    for name in ("positives", "negatives"):
        offsets = dataset.arrays[f"{name}_offsets"]
        counted[f"{name} a row"] = LengthCounts(
            np.diff(offsets[i : i + BLOCK + 1]) for i in range(0, dataset.num_items, BLOCK)
        )
    return counted


def contents_lines(dataset: Dataset, lengths: Mapping[str, LengthCounts]) -> list[str]:
    """Counts and statistics of lengths; `lengths` as `measure_lengths` gives them."""
    index, summary = dataset.whole_index, dataset.summary or {}
    rows = [[dataset.unit, f"{dataset.num_items:,}"]]
    if dataset.kind == "pairs":
        rows.append(["distinct texts", f"{index.num_sequences:,}"])
        rows.append(["documents (texts that can be mined)", f"{len(dataset.arrays['corpus']):,}"])
    elif index.num_sequences != index.num_documents:
        rows.append(["sequences", f"{index.num_sequences:,}"])
    rows.append(["tokens", f"{index.num_tokens:,}"])
    if isinstance(summary.get("bytes"), int):
        rows.append(["bytes of text", f"{summary['bytes']:,}"])
        if index.num_tokens:
            rows.append(["bytes a token", f"{summary['bytes'] / index.num_tokens:.2f}"])
    lines = table(rows) + _facts(dataset)
    measured = {f"tokens a {name}": counts for name, counts in lengths.items()}
    if dataset.kind == "pairs":
        measured |= _texts_a_row(dataset)
    measured = {name: counts for name, counts in measured.items() if len(counts)}
    if measured:
        head = ["", "min", "mean", "median", "p90", "p99", "max", "empty"]
        lines += ["", *table([head, *([name, *_statistics(counts)] for name, counts in measured.items())])]
    return lines


def _facts(dataset: Dataset) -> list[str]:
    """Short lines about the files."""
    index, summary = dataset.whole_index, dataset.summary
    if summary is None:
        facts = [f"stored as {index.dtype.name}; no summary (P.json): not written by our tools"]
    else:
        end = ", </s> at the end of each document" if summary.get("append_eod") else ""
        facts = [f"stored as {index.dtype.name}{end}; vocabulary of {summary.get('tokenizer_size')}"]
    if index.has_modes:
        facts.append("a multimodal index: it ends with a mode for each sequence")
    for name in ("left_out", "rejected"):
        counts = (summary or {}).get(name)
        if isinstance(counts, dict) and counts and all(isinstance(number, int) for number in counts.values()):
            told = ", ".join(f"{number:,} {kind.replace('_', ' ')}" for kind, number in counts.items())
            facts.append(f"{name.replace('_', ' ')}: {told}")
    if dataset.kind == "pairs":
        facts.insert(0, f"task {(summary or {}).get('task')}")
    if "score" in dataset.arrays and len(dataset.arrays["score"]):
        score = dataset.arrays["score"]
        facts.append(f"scores from {score.min():g} to {score.max():g}, mean {score.mean(dtype=np.float64):.4g}")
    return facts


def _statistics(counts: LengthCounts) -> list[str]:
    mean = counts.total / len(counts)
    numbers = [counts.percentile(percent) for percent in (50, 90, 99, 100)]
    return [f"{counts.values[0]:,}", f"{mean:,.1f}", *(f"{number:,}" for number in numbers), f"{counts.num_empty:,}"]


def histogram_lines(name: str, counts: LengthCounts) -> list[str]:
    """Lengths of what is called `name`, in buckets of powers of two, a bar of characters each."""
    buckets = counts.buckets()
    most = max(number for _, number in buckets)
    rows = [["", bucket_name(bucket), f"{number:,}", _share(number, len(counts))] for bucket, number in buckets]
    lines = table([["", "tokens", PLURAL[name], "share"], *rows])
    bars = ["", *("#" * max(round(number / most * BAR_WIDTH), number > 0) for _, number in buckets)]
    return [f"{line}  {bar}".rstrip() for line, bar in zip(lines, bars, strict=True)]


def mix_lines(datasets: Sequence[Dataset]) -> list[str]:
    """Each prefix's share of all tokens."""
    total = sum(dataset.whole_index.num_tokens for dataset in datasets)
    rows = [["prefix", "documents", "rows", "tokens", "of tokens"]]
    for dataset in datasets:
        number, tokens = f"{dataset.num_items:,}", dataset.whole_index.num_tokens
        counts = ["", number] if dataset.kind == "pairs" else [number, ""]
        rows.append([str(dataset.prefix), *counts, f"{tokens:,}", _share(tokens, total)])
    return table([*rows, ["together", *("" for _ in range(2)), f"{total:,}", ""]])


def part_lines(dataset: Dataset) -> list[str]:
    """What each input file gave, the largest first; nothing if P.json does not tell."""
    lines: list[str] = []
    for unit in ("rows", "documents"):
        parts = [part for part in input_parts(dataset) if isinstance(part.get(unit), int)]
        columns = [name for name in (unit, "tokens", "bytes") if all(isinstance(p.get(name), int) for p in parts)]
        if parts:
            lines += _largest(parts, columns, "tokens" if "tokens" in columns else unit)
    return lines


def _largest(parts: Sequence[Mapping[str, Any]], columns: Sequence[str], by: str) -> list[str]:
    """A table of the parts that have most of the column `by`, and a line for all others."""
    parts = sorted(parts, key=lambda part: -part[by])
    total = sum(part[by] for part in parts)
    shown = [(str(part.get("file")), part) for part in parts[:MOST_PARTS]]
    if rest := parts[MOST_PARTS:]:
        shown.append((f"{len(rest):,} more", {name: sum(part[name] for part in rest) for name in columns}))
    rows = [[name, *(f"{part[column]:,}" for column in columns), _share(part[by], total)] for name, part in shown]
    return table([["input", *columns, f"of {by}"], *rows])


def class_lines(dataset: Dataset) -> list[str]:
    """Classes with their rows, the largest first; nothing for other tasks."""
    if "label_offsets" not in dataset.arrays:
        return []
    sizes = np.diff(dataset.arrays["label_offsets"]).tolist()
    names = _class_names(dataset)
    parts = [{"file": f"{visible(names[label])} (class {label})", "rows": size} for label, size in enumerate(sizes)]
    lines = _largest(parts, ["rows"], "rows")
    return [line.replace("input", "class", 1) if i == 0 else line for i, line in enumerate(lines)]


def _class_names(dataset: Dataset) -> list[str]:
    labels = (dataset.summary or {}).get("labels")
    num_classes = len(dataset.arrays["label_offsets"]) - 1
    known = list(labels) if isinstance(labels, dict) else []
    return [*known, *("?" for _ in range(num_classes - len(known)))]


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else "-"


def visible(text: str) -> str:
    r"""A text on one line that can be read back: backslash, | and what is not printable are escaped."""
    escaped = text.replace("\\", "\\\\").replace("|", "\\|")
    if escaped.isprintable():
        return escaped
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in escaped)


def marked_tokens(tokens: np.ndarray, pieces: Sequence[str], most: int = MOST_TOKENS) -> str:
    """Text with | between its tokens; special tokens and single bytes by their names, </s> and <0xE4>.

    Args:
        tokens: [length] ids; those that `pieces` lacks are shown as numbers.
        pieces: text of each token, spaces as U+2581.
        most: further tokens are only counted.
    """
    if not len(tokens):
        return "(no tokens)"
    shown = [
        visible(pieces[token].replace("\u2581", " ")) if 0 <= token < len(pieces) else f"<id {token}>"
        for token in tokens[:most].tolist()
    ]
    return "|".join(shown) + (f" ... {len(tokens) - most:,} more" if len(tokens) > most else "")


def item_lines(dataset: Dataset, number: int, pieces: Sequence[str]) -> list[str]:
    """A document, or a row with its texts."""
    index = dataset.whole_index
    if dataset.kind == "documents":
        tokens = index.document(number)
        return [f"document {number}, {len(tokens):,} tokens:", f"  {marked_tokens(tokens, pieces)}"]
    arrays = dataset.arrays
    head = f"row {number}"
    if "score" in arrays:
        head += f", score {arrays['score'][number]:g}"
    if "label" in arrays:
        label = int(arrays["label"][number])
        head += f", class {label}: {visible(_class_names(dataset)[label])}"
    texts = [("query", arrays["query"][number])]
    more = []
    for name, kind in (("positives", "positive"), ("negatives", "negative")):
        ids = _texts_of(dataset, name, number)
        texts += [(kind, text_id) for text_id in ids[:MOST_TEXTS]]
        more += [f"  ... {len(ids) - MOST_TEXTS:,} more {name}"] if len(ids) > MOST_TEXTS else []
    lines = []
    for kind, text_id in texts:
        tokens = index.document(int(text_id))
        lines.append(f"  {kind} (text {text_id}, {len(tokens):,} tokens): {marked_tokens(tokens, pieces)}")
    return [head, *lines, *more]


def _texts_of(dataset: Dataset, name: str, row: int) -> np.ndarray:
    """[any] ids of a row's positives or negatives."""
    start, end = dataset.arrays[f"{name}_offsets"][row : row + 2].tolist()
    return dataset.arrays[name][start:end]


def duplicate_lines(dataset: Dataset, pieces: Sequence[str] | None) -> list[str]:
    """Exact copies among documents (by their tokens) or rows (by all their texts), with progress on stderr."""
    with find_copies(_contents(dataset)) as copies:
        return _copy_lines(dataset, copies, pieces)


def _copy_lines(dataset: Dataset, copies: Copies, pieces: Sequence[str] | None) -> list[str]:
    index, count = dataset.whole_index, dataset.num_items
    if not copies.count:
        return [f"none: all {count:,} {dataset.unit} are distinct"]
    held = f", which hold {_tokens_of(dataset, copies):,} tokens" if dataset.kind == "documents" else ""
    lines = [
        f"{copies.count:,} of {count:,} {dataset.unit} ({copies.count / count:.1%}) are copies of an earlier one{held}"
    ]
    rows = [["first", "times", ""]]
    starts = []
    for first, times in copies.frequent:
        tokens = index.document(first if dataset.kind == "documents" else int(dataset.arrays["query"][first]))
        if pieces is None:
            start = f"ids {' '.join(map(str, tokens[:MOST_START_TOKENS].tolist()))}" if len(tokens) else "(no tokens)"
        else:
            start = marked_tokens(tokens, pieces, MOST_START_TOKENS)
        rows.append([f"{dataset.unit.removesuffix('s')} {first}", f"{times:,}", ""])
        starts.append(start)
    return [*lines, *(f"{line}  {start}".rstrip() for line, start in zip(table(rows), ["", *starts], strict=True))]


def _contents(dataset: Dataset) -> Iterator[memoryview]:
    """What tells documents or rows apart."""
    index, count = dataset.whole_index, dataset.num_items
    progress = Progress(f"comparing {dataset.prefix}", count, dataset.unit)
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        if dataset.kind == "documents":
            starts = index.starts(begin, end).tolist()
            yield from (index.tokens[start:stop].data for start, stop in pairwise(starts))
        else:
            yield from (_row_content(dataset, row).data for row in range(begin, end))
        progress.advance(end - begin, end - begin)
    progress.finish()


def _row_content(dataset: Dataset, row: int) -> np.ndarray:
    positives, negatives = (_texts_of(dataset, name, row) for name in ("positives", "negatives"))
    head = np.array([dataset.arrays["query"][row], len(positives)])
    return np.concatenate([head, positives, negatives])


def _tokens_of(dataset: Dataset, copies: Copies) -> int:
    """Tokens in documents that are copies."""
    index, count = dataset.whole_index, dataset.num_items
    return sum(
        int(np.diff(index.starts(i, min(i + BLOCK, count)))[~copies.is_first[i : i + BLOCK]].sum())
        for i in range(0, count, BLOCK)
    )
