"""inspect_dataset.py on odd entries of P.json, on corpora that lack documents, and on files cut or changed anywhere."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_texts import DOCUMENTS, load_tool

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.indexed_files import write_index
from megatron_conan.data.pair_files import preprocess_pairs

TOOL = load_tool("inspect_dataset")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer) -> Path:
    """A folder of whole files: docs, retrieval, classes."""
    folder = tmp_path_factory.mktemp("whole")
    texts = [{"text": text} for text in [*DOCUMENTS, "", DOCUMENTS[0]]]
    preprocess_documents([write_rows(folder / "d.jsonl", texts)], tokenizer.path, folder / "docs", append_eod=True)
    retrieval = [
        {"query": f"query {i}", "positive": [text, f"also {text}"], "negative": DOCUMENTS[i + 1 : i + 1 + i % 3]}
        for i, text in enumerate(DOCUMENTS[:9])
    ]
    preprocess_pairs("retrieval", [write_rows(folder / "r.jsonl", retrieval)], tokenizer.path, folder / "retrieval")
    classes = [{"text": text, "label": "abbb"[i % 4]} for i, text in enumerate([*DOCUMENTS, DOCUMENTS[0]])]
    classes.append({"text": "alone", "label": "c"})
    preprocess_pairs("classification", [write_rows(folder / "c.jsonl", classes)], tokenizer.path, folder / "classes")
    return folder


@pytest.fixture
def files(whole, tmp_path) -> Path:
    """A copy of the whole files, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def inspect(capsys) -> Callable[..., tuple[int, str]]:
    """Runs the tool; returns (exit code 0 or 1, what it printed)."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = 0
        try:
            TOOL.main([*map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().out

    return run


def told(output: str) -> list[str]:
    return [line for line in output.splitlines() if "damaged: " in line]


@pytest.mark.parametrize("name", ["docs", "retrieval", "classes"])
def test_whole_files_have_no_findings(whole, inspect, tokenizer, name):
    """Also where rows of classes were dropped, so that the inputs hold more than were written."""
    code, output = inspect("--prefix", whole / name, "--tokenizer-model", tokenizer.path, "--duplicates")
    assert code == 0, output


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("docs", "format", ["megatron_conan documents 1"]),
        ("docs", "left_out", {"duplicates": None}),
        ("docs", "rejected", {"malformed JSON": "1"}),
        ("docs", "rejected", 1),
        ("docs", "bytes", "160"),
        ("docs", "tokenizer_size", None),
        ("docs", "tokenizer_sha256", 5),
        ("docs", "inputs", {"a.jsonl": 3}),
        ("docs", "inputs", [{"file": "d.jsonl", "documents": 13, "tokens": 1}]),
        ("retrieval", "task", ["retrieval"]),
        ("retrieval", "task", None),
        ("retrieval", "inputs", [{"file": "r.jsonl", "rows": 8}]),
        ("classes", "inputs", [{"file": "c.jsonl", "rows": 13}]),
    ],
)
def test_entries_of_the_summary_that_cannot_be(files, inspect, name, key, value):
    path = files / f"{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    code, output = inspect("--prefix", files / name)
    assert code == 1, output
    assert any(f"{name}.json: {key}: " in line for line in told(output)), output


@pytest.mark.parametrize("key", ["task", "tokenizer_size", "rejected", "inputs"])
def test_entries_missing_in_the_summary(files, inspect, key):
    path = files / "retrieval.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    code, output = inspect("--prefix", files / "retrieval")
    assert code == 1, output
    assert any(f"retrieval.json: {key}: found None" in line for line in told(output)), output


@pytest.mark.parametrize("content", ["", "[" * 100_000, "{", "[]", "null", '"a"'])
def test_summaries_that_are_none(files, inspect, content):
    (files / "docs.json").write_text(content)
    code, output = inspect("--prefix", files / "docs")
    assert code == 1, output
    assert "docs.json: " in told(output)[0]


@pytest.mark.parametrize(
    ("name", "array"), [("retrieval", "positives"), ("retrieval", "negatives"), ("classes", "query")]
)
def test_texts_of_rows_that_are_not_in_the_corpus(files, inspect, name, array):
    missing = int(np.load(files / f"{name}.{array}.npy")[2])
    path = files / f"{name}.corpus.npy"
    corpus = np.load(path)
    np.save(path, corpus[corpus != missing])
    code, output = inspect("--prefix", files / name)
    assert code == 1, output
    assert any(f"corpus.npy: documents: text {missing} is missing" in line for line in told(output)), output


def test_any_changed_byte_of_the_index_is_found_and_none_raises(files, inspect):
    path = files / "docs.idx"
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        code, output = inspect("--prefix", files / "docs")
        assert code == 1, f"byte {place}: {output}"
        # that the last sequence is longer or shorter can be seen by the size of docs.bin alone
        assert re.search(r"docs\.(idx|bin)", " ".join(told(output))), f"byte {place}: {output}"


def test_any_cut_of_any_file_is_found_and_none_raises(files, inspect):
    for path in sorted([*files.glob("*.npy"), *files.glob("*.bin"), *files.glob("*.idx")]):
        content = path.read_bytes()
        for size in {0, 1, len(content) // 2, len(content) - 1} - {len(content)}:
            path.write_bytes(content[:size])
            code, output = inspect("--prefix", files / path.name.split(".")[0], "--quick")
            assert code == 1, f"{path.name} cut to {size}: {output}"
            assert path.name in " ".join(told(output)), f"{path.name} cut to {size}: {output}"
        path.write_bytes(content)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_files_without_tokens(tmp_path, inspect, tokenizer, lengths):
    write_index(tmp_path / "none.idx", np.array(lengths, np.int32), np.dtype(np.uint16))
    (tmp_path / "none.bin").touch()
    options = ["--tokenizer-model", tokenizer.path, "--duplicates", "--histogram", tmp_path / "lengths.svg"]
    code, output = inspect("--prefix", tmp_path / "none", *options)
    assert code == 0, output
    assert re.search(r"tokens +0\b", output)
    assert (tmp_path / "lengths.svg").exists() == bool(lengths)
    assert "lengths.svg" in output
