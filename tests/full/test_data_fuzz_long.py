"""Many more files built from good and bad pieces, and lines of 10 MB."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzed_inputs import CLASSES, check_documents, check_pairs, contents, lines, text_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tool_inputs import content_of, decoded, rejected_of, small_tokenizer, write_bytes

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.pair_rows import TASKS
from megatron_conan.data.tokenizer import Tokenizer

pytestmark = pytest.mark.full

PACKED = st.sampled_from(["", "", ".gz", ".zst"])
SIZES = st.sampled_from([1, 60, 500, 10**6])
ON_ERROR = st.sampled_from(["fail", "skip", "skip"])
LONG = 10_000_000
"""Bytes of a long line."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small.model")


def many(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


def test_documents(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> None:
    @many(6000)
    @given(
        rows=st.lists(st.tuples(contents(lines("documents"), 30), PACKED), min_size=1, max_size=3),
        plain=st.lists(st.tuples(contents(text_lines(), 30), PACKED), max_size=2),
        size=SIZES,
        dedup=st.booleans(),
        on_error=ON_ERROR,
    )
    def check(rows: list, plain: list, size: int, dedup: bool, on_error: str) -> None:
        files = {f"{i}.jsonl{ending}": content for i, (content, ending) in enumerate(rows)}
        files |= {f"x{i}.txt{ending}": content for i, (content, ending) in enumerate(plain)}
        check_documents(tmp_path_factory.mktemp("fuzz"), tokenizer, files, size, {"dedup": dedup, "on_error": on_error})

    check()


@pytest.mark.parametrize("task", TASKS)
def test_pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, task: str) -> None:
    @many(1500)
    @given(
        rows=st.lists(st.tuples(contents(lines(task), 30), PACKED), min_size=1, max_size=3),
        corpus=st.lists(st.tuples(contents(lines("documents"), 9), PACKED), max_size=2),
        size=SIZES,
        on_error=ON_ERROR,
    )
    def check(rows: list, corpus: list, size: int, on_error: str) -> None:
        files = {f"{i}.jsonl{ending}": content for i, (content, ending) in enumerate(rows)}
        files |= {f"c{i}.jsonl{ending}": content for i, (content, ending) in enumerate(corpus)}
        if task == "classification" and size > 1:
            files["b.jsonl"] = CLASSES
        check_pairs(tmp_path_factory.mktemp("fuzz"), tokenizer, task, files, size, on_error)

    check()


LONG_TEXTS: dict[str, Callable[[], str]] = {
    "letters": lambda: "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=LONG)),
    "spaces": lambda: " " * LONG,
    "one Chinese character": lambda: "我" * (LONG // 3),
    "one word": lambda: "word1 " * (LONG // 6),
    "line feeds": lambda: "\n" * LONG,
    "literal U+2581": lambda: "\u2581 " * (LONG // 4),
    "emoji": lambda: "🙂" * (LONG // 4),
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_long_texts_come_back_whole(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    """Between short ones, from rows that are plain and packed, and from lines where they are lines."""
    text = LONG_TEXTS[kind]()
    texts = ["before", text, "behind"]
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    sources = [write_bytes(tmp_path / "in.jsonl", content), write_bytes(tmp_path / "in.jsonl.zst", content)]
    if "\n" not in text:
        sources.append(write_bytes(tmp_path / "in.txt.gz", "\n".join(texts).encode()))
    summary = preprocess_documents(sources, tokenizer.path, tmp_path / "out", num_workers=2)
    assert summary["documents"] == 3 * len(sources)
    assert decoded(tmp_path / "out", tokenizer) == [text.replace("\u2581", " ") for text in texts] * len(sources)


BROKEN = {
    "half a text": b'{"text": "' + b"a" * LONG,
    "half a text with quotes": b'{"text": "' + b'\\"' * (LONG // 2),
    "half a text with line feeds": b'{"text": "' + b"\\n" * (LONG // 2),
    "backslashes": b'{"text": "' + b"\\" * LONG,
    "quotes": b'"' * LONG,
    "brackets": b"[" * LONG,
    "pairs of brackets": b"[" + b"[]," * (LONG // 3),
    "objects": b'{"a":' * (LONG // 5),
    "commas": b'{"text": "a"' + b"," * LONG,
    "digits": b'{"text": ' + b"9" * LONG,
    "no UTF-8 at the end": b'{"text": "' + b"a" * LONG + b'\xff"}',
    "white space, then nothing": b" " * LONG + b"{",
    "keys": b"{" + b",".join(b'"%d": "a"' % i for i in range(LONG // 14)) + b"}",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_long_lines_that_can_not_be_used_are_refused_or_skipped(
    tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    good = b'{"text": "good"}\n'
    source = write_bytes(tmp_path / "in.jsonl", good + BROKEN[kind] + b"\n" + good)
    before = content_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"in\.jsonl:2: (malformed JSON|not valid UTF-8|key 'text' is missing)"
    ) as error:
        preprocess_documents([source], tokenizer.path, tmp_path / "new" / "out")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000
    assert content_of(tmp_path) == before
    preprocess_documents([source], tokenizer.path, tmp_path / "out", on_error="skip", dedup=True)
    assert decoded(tmp_path / "out", tokenizer) == ["good"]
    (rejected,) = rejected_of(tmp_path / "out")
    assert len(rejected.get("line", rejected.get("line_base64"))) >= len(BROKEN[kind])
