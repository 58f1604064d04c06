"""preprocess_pairs of every task is its definition, over chunks, files of all forms, and processes."""

import json
import resource
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_reference import Reference
from tool_inputs import FORMS, content_of, outputs, rejected_of, write_bytes, write_rows

from megatron_conan.data import label_files, numbering, pair_arrays, text_files
from megatron_conan.data.pair_arrays import PairArrays
from megatron_conan.data.pair_files import ROW_FILES, preprocess_pairs
from megatron_conan.data.pair_rows import TASKS

TEXT = st.sampled_from([*"abcdefg", " x", "Größe 词\n表", "a  b\tc", "🙂", "long " * 30])
TEXTS = TEXT | st.lists(TEXT, min_size=1, max_size=4)
MAYBE = st.none() | TEXTS | st.just([])


def optional(**fields):
    return st.fixed_dictionaries({}, optional=fields)


def joined(*parts):
    """Rows with the keys of all parts."""
    return st.tuples(*parts).map(lambda rows: {key: value for row in rows for key, value in row.items()})


NUMBER = st.floats(-1e6, 1e6, width=32) | st.integers(-5, 5)
ROWS = {
    "retrieval": joined(
        st.fixed_dictionaries({"query": TEXT}, optional={"instruction": st.none() | TEXT, "more": st.integers()}),
        st.fixed_dictionaries({"positive": TEXTS}) | st.fixed_dictionaries({"pos": TEXTS, "positive": st.none()}),
        optional(negative=MAYBE) | optional(neg=MAYBE),
    ),
    "sts": st.fixed_dictionaries({"text1": TEXT, "text2": TEXT, "score": NUMBER}),
    "sft": st.fixed_dictionaries(
        {"instruction": TEXT, "output": TEXT}, optional={"input": st.none() | st.just("") | TEXT}
    ),
    "classification": st.fixed_dictionaries({"text": TEXT, "label": st.sampled_from(["a", 7, "7", "ä\u2028", "b"])}),
    "bitext": st.fixed_dictionaries({"text1": TEXT, "text2": TEXT}),
    "pairclass": st.fixed_dictionaries({"text1": TEXT, "text2": TEXT, "label": st.sampled_from([0, 1, "0", "1"])}),
}


def split(values, bounds):
    """Values in consecutive parts."""
    bounds = [0, *sorted(bound % (len(values) + 1) for bound in bounds), len(values)]
    return [values[begin:end] for begin, end in pairwise(bounds)]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_its_definition(tmp_path_factory, tokenizer, task):
    @settings(max_examples=25, deadline=None)
    @given(
        rows=st.lists(ROWS[task], min_size=1, max_size=25),
        corpus=st.lists(TEXT | st.sampled_from(["", " "]), max_size=8),
        bounds=st.lists(st.integers(0, 100), max_size=3),
        size=st.sampled_from([1, 120, 10**6]),
        block=st.sampled_from([1, 3, 10**6]),
    )
    def check(rows, corpus, bounds, size, block):
        folder = tmp_path_factory.mktemp(task)
        inputs = [write_rows(folder / f"{i}{FORMS[i % 3]}", part) for i, part in enumerate(split(rows, bounds))]
        names = [f"c{FORMS[len(rows) % 4]}", "c.txt.gz"]
        documents = [write_rows(folder / names[0], [{"text": text} for text in corpus])] * bool(corpus)
        documents.append(write_bytes(folder / names[1], b"from lines\n\na\n"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_files, "SMALLEST_CHUNK_BYTES", size)
            patch.setattr(numbering, "BLOCK_TEXTS", block)
            patch.setattr(pair_arrays, "BLOCK_ROWS", block)
            reference = Reference(task, rows, [*corpus, "from lines", "a"])
            if reference.counts.get("classes", 2) < label_files.MINIMUM_CLASSES:
                before = content_of(folder)
                with pytest.raises(ValueError, match="a row needs another text of its label and one of another label"):
                    preprocess_pairs(task, inputs, tokenizer.path, folder / "out", corpus=documents)
                assert content_of(folder) == before
                return
            summary = preprocess_pairs(task, inputs, tokenizer.path, folder / "out", corpus=documents)
        reference.check(folder / "out", tokenizer, summary)
        counted = [entry.get("rows", entry.get("documents")) for entry in summary["inputs"]]
        assert sum(counted[: len(inputs)]) == len(rows)
        assert sum(counted[len(inputs) :]) == sum(bool(text.strip()) for text in corpus) + 2

    check()


def many_rows(task, count=60):
    """Rows of a task that share texts."""
    if task == "retrieval":
        return [
            {"query": f"q{i % 7}", "positive": [f"p{i % 11}", f"p{i % 3}"], "negative": [f"p{i % 5}", f"n{i}"]}
            for i in range(count)
        ]
    if task == "classification":
        return [{"text": f"text {i % 41}", "label": f"c{i % 4}"} for i in range(count)]
    if task == "sft":
        return [{"instruction": f"do {i % 9}", "input": f"{i % 2}", "output": f"done {i % 13}"} for i in range(count)]
    more = {"sts": "score", "pairclass": "label"}
    return [
        {"text1": f"t{i % 8}", "text2": f"u{i % 13}", **({more[task]: i % 2} if task in more else {})}
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "task", [task if task == "retrieval" else pytest.param(task, marks=pytest.mark.full) for task in TASKS]
)
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, tokenizer, monkeypatch, task):
    """Rejected lines too, which stand in both passes' files."""
    monkeypatch.setattr(text_files, "SMALLEST_CHUNK_BYTES", 150)
    rows = many_rows(task)
    inputs = [write_rows(tmp_path / f"{i}{form}", rows[15 * i : 15 * i + 15]) for i, form in enumerate(FORMS)]
    with inputs[0].open("ab") as file:
        file.write(b'{"more": 1}\n\n')
    corpus = [
        write_bytes(tmp_path / "corpus.jsonl.gz", b'{"text": "p1"}\n{"text": 3}\n{"text": "of the corpus"}\n' * 9)
    ]
    for workers in (1, 3):
        summary = preprocess_pairs(
            task,
            inputs,
            tokenizer.path,
            tmp_path / f"w{workers}" / "out",
            corpus=corpus,
            on_error="skip",
            num_workers=workers,
        )
    assert content_of(tmp_path / "w1") == content_of(tmp_path / "w3")
    Reference(task, rows, ["p1", "of the corpus"]).check(tmp_path / "w3" / "out", tokenizer, summary)
    places = [f"{inputs[0]}:16", *(f"{corpus[0]}:{line}" for line in range(2, 28, 3))]
    assert [line["place"] for line in rejected_of(tmp_path / "w3" / "out")] == places
    assert sum(summary["rejected"].values()) == len(places)


