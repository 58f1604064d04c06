"""Which documents preprocess.py writes: both orders of parallel texts, limits, duplicates, rejected lines; all are counted."""

import base64
import json
import resource
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_texts import DOCUMENTS, load_tool
from tool_inputs import (
    FORMS,
    content_of,
    decoded,
    outputs,
    rejected_of,
    summary_of,
    without_names,
    write_bytes,
    write_rows,
)

from megatron_conan.data import indexed_files, numbering, text_files
from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.indexed_files import IndexedFile, write_index
from megatron_conan.data.numbering import number_texts, text_digests

GOOD = b'{"text": "fine"}\n'


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(text_files, "SMALLEST_CHUNK_BYTES", 200)


PARALLEL = [{"text1": f"Satz {i}, größer", "text2": f"sentence {i}"} for i in range(12)]


def both_orders(rows, first, second):
    return [
        text
        for row in rows
        for one, other in [(f"[{first}] {row['text1']}", f"[{second}] {row['text2']}")]
        for text in (f"{one}\n{other}", f"{other}\n{one}")
    ]


@pytest.mark.parametrize(
    ("name", "more", "languages", "expected"),
    [
        ("x.jsonl", {"lang1": "deu", "lang2": "eng"}, None, ("deu", "eng")),
        ("x.jsonl", {"lang1": "deu", "lang2": "eng"}, ("fra", "ita"), ("deu", "eng")),
        ("tatoeba_deu-eng.jsonl", {"lang1": "gsw", "lang2": "en"}, None, ("gsw", "en")),
        ("tatoeba_deu-eng.jsonl", {}, ("fra", "ita"), ("fra", "ita")),
        ("tatoeba_deu-eng.jsonl.gz", {"lang1": None, "lang2": None}, None, ("deu", "eng")),
        ("deu-eng.parquet", {}, None, ("deu", "eng")),
        ("europarl-v7.de-en.jsonl.zst", {}, None, ("de", "en")),
        ("set.zh-Hans-pt-BR.jsonl", {}, None, ("zh-Hans", "pt-BR")),
        ("x.jsonl", {}, None, None),
        ("wordy-names.jsonl", {}, None, None),
    ],
)
def test_parallel_rows_are_two_documents(tmp_path, tokenizer, name, more, languages, expected):
    """Languages are those of the row, else of the option, else of the file's name."""
    source = write_rows(tmp_path / name, [{**row, **more} for row in PARALLEL])
    options = {"document_format": "bitext", "languages": languages}
    if expected is None:
        with pytest.raises(
            ValueError, match=r":1: the languages of text1 and text2 are not known; give --languages A B"
        ):
            preprocess_documents([source], tokenizer.path, tmp_path / "out", **options)
        return
    summary = preprocess_documents([source], tokenizer.path, tmp_path / "out", **options)
    assert decoded(tmp_path / "out", tokenizer) == both_orders(PARALLEL, *expected)
    assert summary["documents"] == summary["inputs"][0]["documents"] == 2 * len(PARALLEL)


