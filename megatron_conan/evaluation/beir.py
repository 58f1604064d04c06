"""Reads retrieval data in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/test.tsv."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QRELS_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class RetrievalData:
    """A corpus, the queries that have judgements, and these judgements."""

    name: str
    document_ids: list[str]
    documents: list[str]
    """As the model reads them: title and text joined, as mteb does it."""
    query_ids: list[str]
    queries: list[str]
    qrels: dict[str, dict[str, int]]
    """query id -> document id -> relevance, above 0 for relevant ones."""


def read_beir(folder: str | Path, split: str = "test") -> RetrievalData:
    """Reads a folder; queries without judgements are left out.

    Raises:
        ValueError: a file is missing or a row is malformed (the message names file and line), an id occurs twice, or no
            query has a judgement.
    """
    folder = Path(folder)
    corpus_file, queries_file, qrels_file = (
        folder / "corpus.jsonl",
        folder / "queries.jsonl",
        folder / "qrels" / f"{split}.tsv",
    )
    missing = [str(path) for path in (corpus_file, queries_file, qrels_file) if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} is no BEIR folder: {', '.join(missing)} not found")
    documents = {row["_id"]: join_title(row.get("title") or "", row["text"]) for row in _read_rows(corpus_file)}
    texts = {row["_id"]: row["text"] for row in _read_rows(queries_file)}
    qrels = {query: judged for query, judged in _read_qrels(qrels_file).items() if query in texts}
    if not qrels:
        raise ValueError(f"no query of {queries_file} occurs in {qrels_file}")
    query_ids = [query for query in texts if query in qrels]
    return RetrievalData(
        name=folder.name,
        document_ids=list(documents),
        documents=list(documents.values()),
        query_ids=query_ids,
        queries=[texts[query] for query in query_ids],
        qrels=qrels,
    )


def join_title(title: str, text: str) -> str:
    """A document as one text, by mteb's rule."""
    return f"{title} {text}".strip() if title else text.strip()


def read_jsonl(path: Path, fields: dict[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """Reads rows and checks that each has `fields` (name -> type); a ValueError names file and line."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
            wrong = [
                name
                for name, kind in fields.items()
                if not isinstance(row, dict) or not isinstance(row.get(name), kind)
            ]
            if wrong:
                raise ValueError(
                    f"{path}:{number}: field {wrong[0]!r} is missing or of another type; a row needs "
                    f"{', '.join(fields)}"
                )
            rows.append(row)
    return rows


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path, {"_id": str, "text": str})
    seen: set[str] = set()
    for row in rows:
        if row["_id"] in seen:
            raise ValueError(f"{path}: _id {row['_id']!r} occurs twice")
        seen.add(row["_id"])
    return rows


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            parts = line.rstrip("\r\n").split("\t")
            if (number == 1 and parts == QRELS_HEADER) or not line.strip():
                continue
            try:
                query, document, score = parts
                qrels.setdefault(query, {})[document] = int(score)
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number}: expected query-id, corpus-id and a whole score, tab-separated, "
                    f"found {line.rstrip()!r}"
                ) from error
    return qrels
