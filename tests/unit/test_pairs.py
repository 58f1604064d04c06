"""Pair files: what is written is what PairStore gives back, mistakes are named; and texts collated."""

import math

import numpy as np
import pytest
from pair_stores import write_rows
from sample_texts import DOCUMENTS, load_tool, run_script

from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer

RETRIEVAL = [
    {"query": "what is sharded", "positive": DOCUMENTS[0], "negative": [DOCUMENTS[1], DOCUMENTS[2]]},
    {"query": "词表", "pos": [DOCUMENTS[5], DOCUMENTS[6], DOCUMENTS[5]], "neg": [DOCUMENTS[0]]},
    {"query": "what is mined", "positive": [DOCUMENTS[2]]},
    {"query": "merge", "positive": DOCUMENTS[10], "negative": [DOCUMENTS[10], DOCUMENTS[11], DOCUMENTS[3], "x", "y"]},
]
STS = [{"text1": "a cat", "text2": "a dog", "score": 2.5}, {"text1": "a cat", "text2": "the cat", "score": 4}]


@pytest.fixture
def retrieval(tmp_path, tokenizer):
    rows = write_rows(tmp_path / "in.jsonl", RETRIEVAL)
    corpus = write_rows(
        tmp_path / "corpus.jsonl", [{"text": "only in the corpus"}, {"text": DOCUMENTS[0]}, {"text": ""}]
    )
    preprocess_pairs("retrieval", [rows], tokenizer.path, tmp_path / "pairs", corpus=[corpus])
    return PairStore(tmp_path / "pairs", tokenizer)


def test_store_gives_back_every_text_and_row(retrieval, tokenizer):
    store = retrieval
    assert (store.name, store.task, store.num_rows) == ("pairs", "retrieval", 4)
    assert [store.text(store.query(row)) for row in range(4)] == [row["query"] for row in RETRIEVAL]
    assert [store.text(i) for i in store.positives(0)] == [DOCUMENTS[0]]
    assert [store.text(i) for i in store.positives(1)] == [DOCUMENTS[5], DOCUMENTS[6]]
    assert [store.text(i) for i in store.negatives(0)] == [DOCUMENTS[1], DOCUMENTS[2]]
    assert [store.text(i) for i in store.negatives(1)] == [DOCUMENTS[0]]
    assert store.negatives(2).tolist() == []
    assert [store.text(i) for i in store.negatives(3)] == [DOCUMENTS[11], DOCUMENTS[3], "x", "y"]  # not its positive
    assert math.isnan(store.score(0))
    # one id a distinct text: DOCUMENTS[0] is positive, negative and in the corpus
    assert store.negatives(1)[0] == store.positives(0)[0]
    texts = [store.text(i) for i in range(store.num_texts)]
    assert len(set(texts)) == len(texts) == store.summary["texts"]
    queries = {row["query"] for row in RETRIEVAL}
    assert {store.text(i) for i in store.corpus_ids} == set(texts) - queries
    assert "only in the corpus" in texts
    assert np.all(np.diff(store.corpus_ids) > 0)
    assert store.corpus_ids.dtype == store.positives(0).dtype == np.int64
    for i in range(store.num_texts):
        assert store.tokens(i).dtype == np.int32
        assert store.tokens(i).tolist() == tokenizer.encode(store.text(i))
        assert store.lengths[i] == len(store.tokens(i))
    queries = [store.query(row) for row in store.query_order]
    assert sorted(store.query_order.tolist()) == list(range(4))
    assert queries == sorted(queries)
    assert store.summary["rows"] == 4
    assert store.summary["negatives_dropped"] == 1
    assert store.summary["mean_query_length"] == pytest.approx(
        np.mean([len(tokenizer.encode(row["query"])) for row in RETRIEVAL]), abs=0.01
    )


def test_sts_rows_keep_scores(tmp_path, tokenizer):
    preprocess_pairs("sts", [write_rows(tmp_path / "in.jsonl", STS)], tokenizer.path, tmp_path / "sts")
    store = PairStore(tmp_path / "sts", tokenizer)
    assert [store.score(row) for row in range(2)] == [2.5, 4.0]
    assert store.query(0) == store.query(1)
    assert [store.text(store.positives(row)[0]) for row in range(2)] == ["a dog", "the cat"]
    assert store.scores.dtype == np.float32
    assert store.negative_ids.tolist() == []