def test_parallel_rows_that_can_not_be_used(tmp_path, tokenizer):
    bad = [
        ({"text1": "x"}, "key 'text2' is missing (found 'text1')"),
        ({"text1": "x", "text2": " "}, "key 'text2' is empty; drop the row or fill it"),
        ({"text1": "x", "text2": "y", "lang1": "deu"}, "key 'lang2' holds NoneType, not a string"),
        ({"text1": "x", "text2": "y", "lang1": 3, "lang2": "eng"}, "key 'lang1' holds int, not a string"),
    ]
    source = write_rows(tmp_path / "deu-eng.jsonl", [PARALLEL[0], *[row for row, _ in bad], PARALLEL[1]])
    preprocess_documents(
        [source], tokenizer.path, tmp_path / "out", document_format="bitext", on_error="skip", num_workers=1
    )
    assert decoded(tmp_path / "out", tokenizer) == both_orders(PARALLEL[:2], "deu", "eng")
    assert [line["reason"] for line in rejected_of(tmp_path / "out")] == [reason for _, reason in bad]
    text = write_bytes(tmp_path / "x.txt", b"x\n")
    for options, message in [
        ({"document_format": "bitext", "inputs": [text]}, r"x\.txt: lines of text are no parallel rows"),
        ({"languages": ("deu", "eng")}, "languages=deu eng are for parallel rows; they need --format bitext"),
        ({"document_format": "csv"}, "format='csv' is unknown; use one of text, bitext"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens=3 and max_tokens=2 leave no document"),
        ({"min_tokens": -1}, "min_tokens=-1 .*give 0 <= min <= max"),
        ({"on_error": "ignore"}, "on_error='ignore' is unknown; use fail or skip"),
    ]:
        with pytest.raises(ValueError, match=message):
            preprocess_documents(**{"inputs": [source], **options}, tokenizer_path=tokenizer.path, output_prefix=text)


def expected_documents(texts, tokenizer, *, minimum=0, maximum=None, dedup=False):
    """(texts written, counts of what is left out), by their definition."""
    kept, left_out, seen = [], Counter(), set()
    for text in texts:
        length = len(tokenizer.encode(text))
        if dedup and text in seen:
            left_out["duplicates"] += 1
        elif length < minimum:
            left_out["too_short"] += 1
        elif maximum is not None and length > maximum:
            left_out["too_long"] += 1
        else:
            kept.append(text)
        seen.add(text)
    return kept, dict(left_out)


@settings(max_examples=80, deadline=None)
@given(
    picks=st.lists(st.lists(st.sampled_from(["", "a", "a ", "b", *DOCUMENTS]), max_size=12), min_size=1, max_size=4),
    minimum=st.integers(0, 12),
    room=st.none() | st.integers(1, 30),
    dedup=st.booleans(),
    append_eod=st.booleans(),
    size=st.sampled_from([1, 80, 10**6]),
)
def test_limits_and_duplicates_are_as_defined(
    tmp_path_factory, tokenizer, picks, minimum, room, dedup, append_eod, size
):
    """Over several files of all forms and chunks of one line, some lines, or the whole file."""
    folder = tmp_path_factory.mktemp("limits")
    inputs = [
        write_rows(folder / f"{i}{FORMS[i]}", [{"text": text} for text in texts] or [{"text": "a"}])
        for i, texts in enumerate(picks)
    ]
    texts = [text for texts in picks for text in texts or ["a"]]
    maximum = None if room is None else minimum + room
    kept, left_out = expected_documents(texts, tokenizer, minimum=minimum, maximum=maximum, dedup=dedup)
    options = {"min_tokens": minimum, "max_tokens": maximum, "dedup": dedup, "append_eod": append_eod}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "SMALLEST_CHUNK_BYTES", size)
        if not any(tokenizer.encode(text) or append_eod for text in kept):
            with pytest.raises(ValueError, match=f"{len(kept)} documents without a single token"):
                preprocess_documents(inputs, tokenizer.path, folder / "out", **options)
            return
        summary = preprocess_documents(inputs, tokenizer.path, folder / "out", **options)
    file = IndexedFile(folder / "out")
    expected = [tokenizer.encode(text) + [tokenizer.eos_id] * append_eod for text in kept]
    assert [file[i].tolist() for i in range(len(file))] == expected
    assert summary["left_out"] == left_out
    assert summary["documents"] + sum(left_out.values()) == len(texts)
    assert summary["tokens"] == sum(map(len, expected))
    assert summary["bytes"] == sum(len(text.encode()) for text in kept)
    assert summary["longest_document"] == max(map(len, expected))
    for name in ("documents", "tokens", "bytes"):
        assert sum(entry[name] for entry in summary["inputs"]) == summary[name]


