"""Files in every form give the outputs of plain ones; damaged and missing ones are told in one error, and leave nothing."""

import gzip
import json
import os

import pyarrow
import pytest
from sample_texts import DOCUMENTS, run_script
from tool_inputs import (
    FORMS,
    content_of,
    decoded,
    json_lines,
    outputs,
    rejected_of,
    summary_of,
    without_names,
    write_bytes,
    write_rows,
    write_table,
)

from megatron_conan.data import text_files
from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.input_files import find_inputs
from megatron_conan.data.pair_files import preprocess_pairs

TEXTS = [
    "",
    *DOCUMENTS,
    "a\tb\n\nc",
    "",
    "\u2028 within",
    *[f"{i}: {text}" for i, text in enumerate(DOCUMENTS * 3)],
    " ",
]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
PAIRS = [
    {"query": f"query {i % 7}", "positive": [DOCUMENTS[i % 5], f"right {i}"], "negative": [f"wrong {i}"] * (i % 3)}
    for i in range(20)
]
GOOD = b'{"text": "fine"}\n'


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(text_files, "SMALLEST_CHUNK_BYTES", 256)


def documents(inputs, tokenizer, prefix, **options):
    return preprocess_documents(inputs, tokenizer.path, prefix, **options)


def test_every_form_gives_the_bytes_of_the_plain_file(tmp_path, tokenizer):
    made = {}
    for form in FORMS:
        source = write_rows(tmp_path / f"in{form}", ROWS)
        assert len(list(text_files.cut_into_chunks(find_inputs([source]), 256))) > 5
        summary = documents([source], tokenizer, tmp_path / "out", append_eod=True)
        assert summary["inputs"] == [
            {"file": source.name, **{key: summary[key] for key in ("documents", "tokens", "bytes")}}
        ]
        made[form] = outputs(tmp_path / "out")
    assert decoded(tmp_path / "out", tokenizer) == TEXTS
    assert set(made[".jsonl"]) == {".bin", ".idx", ".json"}
    for form in FORMS:
        assert without_names(made[form]) == without_names(made[".jsonl"]), form


def test_all_forms_at_once_for_any_number_of_workers(tmp_path, tokenizer):
    """One file of each form: chunks of all of them are under way together, and stand in the order of the files."""
    inputs = [write_rows(tmp_path / f"in{form}", ROWS) for form in FORMS]
    inputs += [write_bytes(tmp_path / "in.txt.gz", "one\r\n\ntwo 我们\nthree".encode())]
    for workers in (1, 3):
        documents(inputs, tokenizer, tmp_path / f"w{workers}", num_workers=workers)
    assert outputs(tmp_path / "w1") == outputs(tmp_path / "w3")
    assert decoded(tmp_path / "w1", tokenizer) == [*TEXTS * 4, "one", "", "two 我们", "three"]
    summary = summary_of(tmp_path / "w1")
    assert [entry["file"] for entry in summary["inputs"]] == [path.name for path in inputs]
    for name in ("documents", "tokens", "bytes"):
        assert sum(entry[name] for entry in summary["inputs"]) == summary[name]


STRINGS = {
    "string": pyarrow.array(TEXTS),
    "large string": pyarrow.array(TEXTS, pyarrow.large_string()),
    "string view": pyarrow.array(TEXTS, pyarrow.string_view()),
    "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
}


@pytest.mark.parametrize("kind", STRINGS)
def test_parquet_strings_of_every_kind(tmp_path, tokenizer, kind):
    table = pyarrow.table({"before": list(range(len(TEXTS))), "text": STRINGS[kind], "behind": [b"\xff"] * len(TEXTS)})
    for group in (1, 4, 1000):
        source = write_table(tmp_path / "in.parquet", table, group)
        documents([source], tokenizer, tmp_path / "out")
        assert decoded(tmp_path / "out", tokenizer) == TEXTS


@pytest.mark.parametrize(
    "lists", [pyarrow.list_(pyarrow.string()), pyarrow.large_list(pyarrow.large_string())], ids=str
)
def test_pairs_from_every_form(tmp_path, tokenizer, lists):
    made = []
    for form in FORMS:
        source = write_rows(tmp_path / f"in{form}", PAIRS)
        if form == ".parquet":
            schema = pyarrow.schema([("query", pyarrow.string()), ("positive", lists), ("negative", lists)])
            write_table(source, pyarrow.Table.from_pylist(PAIRS, schema))
        preprocess_pairs("retrieval", [source], tokenizer.path, tmp_path / "out")
        assert summary_of(tmp_path / "out")["inputs"] == [{"file": source.name, "rows": len(PAIRS)}]
        made.append(without_names(outputs(tmp_path / "out")))
    assert len(made[0]) == 9
    assert all(files == made[0] for files in made)


