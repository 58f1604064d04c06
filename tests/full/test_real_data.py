"""Every file of the external data goes through the data tools, and comes out as it went in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer

pytestmark = pytest.mark.full


def rows_of(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


@pytest.fixture(scope="module")
def real_tokenizer(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    tool = Path(__file__).parents[2] / "data_tools" / "train_tokenizer.py"
    options = ["--vocab-size", "32000", "--output-prefix", str(prefix), "--workers", "2"]
    subprocess.run([sys.executable, str(tool), "--input", str(real_data / "lm"), *options], check=True)
    return Tokenizer(f"{prefix}.model")


def test_documents_read_back_by_megatron_core_are_the_input(
    real_data: Path, real_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    summary = preprocess_documents(
        [real_data / "lm"], real_tokenizer.path, tmp_path / "lm", append_eod=True, num_workers=2
    )
    texts = [row["text"] for path in sorted((real_data / "lm").glob("*.jsonl")) for row in rows_of(path)]
    dataset = IndexedDataset(str(tmp_path / "lm"))
    assert len(dataset) == len(texts) == summary["documents"]
    assert summary["tokens"] == int(dataset.sequence_lengths.sum())
    assert summary["bytes"] == sum(len(text.encode()) for text in texts)
    for number, text in enumerate(texts):
        ids = dataset[number]
        assert ids[-1] == real_tokenizer.eos_id
        assert real_tokenizer.decode(ids[:-1].tolist()) == text.replace("\u2581", " "), number


def test_parallel_documents_hold_both_orders(real_data: Path, real_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    summary = preprocess_documents(
        [real_data / "bitext"], real_tokenizer.path, tmp_path / "bitext", document_format="bitext", num_workers=2
    )
    dataset = IndexedDataset(str(tmp_path / "bitext"))
    expected = []
    for path in sorted((real_data / "bitext").glob("*.jsonl")):
        first, second = path.stem.removeprefix("tatoeba_").split("-")
        for row in rows_of(path):
            one, other = f"[{first}] {row['text1']}", f"[{second}] {row['text2']}"
            expected += [f"{one}\n{other}", f"{other}\n{one}"]
    assert summary["documents"] == len(expected) == len(dataset)
    for number, text in enumerate(expected):
        assert real_tokenizer.decode(dataset[number].tolist()) == text.replace("\u2581", " ")


def sources(data: Path) -> Iterator[tuple[str, Path]]:
    """(task, file) of all pair files."""
    for task, pattern in [
        ("retrieval", "pairs/*.jsonl"),
        ("sts", "sts/*.jsonl"),
        ("pairclass", "pairclass/*.jsonl"),
        ("bitext", "bitext/*.jsonl"),
        ("classification", "classification/*/*.jsonl"),
    ]:
        for path in sorted(data.glob(pattern)):
            yield task, path


def test_every_pair_file_keeps_its_rows_and_texts(real_data: Path, real_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Row counts are the files'; a sample of rows is decoded and compared."""
    done = Counter()
    for task, path in sources(real_data):
        prefix = tmp_path / "pairs"
        summary = preprocess_pairs(task, [path], real_tokenizer.path, prefix)
        rows = list(rows_of(path))
        store = PairStore(prefix, real_tokenizer)
        assert summary["inputs"] == [{"file": path.name, "rows": len(rows)}]
        if task == "classification":
            dropped = summary["repeated_rows"] + summary["conflicting_rows"] + summary["single_rows"]
            assert store.num_rows + dropped == len(rows), path
            assert {store.text(i) for i in store.query_ids} <= {row["text"].replace("\u2581", " ") for row in rows}
        else:
            assert store.num_rows == len(rows), path
            for number in np.linspace(0, len(rows) - 1, 200).astype(int).tolist():
                check_row(store, number, rows[number])
        done[task] += 1
    folders = ("pairs", "sts", "pairclass", "bitext", "classification")
    assert done.total() == sum(len(list((real_data / folder).rglob("*.jsonl"))) for folder in folders) > 100


def check_row(store: PairStore, number: int, row: dict) -> None:
    query, positive = row.get("query", row.get("text1")), row.get("pos", row.get("text2"))
    positives = positive if isinstance(positive, list) else [positive]
    negatives = row.get("neg", [])
    shown = [text.replace("\u2581", " ") for text in (query, *positives, *negatives)]
    assert store.text(store.query(number)) == shown[0]
    found = [store.text(i) for i in store.positives(number)]
    assert found == list(dict.fromkeys(shown[1 : 1 + len(positives)]))
    others = [text for text in dict.fromkeys(shown[1 + len(positives) :]) if text not in found]
    assert [store.text(i) for i in store.negatives(number)] == others
    if "score" in row or "label" in row:
        assert store.score(number) == pytest.approx(float(row.get("score", row.get("label"))))
