"""What preprocess_pairs makes of rows, by its definition in data_tools/README.md, with dicts and lists alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.data.indexed_files import IndexedFile
from megatron_conan.data.tokenizer import Tokenizer

DTYPES = {"score": np.float32, "label": np.int32}
"""Of the arrays that don't hold int64."""
STORED_AS = {"bitext": "retrieval", "pairclass": "sts"}


def as_list(value: Any) -> list[str]:
    """A text or several, or none."""
    return [value] if isinstance(value, str) else list(value or [])


def texts_of(task: str, row: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """(query, positives, negatives) of a good row, as they stand there."""
    if task == "retrieval":
        instruction = row.get("instruction")
        query = row["query"] if instruction is None else f"{instruction}\n{row['query']}"
        positives = as_list(row.get("positive")) or as_list(row.get("pos"))
        return query, positives, as_list(row.get("negative")) or as_list(row.get("neg"))
    if task == "classification":
        return row["text"], [], []
    if task == "sft":
        return f"{row['instruction']}\n{row.get('input') or ''}\n", [row["output"]], []
    return row["text1"], [row["text2"]], []


class Reference:
    """The texts, arrays and counts that rows and a corpus of documents become."""

    def __init__(self, task: str, rows: Sequence[dict[str, Any]], corpus: Sequence[str] = ()) -> None:
        self.task = STORED_AS.get(task, task)
        self.ids: dict[str, int] = {}
        """Texts and their ids."""
        self.counts: dict[str, Any] = {}
        self.arrays: dict[str, list[Any]] = {}
        numbered = []
        dropped = 0
        for row in rows:
            query, positives, negatives = texts_of(task, row)
            distinct = list(dict.fromkeys(positives))
            kept = [text for text in dict.fromkeys(negatives) if text not in distinct]
            dropped += len(negatives) - len(kept)
            numbered.append([[self._id(text) for text in texts] for texts in ([query], distinct, kept)])
        documents = {self._id(text) for text in corpus if text.strip()}
        if task == "classification":
            documents.update(query for (query,), _, _ in numbered)
            numbered = self._classes(rows, numbered)
        self._fill(numbered, documents)
        if self.task == "sts":
            self.arrays["score"] = [float(row["score" if task == "sts" else "label"]) for row in rows]
        self.counts |= {"rows": len(numbered), "texts": len(self.ids), "documents": len(self.arrays["corpus"])}
        self.counts |= {"positives": len(self.arrays["positives"]), "negatives": len(self.arrays["negatives"])}
        self.counts |= {"task": self.task, "negatives_dropped": dropped}

    def check(self, prefix: Path, tokenizer: Tokenizer, summary: dict[str, Any]) -> None:
        """Raise AssertionError for a difference to the files of `prefix`."""
        names = {path.name.removeprefix(f"{prefix.name}.") for path in prefix.parent.glob(f"{prefix.name}.*.npy")}
        assert names == {f"{name}.npy" for name in self.arrays}
        for name, expected in self.arrays.items():
            found = np.load(prefix.with_name(f"{prefix.name}.{name}.npy"))
            assert found.dtype == DTYPES.get(name, np.int64), name
            assert found.tolist() == np.array(expected, found.dtype).tolist(), name
        tokens = [tokenizer.encode(text) for text in self.ids]
        store = IndexedFile(prefix)
        assert [store[i].tolist() for i in range(len(store))] == tokens
        for name, key in (("query", "query"), ("positives", "positive"), ("negatives", "negative")):
            lengths = [len(tokens[i]) for i in self.arrays[name]]
            self.counts[f"mean_{key}_length"] = round(sum(lengths) / len(lengths), 2) if lengths else 0.0
        self.counts["tokens"] = sum(map(len, tokens))
        assert {name: summary[name] for name in self.counts} == self.counts

    def _id(self, text: str) -> int:
        return self.ids.setdefault(text, len(self.ids))

    def _fill(self, numbered: list[list[list[int]]], documents: set[int]) -> None:
        queries = [query for (query,), _, _ in numbered]
        self.arrays["query"] = queries
        self.arrays["query_order"] = sorted(range(len(queries)), key=lambda row: (queries[row], row))
        for place, name in ((1, "positives"), (2, "negatives")):
            lists = [row[place] for row in numbered]
            self.arrays[name] = [i for of_row in lists for i in of_row]
            self.arrays[f"{name}_offsets"] = [sum(map(len, lists[:row])) for row in range(len(lists) + 1)]
            documents.update(self.arrays[name])
        self.arrays["corpus"] = sorted(documents)

    def _classes(self, rows: Sequence[dict[str, Any]], numbered: list[list[list[int]]]) -> list[list[list[int]]]:
        """The rows that are kept."""
        first: dict[int, str] = {}
        kinds: Counter[str] = Counter()
        kept = []
        for row, content in zip(rows, numbered, strict=True):
            text, label = content[0][0], str(row["label"])
            if text in first:
                kinds["repeated_rows" if first[text] == label else "conflicting_rows"] += 1
            else:
                first[text] = label
                kept.append((label, content))
        sizes = Counter(first.values())
        kinds["single_rows"] = sum(sizes[label] == 1 for label, _ in kept)
        kept = [(label, content) for label, content in kept if sizes[label] > 1]
        names = list(dict.fromkeys(label for label, _ in kept))
        labels = [names.index(label) for label, _ in kept]
        self.arrays["label"] = labels
        self.arrays["label_rows"] = sorted(range(len(labels)), key=lambda row: (labels[row], row))
        self.arrays["label_offsets"] = [sum(label < bound for label in labels) for bound in range(len(names) + 1)]
        self.counts = {name: kinds[name] for name in ("repeated_rows", "conflicting_rows", "single_rows")}
        self.counts |= {"classes": len(names), "labels": {name: sizes[name] for name in names}}
        return [content for _, content in kept]
