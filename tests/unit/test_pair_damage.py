"""inspect_dataset.py finds damage of the arrays of pair data."""

import json

import numpy as np
import pytest
from inspected_files import ROWS, copy_files, damage, edit_array, edit_summary, inspect, make_pairs

from megatron_conan.data import file_checks


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """Undamaged prefixes by task."""
    folder = tmp_path_factory.mktemp("whole")
    return {task: make_pairs(folder, tokenizer, task) for task in ROWS}


@pytest.fixture(params=[None, 2], ids=["one block", "blocks of 2"])
def blocks(request, monkeypatch):
    """All is found across the borders of blocks too."""
    if request.param:
        monkeypatch.setattr(file_checks, "BLOCK", request.param)


ARRAYS = {
    "retrieval": ["query", "query_order", "positives", "positives_offsets", "negatives", "negatives_offsets", "corpus"],
    "sts": ["score"],
    "classification": ["label", "label_rows", "label_offsets"],
}


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in ARRAYS.items() for name in names])
def test_arrays_of_other_types_and_sizes(whole, tmp_path, capsys, task, name):
    prefix = copy_files(whole[task], tmp_path)
    path = tmp_path / f"{task}.{name}.npy"
    values, content = np.load(path), path.read_bytes()

    def told():
        code, output = inspect(capsys, "--prefix", prefix)
        assert code == 1
        assert "Contents" not in output
        return damage(output)

    path.write_bytes(content + b"more")
    assert told() == [
        f"{path.name}: size: found {len(content) + 4:,} bytes, expected {len(content):,}; copy it anew, or write the files anew"
    ]
    for cut in (len(content) - 1, 70, 5, 0):
        path.write_bytes(content[:cut])
        assert told()[0].startswith(f"{path.name}: cut off or no .npy file (")
    for place in (0, 8, 12, 30):  # magic, length of the header, the header itself
        path.write_bytes(content[:place] + b"\xff\xfe" + content[place + 2 :])
        assert told()[0].startswith(f"{path.name}: ")
    np.save(path, values.astype(np.int16))
    assert told() == [
        f"{path.name}: header: found int16 with 1 dimensions, expected {values.dtype} with 1; write the files anew"
    ]
    np.save(path, values[None])
    assert "with 2 dimensions" in told()[0]
    path.unlink()
    assert told() == [f"{path.name}: missing; write the files anew"]


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in ARRAYS.items() for name in names])
def test_arrays_with_a_value_too_few(whole, tmp_path, capsys, task, name):
    prefix = copy_files(whole[task], tmp_path)
    path = tmp_path / f"{task}.{name}.npy"
    values = np.load(path)
    np.save(path, values[:-1])
    code, output = inspect(capsys, "--prefix", prefix)
    assert code == 1
    told = damage(output)
    if name == "query":  # the number of rows is its length
        assert any("query_order.npy: size: found 8 values, expected 7 (7 rows)" in line for line in told)
    elif name == "corpus":
        counted = f"{task}.json: documents: found {len(values)}, expected {len(values) - 1} as in the files"
        assert any(line.startswith(counted) for line in told)
    elif name in ("positives", "negatives"):
        assert told[0].startswith(
            f"{task}.{name}_offsets.npy: end: the last is {len(values)}, expected {len(values) - 1}"
        )
    elif name == "label_offsets":
        assert told[0].startswith("classification.label_offsets.npy: end: the last is 12, expected 15")
    else:
        assert told[0].startswith(f"{path.name}: size: found {len(values) - 1} values, expected {len(values)} (")


