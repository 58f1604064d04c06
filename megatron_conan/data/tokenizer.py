"""SentencePiece BPE tokenizer with fixed special ids and a lossless round trip.

Imports neither torch nor megatron, so that the processes which tokenise a corpus start quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
SPECIAL_PIECES = ("<pad>", "<unk>", "<s>", "</s>")

TRAIN_COMMAND = "python data_tools/train_tokenizer.py --input F [F ...] --vocab-size N --output-prefix P"


class Tokenizer:
    """A trained tokenizer: `P.model` as written by `data_tools/train_tokenizer.py`.

    `encode` adds neither BOS nor EOS. Special pieces are control symbols: a literal `<s>` in a text is ordinary text.
    `decode(encode(x)) == x` for every text without U+2581: SentencePiece writes spaces so, and gives it back as one.

    Raises:
        ValueError: the file is missing, is no SentencePiece model, or has other special ids than this code base uses.
    """

    pad_id: int = PAD_ID
    unk_id: int = UNK_ID
    bos_id: int = BOS_ID
    eos_id: int = EOS_ID

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"tokenizer model {self.path} does not exist; train one: {TRAIN_COMMAND}")
        model = self.path.read_bytes()
        self.sha256: str = hashlib.sha256(model).hexdigest()
        self._processor = _load_processor(model, self.path)
        self.size: int = self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without BOS or EOS. Raises ValueError for text with lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, on the calling thread alone; `encode_batch(texts)[i] == encode(texts[i])`."""
        try:
            return self._processor.encode(list(texts), num_threads=1)
        except (RuntimeError, TypeError, UnicodeError) as error:
            raise ValueError(_explain_encode_failure(texts, error)) from error

    def pieces(self) -> list[str]:
        """[size] text of each piece, spaces as U+2581."""
        return [self._processor.id_to_piece(i) for i in range(self.size)]

    def special_id(self, piece: str) -> int:
        """Id of a special piece, e.g. `<sep>`. Raises ValueError if the tokenizer has none of that name."""
        found: int = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(found) != piece or not self._processor.is_control(found):
            raise ValueError(f"{self.path} has no special token {piece}; train it with --special-tokens {piece}")
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; pad, BOS, EOS and reserved tokens decode to nothing. Raises ValueError for unknown ids."""
        id_list = [int(i) for i in ids]
        out_of_range = [i for i in id_list if not 0 <= i < self.size]
        if out_of_range:
            raise ValueError(f"token id {out_of_range[0]} is outside the vocabulary of {self.path} (size {self.size})")
        return self._processor.decode(id_list)


def _load_processor(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}); train one: {TRAIN_COMMAND}") from error
    found = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
    if found != (PAD_ID, UNK_ID, BOS_ID, EOS_ID):
        raise ValueError(
            f"{path} has pad, unk, bos, eos ids {found}; this code base needs "
            f"{(PAD_ID, UNK_ID, BOS_ID, EOS_ID)}; train one: {TRAIN_COMMAND}"
        )
    return processor


def _explain_encode_failure(texts: Sequence[str], error: Exception) -> str:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {i} of {len(texts)} is of type {type(text).__name__}, not str"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as reason:
            return f"text {i} of {len(texts)} cannot be written as UTF-8 ({reason.reason}): remove the lone surrogate"
    return f"SentencePiece could not encode {len(texts)} texts: {error}"