def test_rows_of_parquet_that_hold_no_text(tmp_path, tokenizer):
    table = pyarrow.table({"text": ["good", None, "", None, "better"], "more": [1, 2, 3, 4, 5]})
    source = write_table(tmp_path / "in.parquet", table)
    with pytest.raises(ValueError, match=r"in\.parquet: row 2: key 'text' holds NoneType, not a string$"):
        documents([source], tokenizer, tmp_path / "out")
    summary = documents([source], tokenizer, tmp_path / "out", on_error="skip")
    assert decoded(tmp_path / "out", tokenizer) == ["good", "", "better"]
    assert summary["rejected"] == {"wrong type": 2}
    reason = "key 'text' holds NoneType, not a string"
    assert rejected_of(tmp_path / "out") == [
        {"place": f"{source}: row {row}", "reason": reason, "row": {"text": None}} for row in (2, 4)
    ]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"body": ["x"], "id": [1]}, "key 'text' is missing (found 'body', 'id')"),
        ({"text": [b"x"]}, "key 'text' holds bytes, not a string"),
        ({"text": [["x"]]}, "key 'text' holds list, not a string"),
        ({"text": [1.5]}, "key 'text' holds float, not a string"),
    ],
)
def test_columns_that_hold_no_text(tmp_path, tokenizer, columns, reason):
    source = write_table(tmp_path / "in.parquet", pyarrow.table(columns))
    before = content_of(tmp_path)
    with pytest.raises(ValueError, match="row 1") as error:
        documents([source], tokenizer, tmp_path / "out")
    assert str(error.value) == f"{source}: row 1: {reason}"
    with pytest.raises(ValueError, match="1 lines rejected; there is nothing to write"):
        documents([source], tokenizer, tmp_path / "out", on_error="skip")
    assert content_of(tmp_path) == before


def test_columns_that_python_can_not_hold_are_named(tmp_path, tokenizer):
    """All are read where the one that is wanted is missing, to show what there is."""
    nanoseconds = pyarrow.array([1], pyarrow.timestamp("ns"))
    source = write_table(tmp_path / "in.parquet", pyarrow.table({"when": nanoseconds}))
    with pytest.raises(ValueError, match=r"in\.parquet: (row 1: key 'text' is missing|row group 0 can't be read)"):
        documents([source], tokenizer, tmp_path / "out")


