"""Whole input files built from good and bad pieces, an oracle of what they hold, and what must come of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from pair_reference import Reference
from tool_inputs import content_of, decoded, rejected_of, write_bytes

from megatron_conan.data import text_files
from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.tokenizer import Tokenizer

BOM = b"\xef\xbb\xbf"
MOST_LEVELS = 100
LETTERS = "ab \t\u00e9\u2028\u0085\u2581我🙂\u0000\ufeff\u00a0"
TEXTS = st.text(LETTERS, max_size=8) | st.text(max_size=5) | st.sampled_from(["a", "b", "a b", "long " * 50])
ASCII_TEXTS = TEXTS.map(json.dumps)
RAW_TEXTS = TEXTS.map(lambda text: json.dumps(text, ensure_ascii=False))


def nested(depth: int) -> str:
    """An array of so many levels."""
    return "[" * depth + "]" * depth


STRINGS = [r'"\ud83d\ude42"', r'"\u0000"', r'"\x"', '"', "'a'", '"a\x00b"', '"a\tb"', "", " "]
SCALARS = [
    "1",
    "0",
    '"1"',
    "-7",
    "2.5",
    "true",
    "false",
    "null",
    "NaN",
    "-Infinity",
    "1e999",
    "1e39",
    "-0.0",
    "01",
    "1_0",
]
LISTS = ["[]", "{}", '["a", "b"]', '["a", "a"]', '["a", 3]', '{"text": "a"}', r'["\ud800"]', '["a", " "]', '[["a"]]']
LONG = ["9" * 25, "9" * 310, "9" * 4299, "9" * 4301, "-" + "9" * 5000, '"' + "[" * 300 + '"', '"' + '\\"{' * 300 + '"']
DEEP = [
    nested(98),
    nested(99),
    nested(500),
    nested(100_000),
    "[" * 100_000,
    '{"a": ' * 99 + "1" + "}" * 99,
    '{"a": ' * 200,
]
ODD_VALUES = st.sampled_from([*STRINGS, *SCALARS, *LISTS, *LONG, *DEEP])
"""Raw JSON, and what looks like it."""
SURROGATES = st.sampled_from(['"\\ud800"', '"a\\udfff b"', '"\\udc00\\ud800"', '"\\uD83D \\ude42"'])
VALUES = SURROGATES | ASCII_TEXTS | RAW_TEXTS | RAW_TEXTS | ODD_VALUES
KEYS = {
    "documents": ("text",),
    "retrieval": ("query", "positive", "negative", "pos", "neg", "instruction"),
    "sts": ("text1", "text2", "score"),
    "sft": ("instruction", "output", "input"),
    "classification": ("text", "label"),
    "bitext": ("text1", "text2"),
    "pairclass": ("text1", "text2", "label"),
}
GOOD = {
    "documents": '{"text": TEXT}',
    "retrieval": '{"query": "NUMBER", "positive": [TEXT, "b"], "negative": "a"}',
    "sts": '{"text1": "a", "text2": TEXT, "score": NUMBER}',
    "sft": '{"instruction": "NUMBER", "output": TEXT}',
    "classification": '{"text": TEXT, "label": NUMBER}',
    "bitext": '{"text1": TEXT, "text2": "NUMBER"}',
    "pairclass": '{"text1": "a", "text2": TEXT, "label": "NUMBER"}',
}
CLASSES = (
    b'{"text": "c", "label": 0}\n{"text": "d", "label": "0"}\n{"text": "e", "label": 1}\n{"text": "f", "label": "1"}\n'
)
"""Rows of two classes, without which few files of labelled texts hold any."""


def rows(task: str) -> st.SearchStrategy[bytes]:
    """Objects with any values under the task's keys, some of them twice, some missing."""
    keys = st.sampled_from([*KEYS[task], "more", "\\ud800"])
    wild = st.lists(st.tuples(keys, VALUES), max_size=5)
    full = st.tuples(*[st.tuples(st.just(key), VALUES) for key in KEYS[task][:3]]).map(list)
    objects = (wild | full).map(lambda pairs: "{" + ", ".join(f'"{key}": {value}' for key, value in pairs) + "}")
    text = TEXTS.map(lambda text: json.dumps(f"x{text}", ensure_ascii=False))
    filled = st.tuples(text, st.sampled_from("01")).map(
        lambda parts: GOOD[task].replace("NUMBER", parts[1]).replace("TEXT", parts[0])
    )
    return (filled | filled | objects).map(str.encode)


def lines(task: str) -> st.SearchStrategy[bytes]:
    """Lines of a .jsonl file, good and bad."""
    good = rows(task)
    cut = st.tuples(good, st.integers(0, 40)).map(lambda parts: parts[0][: parts[1]])
    spoilt = st.tuples(
        good, st.integers(0, 40), st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\xc3", b"\x00", b"\r", b"}"])
    ).map(lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] :])
    blank = st.sampled_from([b"", b"  ", b"\t", b"\r", b"\x0b\x0c", "\u2028".encode(), "\u00a0".encode()])
    other = st.sampled_from([BOM + b'{"text": "a"}', b"[]", b'"a"', b"null", b"3", b"{} {}", b"\x1f\x8b", b"\\", BOM])
    return good | good | good | cut | spoilt | blank | other


