"""The tokenizer loses nothing, treats special pieces in text as text, trains deterministically, and explains mistakes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_texts import CODE, DOCUMENTS, MULTILINGUAL, load_tool, run_script

from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer

AWKWARD = [
    "",
    " ",
    "    leading, trailing and   inner runs   ",
    "\n\n\ttabs\t\tand\r\nlines\n",
    "<s></s><unk><pad><reserved_0><0x41> are text",
    "\0 and \x7f and \ufeff and \ufffd and \u2028",
    "e\u0301 is not é, ﬁ is not fi, Ａ is not A",
    "👩‍👩‍👧 🇩🇪 \U0010ffff",
    "0123456789 1e-5",
]


@pytest.mark.parametrize("text", AWKWARD + MULTILINGUAL + CODE)
def test_round_trip_of_awkward_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=4) > 3  # never pad, unk, bos or eos


@given(
    pieces=st.lists(st.sampled_from([" ", "  ", "\n", "\t", "def", "<s>", "</s>", "é", "我", "7", "x_y"]), max_size=20)
)
@settings(max_examples=200, deadline=None)
def test_round_trip_of_white_space_and_markers(tokenizer, pieces):
    text = "".join(pieces)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_exception_is_the_space_marker(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_batch_equals_single_and_digits_are_split(tokenizer):
    assert tokenizer.encode_batch(DOCUMENTS) == [tokenizer.encode(text) for text in DOCUMENTS]
    assert tokenizer.encode_batch([]) == []
    assert len(tokenizer.encode("2024")) == 4


def test_special_tokens_decode_to_nothing_and_unknown_ids_are_refused(tokenizer):
    ids = tokenizer.encode("text")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == "text"
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert tokenizer.size == 600
    for unknown in (600, -1):
        with pytest.raises(ValueError, match=f"token id {unknown} is outside the vocabulary"):
            tokenizer.decode([unknown])


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="text 1 of 2 cannot be written as UTF-8"):
        tokenizer.encode_batch(["good", "\ud800"])


def test_missing_and_foreign_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist; train one: python data_tools/train_tokenizer\.py"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "text.model")


def test_training_is_deterministic_and_reserves_tokens(tmp_path):
    first, second = (train_tokenizer(DOCUMENTS, 600, num_reserved=3) for _ in range(2))
    assert first == second
    (tmp_path / "r.model").write_bytes(first)
    reserved = Tokenizer(tmp_path / "r.model")
    text = "<reserved_0> stays text"
    assert reserved.decode(reserved.encode(text)) == text
    assert reserved.decode([4, 5, 6]) == ""


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        (DOCUMENTS, 100000, r"vocab_size=100000 is more than this text supports .*: use at most \d+"),
        (DOCUMENTS, 262, r"use at least \d+, or a lower --character-coverage"),
        (DOCUMENTS, 200, r"vocab_size=200 must be above 260"),
        ([], 600, "holds no text"),
        (["", "\n\n"], 600, "holds no text"),
    ],
)
def test_impossible_vocabularies_are_explained(documents, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(documents, vocab_size)


def test_suggested_vocabulary_size_works():
    with pytest.raises(ValueError, match="use at most") as error:
        train_tokenizer(DOCUMENTS, 100000)
    largest = int(str(error.value).split("use at most ")[1].split(",")[0])
    assert train_tokenizer(DOCUMENTS, largest)


def test_tool_reads_both_formats_and_writes_the_same_bytes(tmp_path):
    lines = [text for text in DOCUMENTS if "\n" not in text]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in lines), encoding="utf-8")
    tool = load_tool("train_tokenizer")
    common = ["--vocab-size", "500", "--text-key", "body"]
    tool.main(["--input", str(tmp_path / "a.txt"), "--output-prefix", str(tmp_path / "new" / "from_txt"), *common])
    tool.main(["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "from_jsonl"), *common])
    assert (tmp_path / "new" / "from_txt.model").read_bytes() == (tmp_path / "from_jsonl.model").read_bytes()
    assert Tokenizer(tmp_path / "from_jsonl.model").size == 500


def test_tool_reports_a_mistake_in_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n\n{"text": \n', encoding="utf-8")
    result = run_script(
        "train_tokenizer",
        *("--input", tmp_path / "bad.jsonl", "--vocab-size", 500, "--output-prefix", tmp_path / "new" / "t"),
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}/bad.jsonl:3: malformed JSON")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
