"""preprocess.py: what it writes is what megatron-core reads, for any number of workers; mistakes leave nothing behind."""

import gzip
import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sample_texts import DOCUMENTS, load_tool, run_script

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.indexed_files import IndexedFile, token_dtype
from megatron_conan.data.input_files import find_inputs
from megatron_conan.data.text_files import cut_into_chunks, records

WITH_EMPTY = ["", *DOCUMENTS, "", "a\tb", "\u2028 inside a line", ""]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def write_packed(path, content):
    """Content as a plain, .gz or .zst file, by the name's ending; packed in two members, as parallel packers do."""
    half = len(content) // 2
    if path.suffix == ".gz":
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])
    if path.suffix == ".zst":
        content = b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))
    path.write_bytes(content)
    return path


def read_all(prefix):
    file = IndexedFile(prefix)
    return [file[i].tolist() for i in range(len(file))]


@pytest.mark.parametrize("append_eod", [False, True])
def test_megatron_core_reads_back_every_document(tmp_path, tokenizer, append_eod):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = write_jsonl(tmp_path / "in.jsonl", WITH_EMPTY)
    summary = preprocess_documents([source], tokenizer.path, tmp_path / "out", append_eod=append_eod)
    expected = [tokenizer.encode(text) + [tokenizer.eos_id] * append_eod for text in WITH_EMPTY]
    dataset = IndexedDataset(str(tmp_path / "out"))
    assert len(dataset) == len(WITH_EMPTY)
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected
    assert read_all(tmp_path / "out") == expected
    assert dataset.index.dtype == np.uint16
    assert dataset.document_indices.tolist() == list(range(len(WITH_EMPTY) + 1))
    assert summary["documents"] == len(WITH_EMPTY)
    assert summary["tokens"] == sum(map(len, expected))
    assert summary["bytes"] == sum(len(text.encode()) for text in WITH_EMPTY)
    assert summary["append_eod"] is append_eod
    assert summary["tokenizer_sha256"] == tokenizer.sha256
    assert summary == json.loads((tmp_path / "out.json").read_text())


def test_files_equal_those_of_megatron_core_byte_for_byte(tmp_path, tokenizer):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    source = write_jsonl(tmp_path / "in.jsonl", WITH_EMPTY)
    preprocess_documents([source], tokenizer.path, tmp_path / "ours", append_eod=True)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in WITH_EMPTY:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, tokenizer):
    first = write_jsonl(tmp_path / "a.jsonl", [f"{i} {text}" for i in range(300) for text in WITH_EMPTY])
    second = tmp_path / "b.txt"
    second.write_text("one\n\ntwo 我们\r\nlast line without end", encoding="utf-8")
    for workers in (1, 3):
        preprocess_documents(
            [first, second], tokenizer.path, tmp_path / f"w{workers}", num_workers=workers, append_eod=True
        )
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"w1{suffix}").read_bytes() == (tmp_path / f"w3{suffix}").read_bytes()
    documents = read_all(tmp_path / "w3")
    assert len(documents) == 300 * len(WITH_EMPTY) + 4
    assert [tokenizer.decode(ids) for ids in documents[-4:]] == ["one", "", "two 我们", "last line without end"]


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_chunks_cover_whole_lines_once(tmp_path, size, ending):
    content = "\n\nab\nä\n\nlonger line than a chunk\nend".encode()
    path = write_packed(tmp_path / f"lines.txt{ending}", content)
    chunks = list(cut_into_chunks(find_inputs([path]), size))
    lines = [line.decode() for chunk in chunks for _, line in records(chunk)]
    assert lines == ["", "", "ab", "ä", "", "longer line than a chunk", "end"]
    assert (chunks[0].start, chunks[-1].end) == (0, len(content))
    assert all(before.end == after.start for before, after in itertools.pairwise(chunks))
    assert sum(chunk.work for chunk in chunks) == path.stat().st_size
    for number, chunk in enumerate(chunks):
        left = [later.key for later in cut_into_chunks(find_inputs([path]), size, chunk.key)]
        assert left == [later.key for later in chunks[number + 1 :]]


