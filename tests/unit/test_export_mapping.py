"""Weight names and layouts: both directions are exact inverses, and the names are those of a real LlamaModel."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from megatron_conan.export.mapping import EMBEDDING, OUTPUT_LAYER, ModelShape, from_hf, iterate_rules, split_qkv, to_hf


def make_shape(ratio: int = 2) -> ModelShape:
    return ModelShape(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=4,
        num_query_groups=4 // ratio,
        kv_channels=8,
        ffn_hidden_size=20,
        vocab_size=50,
        rotary_base=10000.0,
        norm_epsilon=1e-5,
    )


def make_weights(shape: ModelShape, padding_rows: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    weights = {
        rule.megatron: torch.randn(rule.shape(shape), generator=generator) for rule in iterate_rules(shape.num_layers)
    }
    if padding_rows:
        weights[EMBEDDING] = torch.cat([weights[EMBEDDING], torch.full((padding_rows, shape.hidden_size), 9.0)])
    return weights


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_both_directions_are_exact_inverses(ratio: int) -> None:
    shape = make_shape(ratio)
    weights = make_weights(shape)
    there = to_hf(weights, shape)
    back = from_hf(there, shape)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    again = to_hf(back, shape)
    assert again.keys() == there.keys()
    assert all(torch.equal(again[name], there[name]) for name in there)
    prefixed = {f"model.{name}": tensor for name, tensor in there.items()}
    prefixed["lm_head.weight"] = there["embed_tokens.weight"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in from_hf(prefixed, shape).items())


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_names_and_shapes_are_those_of_a_real_llama(ratio: int) -> None:
    shape = make_shape(ratio)
    model = LlamaModel(
        LlamaConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            head_dim=shape.kv_channels,
            vocab_size=shape.vocab_size,
        )
    )
    converted = to_hf(make_weights(shape), shape)
    assert {name: tuple(t.shape) for name, t in converted.items()} == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }


def test_qkv_rows_lie_per_group() -> None:
    """Rows are labelled (group, place in the group): q heads of a group come before its k and v."""
    shape = make_shape(ratio=2)  # 2 groups of 2 q heads: blocks q0 q1 k0 v0 q2 q3 k1 v1
    labels = torch.arange(8.0).repeat_interleave(shape.kv_channels)[:, None].expand(-1, shape.hidden_size)
    q, k, v = (part[:: shape.kv_channels, 0].tolist() for part in split_qkv(labels, shape))
    assert (q, k, v) == ([0, 1, 4, 5], [2, 6], [3, 7])


def test_padding_rows_and_a_tied_head_are_dropped() -> None:
    shape = make_shape()
    weights = make_weights(shape, padding_rows=14)
    weights["decoder.layers.0.self_attention._extra_state"] = torch.zeros(1)
    weights[OUTPUT_LAYER] = weights[EMBEDDING].clone()
    converted = to_hf(weights, shape)
    assert converted["embed_tokens.weight"].shape == (50, 24)
    assert not (converted["embed_tokens.weight"] == 9.0).all(dim=1).any()
    weights[OUTPUT_LAYER] = weights[EMBEDDING] + 1
    with pytest.raises(ValueError, match="untied head"):
        to_hf(weights, shape)


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    shape = make_shape()
    weights = make_weights(shape)
    with pytest.raises(ValueError, match=r"1 weights missing \['decoder.final_layernorm.weight'\]"):
        to_hf({name: tensor for name, tensor in weights.items() if "final" not in name}, shape)
    with pytest.raises(ValueError, match=r"without a place \['decoder.layers.0.self_attention.core_attention.theta'\]"):
        to_hf(weights | {"decoder.layers.0.self_attention.core_attention.theta": torch.zeros(4)}, shape)
    with pytest.raises(ValueError, match=r"linear_fc2.weight has shape \(3, 3\)"):
        to_hf(weights | {"decoder.layers.1.mlp.linear_fc2.weight": torch.zeros(3, 3)}, shape)
    with pytest.raises(ValueError, match="must be divisible"):
        ModelShape(1, 8, 3, 2, 4, 8, 10, 1e4, 1e-5)
