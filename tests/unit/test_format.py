"""Formatting: prompt, text and EOS; prompt and text tokenised apart give the tokens of the string of both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sample_texts import DOCUMENTS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_conan.data.format import Formatter, check_prompts, format_text, prompt_name
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer
from megatron_conan.export.tokenizer import convert_tokenizer

PROMPTS = {
    "query": "Find the code that does this:\n",
    "document": "",
    "sts": "Same meaning?  \n\n",
    "classification": "类别 🏷:\n",
    "break": "\n",
}
TEXTS = st.lists(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(["\n", "\r\n", " ", "   ", "\t", "▁", "</s>", "<0x0A>", "the", " the", "1234", "🎉"]),
    ),
    max_size=20,
).map("".join)


@pytest.fixture(scope="module", params=["plain", "trained on line breaks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Two tokenizers of the documented tool; one saw nothing but lines that end and begin alike."""
    documents = DOCUMENTS
    if request.param != "plain":
        documents = [f"{a}\n{b}\n\n{a}" for a in DOCUMENTS for b in ("the end", " the", "\tthe", "# the")] * 3
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    path.write_bytes(train_tokenizer(documents, 560))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def exported(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer, as a user loads it."""
    folder = tmp_path_factory.mktemp("exported")
    convert_tokenizer(trained.path, 64).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def formatter(tokenizer: Tokenizer, **changes: Any) -> Formatter:
    return Formatter(tokenizer, **({"prompts": PROMPTS, "max_lengths": {"query": 40, "document": 64}} | changes))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
@example(text="")
@example(text=" leading")
@example(text="\n\n")
def test_prompt_and_text_tokenised_apart_are_the_whole(
    trained: Tokenizer, exported: PreTrainedTokenizerFast, text: str
) -> None:
    """For SentencePiece, for the exported tokenizer, and from the one to the other with truncation and EOS."""
    whole = formatter(trained)
    for name, prompt in PROMPTS.items():
        apart = trained.encode(prompt) + trained.encode(text)
        assert trained.encode(prompt + text) == apart
        assert exported(prompt + text, add_special_tokens=False)["input_ids"] == apart
        assert exported(prompt, add_special_tokens=False)["input_ids"] == trained.encode(prompt)
        ids = whole.format(trained.encode(text), "document", name)
        assert ids.tolist() == exported(prompt + text, truncation=True)["input_ids"]


def test_a_prompt_without_line_break_would_not_do(trained: Tokenizer) -> None:
    """The rule is needed: a token may span a space."""
    assert trained.encode("a " + "the") != trained.encode("a ") + trained.encode("the")


def test_text_is_cut_and_ends_with_eos() -> None:
    assert format_text([5, 6, 7], 3, 9).tolist() == [5, 6, 9]
    assert format_text([5, 6, 7], 4, 9).tolist() == [5, 6, 7, 9]
    assert format_text(np.empty(0, np.uint16), 4, 9).tolist() == [9]
    assert format_text(np.array([5], np.uint16), 1, 9).tolist() == [9]
    assert format_text([5], 8, 9).dtype == np.int32
    with pytest.raises(ValueError, match="max_length=0 leaves no room"):
        format_text([5], 0, 9)


def test_a_prompt_is_never_cut() -> None:
    assert format_text([5, 6, 7], 5, 9, prompt=[3, 4]).tolist() == [3, 4, 5, 6, 9]
    assert format_text([5, 6, 7], 3, 9, prompt=[3, 4]).tolist() == [3, 4, 9]
    with pytest.raises(ValueError, match=r"no room for the EOS token behind a prompt of 2 tokens; use at least 3"):
        format_text([5], 2, 9, prompt=[3, 4])


@pytest.mark.parametrize("prompt", [*PROMPTS, "no such prompt", None])
@pytest.mark.parametrize("kind", ["query", "document"])
def test_lengths_are_those_of_the_formatted_texts(tokenizer: Tokenizer, kind: Any, prompt: str | None) -> None:
    whole = formatter(tokenizer)
    raw = np.arange(80)
    texts = [np.full(length, 300) for length in raw]
    formatted = [whole.format(text, kind, prompt) for text in texts]
    assert whole.lengths(raw.astype(np.int32), kind, prompt).tolist() == [len(ids) for ids in formatted]
    assert max(map(len, formatted)) == {"query": 40, "document": 64}[kind]
    before = tokenizer.encode(PROMPTS.get(prompt or "", ""))
    assert all(ids[: len(before)].tolist() == before and ids[-1] == tokenizer.eos_id for ids in formatted)
    kept = np.array([(ids == 300).sum() for ids in formatted])
    assert whole.is_truncated(raw, kind, prompt).tolist() == (kept < raw).tolist()
    assert whole.prompt_tokens(prompt).tolist() == before
    assert whole.prompt_tokens(prompt).dtype == whole.format([], kind, prompt).dtype == np.int32


def test_names_of_prompts() -> None:
    assert [prompt_name("retrieval", kind) for kind in ("query", "document")] == ["query", "document"]
    assert [prompt_name(task, "document") for task in ("sts", "classification")] == ["sts", "classification"]
    assert prompt_name("sts", "query", "title") == "title"
    assert prompt_name("retrieval", "query", "") == ""


def test_unfit_prompts_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts\.query='query: ' must end in a line break"):
        check_prompts({"sts": "Same?\n", "query": "query: "})
    with pytest.raises(ValueError, match=r"prompts\.query='query: ' must end in a line break"):
        formatter(tokenizer, prompts={"query": "query: "})
    size = len(tokenizer.encode(PROMPTS["query"]))
    assert size > 3
    formatter(tokenizer, max_lengths={"query": size + 2, "document": size + 2})
    with pytest.raises(
        ValueError, match=rf"prompts\.query has {size} tokens, which leaves no room .* {size + 1} tokens"
    ):
        formatter(tokenizer, max_lengths={"query": 64, "document": size + 1})
