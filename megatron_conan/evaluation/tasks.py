"""Local data as mteb tasks: a BEIR folder becomes a retrieval task, an STS jsonl an STS task; nothing is downloaded.

The tasks are mteb's own abstract tasks with another `load_data`, so scores are computed by mteb's code alone.
"""

from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTask, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from megatron_conan.evaluation.beir import read_beir, read_jsonl
from megatron_conan.evaluation.random_state import keep_random_state

SPLIT = "test"
UNKNOWN_LANGUAGE = "und-Zyyy"


class LocalRetrieval(AbsTaskRetrieval):
    """Retrieval over a BEIR folder; main score nDCG@10."""

    data_loaded: bool = False
    path: Path

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Reads the folder; titles are already joined to the documents."""
        if self.data_loaded:
            return
        data = read_beir(self.path, SPLIT)
        self.dataset = {
            "default": {
                SPLIT: {
                    "corpus": Dataset.from_dict({"id": data.document_ids, "text": data.documents}),
                    "queries": Dataset.from_dict({"id": data.query_ids, "text": data.queries}),
                    "relevant_docs": {query: dict(judged) for query, judged in data.qrels.items()},
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


class LocalSTS(AbsTaskSTS):
    """Graded similarity of pairs; main score Spearman correlation of the cosine."""

    data_loaded: bool = False
    path: Path

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Reads rows {text1, text2, score}."""
        if self.data_loaded:
            return
        rows = read_jsonl(self.path, {"text1": str, "text2": str, "score": (int, float)})
        if len(rows) < 2:
            raise ValueError(f"{self.path} has {len(rows)} rows; a correlation needs at least 2")
        self.dataset = DatasetDict(
            {
                SPLIT: Dataset.from_dict(
                    {
                        "sentence1": [row["text1"] for row in rows],
                        "sentence2": [row["text2"] for row in rows],
                        "score": [float(row["score"]) for row in rows],
                    }
                )
            }
        )
        self.data_loaded = True


def load_task(source: str | Path, language: str = UNKNOWN_LANGUAGE) -> AbsTask:
    """Makes a task of a BEIR folder, an STS jsonl, or the name of one of mteb's tasks (which mteb may download).

    Args:
        language: of local data, as mteb writes it, e.g. `eng-Latn`; goes into the results only.
    """
    path = Path(source)
    with keep_random_state():
        if path.is_dir():
            return _make_task(LocalRetrieval, path.resolve(), "Retrieval", "ndcg_at_10", language)
        if path.is_file():
            return _make_task(LocalSTS, path.resolve(), "STS", "cosine_spearman", language)
        try:
            return mteb.get_task(str(source))
        except KeyError as error:
            raise ValueError(f"{source} is no folder, no file and no mteb task: {error}") from error


def _make_task(base: type[AbsTask], path: Path, kind: str, main_score: str, language: str) -> AbsTask:
    """A task of a class of its own: mteb takes `metadata` from the class and drops an instance's when it unloads data."""
    name = path.name.removesuffix(".jsonl")
    metadata = TaskMetadata(
        name=name,
        description=f"Local {kind} data: {name}",
        type=kind,
        category="t2t",
        modalities=["text"],
        dataset={"path": str(path), "revision": "local"},
        eval_splits=[SPLIT],
        eval_langs=[language],
        main_score=main_score,
    )
    return type(base.__name__, (base,), {"metadata": metadata, "path": path})()