def text_lines() -> st.SearchStrategy[bytes]:
    """Lines of a .txt file."""
    bad = st.sampled_from([b"\xff", b"a\xed\xa0\x80", b"\xc3", b"\xf8\x88\x80\x80\x80", b"\xc0\x80"])
    return (
        TEXTS.map(lambda text: text.replace("\n", " ").encode())
        | bad
        | st.sampled_from([b"", b"\r", b" ", b"a\rb\r", BOM])
    )


def contents(line: st.SearchStrategy[bytes], most: int = 12) -> st.SearchStrategy[bytes]:
    """Files of such lines: with or without a byte order mark and a last line end, with LF, CRLF or both."""
    ends = st.sampled_from([b"\n", b"\n", b"\r\n"])
    body = st.lists(st.tuples(line, ends).map(b"".join), max_size=most).map(b"".join)
    return st.tuples(st.sampled_from([b"", b"", BOM]), body, line | st.just(b"")).map(b"".join)


@dataclass
class Held:
    """What a file holds, by the oracle."""

    good: list[Any] = field(default_factory=list)
    """Texts, or rows."""
    bad: list[tuple[int, bytes]] = field(default_factory=list)
    """(number, content) of lines that can't be used."""
    num_lines: int = 0
    num_blank: int = 0


def held(content: bytes, judge: Any) -> Held:
    """`judge` gives what a line holds in a list, or None if it can't be used, or an empty list if it is blank."""
    result = Held()
    parts = content.removeprefix(BOM).split(b"\n")
    if parts[-1] == b"" and (len(parts) > 1 or not content):
        parts.pop()
    for number, part in enumerate(parts, 1):
        line = part.removesuffix(b"\r")
        found = judge(line)
        result.num_lines += 1
        if found is None:
            result.bad.append((number, line))
        else:
            result.good += found
            result.num_blank += not found
    return result


def depth_of(line: str) -> int:
    """Levels of brackets outside of strings."""
    deepest = level = 0
    inside = escaped = False
    for letter in line:
        if inside:
            inside = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            inside = True
        else:
            level += (letter in "[{") - (letter in "]}")
            deepest = max(deepest, level)
    return deepest


