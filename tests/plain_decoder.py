"""A plain fp64 decoder over weights under megatron names, one sequence and one head at a time: the reference of tests."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import rms_norm, silu

from megatron_conan.data.format import format_text
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer
from megatron_conan.export.hf import ExportSettings
from megatron_conan.export.mapping import EMBEDDING, PROJECTION, ModelShape, iterate_rules

MAX_LENGTH = 24
PROMPTS = {"query": "find:\n", "document": "", "sts": "Same?  \n\n"}
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "def read(path):\n    return open(path).read()",
    "Ein schöner Tag in München",
    "今天天气很好",
    "Numbers 0123456789, and    runs of    spaces\tand tabs",
]


def write_tokenizer(folder: Path, corpus: list[str], vocab_size: int) -> Path:
    """Trains a small SentencePiece model, with two reserved tokens, and writes it into the folder."""
    path = folder / "bpe.model"
    path.write_bytes(train_tokenizer(corpus, vocab_size, num_reserved=2, character_coverage=0.98))
    return path


def make_weights(shape: ModelShape, padding_rows: int) -> dict[str, torch.Tensor]:
    """Random fp64 weights under megatron names, wide enough that position and direction matter to the vectors."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for rule in iterate_rules(shape.num_layers):
        size = rule.shape(shape)
        drawn = torch.randn(size, generator=generator, dtype=torch.float64)
        weights[rule.megatron] = 1 + 0.2 * drawn if len(size) == 1 else 2.5 * drawn / math.sqrt(size[-1])
    padding = torch.full((padding_rows, shape.hidden_size), 5.0, dtype=torch.float64)
    weights[EMBEDDING] = torch.cat([weights[EMBEDDING], padding])
    if shape.projection_dim is not None:
        size = (shape.projection_dim, shape.hidden_size)
        weights[PROJECTION] = torch.randn(size, generator=generator, dtype=torch.float64)
    return weights


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """NeoX rotary embedding of [s, n, d]: dimension i turns together with i + d/2."""
    s, _, d = x.shape
    angle = torch.arange(s, dtype=torch.float64)[:, None] * base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    low, high = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attend(x: torch.Tensor, qkv: torch.Tensor, shape: ModelShape, bidirectional: bool) -> torch.Tensor:
    """Attention of one sequence [s, h] -> [s, n * d], one head at a time, straight from the rows of linear_qkv."""
    d, groups = shape.kv_channels, shape.num_query_groups
    per_group = shape.num_attention_heads // groups
    mixed = (x @ qkv.T).reshape(len(x), groups, per_group + 2, d)
    mask = torch.zeros(len(x), len(x), dtype=torch.float64)
    if not bidirectional:
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -math.inf)
    heads = []
    for group in range(groups):
        key = rotate(mixed[:, group, per_group : per_group + 1], shape.rotary_base)[:, 0]
        value = mixed[:, group, per_group + 1]
        for head in range(per_group):
            query = rotate(mixed[:, group, head : head + 1], shape.rotary_base)[:, 0]
            heads.append((query @ key.T / math.sqrt(d) + mask).softmax(dim=-1) @ value)
    return torch.cat(heads, dim=-1)


def token_vectors(
    ids: list[int], weights: dict[str, torch.Tensor], shape: ModelShape, bidirectional: bool
) -> torch.Tensor:
    """One sequence through a plain pre-norm decoder in fp64 -> [s, h]."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, (shape.hidden_size,), weights[name], shape.norm_epsilon)

    x = weights[EMBEDDING][torch.tensor(ids)]
    for layer in range(shape.num_layers):
        name = f"decoder.layers.{layer}."
        attended = attend(
            norm(x, name + "input_layernorm.weight"),
            weights[name + "self_attention.linear_qkv.weight"],
            shape,
            bidirectional,
        )
        x = x + attended @ weights[name + "self_attention.linear_proj.weight"].T
        hidden = norm(x, name + "pre_mlp_layernorm.weight") @ weights[name + "mlp.linear_fc1.weight"].T
        gate, up = hidden[:, : shape.ffn_hidden_size], hidden[:, shape.ffn_hidden_size :]
        x = x + (silu(gate) * up) @ weights[name + "mlp.linear_fc2.weight"].T
    return norm(x, "decoder.final_layernorm.weight")


def pool(x: torch.Tensor, mode: str, first: int) -> torch.Tensor:
    """[s, h] -> [h], token by token, without the `first` tokens (a prompt that doesn't count)."""
    if mode == "last":
        return x[-1]
    total, weights = torch.zeros_like(x[0]), 0
    for position in range(first, len(x)):
        weight = position + 1 if mode == "weighted_mean" else 1
        total, weights = total + weight * x[position], weights + weight
    return total / weights


class PlainModel:
    """A small tokenizer, a model shape with random weights, and the plain decoder's vectors of texts."""

    def __init__(self, folder: Path, projection_dim: int | None = None) -> None:
        self.tokenizer_path = write_tokenizer(folder, CORPUS, vocab_size=330)
        self.tokenizer = Tokenizer(self.tokenizer_path)
        self.shape = ModelShape(
            num_layers=2,
            hidden_size=40,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=12,
            ffn_hidden_size=56,
            vocab_size=self.tokenizer.size,
            rotary_base=500.0,
            norm_epsilon=1e-4,
            projection_dim=projection_dim,
        )
        self.weights = make_weights(self.shape, padding_rows=13)

    def settings(self, **changes: Any) -> ExportSettings:
        settings = ExportSettings(
            tokenizer_path=self.tokenizer_path,
            alpha=1.0,
            pooling="mean",
            max_seq_length=MAX_LENGTH,
            prompts=PROMPTS,
        )
        return replace(settings, **changes)

    def tokens(self, text: str, prompt: str = "") -> list[int]:
        """The ids that training, mining and evaluation make of a text and the prompt before it."""
        ids, prompt_ids = self.tokenizer.encode(text), self.tokenizer.encode(prompt)
        return format_text(ids, MAX_LENGTH, self.tokenizer.eos_id, prompt_ids).tolist()

    def vectors(
        self, texts: list[str], settings: ExportSettings | None = None, prompt_name: str | None = None
    ) -> np.ndarray:
        """Unit vectors [n, e] float64 as the settings (`self.settings()` if not given) have them."""
        settings = settings or self.settings()
        prompt = settings.prompts.get(prompt_name or "", "")
        first = 0 if settings.include_prompt else len(self.tokenizer.encode(prompt))
        rows = []
        for text in texts:
            x = token_vectors(self.tokens(text, prompt), self.weights, self.shape, bool(settings.alpha))
            pooled = pool(x, settings.pooling, first)
            if self.shape.projection_dim is not None:
                pooled = self.weights[PROJECTION] @ pooled
            rows.append((pooled / pooled.norm()).numpy())
        return np.stack(rows)

    def reference(self, settings: ExportSettings) -> Callable[[list[str], str | None], np.ndarray]:
        """What an export is checked against."""
        return lambda texts, prompt_name: self.vectors(texts, settings, prompt_name)
