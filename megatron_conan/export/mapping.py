"""Weight names and layouts: megatron-core's GPT naming <-> Hugging Face's `LlamaModel`, as one table.

Legend: h hidden, n attention heads, g query groups (KV heads), d head dim (`kv_channels`), f ffn hidden, v vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
PROJECTION = "projection.weight"
"""Behind pooling: not part of the Llama model, but a module of the SentenceTransformer folder."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers that fix every weight's shape and the rotary and norm arithmetic."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Head dimension, explicit: `hidden_size` need not be `num_attention_heads * kv_channels`."""
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the tokenizer's vocabulary, without padding rows."""
    rotary_base: float
    norm_epsilon: float
    projection_dim: int | None = None
    """Rows of the linear map behind pooling; None where there is none."""

    @property
    def embedding_dim(self) -> int:
        """Size of the embedding."""
        return self.projection_dim or self.hidden_size

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be divisible by num_query_groups="
                f"{self.num_query_groups}"
            )


@dataclass(frozen=True)
class Rule:
    """One row of the table: a megatron weight is split into the Hugging Face weights; `merge` is its exact inverse."""

    megatron: str
    hugging_face: tuple[str, ...]
    shape: Callable[[ModelShape], tuple[int, ...]]
    split: Callable[[Tensor, ModelShape], tuple[Tensor, ...]]
    merge: Callable[[tuple[Tensor, ...], ModelShape], Tensor]


