"""Trained runs and SentenceTransformer folders as models that texts are mined with.

Shapes: `n` texts, `t` tokens of all texts, `e` embedding dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from megatron_conan.config import dump_config
from megatron_conan.config.tree import ParallelConfig
from megatron_conan.data.binarize import BATCH_CHARACTERS, in_batches
from megatron_conan.data.format import Formatter, TextKind
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.word_encoding import WordEncoder
from megatron_conan.export.trained import TrainedRun, load_run
from megatron_conan.mining.encode import packed_embed
from megatron_conan.mining.offline import PreparedTexts
from megatron_conan.mining.rows import weights_fingerprint
from megatron_conan.parallel.context import build_context, initialize_distributed

HOST_BATCH_SIZE = 32
"""Texts that a SentenceTransformer embeds at once on a CPU, which more make slower; on a GPU it takes a whole batch."""
GPU_BATCH_TOKENS = 16384
"""Tokens of an encoding batch on a GPU; on a CPU smaller ones stay in the cache and take less memory."""
CHARACTERS_A_TOKEN = 4
"""For the estimate of lengths; a character that is not ASCII counts as a token."""


class RunModel:
    """A trained run; texts are formatted and cut as in training."""

    def __init__(self, run: TrainedRun) -> None:
        self.name = f"{run.checkpoint.parent.parent} (step {run.step})"
        self.width = run.config.embedding_dim
        self.context = run.context
        self.batch_tokens = 4096 if run.context.device.type == "cpu" else GPU_BATCH_TOKENS
        self._run = run
        self._formatter = Formatter.of_run(run.config, run.tokenizer)

    @classmethod
    def load(cls, run_dir: Path) -> RunModel:
        """From a run folder or one of its step_* folders. All processes that torchrun started must call."""
        return cls(load_run(run_dir, every_rank=True))

    @property
    def prompts(self) -> Mapping[str, str]:
        """See TextModel."""
        return self._run.config.prompts

    def prepare(self, texts: Sequence[str], kind: TextKind, prompt: str | None) -> PreparedTexts:
        """See TextModel. The texts are tokenised at once, and not needed any more."""
        formatter, name = self._formatter, kind if prompt is None else prompt
        tokens, offsets = _tokenize(texts, self._run.tokenizer)
        embed = packed_embed(
            self._run.embed_packed,
            lambda i: formatter.format(tokens[offsets[i] : offsets[i + 1]], kind, name),
            self.context.device,
            pad_id=self._run.tokenizer.pad_id,
            prompt_length=len(formatter.prompt_tokens(name)),
        )
        return PreparedTexts(formatter.lengths(np.diff(offsets), kind, name), embed)

    def fingerprint(self) -> str:
        """See TextModel."""
        return weights_fingerprint(
            [self._run.model], f"{dump_config(self._run.config)} {self._run.alpha} {self._run.tokenizer.sha256}"
        )


class FolderModel:
    """A SentenceTransformer folder, with its own prompts for queries and documents."""

    def __init__(self, folder: Path) -> None:
        """All processes that torchrun started must call."""
        self.name = str(folder)
        self.context = build_context(ParallelConfig(), initialize_distributed())
        on_host = self.context.device.type == "cpu"  # where HOST_BATCH_SIZE texts are taken at a time
        self.batch_tokens = 65536 if on_host else GPU_BATCH_TOKENS
        self._folder = folder
        self._model = SentenceTransformer(str(folder), device=str(self.context.device), local_files_only=True)
        self.width = int(self._model.encode(["width"], show_progress_bar=False).shape[1])

    @property
    def prompts(self) -> Mapping[str, str]:
        """See TextModel."""
        return self._model.prompts

    def prepare(self, texts: Sequence[str], kind: TextKind, prompt: str | None) -> PreparedTexts:
        """See TextModel."""
        model = self._model
        encode = model.encode_query if kind == "query" else model.encode_document
        named = {} if prompt is None else {"prompt_name": prompt} if prompt else {"prompt": ""}

        def embed(batches: list[np.ndarray]) -> torch.Tensor:
            chosen = [texts[i] for batch in batches for i in batch.tolist()]
            size = HOST_BATCH_SIZE if self.context.device.type == "cpu" else len(chosen)
            vectors = encode(chosen, batch_size=size, convert_to_tensor=True, show_progress_bar=False, **named)
            return torch.nn.functional.normalize(vectors.float(), dim=1)

        longest = model.max_seq_length or np.iinfo(np.int64).max
        lengths = np.fromiter(map(_estimated_tokens, texts), np.int64, len(texts))
        return PreparedTexts(np.minimum(lengths, longest), embed)

    def fingerprint(self) -> str:
        """See TextModel: a digest of all files but hidden ones."""
        digest = hashlib.sha256()
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                with path.open("rb") as file:
                    digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
        return digest.hexdigest()


def _tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all texts [t] without special ones, and where each begins and the last ends [n + 1] int64."""
    encoder = WordEncoder(tokenizer)
    tokens, lengths = [], [np.zeros(1, np.int64)]
    for batch in in_batches(texts, BATCH_CHARACTERS):
        batch_tokens, batch_lengths = encoder.encode(batch)
        tokens.append(np.frombuffer(batch_tokens, encoder.dtype))
        lengths.append(batch_lengths)
    return np.concatenate(tokens), np.cumsum(np.concatenate(lengths), dtype=np.int64)


def _estimated_tokens(text: str) -> int:
    return len(text) // CHARACTERS_A_TOKEN + 2 if text.isascii() else len(text) + 2
