"""The benchmark of tokenising: its variants write the same tokens, its generated table is a PairStore."""

import json

import preprocess as benchmark
import pytest
from sample_texts import DOCUMENTS

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.pairs import PairStore


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "lm"
    folder.mkdir()
    for part in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS[part::2]]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_all_variants_write_the_same_tokens(tmp_path, corpus, tokenizer):
    alone = benchmark.measure_sentencepiece(corpus, tokenizer.path, tmp_path / "alone", 1)
    shaped = benchmark.measure_megatron(corpus, tokenizer.path, tmp_path / "shaped", 1)
    ours = benchmark.run_preprocess(corpus, tokenizer.path, tmp_path / "ours", 2)
    assert shaped["tokens"] == ours["tokens"] == alone["tokens"] + len(DOCUMENTS)
    preprocess_documents([corpus], tokenizer.path, tmp_path / "plain", append_eod=True)
    for suffix in (".bin", ".idx"):
        expected = (tmp_path / f"plain{suffix}").read_bytes()
        assert (tmp_path / f"ours{suffix}").read_bytes() == expected
        assert (tmp_path / f"shaped{suffix}").read_bytes() == expected
    assert ours["cpu"] > 0
    assert ours["memory"] > 20  # MB: an interpreter with numpy at least


def test_generated_table_is_pair_data(tmp_path, tokenizer):
    benchmark.write_table(tmp_path / "table", 1000, tokenizer)
    store = PairStore(tmp_path / "table", tokenizer)
    assert (store.num_rows, store.num_texts) == (1000, 1200)
    for row in (0, 1, 999):
        ids = [store.query(row), *store.positives(row), *store.negatives(row)]
        assert len(ids) == 4
        assert all(len(store.tokens(i)) == benchmark.TEXT_TOKENS for i in ids)
        assert set(ids[1:]) <= set(store.corpus_ids.tolist())
    opened = benchmark.measure_opening(tmp_path / "table", tokenizer.path)
    assert opened["seconds"] > 0


def test_copies_share_no_words():
    assert benchmark.rotated("Ab z", 1) == "Ac a"
    assert benchmark.rotated("text", 0) == "text"


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="name the folder that holds lm/ with --data DIR"):
        benchmark.main(["--data", str(tmp_path)])