def split_qkv(weight: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """Splits [g * (n/g + 2) * d, h], rows per KV group (q heads, k, v), into q [n * d, h], k and v [g * d, h]."""
    groups, d = shape.num_query_groups, shape.kv_channels
    per_group = shape.num_attention_heads // groups
    # [g * (n/g + 2) * d, h] -> [g, n/g + 2, d, h]
    blocks = weight.reshape(groups, per_group + 2, d, weight.shape[-1])
    q, k, v = blocks[:, :per_group], blocks[:, per_group], blocks[:, per_group + 1]
    # [g, n/g, d, h] -> [n * d, h]; [g, d, h] -> [g * d, h]
    return tuple(part.reshape(-1, weight.shape[-1]).contiguous() for part in (q, k, v))  # type: ignore[return-value]


def merge_qkv(parts: tuple[Tensor, ...], shape: ModelShape) -> Tensor:
    """The inverse of `split_qkv`: q [n * d, h], k [g * d, h], v [g * d, h] -> [g * (n/g + 2) * d, h]."""
    groups, d = shape.num_query_groups, shape.kv_channels
    # [heads * d, h] -> [g, heads/g, d, h], then joined within each group
    blocks = [part.reshape(groups, -1, d, part.shape[-1]) for part in parts]
    return torch.cat(blocks, dim=1).reshape(-1, parts[0].shape[-1])


def split_gate_up(weight: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Splits [2 * f, h], the gate above the up projection, into gate [f, h] and up [f, h]."""
    gate, up = weight.split(shape.ffn_hidden_size)
    return gate.contiguous(), up.contiguous()


def merge_gate_up(parts: tuple[Tensor, ...], shape: ModelShape) -> Tensor:
    """The inverse of `split_gate_up`: gate [f, h], up [f, h] -> [2 * f, h]."""
    return torch.cat(parts)


def keep(weight: Tensor, shape: ModelShape) -> tuple[Tensor]:
    """A weight that both sides hold in the same layout."""
    return (weight.contiguous(),)


def keep_back(parts: tuple[Tensor, ...], shape: ModelShape) -> Tensor:
    """The inverse of `keep`."""
    return parts[0]


def _qkv_rows(shape: ModelShape) -> int:
    return (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels


MODEL_RULES = (
    Rule(EMBEDDING, ("embed_tokens.weight",), lambda s: (s.vocab_size, s.hidden_size), keep, keep_back),
    Rule("decoder.final_layernorm.weight", ("norm.weight",), lambda s: (s.hidden_size,), keep, keep_back),
)
LAYER_RULES = (
    Rule("input_layernorm.weight", ("input_layernorm.weight",), lambda s: (s.hidden_size,), keep, keep_back),
    Rule(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        lambda s: (_qkv_rows(s), s.hidden_size),
        split_qkv,
        merge_qkv,
    ),
    Rule(
        "self_attention.linear_proj.weight",
        ("self_attn.o_proj.weight",),
        lambda s: (s.hidden_size, s.num_attention_heads * s.kv_channels),
        keep,
        keep_back,
    ),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), lambda s: (s.hidden_size,), keep, keep_back),
    Rule(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        lambda s: (2 * s.ffn_hidden_size, s.hidden_size),
        split_gate_up,
        merge_gate_up,
    ),
    Rule(
        "mlp.linear_fc2.weight",
        ("mlp.down_proj.weight",),
        lambda s: (s.hidden_size, s.ffn_hidden_size),
        keep,
        keep_back,
    ),
)


def iterate_rules(num_layers: int) -> list[Rule]:
    """The table with the layer numbers filled in: every weight of a model of `num_layers` layers, once."""
    rules = list(MODEL_RULES)
    for layer in range(num_layers):
        rules.extend(
            Rule(
                f"decoder.layers.{layer}.{rule.megatron}",
                tuple(f"layers.{layer}.{name}" for name in rule.hugging_face),
                rule.shape,
                rule.split,
                rule.merge,
            )
            for rule in LAYER_RULES
        )
    return rules


def to_hf(state_dict: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Renames and splits a full (unsharded) megatron state dict into that of Hugging Face's `LlamaModel`.

    Padding rows of the vocabulary are dropped. A tied copy of the head (`output_layer.weight`, as the last pipeline
    stage holds it) is accepted if it equals the embedding, and dropped.

    Raises:
        ValueError: a weight is missing, has another shape, or has no place in a Llama model (an untied head too).
    """
    weights = {name: tensor for name, tensor in state_dict.items() if not name.endswith("_extra_state")}
    rules = iterate_rules(shape.num_layers)
    _require_names(set(weights) - {OUTPUT_LAYER}, {rule.megatron for rule in rules}, "megatron")
    head = weights.get(OUTPUT_LAYER)
    if head is not None and not torch.equal(head, weights[EMBEDDING]):
        raise ValueError(
            f"{OUTPUT_LAYER} differs from {EMBEDDING}: an untied head has no place in an embedding model; "
            "drop it from the state dict before the export"
        )
    converted: dict[str, Tensor] = {}
    for rule in rules:
        weight = weights[rule.megatron]
        if rule.megatron == EMBEDDING:
            weight = weight[: shape.vocab_size]
        _require_shape(rule.megatron, weight, rule.shape(shape))
        converted.update(zip(rule.hugging_face, rule.split(weight, shape), strict=True))
    return converted


def from_hf(state_dict: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The exact inverse of `to_hf`; names may carry the prefix `model.` of `LlamaForCausalLM`, its head is dropped.

    Raises:
        ValueError: a weight is missing, unknown or has another shape.
    """
    weights = {name.removeprefix("model."): tensor for name, tensor in state_dict.items() if name != "lm_head.weight"}
    rules = iterate_rules(shape.num_layers)
    _require_names(set(weights), {name for rule in rules for name in rule.hugging_face}, "Hugging Face")
    converted: dict[str, Tensor] = {}
    for rule in rules:
        merged = rule.merge(tuple(weights[name] for name in rule.hugging_face), shape)
        _require_shape(rule.megatron, merged, rule.shape(shape))
        converted[rule.megatron] = merged
    return converted


def _require_names(found: set[str], expected: set[str], naming: str) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise ValueError(
            f"the {naming} state dict does not fit the model shape: {len(missing)} weights missing "
            f"{missing[:3]}, {len(unknown)} without a place {unknown[:3]}; check num_layers and the names"
        )


def _require_shape(name: str, weight: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(weight.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, the model shape asks for {expected}")
