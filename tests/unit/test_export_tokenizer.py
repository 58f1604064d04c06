"""The Hugging Face tokenizer of an export gives SentencePiece's ids for any text, before and after saving."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from plain_decoder import write_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_conan.export.tokenizer import convert_tokenizer, verify_tokenizer

MAX_LENGTH = 12
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It runs    and runs,  again and again.\n",
    "def read_file(path):\n    with open(path) as file:\n        return file.read()\n\tif x == 1024: pass",
    "Ein schöner Tag in München; die Straße ist naß. ¿Qué tal? Ça va très bien, aaaaaaaa aaaa!",
    "今天天气很好,我们去公园散步。东京是日本的首都。 Привет, как дела? Всё хорошо.",
    "for i in range(100):\n        for j in range(100):\n            total += i * j\n\n\n        print(total)",
]
HARD_TEXTS = [
    "",
    " ",
    "   ",
    "\n\n\n",
    "\t\tx",
    "a  b   c    d",
    "trailing   ",
    "   leading",
    "</s>",
    "<s>text</s><pad>",
    "<unk> <pad",
    "<reserved_0>",
    "<0x41> <0xE2>",
    "👩‍👩‍👧 emoji 🎉🎉",
    "▁literal▁marker",
    "aaaaaaaaaaaaa",
    "e\u0301 combining",
    "\x00nul",
    "۱۲۳",
    "ﬁ ligature ①",
    "\r\n",
    "\u200b\u2028",
    "x" * 300,
    " " * 65 + "y",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), CORPUS * 3, vocab_size=420)


@pytest.fixture(scope="module")
def reference(model_file: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


@pytest.fixture(scope="module", params=["converted", "loaded"])
def tokenizer(
    request: pytest.FixtureRequest, model_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    converted = convert_tokenizer(model_file, MAX_LENGTH)
    if request.param == "converted":
        return converted
    folder = tmp_path_factory.mktemp("saved")
    converted.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


ALPHABET = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from([*"aeiortn .,\n\t\r▁0123456789<>/s"]),
    st.sampled_from(["  ", "    ", "</s>", "<s>", "<pad>", "<unk>", "<0x0A>", "🎉", "👩‍👧", "ß"]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(ALPHABET, max_size=40))
@example(parts=["</s>"])
@example(parts=[])
def test_ids_equal_on_any_text(
    parts: list[str], tokenizer: PreTrainedTokenizerFast, reference: sentencepiece.SentencePieceProcessor
) -> None:
    text = "".join(parts)
    assert tokenizer(text)["input_ids"] == [*reference.encode(text), 3]
    assert tokenizer.decode(tokenizer(text)["input_ids"][:-1]) == reference.decode(reference.encode(text))


def test_ids_equal_on_corpus_and_hard_texts(model_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = HARD_TEXTS + [line[start:] for line in CORPUS for start in range(0, len(line), 3)]
    assert verify_tokenizer(model_file, tokenizer, texts) == len(texts)


def test_batch_is_right_padded_and_truncated_before_the_eos(
    tokenizer: PreTrainedTokenizerFast, reference: sentencepiece.SentencePieceProcessor
) -> None:
    texts = ["", "fox", "the quick brown fox jumps over the lazy dog, again and again and again"]
    batch = tokenizer(texts, padding=True, truncation=True)
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        expected = [*reference.encode(text)[: MAX_LENGTH - 1], 3]
        assert ids == expected + [0] * (MAX_LENGTH - len(expected))
        assert mask == [1] * len(expected) + [0] * (MAX_LENGTH - len(expected))


def test_verify_reports_the_first_difference(model_file: Path) -> None:
    tokenizer = convert_tokenizer(model_file, MAX_LENGTH)
    tokenizer.split_special_tokens = False
    with pytest.raises(ValueError, match=r"differs from .* on text 'x</s>' at token 1"):
        verify_tokenizer(model_file, tokenizer, ["fox", "x</s>"])


def test_other_trainings_are_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "unigram"),
        model_type="unigram",
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"model_type must be bpe; byte_fallback must be on; normalization_rule_name"):
        convert_tokenizer(tmp_path / "unigram.model", MAX_LENGTH)