def test_duplicates_for_any_number_of_workers(tmp_path, tokenizer):
    inputs = [
        write_rows(tmp_path / f"in{form}", [{"text": f"{i % 17} {DOCUMENTS[i % 5]}"} for i in range(start, start + 40)])
        for start, form in zip((0, 30, 50, 5), FORMS, strict=True)
    ]
    for workers in (1, 3):
        preprocess_documents(inputs, tokenizer.path, tmp_path / f"w{workers}", dedup=True, num_workers=workers)
    assert outputs(tmp_path / "w1") == outputs(tmp_path / "w3")
    assert decoded(tmp_path / "w1", tokenizer) == [f"{i % 17} {DOCUMENTS[i % 5]}" for i in range(85)]
    assert summary_of(tmp_path / "w1")["left_out"] == {"duplicates": 4 * 40 - 85}


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=1) | st.sampled_from(DOCUMENTS), max_size=60),
    bucket_texts=st.sampled_from([1, 2, 7, 1000]),
    block=st.sampled_from([1, 3, 1000]),
)
def test_numbers_of_texts_are_those_of_a_dict(tmp_path_factory, texts, bucket_texts, block):
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "digests").write_bytes(text_digests(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbering, "BLOCK_TEXTS", block)
        is_first, number = number_texts(folder / "digests", folder, bucket_texts=bucket_texts)
    numbers: dict[str, int] = {}
    firsts = [text not in texts[:i] for i, text in enumerate(texts)]
    assert number.tolist() == [numbers.setdefault(text, len(numbers)) for text in texts]
    assert is_first.tolist() == firsts
    assert (is_first.dtype, number.dtype) == (np.bool_, np.int64)
    assert {path.name for path in folder.iterdir()} <= {"digests", "is_first", "number"}


@pytest.mark.parametrize("num_sequences", [0, 1, 2, 3, 4, 7])
def test_the_index_is_the_same_in_blocks(tmp_path, monkeypatch, num_sequences):
    lengths = np.arange(num_sequences, dtype=np.int32) % 3
    write_index(tmp_path / "whole", lengths, np.dtype(np.uint16))
    monkeypatch.setattr(indexed_files, "BLOCK", 3)
    write_index(tmp_path / "blocks", lengths, np.dtype(np.uint16))
    content = (tmp_path / "blocks").read_bytes()
    assert content == (tmp_path / "whole").read_bytes()
    pointers = np.frombuffer(content, "<i8", num_sequences, indexed_files.HEADER.size + 4 * num_sequences)
    assert pointers.tolist() == [2 * int(lengths[:i].sum()) for i in range(num_sequences)]


@pytest.mark.parametrize("room", [50, 799, 1000])
def test_numbers_on_a_full_disk_are_told(tmp_path, room):
    """For the first array, the next ones, and the last bytes of a bucket; not later, by a signal or wrong numbers."""
    (tmp_path / "digests").write_bytes(text_digests(map(str, range(100))))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            number_texts(tmp_path / "digests", tmp_path, bucket_texts=70)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


BAD = {
    b'{"text": "half': "malformed JSON",
    b"{]": "malformed JSON",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\ud800 \xc3\xa9"}': "lone surrogate",
    b'{"body": "\xc3\xa9\\u0000"}': "missing key",
    b'{"text": null, "more": "%s"}' % (b"a long line, " * 40): "wrong type",
    b"[1]": "no object",
}


def test_rejected_lines_are_kept_whole_and_all_lines_are_counted(tmp_path, tokenizer):
    bad = list(BAD)
    lines = [b"\xef\xbb\xbf" + GOOD.strip()]
    for i in range(60):
        lines += [bad[i % 7], b"", b'{"text": "number %d"}' % i, b" \t", GOOD.strip() + b"\r"][i % 3 :]
    inputs = [
        write_bytes(tmp_path / "a.jsonl", b"\n".join(lines)),
        write_bytes(tmp_path / "b.jsonl.gz", b"\r\n".join(lines) + b"\n"),
        write_bytes(tmp_path / "c.txt", b"first\n\xff second\nthird \xed\xa0\x80"),
    ]
    for workers in (1, 3):
        prefix = tmp_path / f"w{workers}" / "out"
        summary = preprocess_documents(inputs, tokenizer.path, prefix, on_error="skip", num_workers=workers)
    assert content_of(tmp_path / "w1") == content_of(tmp_path / "w3")
    expected, kinds = [], Counter()
    for source in inputs[:2]:
        for number, line in enumerate(lines, 1):
            if line in BAD:
                kinds[BAD[line]] += 1
                expected.append((f"{source}:{number}", line))
    expected += [(f"{inputs[2]}:2", b"\xff second"), (f"{inputs[2]}:3", b"third \xed\xa0\x80")]
    kinds["not UTF-8"] += 2
    found = rejected_of(tmp_path / "w1" / "out")
    assert [line["place"] for line in found] == [place for place, _ in expected]
    for entry, (_, line) in zip(found, expected, strict=True):
        try:
            assert entry == {"place": entry["place"], "reason": entry["reason"], "line": line.decode()}
        except UnicodeDecodeError:
            assert set(entry) == {"place", "reason", "line_base64"}
            assert base64.b64decode(entry["line_base64"]) == line
            assert entry["reason"].startswith("not valid UTF-8: byte 0x")
    assert summary["rejected"] == dict(kinds)
    assert list(summary["rejected"]) == list(kinds)
    blank = 2 * sum(not line.strip() for line in lines)
    assert summary["documents"] + len(found) + blank == 2 * len(lines) + 3
    assert summary["documents"] == len(decoded(tmp_path / "w1" / "out", tokenizer))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_failure_leaves_older_output_alone_and_the_next_one_replaces_all_of_it(tmp_path, tokenizer, on_error):
    prefix = tmp_path / "out"
    preprocess_documents([write_bytes(tmp_path / "a.jsonl", GOOD + b"{\n")], tokenizer.path, prefix, on_error="skip")
    assert set(outputs(prefix)) == {".bin", ".idx", ".json", ".rejected.jsonl"}
    bad = write_bytes(tmp_path / "b.jsonl", b"{\n" + GOOD * (on_error == "fail"))
    before = content_of(tmp_path)
    with pytest.raises(ValueError, match=r"b\.jsonl:1: malformed" if on_error == "fail" else "1 lines rejected"):
        preprocess_documents([bad], tokenizer.path, prefix, on_error=on_error)
    assert content_of(tmp_path) == before
    preprocess_documents([write_bytes(tmp_path / "c.jsonl", GOOD)], tokenizer.path, prefix, on_error=on_error)
    assert set(outputs(prefix)) == {".bin", ".idx", ".json"}


def test_tool_tells_what_it_left_out_and_rejected(tmp_path, tokenizer, capsys):
    source = write_bytes(tmp_path / "in.jsonl", GOOD * 3 + b"{\n{\n[1]\n" + b'{"text": ""}\n')
    options = ["--dedup", "--min-tokens", "1", "--on-error", "skip"]
    common = [
        "--input",
        str(source),
        "--tokenizer-model",
        str(tokenizer.path),
        "--output-prefix",
        str(tmp_path / "out"),
    ]
    load_tool("preprocess").main(common + options)
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {tmp_path}/out.bin: 1 documents, {len(tokenizer.encode('fine'))} tokens",
        "left out: 2 duplicates, 1 too short",
        f"rejected 3 lines (2 malformed JSON, 1 no object), see {tmp_path}/out.rejected.jsonl",
    ]


