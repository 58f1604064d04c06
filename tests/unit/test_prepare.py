"""Preparation of code and questions: what is split, what is dropped, what stays."""

import keyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_conan.data.prepare import PYTHON_KEYWORDS, prepare_code, prepare_query, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("read_json_file", ["read", "json", "file"]),
        ("HTTPServer2", ["http", "server", "2"]),
        ("parseXMLDocument", ["parse", "xml", "document"]),
        ("__init__", ["init"]),
        ("utf8 B64encode", ["utf", "8", "b", "64", "encode"]),
        ("x+=1; # naïve 数据库 café", ["x", "1", "naïve", "数据库", "café"]),
        ("...", []),
    ],
)
def test_split_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_document_says_each_word_once_a_query_does_not() -> None:
    text = "def copy_file(src, dst): return copy(src, dst, file=None)"
    assert prepare_code(text) == "copy file src dst"
    assert prepare_query(text) == "copy file src dst copy src dst file"


def test_keywords_are_dropped_in_any_case() -> None:
    assert prepare_query("Return True if the class is not None") == "the"


def test_every_keyword_of_this_python_is_dropped() -> None:
    assert set(keyword.kwlist) <= PYTHON_KEYWORDS


@given(st.text(max_size=200))
def test_prepared_text_is_stable(text: str) -> None:
    """Preparing twice changes nothing more, and a document is the distinct words of the query form."""
    query = prepare_query(text)
    if text.isascii():
        assert prepare_query(query) == query
    assert prepare_code(text).split() == list(dict.fromkeys(query.split()))
    assert not {word.lower() for word in PYTHON_KEYWORDS}.intersection(query.split())