def row_of(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if there is none."""
    try:
        text = line.decode()
        if depth_of(text) > MOST_LEVELS:
            return None
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def is_text(value: object, *, filled: bool = True) -> bool:
    """Whether a value is text that UTF-8 can hold, and more than white space."""
    return (
        isinstance(value, str)
        and not any("\ud800" <= letter <= "\udfff" for letter in value)
        and (not filled or value.strip() != "")
    )


def text_line(line: bytes) -> list[str] | None:
    """The document of a line of .txt."""
    try:
        return [line.decode()]
    except UnicodeDecodeError:
        return None


def text_row(line: bytes) -> list[str] | None:
    """The document of a line of .jsonl."""
    if not line.strip(b" \t\n\r\x0b\x0c"):
        return []
    row = row_of(line)
    return [row["text"]] if row is not None and is_text(row.get("text"), filled=False) else None


def are_texts(row: dict[str, Any], names: tuple[str, str], *, needed: bool) -> bool:
    """Whether texts stand under one of two keys."""
    given = [row[name] for name in names if row.get(name) is not None]
    if len(given) != 1:
        return not given and not needed
    values = given[0] if isinstance(given[0], list) else given
    return all(map(is_text, values)) and bool(values or not needed)


def is_pair(task: str, row: dict[str, Any]) -> bool:
    """Whether a row follows the schema of its task in data_tools/README.md."""
    if task == "retrieval":
        instructed = row.get("instruction") is None or is_text(row["instruction"])
        positives = are_texts(row, ("positive", "pos"), needed=True)
        return (
            is_text(row.get("query")) and instructed and positives and are_texts(row, ("negative", "neg"), needed=False)
        )
    if task == "sft":
        more = row.get("input") is None or is_text(row["input"], filled=False)
        return is_text(row.get("instruction")) and is_text(row.get("output")) and more
    label = row.get("label")
    if task == "classification":
        named = is_text(label) or (isinstance(label, int) and not isinstance(label, bool))
        return is_text(row.get("text")) and named
    if not (is_text(row.get("text1")) and is_text(row.get("text2"))):
        return False
    if task == "sts":
        score = row.get("score")
        return isinstance(score, (int, float)) and not isinstance(score, bool) and abs(score) < 3.4e38
    return task == "bitext" or (isinstance(label, (int, str)) and label in (0, 1, "0", "1"))


def pair_row(task: str, line: bytes) -> list[dict[str, Any]] | None:
    """The row of a line of .jsonl."""
    if not line.strip(b" \t\n\r\x0b\x0c"):
        return []
    row = row_of(line)
    return [row] if row is not None and is_pair(task, row) else None


def check_failure(error: BaseException, folder: Path, before: dict[str, Any], expected: str) -> None:
    """One line, which begins as expected, and nothing left."""
    assert type(error) is ValueError
    assert str(error).startswith(expected), str(error)[:300]
    assert len(str(error).splitlines()) == 1
    assert content_of(folder) == before


def check_rejected(prefix: Path, summary: dict[str, Any], expected: list[tuple[str, bytes]]) -> None:
    """Each bad line is kept whole, with its place, and counted."""
    found = rejected_of(prefix)
    assert [entry["place"] for entry in found] == [place for place, _ in expected]
    for entry, (_, line) in zip(found, expected, strict=True):
        assert "line_base64" in entry or entry["line"].encode() == line
        assert len(entry["reason"].splitlines()) == 1
    assert sum(summary["rejected"].values()) == len(found)


def check_documents(
    folder: Path, tokenizer: Tokenizer, files: dict[str, bytes], size: int, options: dict[str, Any]
) -> None:
    """What preprocess_documents makes of files, by their names, in chunks of `size`."""
    paths = [write_bytes(folder / name, content) for name, content in files.items()]
    judged = [held(content, text_line if ".txt" in name else text_row) for name, content in files.items()]
    bad = [(f"{path}:{number}", line) for path, one in zip(paths, judged, strict=True) for number, line in one.bad]
    texts = [text for one in judged for text in one.good]
    kept = list(dict.fromkeys(texts)) if options["dedup"] else texts
    before = content_of(folder)
    is_failure = bool(bad) and options["on_error"] == "fail"
    prefix = folder / "new" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "SMALLEST_CHUNK_BYTES", size)
        if is_failure or not any(kept):
            with pytest.raises(ValueError) as error:  # noqa: PT011
                preprocess_documents(paths, tokenizer.path, prefix, **options)
            expected = (
                f"{bad[0][0]}: " if is_failure else f"{', '.join(map(str, paths))}: {len(kept)} documents without a"
            )
            check_failure(error.value, folder, before, expected)
            return
        summary = preprocess_documents(paths, tokenizer.path, prefix, **options)
    assert decoded(prefix, tokenizer) == [text.replace("\u2581", " ") for text in kept]
    left_out = len(texts) - len(kept)
    assert summary["left_out"] == ({"duplicates": left_out} if left_out else {})
    total, blank = (sum(getattr(one, name) for one in judged) for name in ("num_lines", "num_blank"))
    assert summary["documents"] + left_out + sum(summary["rejected"].values()) + blank == total
    check_rejected(prefix, summary, bad)


def check_pairs(
    folder: Path, tokenizer: Tokenizer, task: str, files: dict[str, bytes], size: int, on_error: str
) -> None:
    """What preprocess_pairs makes of files; those of names with a c are documents."""
    inputs = {name: content for name, content in files.items() if not name.startswith("c")}
    paths = {name: write_bytes(folder / name, content) for name, content in files.items()}
    judged = {name: held(content, lambda line: pair_row(task, line)) for name, content in inputs.items()}
    corpus = {name: held(content, text_row) for name, content in files.items() if name not in inputs}
    everything = judged | corpus
    bad = [(f"{paths[name]}:{number}", line) for name, one in everything.items() for number, line in one.bad]
    rows = [row for one in judged.values() for row in one.good]
    reference = Reference(task, rows, [text for one in corpus.values() for text in one.good])
    before = content_of(folder)
    names = ", ".join(str(paths[name]) for name in inputs)
    failure = ""
    if on_error == "fail" and bad:
        failure = f"{bad[0][0]}: "
    elif not rows:
        failure = f"{names}: no rows"
    elif reference.counts.get("classes", 2) < 2:
        failure = f"{names}: {reference.counts['classes']} of the labels have two texts or more"
    call = [[paths[name] for name in inputs], tokenizer.path, folder / "new" / "out"]
    options = {"corpus": [paths[name] for name in corpus], "on_error": on_error}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "SMALLEST_CHUNK_BYTES", size)
        if failure:
            with pytest.raises(ValueError) as error:  # noqa: PT011
                preprocess_pairs(task, *call, **options)
            check_failure(error.value, folder, before, failure)
            return
        summary = preprocess_pairs(task, *call, **options)
    reference.check(folder / "new" / "out", tokenizer, summary)
    check_rejected(folder / "new" / "out", summary, bad)
    counted = Counter(entry["file"] for entry in summary["inputs"])
    assert counted == Counter(list(paths))
    total = sum(one.num_lines for one in judged.values())
    rejected = sum(len(one.bad) for one in judged.values())
    assert len(rows) + rejected + sum(one.num_blank for one in judged.values()) == total