@pytest.mark.parametrize("depth", [99, 100, 101, 960, 970, 980, 990, 100_000])
def test_depth_of_json_is_judged_alike_in_all_passes(tmp_path, tokenizer, depth):
    """Python's own limit depends on how deep the caller is, which differs between passes, and from process to process."""
    inside = "[{" * 200  # in a string they are no levels
    lines = [f'{{"text": "deep", "more": ["{inside}\\"", {"[" * (depth - 2)}{"]" * (depth - 2)}]}}', '{"text": "deep"}']
    source = write_bytes(tmp_path / "in.jsonl", "\n".join(lines).encode())
    made = []
    for dedup in (False, True):
        summary = preprocess_documents(
            [source], tokenizer.path, tmp_path / "out", dedup=dedup, on_error="skip", num_workers=1
        )
        made.append(summary["rejected"])
    assert made == [{"malformed JSON": 1} if depth > 100 else {}] * 2
    assert decoded(tmp_path / "out", tokenizer) == ["deep"]


def test_forms_of_one_text_are_one_document(tmp_path, tokenizer):
    """Duplicates are found by the text, not by how it is written."""
    lines = [b'{"text": "caf\xc3\xa9 \xf0\x9f\x99\x82"}', b'{"a": 1, "text": "caf\\u00e9 \\ud83d\\ude42"}']
    source = write_bytes(tmp_path / "in.jsonl", b"\n".join(lines))
    other = write_bytes(tmp_path / "in.txt", "café 🙂".encode())
    table = write_rows(tmp_path / "in.parquet", [json.loads(line) for line in lines])
    summary = preprocess_documents([source, other, table], tokenizer.path, tmp_path / "out", dedup=True)
    assert summary["left_out"] == {"duplicates": 4}
    assert without_names(outputs(tmp_path / "out")).keys() == {".bin", ".idx"}