DAMAGED = {
    "gz cut": (".jsonl.gz", lambda content: content[: len(content) * 2 // 3], r"damaged \.gz file .*get it anew$"),
    "gz of no bytes": (".jsonl.gz", lambda content: b"", r"damaged \.gz file .*it is empty"),
    "gz with garbage": (".jsonl.gz", lambda content: content + b"garbage", r"damaged \.gz file .*Not a gzipped file"),
    "gz with half a member": (".jsonl.gz", lambda content: content + gzip.compress(GOOD)[:15], r"damaged \.gz file"),
    "no gz": (".jsonl.gz", lambda content: GOOD, r"damaged \.gz file behind 0 bytes .*Not a gzipped file"),
    "gz with a wrong sum": (
        ".jsonl.gz",
        lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:],
        "CRC check failed",
    ),
    "zst cut": (".jsonl.zst", lambda content: content[: len(content) * 2 // 3], r"damaged \.zst file .*[Tt]runcated"),
    "zst with garbage": (".jsonl.zst", lambda content: content + b"garbage", r"damaged \.zst file"),
    "no zst": (".jsonl.zst", lambda content: GOOD, r"damaged \.zst file behind 0 bytes"),
    "parquet cut": (".parquet", lambda content: content[: len(content) // 2], "is not a parquet file, or is damaged"),
    "parquet of no bytes": (".parquet", lambda content: b"", "is not a parquet file, or is damaged"),
    "parquet with a hole": (
        ".parquet",
        lambda content: content[:4] + b"\xff" * (len(content) // 4) + content[4 + len(content) // 4 :],
        "row group 0 can't be read: .*get the file anew$",
    ),
}


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_one_error_and_leave_nothing(tmp_path, tokenizer, kind, on_error):
    form, damage, message = DAMAGED[kind]
    source = write_rows(tmp_path / f"in{form}", ROWS)
    source.write_bytes(damage(source.read_bytes()))
    before = content_of(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        documents([source], tokenizer, tmp_path / "new" / "out", on_error=on_error)
    assert str(error.value).startswith(f"{source}")
    assert "\n" not in str(error.value)
    assert content_of(tmp_path) == before


def test_the_first_mistake_is_told_for_any_number_of_workers(tmp_path, tokenizer):
    """Though the process that unpacks a file meets its damaged end before another has read a bad line in the middle."""
    source = write_bytes(tmp_path / "in.jsonl.gz", GOOD * 50 + b"{\n" + GOOD * 50)
    source.write_bytes(source.read_bytes()[:-4])
    for workers in (1, 3):
        with pytest.raises(ValueError, match=r"in\.jsonl\.gz:51: malformed JSON"):
            documents([source], tokenizer, tmp_path / "out", num_workers=workers)
        with pytest.raises(ValueError, match=r"damaged \.gz file"):
            documents([source], tokenizer, tmp_path / "out", num_workers=workers, on_error="skip")
    assert list(tmp_path.iterdir()) == [source]


def test_tool_tells_of_damage_in_one_line(tmp_path, tokenizer):
    source = write_rows(tmp_path / "in.jsonl.gz", ROWS)
    source.write_bytes(source.read_bytes()[:-20])
    result = run_script(
        "preprocess", "--input", source, "--tokenizer-model", tokenizer.path, "--output-prefix", tmp_path / "out"
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {source}: damaged .gz file")
    assert result.stderr.count("\n") == 1


def test_folders_are_read_at_any_depth_in_order(tmp_path):
    names = ["b/2.jsonl", "b/1.txt.gz", "a.parquet", "c/d/e.jsonl.zst", "z.txt"]
    passed_over = [".hidden.jsonl", "b/.git/x.jsonl", "notes.md", "b/x.json", "b/x.csv.gz", "b/out.rejected.jsonl"]
    for name in names + passed_over:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jsonl").mkdir()
    found = [file.path.relative_to(tmp_path).as_posix() for file in find_inputs([tmp_path])]
    assert found == ["a.parquet", "b/1.txt.gz", "b/2.jsonl", "c/d/e.jsonl.zst", "z.txt"]
    rows_only = [file.path.name for file in find_inputs([tmp_path], (".jsonl", ".parquet"))]
    assert rows_only == ["a.parquet", "2.jsonl", "e.jsonl.zst"]


def test_what_names_stand_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/a.jsonl", "x/y/b.jsonl", "x/y/.c.jsonl", "x/notes.md", "brackets[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*names):
        return [file.path.as_posix() for file in find_inputs(names)]

    assert found("x/**/*.jsonl") == ["x/a.jsonl", "x/y/b.jsonl"]
    assert found("x/y", "x/*.jsonl") == ["x/y/b.jsonl", "x/a.jsonl"]
    assert found("brackets[1].jsonl") == ["brackets[1].jsonl"]
    (tmp_path / "link.jsonl").symlink_to("x/a.jsonl")
    (tmp_path / "empty").mkdir()
    for names, message in [
        (["x", "x/a.jsonl"], r"input x/a\.jsonl is named twice \(as x/a\.jsonl before\)"),
        (["x/a.jsonl", "link.jsonl"], r"input link\.jsonl is named twice \(as x/a\.jsonl before\)"),
        (["x/*.gz"], r"input x/\*\.gz matches no file$"),
        (["x/*"], r"input x/notes\.md: unknown format '\.md'; use \.jsonl, \.txt \(also \.gz, \.zst\) or \.parquet$"),
        (["empty"], "input folder empty holds no .* file$"),
        (["absent"], "input absent does not exist or is not a file$"),
        (["x/a.parquet.gz"], "does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_inputs(names)
    (tmp_path / "a.parquet.gz").touch()
    with pytest.raises(ValueError, match=r"unknown format '\.parquet\.gz'"):
        find_inputs(["a.parquet.gz"])


def test_files_without_documents_count_nothing(tmp_path, tokenizer):
    inputs = [write_bytes(tmp_path / "a.jsonl", b""), write_bytes(tmp_path / "b.txt.gz", b"")]
    inputs += [write_table(tmp_path / "c.parquet", pyarrow.table({"text": pyarrow.array([], pyarrow.string())}))]
    inputs += [write_bytes(tmp_path / "d.jsonl", b"\xef\xbb\xbf"), write_bytes(tmp_path / "e.txt", b"\xef\xbb\xbfx")]
    summary = documents(inputs, tokenizer, tmp_path / "out")
    assert [entry["documents"] for entry in summary["inputs"]] == [0, 0, 0, 0, 1]
    assert decoded(tmp_path / "out", tokenizer) == ["x"]


def test_files_that_grow_or_shrink_meanwhile_are_told(tmp_path, tokenizer, monkeypatch):
    """Between two passes, where texts would be taken for others."""
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    from megatron_conan.data import binarize

    real = binarize.read_first

    def meanwhile(*arguments):
        source.write_bytes(json_lines(ROWS[5:]))
        return real(*arguments)

    monkeypatch.setattr(binarize, "read_first", meanwhile)
    with pytest.raises(ValueError, match=r"in\.jsonl changed while it was read; wait until it is whole"):
        documents([source], tokenizer, tmp_path / "out", dedup=True)
    assert list(tmp_path.iterdir()) == [source]


def test_names_that_are_no_utf8(tmp_path, tokenizer):
    source = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    source.write_bytes(GOOD + b"{\n")
    documents([source], tokenizer, tmp_path / "out", on_error="skip")
    assert json.loads((tmp_path / "out.json").read_text())["inputs"][0]["file"] == source.name
    assert rejected_of(tmp_path / "out")[0]["place"] == f"{source}:2"


def test_lines_of_absurd_length_are_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_LINE_BYTES", 1000)
    long = json.dumps({"text": "x" * 2000}).encode() + b"\n"
    for name in ("in.jsonl", "in.jsonl.gz", "in.jsonl.zst"):
        source = write_bytes(tmp_path / name, GOOD + long + GOOD)
        with pytest.raises(ValueError, match=rf"{name}: a line of more than 0 MiB is no text"):
            documents([source], tokenizer, tmp_path / "out", on_error="skip")
    documents([write_bytes(tmp_path / "in.jsonl", GOOD + long[:300].rstrip() + b'"}\n')], tokenizer, tmp_path / "out")
