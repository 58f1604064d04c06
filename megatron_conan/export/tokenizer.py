"""SentencePiece BPE model -> Hugging Face fast tokenizer that gives the same ids for any text.

Special tokens spelled out in a text (`</s>`) are text, as SentencePiece has it: `split_special_tokens` is saved with
the tokenizer. Programs that read the bare `tokenizer.json` without `tokenizer_config.json` don't see that setting.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

BPE_MODEL_TYPE = 2
SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
WORD_BOUNDARY = "▁"  # how SentencePiece writes a space


def convert_tokenizer(model_file: str | Path, max_length: int) -> PreTrainedTokenizerFast:
    """Builds the Hugging Face tokenizer of a SentencePiece model.

    It appends `</s>`, pads on the right with `<pad>`, and truncates to `max_length` tokens keeping the `</s>`.

    Args:
        model_file: SentencePiece BPE model as `train_tokenizer.py` writes it: identity normalisation, no dummy prefix,
            no removal of whitespace, byte fallback, ids `<pad>` 0, `<unk>` 1, `<s>` 2, `</s>` 3.
        max_length: in tokens, the `</s>` included.

    Raises:
        ValueError: the model was trained with another setting, named in the message.
    """
    proto = _read_model(Path(model_file))
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    mergeable = [piece for piece in proto.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)]
    core = models.BPE(
        vocabulary, _list_merges(mergeable, vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(core)
    backend.normalizer = normalizers.Replace(" ", WORD_BOUNDARY)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(WORD_BOUNDARY, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS.values()])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def verify_tokenizer(model_file: str | Path, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> int:
    """Compares the ids of both tokenizers text by text; returns the number of texts compared.

    Raises:
        ValueError: ids differ; the message holds the text and both lists from the first difference on.
    """
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    eos, count = reference.eos_id(), 0
    for text in texts:
        expected = [*reference.encode(text), eos]
        found = tokenizer(text, truncation=False)["input_ids"]
        if found != expected:
            first = next(
                (i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]),
                min(len(expected), len(found)),
            )
            raise ValueError(
                f"the converted tokenizer differs from {model_file} on text {text[:200]!r} at token "
                f"{first}: {found[first : first + 8]}, SentencePiece gives {expected[first : first + 8]}"
            )
        count += 1
    return count


def _read_model(model_file: Path) -> Any:
    """Reads the model's protobuf message and refuses settings that the converted tokenizer does not reproduce."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model_file.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    checks = {
        "model_type must be bpe": trainer.model_type == BPE_MODEL_TYPE,
        "byte_fallback must be on": trainer.byte_fallback,
        "normalization_rule_name must be identity": not normalizer.precompiled_charsmap,
        "add_dummy_prefix must be off": not normalizer.add_dummy_prefix,
        "remove_extra_whitespaces must be off": not normalizer.remove_extra_whitespaces,
        "escape_whitespaces must be on": normalizer.escape_whitespaces,
        "treat_whitespace_as_suffix must be off": not trainer.treat_whitespace_as_suffix,
        "user defined symbols are not supported": not any(piece.type == kinds.USER_DEFINED for piece in proto.pieces),
        "ids must start with <pad>, <unk>, <s>, </s>": [piece.piece for piece in proto.pieces[:4]]
        == list(SPECIAL_TOKENS.values()),
    }
    failed = [remedy for remedy, holds in checks.items() if not holds]
    if failed:
        raise ValueError(
            f"{model_file} cannot be exported: {'; '.join(failed)}; "
            "train the tokenizer with data_tools/train_tokenizer.py"
        )
    return proto


def _list_merges(mergeable: list[Any], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Lists BPE merges in rank order.

    SentencePiece joins two neighbours whenever their concatenation is a piece, best score first, so every split of a
    piece into two known pieces is a merge of that piece's rank.
    """
    known = {piece.piece for piece in mergeable}
    merges: list[tuple[str, str]] = []
    for piece in sorted(mergeable, key=lambda piece: -piece.score):
        text = piece.piece
        splits = [
            (text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in known and text[cut:] in known
        ]
        merges.extend(sorted(splits, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]])))
    return merges
