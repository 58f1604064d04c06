"""The one way a text becomes a model input: used by training, mining, evaluation and export alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from megatron_conan.config import RunConfig
from megatron_conan.data.tokenizer import Tokenizer

TextKind = Literal["query", "document"]


def format_text(
    tokens: np.ndarray | Sequence[int], max_length: int, eos_id: int, prompt: Sequence[int] | np.ndarray = ()
) -> np.ndarray:
    """Prompt, text and EOS; the text's end is cut where the whole would be longer than `max_length`.

    Args:
        tokens: [s] raw token ids, without special tokens; may be empty.
        max_length: most tokens of the result, prompt and EOS included; at least that of the prompt + 1.
        eos_id: id of the end-of-sequence token.
        prompt: [p] token ids put before the text.

    Returns:
        [min(p + s, max_length - 1) + 1] int32.
    """
    room = max_length - 1 - len(prompt)
    if room < 0:
        raise ValueError(
            f"max_length={max_length} leaves no room for the EOS token behind a prompt of {len(prompt)} tokens; use at "
            f"least {len(prompt) + 1}"
        )
    body = np.asarray(tokens, dtype=np.int32)[:room]
    return np.concatenate([np.asarray(prompt, dtype=np.int32), body, np.array([eos_id], dtype=np.int32)])


class Formatter:
    """Formats queries and documents with the prompts and lengths of a run.

    A prompt ends in a line break, which no token spans (data_tools/train_tokenizer.py): so prompt and text can be tokenised
    apart, and give the same tokens as the string of both, which is what an exported model sees.

    Args:
        tokenizer: gives the prompts' tokens and EOS.
        prompts: texts put before inputs, by name.
        max_lengths: most tokens of a query and of a document, prompt and EOS included.

    Raises:
        ValueError: a prompt doesn't end in a line break, or fills a text's whole length.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Mapping[str, str], max_lengths: Mapping[TextKind, int]) -> None:
        check_prompts(prompts)
        self.max_lengths = dict(max_lengths)
        self.eos_id = tokenizer.eos_id
        self._prompts = {name: np.array(tokenizer.encode(text), np.int32) for name, text in prompts.items()}
        shortest = min(self.max_lengths.values())
        for name, tokens in self._prompts.items():
            if len(tokens) + 2 > shortest:
                raise ValueError(
                    f"prompts.{name} has {len(tokens)} tokens, which leaves no room for a text in {shortest} tokens; "
                    "shorten it, or raise data.max_query_length and data.max_document_length"
                )

    @classmethod
    def of_run(cls, config: RunConfig, tokenizer: Tokenizer) -> Formatter:
        """The formatter of a run."""
        lengths: dict[TextKind, int] = {"query": config.max_query_length, "document": config.max_document_length}
        return cls(tokenizer, config.prompts, lengths)

    def prompt_tokens(self, prompt: str | None) -> np.ndarray:
        """[p] int32 token ids of a prompt; none for a name that isn't among the prompts."""
        return self._prompts.get(prompt or "", np.empty(0, np.int32))

    def format(self, tokens: np.ndarray | Sequence[int], kind: TextKind, prompt: str | None = None) -> np.ndarray:
        """[s] int32: prompt, text (cut to fit) and EOS."""
        return format_text(tokens, self.max_lengths[kind], self.eos_id, self.prompt_tokens(prompt))

    def lengths(self, text_lengths: np.ndarray, kind: TextKind, prompt: str | None = None) -> np.ndarray:
        """[n] int64 lengths that texts of `text_lengths` tokens have once formatted."""
        whole = np.asarray(text_lengths, dtype=np.int64) + len(self.prompt_tokens(prompt)) + 1
        return np.minimum(whole, self.max_lengths[kind])

    def is_truncated(self, text_lengths: np.ndarray, kind: TextKind, prompt: str | None = None) -> np.ndarray:
        """[n] bool: the text loses tokens."""
        room = self.max_lengths[kind] - 1 - len(self.prompt_tokens(prompt))
        return np.asarray(text_lengths) > room


def check_prompts(prompts: Mapping[str, str]) -> None:
    """Refuse prompts whose last token could span into the text. Raises ValueError."""
    for name, text in prompts.items():
        if text and not text.endswith("\n"):
            raise ValueError(
                f"prompts.{name}={text!r} must end in a line break, so that no token spans prompt and text; "
                f'write {text.rstrip()!r} + a line break (in YAML: "...\\n")'
            )


def prompt_name(task: str, kind: TextKind, override: str | None = None) -> str:
    """Name of the prompt a source's texts get: its own choice, else `query`/`document` for retrieval, else the task's name."""
    if override is not None:
        return override
    return kind if task == "retrieval" else task
