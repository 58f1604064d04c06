"""Labelled texts: which become rows, what lies on disk, what is dropped and counted, and every mistake named."""

import json
from collections import Counter

import numpy as np
import pytest
from sample_texts import run_script

from megatron_conan.data.label_files import rows_of_classes
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer

ROWS = [
    {"text": "alone", "label": "single"},
    {"text": "a rank", "label": "parallel"},
    {"text": "ein Satz", "label": 7},
    {"text": "a rank", "label": "other"},  # conflicting: the first label counts
    {"text": "a group", "label": "parallel"},
    {"text": "noch ein Satz", "label": "7"},  # the same class as the number
    {"text": "a rank", "label": "parallel"},  # repeated
    {"text": "词表", "label": "other"},
    {"text": "drei", "label": 7},
    {"text": "a mesh", "label": "parallel"},
    {"text": "词", "label": "other"},
]
KEPT = ["a rank", "ein Satz", "a group", "noch ein Satz", "词表", "drei", "a mesh", "词"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts_of(store, ids):
    return [store.text(i) for i in ids]


def check_invariants(store):
    """What every store of labelled texts promises, whatever the input."""
    labels, label_rows, offsets = store.labels, store.label_rows, store.label_offsets
    num_classes = store.summary["classes"]
    assert (labels.dtype, label_rows.dtype, offsets.dtype) == (np.int32, np.int64, np.int64)
    assert (labels.shape, label_rows.shape, offsets.shape) == (
        (store.num_rows,),
        (store.num_rows,),
        (num_classes + 1,),
    )
    assert all(isinstance(array, np.memmap) for array in (labels, label_rows, offsets, store.query_ids))
    assert num_classes >= 2
    assert np.diff(offsets).min() >= 2
    assert (offsets[0], offsets[-1]) == (0, store.num_rows)
    for label in range(num_classes):
        rows = store.rows_of_label(label)
        assert rows.tolist() == np.flatnonzero(labels == label).tolist()
    first_rows = [int(np.flatnonzero(labels == label)[0]) for label in range(num_classes)]
    assert first_rows == sorted(first_rows)  # classes are numbered by first appearance
    assert list(store.summary["labels"].values()) == np.diff(offsets).tolist()
    assert len(set(store.query_ids.tolist())) == store.num_rows == store.summary["rows"]
    assert store.corpus_ids.tolist() == list(range(store.num_texts))
    assert len(store.positive_ids) == len(store.negative_ids) == 0
    assert store.positive_offsets.tolist() == store.negative_offsets.tolist() == [0] * (store.num_rows + 1)


@pytest.fixture
def labelled(tmp_path, tokenizer):
    preprocess_pairs("classification", [write_rows(tmp_path / "in.jsonl", ROWS)], tokenizer.path, tmp_path / "out")
    return PairStore(tmp_path / "out", tokenizer)


def test_rows_are_the_distinct_texts_that_share_a_class(labelled):
    check_invariants(labelled)
    assert labelled.task == "classification"
    assert texts_of(labelled, labelled.query_ids) == KEPT
    assert labelled.labels.tolist() == [0, 1, 0, 1, 2, 1, 0, 2]
    assert labelled.label_rows.tolist() == [0, 2, 6, 1, 3, 5, 4, 7]
    assert labelled.label_offsets.tolist() == [0, 3, 6, 8]
    assert labelled.rows_of_label(1).tolist() == [1, 3, 5]
    assert texts_of(labelled, labelled.corpus_ids) == ["alone", *KEPT]
    assert labelled.positives(0).tolist() == labelled.negatives(7).tolist() == []
    assert labelled.scores is None
    assert labelled.query(3) == labelled.query_ids[3]


def test_summary_counts_every_line(labelled):
    summary = labelled.summary
    assert (summary["rows"], summary["texts"], summary["documents"]) == (8, 9, 9)
    assert (summary["positives"], summary["negatives"], summary["mean_positive_length"]) == (0, 0, 0.0)
    assert (summary["repeated_rows"], summary["conflicting_rows"], summary["single_rows"]) == (1, 1, 1)
    assert summary["classes"] == 3
    assert list(summary["labels"].items()) == [("parallel", 3), ("7", 3), ("other", 2)]
    assert json.loads(labelled.prefix.with_name("out.json").read_text(encoding="utf-8")) == summary


def test_rows_of_several_files_are_one_table_and_corpus_adds_texts(tmp_path, tokenizer):
    inputs = [write_rows(tmp_path / f"{i}.jsonl", ROWS[i::2]) for i in range(2)]
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": "mined"}, {"text": "a rank"}])
    summary = preprocess_pairs("classification", inputs, tokenizer.path, tmp_path / "out", corpus=[corpus])
    store = PairStore(tmp_path / "out", tokenizer)
    check_invariants(store)
    assert summary["documents"] == 10
    assert store.text(9) == "mined"
    assert sorted(texts_of(store, store.query_ids)) == sorted(KEPT)
    dropped = summary["repeated_rows"] + summary["conflicting_rows"] + summary["single_rows"]
    assert summary["rows"] + dropped == len(ROWS)


def test_grouping_equals_a_plain_count():
    rng = np.random.default_rng(5)
    for _ in range(200):
        lines = [(int(text), f"c{label}") for text, label in rng.integers(0, (20, 12), (int(rng.integers(2, 40)), 2))]
        ids = {text: number for number, text in enumerate(dict.fromkeys(text for text, _ in lines))}
        lines = [(ids[text], label) for text, label in lines]
        names = list(dict.fromkeys(label for _, label in lines))
        labels = np.array([names.index(label) for _, label in lines], np.int32)
        rows = rows_of_classes(np.array([text_id for text_id, _ in lines]), labels, names)
        first: dict[int, str] = {}
        for text_id, label in lines:
            first.setdefault(text_id, label)
        sizes = Counter(first.values())
        expected = [(text_id, label) for text_id, label in first.items() if sizes[label] > 1]
        assert [(lines[i][0], rows.names[c]) for i, c in zip(rows.lines, rows.labels, strict=True)] == expected
        assert rows.names == list(dict.fromkeys(label for _, label in expected))
        assert rows.num_repeated + rows.num_conflicting == len(lines) - len(first)
        assert rows.num_repeated == sum(first[text_id] == label for text_id, label in lines) - len(first)
        assert rows.num_single == len(first) - len(expected)


BAD_ROWS = [
    ({"label": "x"}, "key 'text' is missing (found 'label')"),
    ({"text": 3, "label": "x"}, "key 'text' holds int, not a string"),
    ({"text": " ", "label": "x"}, "key 'text' is empty; drop the row or fill it"),
    ({"text": "x"}, "key 'label' is missing (found 'text')"),
    ({"text": "x", "label": None}, "key 'label' must be a string or an integer, found None"),
    ({"text": "x", "label": True}, "key 'label' must be a string or an integer, found True"),
    ({"text": "x", "label": 1.0}, "key 'label' must be a string or an integer, found 1.0"),
    ({"text": "x", "label": ["y"]}, "key 'label' must be a string or an integer, found ['y']"),
    ({"text": "x", "label": ""}, "key 'label' is empty; drop the row or fill it"),
    ({"text": "x", "label": " \t"}, "key 'label' is empty; drop the row or fill it"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_rows_are_named_and_nothing_is_left(tmp_path, tokenizer, row, reason):
    source = write_rows(tmp_path / "in.jsonl", [*ROWS, row])
    with pytest.raises(ValueError, match=rf"in\.jsonl:{len(ROWS) + 1}: ") as error:
        preprocess_pairs("classification", [source], tokenizer.path, tmp_path / "out")
    assert reason in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_label_that_is_no_text_is_named(tmp_path, tokenizer):
    (tmp_path / "in.jsonl").write_text('{"text": "x", "label": "\\ud800"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"in\.jsonl:1: key 'label' is not valid UTF-8 text: lone surrogate U\+D800"):
        preprocess_pairs("classification", [tmp_path / "in.jsonl"], tokenizer.path, tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "num_classes", "dropped"),
    [
        ([ROWS[0]], 0, "0 repeated rows, 0 conflicting ones, 1 alone with their label"),
        ([ROWS[1], ROWS[4], ROWS[6], ROWS[3]], 1, "1 repeated rows, 1 conflicting ones, 0 alone with their label"),
        ([ROWS[1], ROWS[1], ROWS[2], ROWS[2]], 0, "2 repeated rows, 0 conflicting ones, 2 alone with their label"),
    ],
)
def test_fewer_than_two_classes_are_refused(tmp_path, tokenizer, rows, num_classes, dropped):
    source = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(ValueError, match=rf"in\.jsonl: {num_classes} of the labels have two texts or more") as error:
        preprocess_pairs("classification", [source], tokenizer.path, tmp_path / "out")
    assert "give at least 2 labels with two distinct texts each" in str(error.value)
    assert dropped in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_no_rows_are_refused(tmp_path, tokenizer):
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": "no row"}])
    source = write_rows(tmp_path / "in.jsonl", [])
    with pytest.raises(ValueError, match=r"in\.jsonl: no rows"):
        preprocess_pairs("classification", [source], tokenizer.path, tmp_path / "out", corpus=[corpus])


def test_other_tasks_have_no_labels(tmp_path, tokenizer):
    source = write_rows(tmp_path / "in.jsonl", [{"text1": "a", "text2": "b", "score": 1}])
    preprocess_pairs("sts", [source], tokenizer.path, tmp_path / "sts")
    store = PairStore(tmp_path / "sts", tokenizer)
    assert store.labels is store.label_rows is store.label_offsets is None
    with pytest.raises(ValueError, match="sts holds sts rows, which have no labels"):
        store.rows_of_label(0)
    assert store.scores.tolist() == [1.0]
    assert (store.query_ids.tolist(), store.positive_ids.tolist()) == ([0], [1])
    assert (store.positive_offsets.tolist(), store.negative_offsets.tolist()) == ([0, 1], [0, 0])


def test_workers_write_the_same_bytes(tmp_path, tokenizer):
    rows = [{"text": f"{i} some words " * 2000, "label": i % 7} for i in range(150)]  # more than one chunk of text
    source = write_rows(tmp_path / "in.jsonl", rows)
    for workers in (1, 2):
        prefix = tmp_path / str(workers) / "p"
        preprocess_pairs("classification", [source], tokenizer.path, prefix, num_workers=workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    arrays = ["corpus", "label", "label_offsets", "label_rows", "negatives", "negatives_offsets"]
    arrays += ["positives", "positives_offsets", "query", "query_order"]
    assert names == sorted(["p.bin", "p.idx", "p.json", *(f"p.{name}.npy" for name in arrays)])
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    check_invariants(PairStore(tmp_path / "2" / "p", tokenizer))


def test_tool_reports_what_it_dropped(tmp_path, tokenizer):
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    common = ["--tokenizer-model", tokenizer.path, "--output-prefix", tmp_path / "out"]
    result = run_script("preprocess_pairs", "--task", "classification", "--input", source, *common)
    assert result.returncode == 0, result.stderr
    assert "8 rows, 9 distinct texts, 9 of them documents" in result.stdout
    assert "3 classes; dropped 1 repeated rows, 1 with a second label, 1 alone in their class" in result.stdout
    write_rows(source, [*ROWS, {"text": "x", "label": 0.5}])
    result = run_script("preprocess_pairs", "--task", "classification", "--input", source, *common)
    assert result.returncode == 2
    assert result.stderr == f"error: {source}:12: key 'label' must be a string or an integer, found 0.5\n"
    assert PairStore(tmp_path / "out", tokenizer).num_rows == 8  # the older output stays


def test_external_texts_come_back_whole(tmp_path, real_data):
    source = real_data / "classification/banking77/train.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "t.model").write_bytes(train_tokenizer([row["text"] for row in rows[::5]], 700))
    tokenizer = Tokenizer(tmp_path / "t.model")
    summary = preprocess_pairs("classification", [source], tokenizer.path, tmp_path / "out")
    store = PairStore(tmp_path / "out", tokenizer)
    check_invariants(store)
    dropped = summary["repeated_rows"] + summary["conflicting_rows"] + summary["single_rows"]
    assert summary["rows"] + dropped == len(rows)
    names = list(summary["labels"])
    stored = [(store.text(i), names[c]) for i, c in zip(store.query_ids, store.labels, strict=True)]
    first = {}
    for row in rows:
        first.setdefault(row["text"], str(row["label"]))
    sizes = Counter(first.values())
    assert stored == [(text, label) for text, label in first.items() if sizes[label] > 1]