def test_files_of_an_older_output_of_another_task_are_removed(tmp_path, tokenizer):
    prefix = tmp_path / "out"
    common = {".bin", ".idx", ".json", ".query.npy", ".query_order.npy", ".corpus.npy"}
    common |= {f".{name}{end}.npy" for name in ("positives", "negatives") for end in ("", "_offsets")}
    more = {
        "sts": {".score.npy"},
        "classification": {".label.npy", ".label_rows.npy", ".label_offsets.npy"},
        "retrieval": set(),
        "pairclass": {".score.npy"},
        "bitext": set(),
    }
    for number, (task, own) in enumerate(more.items()):
        source = write_rows(tmp_path / "in.jsonl", many_rows(task))
        if number % 2:
            source.write_bytes(source.read_bytes() + b"{\n")
        summary = preprocess_pairs(task, [source], tokenizer.path, prefix, on_error="skip")
        assert set(outputs(prefix)) == common | own | ({".rejected.jsonl"} if number % 2 else set())
        Reference(task, many_rows(task)).check(prefix, tokenizer, summary)
    before = content_of(tmp_path)
    for content, message in [(b"", "no rows"), (b"{\n", r"no rows \(1 lines rejected\)")]:
        empty = write_bytes(tmp_path / "empty.jsonl", content)
        with pytest.raises(ValueError, match=rf"empty\.jsonl: {message}"):
            preprocess_pairs("sts", [empty], tokenizer.path, prefix, on_error="skip")
        empty.unlink()
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("retrieval", {"query": "x", "pos": {"a": 1}}, "key 'pos' holds dict, not a string"),
        ("retrieval", {"query": "x", "pos": [["y"]]}, "key 'pos' holds list, not a string"),
        ("retrieval", {"query": "x", "pos": "y", "neg": ["z", " "]}, "key 'neg' holds an empty text; drop it"),
        (
            "retrieval",
            {"query": "x", "pos": "y", "instruction": ""},
            "key 'instruction' is empty; drop the row or fill it",
        ),
        ("sts", {"text1": "x", "text2": "y", "score": True}, "key 'score' must be a finite number, found True"),
        ("sts", {"text1": "x", "text2": "y", "score": 10**400}, f"key 'score' must be a finite number, found {10**59}"),
        (
            "sts",
            {"text1": "x", "text2": "y", "score": float("-inf")},
            "key 'score' must be a finite number, found -inf",
        ),
        ("pairclass", {"text1": "x", "text2": "y", "label": 2}, "key 'label' must be 1 (same meaning) or 0, found 2"),
        (
            "pairclass",
            {"text1": "x", "text2": "y", "label": 1.0},
            "key 'label' must be 1 (same meaning) or 0, found 1.0",
        ),
        ("pairclass", {"text1": "x", "text2": "y", "label": []}, "key 'label' must be 1 (same meaning) or 0, found []"),
        ("classification", {"text": "x", "label": None}, "key 'label' must be a string or an integer, found None"),
        (
            "classification",
            {"text": "x", "label": "\ud800"},
            "key 'label' is not valid UTF-8 text: lone surrogate U+D800",
        ),
        ("sft", {"instruction": "x", "output": "\n"}, "key 'output' is empty; drop the row or fill it"),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, task, row, reason):
    good = [json.dumps(content) for content in many_rows(task)]
    source = write_bytes(tmp_path / "in.jsonl", "\n".join([*good, json.dumps(row)]).encode())
    with pytest.raises(ValueError, match=r"in\.jsonl:61: ") as error:
        preprocess_pairs(task, [source], tokenizer.path, tmp_path / "out")
    assert str(error.value) == f"{source}:61: {reason}"
    assert list(tmp_path.iterdir()) == [source]


def test_arrays_on_a_full_disk_are_told(tmp_path):
    """Wherever a file ends; not every way of numpy's to write tells if only its last bytes are missing."""
    rows = {name: np.ones(500, dtype) for name, dtype in ROW_FILES.items()}
    arrays = PairArrays(tmp_path, np.arange(1500), rows, 1500)
    arrays.write(None, stores_scores=True)
    sizes = {name: (tmp_path / f"out.{name}.npy").stat().st_size for name in arrays.names}
    assert max(sizes.values()) == sizes["corpus"] == 128 + 8 * 1000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in {*sizes.values(), 4096, 4095, 129, 0}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(size - 1, 0), limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                PairArrays(tmp_path, np.arange(1500), rows, 1500).write(None, stores_scores=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
