"""External data as training inputs: `python benchmarks/external_data.py --data DIR --tokenizer-model M --output DIR`.

DIR holds folders of public text: pairs/, sts/, classification/, bitext/, retrieval/. Training sources are made of the first
four with the project's own tool, one source a file. Nothing is read for training from retrieval/, a *_dev file, the STS
sets kept for testing, or a test.jsonl. Training rows that stand in one of those all the same are left out and counted; what
stays in are translations of test pairs and sentences that also stand in another pair.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_conan.data.command_line import run_tool
from megatron_conan.data.pair_files import preprocess_pairs

KINDS = ("pairs", "sts", "classification", "bitext")
BITEXT_LANGUAGES = ("ara", "cmn", "deu", "fra", "jpn", "kor", "rus", "spa")
"""Languages with many speakers, of several scripts, whose files have about 500 rows or more."""
STS_TEST_SETS = ("*_dev.jsonl", "*_trial.jsonl", "sts12_*.jsonl", "sts13_*.jsonl")
RETRIEVAL_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")


class Source(NamedTuple):
    """A training source on disk."""

    task: str
    prefix: Path
    rows: int


@dataclass(frozen=True)
class HeldOut:
    """What training must not see."""

    texts: frozenset[str]
    """Texts of the classification test sets and queries of the retrieval sets."""
    pairs: frozenset[frozenset[str]]
    """Pairs of the STS test sets, in either order."""

    def holds(self, *texts: str) -> bool:
        """Whether one of the texts, the pair, or both as one text is held out (news are "title. description")."""
        return (
            any(text in self.texts for text in texts)
            or ". ".join(texts) in self.texts
            or frozenset(texts) in self.pairs
        )


def prepare_sources(
    data: Path,
    tokenizer_model: Path,
    output: Path,
    *,
    kinds: Sequence[str] = KINDS,
    bitext_languages: Sequence[str] = BITEXT_LANGUAGES,
    num_workers: int = 1,
) -> dict[str, Source]:
    """Write the training rows of external data to `output`/rows and the files of a PairStore to `output`.

    Args:
        data: the folder of external data.
        tokenizer_model: the .model file.
        output: a folder, made if missing.
        kinds: which of KINDS to prepare.
        bitext_languages: three-letter codes of the files under bitext/; queries are of that language, documents English.
        num_workers: processes that tokenise.

    Returns:
        Source by name, which is that of its file (classification: of its folder).

    Raises:
        ValueError: a kind is unknown or a file is missing.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"kinds={unknown} are unknown; use {', '.join(KINDS)}")
    held_out = _held_out(data)
    sources: dict[str, Source] = {}
    for kind in kinds:
        task = kind if kind in ("sts", "classification") else "retrieval"
        for name, path in _training_files(data, kind, bitext_languages).items():
            rows = output / "rows" / f"{name}.jsonl"
            _write_rows(rows, path, kind, held_out)
            summary = preprocess_pairs(task, [rows], tokenizer_model, output / name, num_workers=num_workers)
            sources[name] = Source(task, output / name, summary["rows"])
    return sources


def retrieval_sets(data: Path) -> list[Path]:
    """The BEIR folders of external data, for evaluation only."""
    folders = sorted(path for path in (data / "retrieval").glob("*") if path.is_dir())
    return [folder for folder in folders if all((folder / name).is_file() for name in RETRIEVAL_FILES)]


def sts_test_sets(data: Path) -> list[tuple[str, Path]]:
    """(name, file) of the STS sets that are for evaluation only."""
    paths = {path for pattern in STS_TEST_SETS for path in (data / "sts").glob(pattern)}
    return [(path.stem, path) for path in sorted(paths)]


