"""Training the SentencePiece BPE model: lossless, deterministic, with the special ids of `tokenizer.py`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from megatron_conan.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, SPECIAL_PIECES, UNK_ID

MAX_LINE_CHARACTERS = 4096
"""Longer lines are cut: the trainer would drop them."""

TRAINER_THREADS = 4
"""Constant, as it is written into the model file: the same text gives the same bytes on every machine."""

_UNSEEN_BY_TRAINER = re.compile("[\0\t\n\u2585]+")
"""SentencePiece drops whole lines with one of these; as bytes they can be encoded all the same."""


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (),
    num_reserved: int = 0,
    character_coverage: float = 0.9995,
    is_silent: bool = True,
) -> bytes:
    """Train a BPE model with byte fallback.

    Args:
        documents: texts; read once.
        vocab_size: number of pieces, special, reserved and the 256 byte pieces included.
        special_tokens: further control tokens, e.g. `<sep>`, with the ids from 4 on.
        num_reserved: number of control tokens `<reserved_0>` .. behind those, for later use.
        character_coverage: share of the text's characters that get a piece; the rest is written in bytes.
        is_silent: SentencePiece doesn't tell on stderr how far it is.

    Returns:
        The model file's content.

    Raises:
        ValueError: there is no text, or the vocabulary is smaller or larger than the text supports.
    """
    if num_reserved < 0 or not 0 < character_coverage <= 1:
        raise ValueError(
            f"reserved={num_reserved} must not be negative, character_coverage={character_coverage} must be in (0, 1]"
        )
    control_symbols = [*special_tokens, *(f"<reserved_{i}>" for i in range(num_reserved))]
    _check_special_tokens(control_symbols)
    num_special = len(SPECIAL_PIECES) + len(special_tokens)
    smallest = num_special + num_reserved + 256
    if vocab_size <= smallest:
        raise ValueError(
            f"vocab_size={vocab_size} must be above {smallest}: {num_special} special, "
            f"{num_reserved} reserved and 256 byte pieces come before the characters"
        )
    source = _TrainingLines(documents)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(source),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_piece=SPECIAL_PIECES[PAD_ID],
            unk_piece=SPECIAL_PIECES[UNK_ID],
            bos_piece=SPECIAL_PIECES[BOS_ID],
            eos_piece=SPECIAL_PIECES[EOS_ID],
            control_symbols=control_symbols,
            max_sentence_length=MAX_LINE_CHARACTERS * 4,
            num_threads=TRAINER_THREADS,
            minloglevel=2 if is_silent else 0,
        )
    except RuntimeError as error:
        if source.error:
            raise source.error from None
        raise ValueError(_explain_training_failure(str(error), vocab_size, source.num_lines)) from error
    if source.error:
        raise source.error
    return model.getvalue()


def training_lines(document: str) -> Iterator[str]:
    """The lines of a document as the trainer takes them, without line breaks."""
    for line in _UNSEEN_BY_TRAINER.split(document):
        for start in range(0, len(line), MAX_LINE_CHARACTERS):
            yield line[start : start + MAX_LINE_CHARACTERS]


class _TrainingLines:
    """Lines the trainer accepts; keeps an error of the source, which must not pass through the C++ trainer."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.error: ValueError | None = None
        self.num_lines = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self._documents:
                for line in training_lines(document):
                    self.num_lines += 1
                    yield line
        except ValueError as error:
            self.error = error


def _check_special_tokens(names: Sequence[str]) -> None:
    taken = [
        name
        for name in names
        if names.count(name) > 1 or name in SPECIAL_PIECES or re.fullmatch("<0x[0-9A-F]{2}>", name)
    ]
    odd = [
        name for name in names if not name or any(character.isspace() or character in "\0,\u2581" for character in name)
    ]
    if taken or odd:
        wrong = taken or odd
        raise ValueError(
            f"special token {wrong[0]!r} {'is there already' if taken else 'must be of visible characters'}; name another"
        )


def _explain_training_failure(message: str, vocab_size: int, num_lines: int) -> str:
    if not num_lines:
        return "the input holds no text to train a tokenizer on"
    too_high = re.search(r"Vocabulary size too high .*<= (\d+)", message)
    if too_high:
        return (
            f"vocab_size={vocab_size} is more than this text supports ({num_lines} lines): "
            f"use at most {too_high[1]}, or give more text"
        )
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_small:
        return (
            f"vocab_size={vocab_size} is less than the {too_small[1]} special, byte and character pieces of this "
            f"text: use at least {too_small[1]}, or a lower --character-coverage"
        )
    return f"SentencePiece could not train a tokenizer with vocab_size={vocab_size}: {message}"
