"""Any file is refused in one line, with nothing left, or comes out whole: each line a document, a row, rejected or blank."""

import pytest
from fuzzed_inputs import CLASSES, check_documents, check_pairs, contents, lines, text_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_conan.data.pair_rows import TASKS

PACKED = st.sampled_from(["", "", ".gz", ".zst"])
SIZES = st.sampled_from([1, 60, 10**6])
ON_ERROR = st.sampled_from(["fail", "skip", "skip"])


@settings(max_examples=120, deadline=None)
@given(
    rows=st.lists(st.tuples(contents(lines("documents")), PACKED), min_size=1, max_size=2),
    plain=st.lists(st.tuples(contents(text_lines()), PACKED), max_size=1),
    size=SIZES,
    dedup=st.booleans(),
    on_error=ON_ERROR,
)
def test_documents(tmp_path_factory, tokenizer, rows, plain, size, dedup, on_error):
    files = {f"{i}.jsonl{ending}": content for i, (content, ending) in enumerate(rows)}
    files |= {f"x.txt{ending}": content for content, ending in plain}
    check_documents(tmp_path_factory.mktemp("fuzz"), tokenizer, files, size, {"dedup": dedup, "on_error": on_error})


@pytest.mark.parametrize("task", TASKS)
def test_pairs(tmp_path_factory, tokenizer, task):
    @settings(max_examples=25, deadline=None)
    @given(
        rows=st.lists(st.tuples(contents(lines(task)), PACKED), min_size=1, max_size=2),
        corpus=st.lists(st.tuples(contents(lines("documents"), 4), PACKED), max_size=1),
        size=SIZES,
        on_error=ON_ERROR,
    )
    def check(rows, corpus, size, on_error):
        files = {f"{i}.jsonl{ending}": content for i, (content, ending) in enumerate(rows)}
        files |= {f"c.jsonl{ending}": content for content, ending in corpus}
        if task == "classification" and size > 1:
            files["b.jsonl"] = CLASSES
        check_pairs(tmp_path_factory.mktemp("fuzz"), tokenizer, task, files, size, on_error)

    check()