def test_workers_write_the_same_bytes(tmp_path, tokenizer):
    rows = [{"query": f"query {i} " * 500, "positive": f"{i} {text}" * 20} for i, text in enumerate(DOCUMENTS * 40)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        preprocess_pairs("retrieval", [source], tokenizer.path, tmp_path / str(workers) / "p", num_workers=workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    expected = [
        "bin",
        "idx",
        "json",
        *(f"{name}.npy" for name in ("corpus", "negatives", "negatives_offsets", "query_order")),
    ]
    assert names == sorted(f"p.{name}" for name in [*expected, "positives.npy", "positives_offsets.npy", "query.npy"])
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert PairStore(tmp_path / "3" / "p", tokenizer).num_rows == len(rows)


BAD_ROWS = [
    ("retrieval", {"positive": "x"}, "key 'query' is missing (found 'positive')"),
    ("retrieval", {"query": "x"}, "key 'positive' is missing or empty"),
    ("retrieval", {"query": "x", "positive": []}, "key 'positive' is missing or empty"),
    ("retrieval", {"query": " ", "positive": "x"}, "key 'query' is empty"),
    ("retrieval", {"query": "x", "positive": ["y", ""]}, "key 'positive' holds an empty text"),
    ("retrieval", {"query": "x", "pos": "y", "neg": [3]}, "key 'neg' holds int, not a string"),
    ("retrieval", {"query": "x", "pos": "y", "positive": "y"}, "keys 'positive' and 'pos' mean the same"),
    ("sts", {"text1": "x", "text2": "y"}, "key 'score' must be a finite number, found None"),
    ("sts", {"text1": "x", "text2": "y", "score": "3"}, "key 'score' must be a finite number, found '3'"),
    ("sts", {"text1": "x", "text2": "y", "score": float("nan")}, "key 'score' must be a finite number, found nan"),
    ("sft", {"instruction": "x"}, "key 'output' is missing"),
    ("sft", {"instruction": "x", "input": 1, "output": "y"}, "key 'input' holds int, not a string"),
]
GOOD_ROWS = {"retrieval": RETRIEVAL[0], "sts": STS[0], "sft": {"instruction": "say", "output": "word"}}


@pytest.mark.parametrize(("task", "row", "reason"), BAD_ROWS)
def test_bad_rows_are_named_and_nothing_is_left(tmp_path, tokenizer, task, row, reason):
    source = write_rows(tmp_path / "in.jsonl", [GOOD_ROWS[task], row])
    with pytest.raises(ValueError, match=r"in\.jsonl:2: ") as error:
        preprocess_pairs(task, [source], tokenizer.path, tmp_path / "out")
    assert reason in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_other_mistakes_are_explained(tmp_path, tokenizer):
    source = write_rows(tmp_path / "in.jsonl", RETRIEVAL)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl: no rows"):
        preprocess_pairs("retrieval", [empty], tokenizer.path, tmp_path / "out")
    with pytest.raises(ValueError, match="task='qa' is unknown; use one of retrieval, sts, sft"):
        preprocess_pairs("qa", [source], tokenizer.path, tmp_path / "out")
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        preprocess_pairs("retrieval", [source], tokenizer.path, tmp_path / "out", num_workers=0)
    with pytest.raises(ValueError, match=r"make it with: python data_tools/preprocess_pairs\.py --task"):
        PairStore(tmp_path / "out", tokenizer)
    preprocess_pairs("retrieval", [source], tokenizer.path, tmp_path / "out")
    (tmp_path / "out.positives.npy").unlink()
    with pytest.raises(ValueError, match=r"out\.positives\.npy does not exist; write the files of .*out anew"):
        PairStore(tmp_path / "out", tokenizer)


def test_another_tokenizer_is_refused(retrieval, tmp_path, tokenizer):
    (tmp_path / "other.model").write_bytes(train_tokenizer(DOCUMENTS, 500))
    other = Tokenizer(tmp_path / "other.model")
    with pytest.raises(ValueError, match=r"run data_tools/preprocess_pairs\.py again") as error:
        PairStore(retrieval.prefix, other)
    assert tokenizer.sha256 in str(error.value)
    assert other.sha256 in str(error.value)


def test_tool_runs_as_documented(tmp_path, tokenizer):
    source = write_rows(tmp_path / "in.jsonl", RETRIEVAL)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one more document\n", encoding="utf-8")
    common = ["--tokenizer-model", tokenizer.path, "--output-prefix", tmp_path / "out", "--corpus", corpus]
    result = run_script("preprocess_pairs", "--task", "retrieval", "--input", source, *common, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert "4 rows" in result.stdout
    assert PairStore(tmp_path / "out", tokenizer).summary["documents"] == 11
    write_rows(source, [RETRIEVAL[0], {"query": "q"}])
    result = run_script("preprocess_pairs", "--task", "retrieval", "--input", source, *common)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: {source}:2: ")
    with pytest.raises(SystemExit) as stop:
        load_tool("preprocess_pairs").main(["--task", "unknown"])
    assert stop.value.code == 2