def read_sts(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """(first texts, second texts, scores [pairs] float64) of an STS file."""
    rows = list(_read_rows(path))
    scores = np.array([row["score"] for row in rows], dtype=np.float64)
    return [row["text1"] for row in rows], [row["text2"] for row in rows], scores


def _training_files(data: Path, kind: str, bitext_languages: Sequence[str]) -> dict[str, Path]:
    """Files of a kind that training may read, by the name of their source."""
    if kind == "bitext":
        paths = [data / f"bitext/tatoeba_{language}-eng.jsonl" for language in bitext_languages]
    else:
        patterns = {"pairs": "*.jsonl", "sts": "*_train.jsonl", "classification": "*/train.jsonl"}
        paths = sorted((data / kind).glob(patterns[kind]))
    missing = [path for path in paths if not path.is_file()] if paths else [data / kind]
    if missing:
        raise ValueError(f"no external data at {', '.join(map(str, missing))}; name its folder with --data DIR")
    return {path.parent.name if kind == "classification" else path.stem: path for path in paths}


def _held_out(data: Path) -> HeldOut:
    labelled = [row["text"] for path in (data / "classification").glob("*/test.jsonl") for row in _read_rows(path)]
    queries = [row["text"] for folder in retrieval_sets(data) for row in _read_rows(folder / "queries.jsonl")]
    scored = [row for _, path in sts_test_sets(data) for row in _read_rows(path)]
    return HeldOut(
        texts=frozenset(labelled + queries),
        pairs=frozenset(frozenset((row["text1"], row["text2"])) for row in scored),
    )


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    return {"query": row["query"], "positive": row["pos"], "negative": row.get("neg", [])}


def _bitext(row: dict[str, Any]) -> dict[str, Any]:
    return {"query": row["text1"], "positive": row["text2"]}


CONVERTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"pairs": _pair, "bitext": _bitext}
COMPARED_KEYS = {
    "pairs": ("query", "positive"),
    "sts": ("text1", "text2"),
    "classification": ("text",),
    "bitext": ("query", "positive"),
}
"""Keys of a row whose texts must not be held out."""


def _write_rows(target: Path, source: Path, kind: str, held_out: HeldOut) -> None:
    """Write a file's rows as the tool reads them, without those that are held out."""
    convert = CONVERTERS.get(kind, dict)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for row in map(convert, _read_rows(source)):
            if not held_out.holds(*(row[key] for key in COMPARED_KEYS[kind])):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _count_rows(path: Path) -> int:
    return sum(1 for _ in _read_rows(path))


def _print_table(data: Path, sources: dict[str, Source], bitext_languages: Sequence[str]) -> None:
    """One line a source: rows kept, lines of its file left out as held out, tokens of a mean text."""
    files = {name: path for kind in KINDS for name, path in _training_files(data, kind, bitext_languages).items()}
    print("| source | task | rows | held out | query | positive | negative |")
    print("|---|---|---|---|---|---|---|")
    for name, source in sources.items():
        summary = json.loads(source.prefix.with_name(f"{name}.json").read_text(encoding="utf-8"))
        left_out = _count_rows(files[name]) - _count_rows(source.prefix.parent / "rows" / f"{name}.jsonl")
        lengths = [summary[f"mean_{text}_length"] for text in ("query", "positive", "negative")]
        print(f"| {name} | {source.task} | {source.rows:,} | {left_out:,} | {' | '.join(map(str, lengths))} |")


def main(argv: Sequence[str]) -> None:
    """Prepare all sources and print them. Raises ValueError for a user's mistake."""
    parser = argparse.ArgumentParser(description="Prepare external data for training and list what came of it.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of external data")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="the .model of train_tokenizer.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the prepared sources")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    arguments = parser.parse_args(argv)
    sources = prepare_sources(
        arguments.data, arguments.tokenizer_model, arguments.output, num_workers=arguments.workers
    )
    _print_table(arguments.data, sources, BITEXT_LANGUAGES)
    print(f"{len(sources)} sources, {sum(source.rows for source in sources.values()):,} rows in {arguments.output}")
    print(
        f"for evaluation: {len(retrieval_sets(arguments.data))} retrieval, {len(sts_test_sets(arguments.data))} STS sets"
    )


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
