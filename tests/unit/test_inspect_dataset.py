"""inspect_dataset.py shows what files hold: counts, lengths, the mix, documents and rows, copies."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from inspected_files import (
    CLASSES,
    RETRIEVAL,
    ROWS,
    STS,
    TEXTS,
    copy_files,
    damage,
    edit_bytes,
    inspect,
    make_documents,
    make_pairs,
    read_back,
    section,
    write_rows,
)
from sample_texts import DOCUMENTS

from megatron_conan.data import exact_duplicates, file_checks, inspection
from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.indexed_files import IndexedFile, write_index
from megatron_conan.data.inspection import marked_tokens
from megatron_conan.data.length_counts import LengthCounts, bucket_name
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.evaluation.svg import BarChart, draw_bars


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """The prefix of TEXTS."""
    return make_documents(tmp_path_factory.mktemp("corpus"), tokenizer, TEXTS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer):
    """Prefixes by task."""
    folder = tmp_path_factory.mktemp("pairs")
    return {task: make_pairs(folder, tokenizer, task) for task in ROWS}


@pytest.fixture
def small_blocks(monkeypatch):
    """Everything crosses the borders of blocks."""
    monkeypatch.setattr(file_checks, "SCAN_BYTES", 8)
    for module in (file_checks, inspection, exact_duplicates):
        monkeypatch.setattr(module, "BLOCK", 3)


def test_documents_are_shown_token_by_token(corpus, capsys, tokenizer):
    code, output = inspect(
        capsys, "--prefix", corpus, "--tokenizer-model", tokenizer.path, "--documents", len(TEXTS) + 5
    )
    assert code == 0
    lines = section(output, "Documents")
    assert len(lines) == 2 * len(TEXTS)
    for number, text in enumerate(TEXTS):
        tokens = tokenizer.encode(text)
        assert lines[2 * number] == f"document {number}, {len(tokens) + 1} tokens:"
        shown = lines[2 * number + 1]
        if len(tokens) < 60:
            assert read_back(shown) == text
            assert len(re.findall(r"(?:\\.|[^|\\])+", shown)) == len(tokens) + 1
        else:
            assert shown.endswith(f" ... {len(tokens) - 59} more")
            assert read_back(shown.rpartition(" ... ")[0]) == tokenizer.decode(tokens[:60])
    assert "\x1b" not in output
    assert len(tokenizer.encode(TEXTS[-1])) > 60
    assert "<0xE2>|<0x82>|<0xAC>" in lines[-3]  # the bytes of the euro sign


def test_tokens_are_marked_so_that_they_can_be_told_apart():
    pieces = ["a|b", "\\", "\\n", "\u2581x", "\n", "\x1b[1m", "</s>", "<0x0A>", "\u3000\u200b", "德"]
    shown = marked_tokens(np.array([*range(10), 10, -1]), pieces)
    assert shown == r"a\|b|\\|\\n| x|\n|\x1b[1m|</s>|<0x0A>|\u3000\u200b|德|<id 10>|<id -1>"
    assert marked_tokens(np.array([9, 9, 9]), pieces, 2) == "德|德 ... 1 more"


def test_some_documents_by_their_ids(corpus, capsys, tokenizer):
    options = ("--prefix", corpus, "--tokenizer-model", tokenizer.path)
    every = section(inspect(capsys, *options, "--documents", 99)[1], "Documents")
    lines = section(inspect(capsys, *options, "--ids", 5, 2)[1], "Documents")
    assert lines == [*every[10:12], *every[4:6]]
    assert len(section(inspect(capsys, *options)[1], "Documents")) == 6
    assert "Documents" not in inspect(capsys, *options, "--documents", 0)[1].splitlines()
    assert section(inspect(capsys, "--prefix", corpus)[1], "Documents") == ["not shown: that needs --tokenizer-model"]


def test_counts_and_lengths(corpus, small_blocks, capsys, tokenizer):
    output = inspect(capsys, "--prefix", corpus)[1]
    lengths = np.array([len(tokenizer.encode(text)) + 1 for text in TEXTS])
    contents = section(output, "Contents")
    size = sum(len(text.encode()) for text in TEXTS)
    assert [line.rsplit(None, 1) for line in contents[:4]] == [
        ["documents", str(len(TEXTS))],
        ["tokens", f"{lengths.sum():,}"],
        ["bytes of text", f"{size:,}"],
        ["bytes a token", f"{size / lengths.sum():.2f}"],
    ]
    ranks = [int(np.percentile(lengths, percent, method="inverted_cdf")) for percent in (50, 90, 99)]
    expected = [lengths.min(), f"{lengths.mean():.1f}", *ranks, lengths.max(), 0]
    assert contents[-1].split() == ["tokens", "a", "document", *map(str, expected)]
    rows = [line.split() for line in section(output, "Tokens a document")[1:]]
    for name, number, *_ in rows:
        low, _, high = name.partition("-")
        assert int(number) == np.count_nonzero((lengths >= int(low)) & (lengths <= int(high or low)))
    assert sum(int(row[1]) for row in rows) == len(TEXTS)
    assert max(len(row[3]) for row in rows if len(row) > 3) == inspection.BAR_WIDTH


def test_statistics_of_many_lengths():
    lengths = np.random.default_rng(5).geometric(0.01, size=5000) - 1
    counts = LengthCounts(np.array_split(lengths, 7))
    assert (len(counts), counts.total, counts.num_empty) == (5000, lengths.sum(), np.count_nonzero(lengths == 0))
    for percent in range(101):
        assert counts.percentile(percent) == np.percentile(lengths, percent, method="inverted_cdf")
    buckets = dict(counts.buckets())
    assert list(buckets) == list(range(min(buckets), max(buckets) + 1))
    assert [buckets[b] for b in (0, 1, 3)] == [sum(lengths == 0), sum(lengths == 1), sum((lengths > 3) & (lengths < 8))]
    assert [bucket_name(b) for b in (0, 1, 2, 3, 12)] == ["0", "1", "2-3", "4-7", "2,048-4,095"]
    assert LengthCounts().buckets() == []


def test_the_histogram_as_a_picture(corpus, pairs, tmp_path, capsys):
    picture = tmp_path / "new" / "lengths.svg"
    code, output = inspect(capsys, "--prefix", corpus, pairs["retrieval"], "--histogram", picture, "--quick")
    assert code == 0
    assert output.endswith(f"\nwrote {picture}\n")
    root = ElementTree.parse(picture).getroot()
    space = "{http://www.w3.org/2000/svg}"
    panels = root.findall(f"{space}svg")
    titles = [panel.find(f"{space}text").text for panel in panels]
    assert titles[0] == "corpus: tokens a document"
    assert titles[1:] == [f"retrieval: tokens a {name}" for name in ("query", "positive", "negative")]
    sums = [sum(int(bar[0].text.rpartition(": ")[2]) for bar in panel.findall(f"{space}rect")) for panel in panels]
    texts = [sum(len(row[name]) for row in RETRIEVAL) for name in ("positive", "negative")]
    assert sums == [len(TEXTS), len(RETRIEVAL), *texts]
    labels = [text.text for text in panels[0].findall(f"{space}text") if text.get("class") == "label"]
    assert labels == [
        "documents",
        f"tokens, from the number under a bar to below the next one ({len(TEXTS)} documents)",
    ]
    for panel in panels:  # inside their frames
        assert all(
            0 <= float(bar.get("y")) <= 270 and float(bar.get("height")) >= 0 for bar in panel.iter(f"{space}rect")
        )
    assert "var(" not in picture.read_text()


def test_large_counts_take_little_room():
    bars = [("1", 0), ("2", 99_999), ("4", 999_600), ("8", 14_732_123)]
    drawn = ElementTree.fromstring(draw_bars(BarChart("title", "tokens", "a < b", bars)))
    texts = {kind: [text.text for text in drawn if text.get("class") == kind] for kind in ("tick", "value")}
    assert texts["value"] == ["0", "99,999", "1M", "14.7M"]
    assert texts["tick"] == ["0", "5M", "10M", "15M", "1", "2", "4", "8"]
    assert [bar[0].text for bar in drawn if bar.get("class") == "column"][3] == "8: 14,732,123"


def test_rows_of_pairs(pairs, small_blocks, capsys, tokenizer):
    code, output = inspect(capsys, "--prefix", pairs["retrieval"], "--tokenizer-model", tokenizer.path, "--ids", 5, 0)
    assert code == 0
    shown = [(line.partition(" ")[0], read_back(line.partition(": ")[2])) for line in section(output, "Rows")]
    row = RETRIEVAL[5]
    texts = [
        ("query", row["query"]),
        *(("positive", t) for t in row["positive"]),
        *(("negative", t) for t in row["negative"]),
    ]
    assert shown == [("row", ""), *texts, ("row", ""), ("query", "question 0?"), ("positive", "answer 0")]
    contents = {line.rpartition(" a ")[0] + line.rpartition(" a ")[2]: line for line in section(output, "Contents")}
    lengths = [len(tokenizer.encode(text)) for row in RETRIEVAL for text in row["negative"]]
    measured = next(line for name, line in contents.items() if line.startswith("tokens a negative")).split()[3:]
    assert measured[:3] == [str(min(lengths)), f"{np.mean(lengths):.1f}", str(sorted(lengths)[(len(lengths) - 1) // 2])]
    a_row = [len(row["negative"]) for row in RETRIEVAL]
    measured = next(line for line in contents.values() if line.startswith("negatives a row")).split()[3:]
    assert measured == ["0", f"{np.mean(a_row):.1f}", "1", "2", "2", "2", str(a_row.count(0))]
    assert "task retrieval" in section(output, "Contents")
    in_buckets = [int(line.split()[1]) for line in section(output, "Tokens a negative")[1:]]
    assert sum(in_buckets) == len(lengths)


def test_scores_and_classes(pairs, capsys, tokenizer):
    options = ("--tokenizer-model", tokenizer.path, "--ids", 3)
    output = inspect(capsys, "--prefix", pairs["sts"], *options)[1]
    assert section(output, "Rows")[0] == f"row 3, score {STS[3]['score']}"
    assert "scores from 0 to 2.5, mean 1.25" in section(output, "Contents")
    output = inspect(capsys, "--prefix", pairs["classification"], *options)[1]
    assert section(output, "Rows")[0] == "row 3, class 0: a"
    counts = Counter(row["label"] for row in CLASSES)
    rows = [line.split() for line in section(output, "Classes")[1:]]
    assert [(row[0], int(row[3])) for row in rows] == counts.most_common()
    assert rows[0] == ["a", "(class", "0)", "6", "40.0%"]


def test_many_negatives_and_special_names(tmp_path, capsys, tokenizer):
    rows = [{"query": "q", "positive": "p", "negative": [f"n{i}" for i in range(11)]}]
    preprocess_pairs("retrieval", [write_rows(tmp_path / "many.jsonl", rows)], tokenizer.path, tmp_path / "many")
    lines = section(inspect(capsys, "--prefix", tmp_path / "many", "--tokenizer-model", tokenizer.path)[1], "Rows")
    assert [line.split()[0] for line in lines[3:11]] == ["negative"] * 8
    assert lines[11:] == ["... 3 more negatives"]


def test_the_mix_of_several_prefixes(corpus, pairs, tmp_path, capsys, tokenizer):
    other = make_documents(tmp_path, tokenizer, DOCUMENTS[:5] * 3, "other")
    code, output = inspect(capsys, "--prefix", corpus, other, pairs["sts"])
    assert code == 0
    tokens = [int(IndexedFile(prefix).lengths.sum()) for prefix in (corpus, other, pairs["sts"])]
    lines = [line.split() for line in section(output, "Mix")]
    assert lines[1:] == [
        [str(prefix), str(count), f"{number:,}", f"{number / sum(tokens):.1%}"]
        for prefix, count, number in zip((corpus, other, pairs["sts"]), (len(TEXTS), 15, 6), tokens, strict=True)
    ] + [["together", f"{sum(tokens):,}"]]
    assert "Mix" not in inspect(capsys, "--prefix", corpus)[1].splitlines()


def test_inputs_the_largest_first(tmp_path, capsys, tokenizer):
    (tmp_path / "in").mkdir()
    for number in range(23):
        write_rows(tmp_path / "in" / f"{number:02d}.jsonl", [{"text": "a b c"}] * (number + 1))
    preprocess_documents([tmp_path / "in"], tokenizer.path, tmp_path / "out")
    lines = [line.split() for line in section(inspect(capsys, "--prefix", tmp_path / "out")[1], "Inputs")]
    each, total = len(tokenizer.encode("a b c")), sum(range(24))
    assert lines[0] == ["input", "documents", "tokens", "bytes", "of", "tokens"]
    assert lines[1:21] == [
        [f"{n - 1:02d}.jsonl", str(n), str(n * each), str(n * 5), f"{n / total:.1%}"] for n in range(23, 3, -1)
    ]
    assert lines[21:] == [["3", "more", "6", str(6 * each), "30", f"{6 / total:.1%}"]]


def test_exact_copies(corpus, small_blocks, capsys, tokenizer):
    code, output = inspect(capsys, "--prefix", corpus, "--duplicates", "--tokenizer-model", tokenizer.path)
    assert code == 0
    counts = Counter(TEXTS)
    copied = [text for number, text in enumerate(TEXTS) if text in TEXTS[:number]]
    held = sum(len(tokenizer.encode(text)) + 1 for text in copied)
    lines = section(output, "Duplicates")
    share = f"{len(copied) / len(TEXTS):.1%}"
    assert lines[0] == (
        f"{len(copied)} of {len(TEXTS)} documents ({share}) are copies of an earlier one, which hold {held} tokens"
    )
    repeated = sorted(
        (text for text in counts if counts[text] > 1), key=lambda text: (-counts[text], TEXTS.index(text))
    )
    assert [line.split()[:3] for line in lines[2:]] == [
        ["document", str(TEXTS.index(text)), str(counts[text])] for text in repeated
    ]
    assert lines[3].split(None, 3)[3] == "</s>"  # the empty text
    ids = [*tokenizer.encode(DOCUMENTS[0])[:16]]
    output = inspect(capsys, "--prefix", corpus, "--duplicates")[1]
    assert section(output, "Duplicates")[2].endswith(f"ids {' '.join(map(str, ids))}")


def test_the_most_frequent_of_many_copies(small_blocks, tmp_path, capsys, tokenizer):
    numbers = np.random.default_rng(3).zipf(1.3, size=5000) % 3000
    prefix = make_documents(tmp_path, tokenizer, [f"{number} end" for number in numbers])
    lines = section(inspect(capsys, "--prefix", prefix, "--duplicates")[1], "Duplicates")
    values, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    assert lines[0].startswith(f"{5000 - len(values):,} of 5,000 documents ")
    top = sorted(zip(-counts, first, strict=True))[:5]
    assert [line.split()[1:3] for line in lines[2:]] == [[str(at), f"{-count:,}"] for count, at in top]
    prefix = make_documents(tmp_path, tokenizer, ["a", "b"], "distinct")
    lines = section(inspect(capsys, "--prefix", prefix, "--duplicates")[1], "Duplicates")
    assert lines == ["none: all 2 documents are distinct"]


def test_copies_among_rows(tmp_path, capsys, tokenizer):
    rows = [
        {"query": "q", "positive": ["a", "b"]},
        {"query": "q", "positive": ["a"], "negative": ["b"]},  # the same texts, parted otherwise
        {"query": "q", "positive": ["a", "b"]},
    ]
    preprocess_pairs("retrieval", [write_rows(tmp_path / "in.jsonl", rows)], tokenizer.path, tmp_path / "out")
    options = ("--prefix", tmp_path / "out", "--duplicates", "--tokenizer-model", tokenizer.path)
    lines = section(inspect(capsys, *options)[1], "Duplicates")
    assert lines[0] == "1 of 3 rows (33.3%) are copies of an earlier one"
    assert [*lines[2].split()[:3], read_back(lines[2].split()[3])] == ["row", "0", "2", "q"]


@pytest.mark.parametrize("multimodal", [False, True])
def test_files_of_megatron_core(tmp_path, small_blocks, capsys, tokenizer, multimodal):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [["one", "two three"], [], ["four"], ["", "five"]]
    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=np.int32, multimodal=multimodal)
    for sentences in documents:
        ids = [tokenizer.encode(sentence) for sentence in sentences]
        builder.add_document(torch.tensor([*chain.from_iterable(ids)]), [len(i) for i in ids], [1] * len(ids))
    builder.finalize(str(tmp_path / "core.idx"))
    options = ("--prefix", tmp_path / "core", "--tokenizer-model", tokenizer.path, "--documents", 9)
    code, output = inspect(capsys, *options)
    assert code == 0, output
    contents = section(output, "Contents")
    assert [line.split() for line in contents[:2]] == [["documents", "4"], ["sequences", "5"]]
    assert "stored as int32; no summary (P.json): not written by our tools" in contents
    assert ("a multimodal index: it ends with a mode for each sequence" in contents) is multimodal
    shown = section(output, "Documents")[1::2]
    assert [*map(read_back, shown)] == ["onetwo three", "(no tokens)", "four", "five"]
    assert contents[-1].split()[-1] == "1"  # an empty one
    edit_bytes(tmp_path / "core.bin", 4, np.int32(-3).tobytes())
    assert damage(inspect(capsys, *options[:2])[1])[0].startswith(
        "core.bin: sequence 0, position 1: token id -3, expected 0 or more"
    )
    assert "token id -3, expected 0 to 599" in damage(inspect(capsys, *options)[1])[0]


def test_without_a_vocabulary_the_highest_id_is_told(small_blocks, tmp_path, capsys):
    np.array([5, 70000, 8], np.int32).tofile(tmp_path / "other.bin")
    write_index(tmp_path / "other.idx", np.array([2, 0, 1]), np.dtype(np.int32))
    code, output = inspect(capsys, "--prefix", tmp_path / "other")
    assert code == 0
    assert "highest token id 70,000; no vocabulary is known to check it" in output


def test_files_without_any_document(tmp_path, capsys, tokenizer):
    (tmp_path / "none.bin").touch()
    write_index(tmp_path / "none.idx", np.empty(0, np.int32), np.dtype(np.uint16))
    options = ("--tokenizer-model", tokenizer.path, "--duplicates", "--histogram", tmp_path / "none.svg")
    code, output = inspect(capsys, "--prefix", tmp_path / "none", *options)
    assert code == 0
    assert section(output, "Contents")[0].split() == ["documents", "0"]
    assert not (tmp_path / "none.svg").exists()


def test_one_damaged_prefix_of_several(corpus, pairs, tmp_path, capsys):
    prefix = copy_files(corpus, tmp_path)
    edit_bytes(tmp_path / "corpus.idx", 0, b"X")
    code, output = inspect(capsys, "--prefix", prefix, pairs["sft"])
    assert code == 1
    assert len(damage(output)) == 1
    assert [line.split()[0] for line in section(output, "Mix")] == ["prefix", str(pairs["sft"]), "together"]