def test_tool_runs_as_documented_with_another_key_and_a_byte_order_mark(tmp_path, tokenizer):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"body": "first"}\r\n   \n{"body": "second", "text": 3}\n')
    result = run_script(
        "preprocess",
        *("--input", source, "--tokenizer-model", tokenizer.path, "--output-prefix", tmp_path / "new" / "out"),
        *("--text-key", "body", "--workers", 2, "--append-eod"),
    )
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stderr
    assert result.stdout.startswith(f"wrote {tmp_path}/new/out.bin: 2 documents")
    assert [tokenizer.decode(ids) for ids in read_all(tmp_path / "new" / "out")] == ["first", "second"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.bin", "out.idx", "out.json"]


GOOD = b'{"text": "fine"}\n'
BAD_LINES = {
    "cut off": (b'{"text": "fi', "malformed JSON"),
    "no key": (b'{"body": "x"}', "key 'text' is missing (found 'body')"),
    "no string": (b'{"text": ["x"]}', "key 'text' holds list, not a string"),
    "no object": (b'"x"', "expected a JSON object, found str"),
    "latin-1": (b'{"text": "\xe9"}', "not valid UTF-8: byte 0xe9 at column 11"),
    "surrogate": (b'{"text": "\\ud800"}', "lone surrogate U+D800"),
    "too deep": (b"[" * 100000, "malformed JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines_are_named_and_nothing_is_left(tmp_path, tokenizer, kind):
    line, reason = BAD_LINES[kind]
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=r"in\.jsonl:3: ") as error:
        preprocess_documents([source], tokenizer.path, tmp_path / "out")
    assert reason in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_text_line_and_first_error_of_several_workers(tmp_path, tokenizer):
    source = tmp_path / "in.txt"
    source.write_bytes(b"fine line\n" * 60000 + b"\xff\n" + b"fine line\n" * 60000 + b"\xfe\n")
    with pytest.raises(ValueError, match=r"in\.txt:60001: not valid UTF-8: byte 0xff"):
        preprocess_documents([source], tokenizer.path, tmp_path / "out", num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_tool_exits_2_and_keeps_the_older_output(tmp_path, tokenizer):
    prefix = tmp_path / "out"
    preprocess_documents([write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)], tokenizer.path, prefix)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"{\n")
    result = run_script(
        "preprocess",
        *("--input", tmp_path / "bad.jsonl", "--tokenizer-model", tokenizer.path, "--output-prefix", prefix),
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}/bad.jsonl:2: malformed JSON")
    assert result.stderr.count("\n") == 1
    (tmp_path / "bad.jsonl").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_mistakes_are_explained(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    (tmp_path / "in.csv").write_text("x")
    out = tmp_path / "out"
    for inputs, workers, message in [
        ([tmp_path / "absent.jsonl"], 1, "does not exist"),
        ([tmp_path / "in.csv"], 1, "unknown format '.csv'; use .jsonl, .txt"),
        ([empty], 1, "2 documents without a single token"),
        ([source], 0, "workers=0 must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            preprocess_documents(inputs, tokenizer.path, out, num_workers=workers)
    with pytest.raises(ValueError, match=r"absent\.model does not exist; train one"):
        load_tool("preprocess").main(
            ["--input", str(source), "--tokenizer-model", str(tmp_path / "absent.model"), "--output-prefix", str(out)]
        )
    assert not list(tmp_path.glob("out*"))


def test_token_type_follows_megatron_core():
    from megatron.core.datasets.indexed_dataset import DType

    for size in (300, 65499, 65500, 65536, 150000):
        assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))


def test_damaged_files_are_refused(tmp_path, tokenizer):
    preprocess_documents([write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)], tokenizer.path, tmp_path / "out")
    index = (tmp_path / "out.idx").read_bytes()
    (tmp_path / "out.idx").write_bytes(index[:-20])
    with pytest.raises(ValueError, match="is cut off"):
        IndexedFile(tmp_path / "out")
    (tmp_path / "out.idx").write_bytes(b"something else entirely, of some length")
    with pytest.raises(ValueError, match="is not a Megatron index file"):
        IndexedFile(tmp_path / "out")
    (tmp_path / "out.idx").write_bytes(index)
    (tmp_path / "out.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="they are of different runs"):
        IndexedFile(tmp_path / "out")
