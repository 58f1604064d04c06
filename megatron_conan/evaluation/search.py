"""Live search over functions of the Python installation: `conan search RUN "question"`.

RUN is a demo's folder: `export/` holds the model as a SentenceTransformer, `search/` the index made from it (one vector a
function and the functions themselves). Every function is indexed, whether its file was held out of training or not.
Legend: n functions, e embedding dim.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sentence_transformers import SentenceTransformer

from megatron_conan.data.code_functions import STDLIB
from megatron_conan.data.durable import save_array
from megatron_conan.data.prepare import prepare_query
from megatron_conan.evaluation.beir import read_jsonl
from megatron_conan.evaluation.bm25 import Bm25Index, Bm25Settings

EMBEDDINGS, DOCUMENTS, SUMMARY = "embeddings.npy", "documents.jsonl", "summary.json"
FUSION_DEPTH = 100  # results of each ranking that enter the fusion
FUSION_CONSTANT = 60  # of reciprocal rank fusion (Cormack et al. 2009): score = sum of 1 / (60 + rank)
SNIPPET_LINES = 4
SEARCH_BM25 = Bm25Settings(stopwords=True, stemming=True)
REMEDY = "`make demo` writes it"

Encode = Callable[[Sequence[str]], np.ndarray]
"""Prepared texts of n documents -> [n, e] float."""


@dataclass(frozen=True)
class SearchHit:
    """One function found."""

    score: float
    """Cosine, or the fused score."""
    title: str
    """Qualified name."""
    file: str
    line: int
    held_out: bool
    """Its file was held out of all training."""
    snippet: str
    """First lines of the code."""


@dataclass(frozen=True)
class HitReport:
    """Outcome of a list of questions."""

    k: int
    ranks: dict[str, int | None]
    """question -> rank (from 1) of the first expected function; None: not among the first k."""

    @property
    def rate(self) -> float:
        """Share of the questions that found an expected function."""
        return sum(rank is not None for rank in self.ranks.values()) / len(self.ranks)


def build_search_index(
    export_dir: str | Path,
    documents_jsonl: str | Path,
    out_dir: str | Path,
    *,
    encode: Encode | None = None,
    batch_size: int = 128,
) -> int:
    """Embed the documents and write the index; an earlier one is replaced file by file, its summary last.

    Args:
        documents_jsonl: rows with `id` (PACKAGE:...), `title`, `file`, `line`, `text` (prepared), `code`, `held_out`.
        encode: embeds the texts with the exported weights by another way (the live model is quicker); None loads
            the export with sentence-transformers.

    Returns:
        Number of documents indexed.

    Raises:
        ValueError: a missing or malformed input, or vectors that don't fit.
    """
    export_dir, out_dir = Path(export_dir), Path(out_dir)
    rows = _read_documents(Path(documents_jsonl))
    digest = weights_digest(export_dir)
    if encode is None:
        model = _load_model(export_dir)

        def encode(texts: Sequence[str]) -> np.ndarray:
            return model.encode_document(list(texts), batch_size=batch_size, show_progress_bar=True)

    vectors = np.asarray(encode([row["text"] for row in rows]), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(rows) or not np.isfinite(vectors).all():
        raise ValueError(
            f"embedding {len(rows)} documents gave an array of shape {vectors.shape}, or values not finite"
        )
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / SUMMARY).unlink(missing_ok=True)  # a killed run leaves no index that looks whole
    _write(out_dir / EMBEDDINGS, lambda path: save_array(path, vectors.astype(np.float16)))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(out_dir / DOCUMENTS, lambda path: path.write_text(lines, encoding="utf-8"))
    summary = {"documents": len(rows), "dim": vectors.shape[1], "weights_sha256": digest}
    _write(out_dir / SUMMARY, lambda path: path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8"))
    return len(rows)


class SearchIndex:
    """A demo run opened for questions."""

    def __init__(self, run_dir: str | Path) -> None:
        """Load model and index.

        Raises:
            ValueError: a part is missing, or the index was made from other weights; the message says what to run.
        """
        run_dir = Path(run_dir)
        export_dir, index_dir = run_dir / "export", run_dir / "search"
        if not run_dir.is_dir():
            raise ValueError(f'{run_dir} is no folder; {REMEDY} to runs/demo: `conan search runs/demo "..."`')
        for path in (export_dir, index_dir / SUMMARY, index_dir / EMBEDDINGS, index_dir / DOCUMENTS):
            if not path.exists():
                raise ValueError(f"{path} is missing, so {run_dir} can't be searched; {REMEDY}")
        summary = json.loads((index_dir / SUMMARY).read_text(encoding="utf-8"))
        if summary["weights_sha256"] != weights_digest(export_dir):
            raise ValueError(
                f"the index {index_dir} was made from other weights than those in {export_dir}; {REMEDY} anew"
            )
        self.documents = _read_documents(index_dir / DOCUMENTS)
        self._embeddings = np.load(index_dir / EMBEDDINGS).astype(np.float32)  # [n, e]
        if self._embeddings.shape != (len(self.documents), summary["dim"]):
            raise ValueError(
                f"{index_dir / EMBEDDINGS} has shape {self._embeddings.shape} but {DOCUMENTS} {len(self.documents)} rows"
                f" and {SUMMARY} dim={summary['dim']}; {REMEDY} anew"
            )
        self._is_stdlib = np.array([row["id"].startswith(f"{STDLIB}:") for row in self.documents])  # bool [n]
        self._model = _load_model(export_dir)
        self._bm25: Bm25Index | None = None

    def search(
        self, question: str, *, k: int = 10, bm25: bool = False, raw: bool = False, stdlib_only: bool = False
    ) -> list[SearchHit]:
        """The k best functions for a question.

        Args:
            stdlib_only: rank the standard library's functions only, which are the same in every installation.
            bm25: fuse with BM25 (stop words, stemming) by reciprocal rank.
            raw: give the model the question as typed, instead of split and lower-cased words.
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        prepared = prepare_query(question)
        text = question if raw else prepared
        if not text.strip():
            raise ValueError(f"the question {question!r} has no words to search for")
        vector = np.asarray(self._model.encode_query(text, show_progress_bar=False), dtype=np.float32)
        scores = self._embeddings @ (vector / max(float(np.linalg.norm(vector)), 1e-12))  # [n, e] @ [e] -> [n]
        ranked = np.lexsort((np.arange(len(scores)), -scores))
        if stdlib_only:
            ranked = ranked[self._is_stdlib[ranked]]
        if not bm25:
            return [self._hit(i, float(scores[i])) for i in ranked[:k].tolist()]
        if self._bm25 is None:
            self._bm25 = Bm25Index([row["text"] for row in self.documents], SEARCH_BM25)
        depth = max(FUSION_DEPTH, k)
        words = self._bm25.rank([prepared], len(self.documents) if stdlib_only else depth)[1][0]
        words = words[words >= 0]
        if stdlib_only:
            words = words[self._is_stdlib[words]]
        fused = fuse_rankings([ranked[:depth].tolist(), words[:depth].tolist()])
        return [self._hit(i, score) for i, score in fused[:k]]

    def _hit(self, number: int, score: float) -> SearchHit:
        row = self.documents[number]
        lines = row["code"].splitlines()
        snippet = "\n".join(lines[:SNIPPET_LINES] + (["    ..."] if len(lines) > SNIPPET_LINES else []))
        return SearchHit(score, row["title"], row["file"], row["line"], row["held_out"], snippet)


