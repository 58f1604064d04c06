"""The demo's data, extracted from a few standard library packages: no leaks, same for any number of workers, schemas."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_conan.data.code_functions import SourceFile, first_sentence, is_held_out, is_skipped, read_functions
from megatron_conan.data.prepare import prepare_query, split_words

SCRIPT = Path(__file__).parents[2] / "data_tools" / "extract_code.py"
PACKAGES = [
    *("json", "email", "http", "urllib", "xml", "asyncio", "unittest", "logging", "collections", "multiprocessing"),
    *("argparse", "zipfile", "shutil", "tarfile", "datetime", "statistics", "random", "typing", "inspect", "ast"),
    *("pathlib", "difflib", "doctest", "csv", "calendar", "threading", "subprocess", "socket", "ssl", "decimal"),
]
TRAINING_FILES = ("lm.jsonl", "sft.jsonl", "weak.jsonl", "train.jsonl")


def extract(output: Path, workers: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--workers", str(workers), "--package", *PACKAGES]
    return subprocess.run([*command, "--num-queries", "100"], capture_output=True, text=True, check=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("extracted") / "data"
    extract(output, workers=1)
    return output


def training_texts(row: dict[str, Any]) -> list[str]:
    return [row[key] for key in ("text", "query", "positive", "instruction", "input", "output") if key in row]


def test_two_workers_write_the_same_bytes(data: Path, tmp_path: Path) -> None:
    extract(tmp_path, workers=2)
    files = sorted(str(p.relative_to(data)) for p in data.rglob("*") if p.is_file())
    assert files == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    for file in files:
        assert (data / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_schemas_and_counts(data: Path) -> None:
    columns = {
        "lm.jsonl": {"text", "source"},
        "sft.jsonl": {"instruction", "input", "output"},
        "weak.jsonl": {"query", "positive"},
        "train.jsonl": {"query", "positive"},
        "eval/corpus.jsonl": {"_id", "title", "text"},
        "eval/queries.jsonl": {"_id", "text"},
        "search.jsonl": {"id", "title", "file", "line", "text", "code", "held_out"},
    }
    summary = json.loads((data / "summary.json").read_text())
    for file, keys in columns.items():
        rows = read_rows(data / file)
        assert len(rows) == summary["rows"][file] > 0
        assert all(keys <= row.keys() for row in rows)
        assert all(row.get(key) for row in rows for key in keys - {"title", "held_out"})
    assert len(read_rows(data / "train.jsonl")) > 500
    documents = {row["_id"] for row in read_rows(data / "eval/corpus.jsonl")}
    queries = {row["_id"] for row in read_rows(data / "eval/queries.jsonl")}
    assert len(queries) == 100
    assert all(query.startswith("stdlib") for query in queries)
    with (data / "eval/qrels/test.tsv").open() as file:
        judgements = list(csv.DictReader(file, delimiter="\t"))
    assert {row["query-id"] for row in judgements} == queries
    assert {row["corpus-id"] for row in judgements} <= documents


def test_no_held_out_file_trains(data: Path) -> None:
    held_out_files = {row["file"] for row in read_rows(data / "eval/corpus.jsonl")}
    held_out_files |= {row["file"] for row in read_rows(data / "search.jsonl") if row["held_out"]}
    assert held_out_files
    for file in TRAINING_FILES:
        assert not held_out_files.intersection(row["file"] for row in read_rows(data / file)), file


def test_no_held_out_text_trains(data: Path) -> None:
    """No test query or body as a whole, and hardly any run of 12 words of a held-out body, is in training text."""
    queries = read_rows(data / "eval/queries.jsonl")
    corpus = read_rows(data / "eval/corpus.jsonl")
    texts = [text for file in TRAINING_FILES for row in read_rows(data / file) for text in training_texts(row)]
    prepared = {prepare_query(text) for text in texts}
    assert prepared.isdisjoint(row["text"] for row in queries)
    assert prepared.isdisjoint(row["text"] for row in corpus)
    padded = [f" {' '.join(split_words(text))} " for text in texts]
    for phrase in (" ".join(split_words(row["raw"])) for row in queries):
        if len(phrase.split()) >= 6:
            assert not any(f" {phrase} " in text for text in padded), phrase

    def runs(text: str) -> set[tuple[str, ...]]:
        words = split_words(text)
        return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}

    held_out_runs = set().union(*(runs(row["raw"]) for row in corpus))
    training_runs = set().union(*(runs(text) for text in texts))
    assert len(held_out_runs) > 1000
    assert len(held_out_runs & training_runs) / len(held_out_runs) < 0.01


def test_raw_share(data: Path) -> None:
    """About 15% of the rows keep their raw text, chosen for each file apart."""
    for file in ("weak.jsonl", "train.jsonl"):
        rows = read_rows(data / file)
        share = sum(row["raw"] for row in rows) / len(rows)
        assert 0.10 < share < 0.20, (file, share)
        assert all(row["query"] == prepare_query(row["query"]) for row in rows if not row["raw"])
        assert (
            any("(" in row["positive"] for row in rows if row["raw"] and file == "train.jsonl") or file != "train.jsonl"
        )


def test_unknown_package_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), "--package", "json", "no_such_package"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "no_such_package" in result.stderr
    assert "Traceback" not in result.stderr


def test_read_functions(tmp_path: Path) -> None:
    """Docstrings leave the code, comments stay; nesting, decorators and one-line bodies are handled."""
    (tmp_path / "mod.py").write_text(
        'class Reader(Base):\n    """Reads things. More."""\n\n    # keep me\n    @property\n    def first_item(self):\n'
        '        """first_item(self) -> int\n\n        Return the :func:`first` item of all.\n        """\n'
        '        return self.items[0]\n\n    def undocumented(self): pass\n\ndef one(): "Only a docstring here."\n'
        "if True:\n    def inner(a, *, b=1):\n        'Inner function in a branch.'\n        return a\n"
    )
    functions = read_functions(SourceFile("stdlib", str(tmp_path), "mod.py"))
    assert functions is not None
    assert [f.name for f in functions] == ["mod.Reader", "mod.Reader.first_item", "mod.inner"]
    reader, first_item, inner = functions
    assert reader.query == "Reads things."
    assert "# keep me" in reader.code
    assert "Reads" not in reader.code
    assert "Return the" not in reader.code
    assert first_item.query == "Return the first item of all."
    assert first_item.code == "def first_item(self):\n    return self.items[0]"
    assert inner.signature == "mod.inner(a, b)"
    (tmp_path / "broken.py").write_text("def f(:\n")
    assert read_functions(SourceFile("stdlib", str(tmp_path), "broken.py")) is None


def test_split_by_file_name_alone() -> None:
    """A fixed choice: a changed hash would move files between training and evaluation."""
    modules = [f"{name}.py" for name in ("abc", "ast", "calendar", "copy", "csv", "glob", "gzip", "heapq", "shutil")]
    assert [name for name in modules if is_held_out("stdlib", name)] == ["ast.py", "glob.py"]
    assert is_held_out("stdlib", "csv.py") == is_held_out("stdlib", "csv/__init__.py")
    share = sum(is_held_out("torch", f"torch/file{i}.py") for i in range(5000)) / 5000
    assert 0.06 < share < 0.10
    assert is_skipped("numpy/tests/test_x.py")
    assert is_skipped("pip/_vendor/rich/box.py")
    assert not is_skipped("unittest/mock.py")


def test_first_sentence() -> None:
    assert first_sentence("Open a file, e.g. a zip.\nThen more.") == "Open a file, e.g. a zip."
    assert first_sentence("add(a, b) -> Tensor\n\nAdds\nnumbers.") == "Adds numbers."
    assert first_sentence("") == ""