# retrieval: row i has texts in order of first appearance; 8 rows with 1, 2, 1, 2, .. positives and 0, 1, 2, 0, .. negatives
PLANTED = [
    ("retrieval", "query", 3, 999, "query.npy: row 3: found 999, expected 0 to 21 (22 texts)"),
    ("retrieval", "query", 3, -1, "query.npy: row 3: found -1, expected 0 to 21 (22 texts)"),
    ("retrieval", "positives", 5, 22, "positives.npy: row 3, value 5: found 22, expected 0 to 21 (22 texts)"),
    ("retrieval", "negatives", 3, 22, "negatives.npy: row 4, value 3: found 22, expected 0 to 21 (22 texts)"),
    ("retrieval", "corpus", 0, -7, "corpus.npy: document 0: found -7, expected 0 to 21 (22 texts)"),
    ("retrieval", "corpus", 4, 1, "corpus.npy: document 4: found 1 behind "),
    ("retrieval", "positives_offsets", 0, 1, "positives_offsets.npy: row 0: the first is 1, expected 0"),
    ("retrieval", "positives_offsets", 3, 9, "positives_offsets.npy: row 3: ends at 6, expected at least 9, where it begins"),
    ("retrieval", "negatives_offsets", 8, 6, "negatives_offsets.npy: end: the last is 6, expected 7, the number of values"),
    ("retrieval", "positives_offsets", 1, 0, "positives_offsets.npy: row 0: 0 positives, expected 1 or more"),
    ("sts", "positives_offsets", 2, 1, "positives_offsets.npy: row 1: 0 positives, expected 1 (and 1 more places)"),
    ("sft", "positives_offsets", 2, 3, "positives_offsets.npy: row 1: 2 positives, expected 1 (and 1 more places)"),
    ("retrieval", "query_order", 2, 8, "query_order.npy: place 2: found 8, expected 0 to 7 (8 rows)"),
    ("retrieval", "query_order", 2, 1, "query_order.npy: place 2: row 1 (query 2) stands behind row 1 (query 2), expected"),
    ("sts", "score", 4, np.nan, "score.npy: row 4: score nan, expected a finite number"),
    ("classification", "label", 6, 3, "label.npy: row 6: found 3, expected 0 to 2 (3 classes)"),
    ("classification", "label", 6, 0, "label_rows.npy: place 8: row 6, which P.label.npy has in class 0, stands in class 1"),
    ("classification", "label_rows", 0, 15, "label_rows.npy: place 0: found 15, expected 0 to 14 (15 rows)"),
    ("classification", "label_rows", 1, 0, "label_rows.npy: place 1: row 0 behind row 0, expected ascending rows in a class"),
    ("classification", "label_offsets", 2, 14, "label_offsets.npy: class 2: 1 rows, expected 2 or more"),
    ("classification", "label_offsets", 1, 13, "label_offsets.npy: class 1: ends at 12, expected at least 13"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "name", "place", "value", "told"), PLANTED)
def test_planted_values(whole, blocks, tmp_path, capsys, tokenizer, task, name, place, value, told):
    prefix = copy_files(whole[task], tmp_path)
    edit_array(tmp_path / f"{task}.{name}.npy", place, value)
    code, output = inspect(capsys, "--prefix", prefix, "--tokenizer-model", tokenizer.path, "--duplicates")
    assert code == 1
    assert damage(output)[0].startswith(f"{task}.{told}")


def test_an_order_that_is_not_sorted(whole, blocks, tmp_path, capsys):
    prefix = copy_files(whole["sts"], tmp_path)
    path = tmp_path / "sts.query_order.npy"
    np.save(path, np.load(path)[[0, 1, 3, 2, 4, 5]])
    assert damage(inspect(capsys, "--prefix", prefix)[1]) == [
        "sts.query_order.npy: place 3: row 2 (query 4) stands behind row 3 (query 6), expected each row once, by query and "
        "row; write the files anew"
    ]


@pytest.mark.parametrize("name", ["rows", "texts", "documents", "positives", "negatives", "tokens", "classes"])
def test_counts_in_the_summary(whole, tmp_path, capsys, name):
    prefix = copy_files(whole["classification"], tmp_path)
    count = json.loads((tmp_path / "classification.json").read_text())[name]
    edit_summary(prefix, **{name: count + 1})
    [found] = damage(inspect(capsys, "--prefix", prefix)[1])
    assert found.startswith(f"classification.json: {name}: found {count + 1}, expected {count} as in the files")


def test_classes_and_tasks_in_the_summary(whole, tmp_path, capsys):
    prefix = copy_files(whole["classification"], tmp_path)
    edit_summary(prefix, labels={"a": 6, "b": 5, "c": 4})
    [found] = damage(inspect(capsys, "--prefix", prefix)[1])
    assert found.startswith("classification.json: labels: the rows of the classes are not those of ")
    edit_summary(prefix, task="clustering")
    [found] = damage(inspect(capsys, "--prefix", prefix)[1])
    assert found.startswith("classification.json: task: found 'clustering', expected one of retrieval, sts, ")
    (tmp_path / "classification.json").unlink()
    code, output = inspect(capsys, "--prefix", prefix)
    assert (code, damage(output)) == (1, ["classification.json: missing; write the files anew"])
    assert output.startswith(f"{prefix}: pairs\n")


def test_damage_of_the_text_store(whole, tmp_path, capsys):
    prefix = copy_files(whole["retrieval"], tmp_path)
    content = (tmp_path / "retrieval.bin").read_bytes()
    (tmp_path / "retrieval.bin").write_bytes(content[:-2])
    [found] = damage(inspect(capsys, "--prefix", prefix)[1])
    assert found.startswith("retrieval.bin: size: cut off: ")
    (tmp_path / "retrieval.bin").write_bytes(content[:-2] + b"\xff\xff")
    told = damage(inspect(capsys, "--prefix", prefix)[1])
    assert [line.split(":")[1].split(",")[0] for line in told] == [" sequence 21", " SHA-256 of the tokens"]