def fuse_rankings(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion: (document number, score) in the order (-score, number)."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, number in enumerate(ranking, start=1):
            scores[number] = scores.get(number, 0.0) + 1 / (FUSION_CONSTANT + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def hit_at_k(index: SearchIndex, questions_file: str | Path, *, k: int = 10, bm25: bool = False) -> HitReport:
    """Ask the questions of a YAML file (`questions`: list of `question` and `expected` titles).

    Only standard library functions are ranked: the expected ones are from there, and which other packages with equally
    good answers are installed differs between machines.
    """
    questions = read_questions(questions_file)
    titles = {row["title"] for row in index.documents}
    ranks: dict[str, int | None] = {}
    for question, expected in questions.items():
        if titles.isdisjoint(expected):
            raise ValueError(f"none of {', '.join(sorted(expected))} is indexed, so {question!r} can't be answered")
        hits = index.search(question, k=k, bm25=bm25, stdlib_only=True)
        ranks[question] = next((rank for rank, hit in enumerate(hits, start=1) if hit.title in expected), None)
    return HitReport(k, ranks)


def read_questions(path: str | Path) -> dict[str, frozenset[str]]:
    """Questions and the titles that answer them."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    try:
        return {row["question"]: frozenset(row["expected"]) for row in content["questions"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a list `questions` of rows with `question` and `expected`") from error


def format_hits(hits: Sequence[SearchHit], num_documents: int) -> str:
    """Hits as text for a terminal."""
    parts = []
    for rank, hit in enumerate(hits, start=1):
        held_out = "  [held out of training]" if hit.held_out else ""
        snippet = "\n".join(f"      {line}" for line in hit.snippet.splitlines())
        parts.append(f"{rank:2}. {hit.title}  ({hit.score:.3f})  {hit.file}:{hit.line}{held_out}\n{snippet}")
    parts.append(f"{num_documents} functions searched: all that were extracted, held out of training or not.")
    return "\n".join(parts)


def run_search(run_dir: str | Path, question: str, *, k: int = 10, bm25: bool = False, raw: bool = False) -> str:
    """What `conan search` prints."""
    index = SearchIndex(run_dir)
    return format_hits(index.search(question, k=k, bm25=bm25, raw=raw), len(index.documents))


def weights_digest(export_dir: str | Path) -> str:
    """SHA-256 over the weight files of an exported folder and its modules, in the order of their names."""
    files = sorted(Path(export_dir).rglob("*.safetensors"))
    if not files:
        raise ValueError(f"{export_dir} holds no exported model (*.safetensors); {REMEDY}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _load_model(export_dir: Path) -> SentenceTransformer:
    return SentenceTransformer(str(export_dir), device="cpu", local_files_only=True)


def _read_documents(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {REMEDY}")
    rows = read_jsonl(
        path, {"id": str, "title": str, "file": str, "line": int, "text": str, "code": str, "held_out": bool}
    )
    if not rows:
        raise ValueError(f"{path} has no rows; {REMEDY}")
    return rows


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole: under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(path)
