"""Words encoded once: the tokens are those of the whole texts, for any text and any tokenizer."""

from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_texts import DOCUMENTS

from megatron_conan.data import word_encoding
from megatron_conan.data.tokenizer import PAD_ID, Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer
from megatron_conan.data.word_encoding import WordEncoder

SPACED = st.text(st.sampled_from("  \u2581\n\tae.1我🙂\u00a0\u0000<s>"), max_size=40)
"""What stands around spaces, and what looks like one."""
TEXTS = st.lists(st.text(max_size=30) | SPACED | st.sampled_from(DOCUMENTS), max_size=8)
SPACES = [f"{'x' * (i % 3)}{' ' * i}word{' ' * (20 - i)}" for i in range(20)] * 8


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A tokenizer with pieces of several spaces, and of spaces with a word behind them."""
    path = tmp_path_factory.mktemp("spaced") / "spaced.model"
    path.write_bytes(train_tokenizer(DOCUMENTS + SPACES, 500))
    tokenizer = Tokenizer(path)
    assert {"\u2581\u2581", "\u2581\u2581\u2581\u2581"} <= set(tokenizer.pieces())
    return tokenizer


def check(encoder, texts, *, append_eod=False):
    """Tokens, lengths and their types are those of texts encoded one by one."""
    tokens, lengths = encoder.encode(texts, append_eod=append_eod)
    expected = [encoder.tokenizer.encode(text) + [encoder.tokenizer.eos_id] * append_eod for text in texts]
    assert lengths.tolist() == list(map(len, expected))
    assert lengths.dtype == np.int32
    bounds = [0, *np.cumsum(lengths).tolist()]
    values = np.frombuffer(tokens, encoder.dtype).tolist()
    assert [values[begin:end] for begin, end in pairwise(bounds)] == expected


@settings(max_examples=150, deadline=None)
@given(
    batches=st.lists(TEXTS, min_size=1, max_size=3), most=st.sampled_from([0, 1, 3, 50_000]), append_eod=st.booleans()
)
@example(batches=[["a\u2581 b", " \u2581x", "\u2581  x"]], most=3, append_eod=False)
@example(batches=[["", " ", "  ", "x  ", "  x", "x   y "]], most=1, append_eod=True)
def test_tokens_are_those_of_whole_texts(spaced, batches, most, append_eod):
    """Also from words that were met before, with room for all of them, for some, or for none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_encoding, "MOST_KEPT_WORDS", most)
        encoder = WordEncoder(spaced)
        assert encoder.cuts_words
        for texts in batches * 2:
            check(encoder, texts, append_eod=append_eod)
            assert len(encoder._tokens) <= most
        assert all(len(word) <= word_encoding.LONGEST_KEPT_WORD for word in encoder._tokens)


def other_model(path, **options):
    """A model trained in another way than ours."""
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS * 3),
            model_writer=model,
            vocab_size=600,
            pad_id=PAD_ID,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            hard_vocab_limit=False,
            minloglevel=2,
            **{"model_type": "bpe", "normalization_rule_name": "identity", **options},
        )
    return Tokenizer(path)


PLAIN = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True}
OTHERS = {
    "dummy prefix": {**PLAIN, "add_dummy_prefix": True},
    "extra spaces removed": {**PLAIN, "remove_extra_whitespaces": True},
    "nfkc": {**PLAIN, "normalization_rule_name": "nfkc"},
    "nfkc and lower case": {**PLAIN, "normalization_rule_name": "nmt_nfkc_cf"},
    "words are not split": {**PLAIN, "split_by_whitespace": False},
    "spaces end words": {**PLAIN, "treat_whitespace_as_suffix": True},
    "a symbol with a space in it": {**PLAIN, "user_defined_symbols": ["of\u2581the", "a\u2581\u2581b"]},
    "unigram": {**PLAIN, "model_type": "unigram"},
    "no bytes": {**PLAIN, "byte_fallback": False},
    "all of it": {"normalization_rule_name": "nmt_nfkc"},
}
CUT = {
    "plain": PLAIN,
    "symbols": {**PLAIN, "user_defined_symbols": ["<sep>", "  "]},
    "a symbol that no text holds": {**PLAIN, "user_defined_symbols": ["of the"]},  # spaces of texts are U+2581
}


@pytest.mark.parametrize("kind", [*OTHERS, *CUT])
def test_other_models_are_encoded_whole_where_words_are_not_apart(tmp_path, kind):
    encoder = WordEncoder(other_model(tmp_path / "other.model", **{**OTHERS, **CUT}[kind]))
    assert encoder.cuts_words == (kind in CUT)
    texts = [*DOCUMENTS, "of the  a  b a  b", " a", "b ", "  ", "Ａ ﬁ  x", "☃ ☃☃ x☃ ☃", "<sep> <sep>x  <sep>"]
    for _ in range(2):
        check(encoder, texts, append_eod=True)


def test_lone_surrogates_are_refused_and_nothing_of_them_is_kept(tokenizer):
    encoder = WordEncoder(tokenizer)
    with pytest.raises(ValueError, match="remove the lone surrogate"):
        encoder.encode(["fine", "not \ud800 fine"])
    check(encoder, ["fine", "not fine"])
