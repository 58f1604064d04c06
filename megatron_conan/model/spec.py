"""How a Conan layer is composed of megatron-core's parts."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_conan.config import RunConfig
from megatron_conan.model.attention import SoftMaskAttention
from megatron_conan.model.backends import import_te_linears
from megatron_conan.model.mask import SoftMask
from megatron_conan.model.norm import RMSNorm


def transformer_config(config: RunConfig, device: torch.device) -> TransformerConfig:
    """megatron-core's config of the decoder that `config` describes."""
    m, p = config.model, config.parallel
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    interleaved = p.virtual_pipeline is not None
    return TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.head_dim,
        ffn_hidden_size=m.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend=AttnBackend.local,  # our core attention; no transformer-engine switches in the environment
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        # conan.initialize_parameters draws the weights, independent of the layout; megatron-core's own initialisation only
        # marks which parameters are split, and how
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        use_cpu_initialization=device.type == "cpu",
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline,
        sequence_parallel=p.sequence,
        calculate_per_token_loss=True,  # gradients are summed, then divided once by the global count
        params_dtype=dtype,
        bf16=config.train.precision == "bf16",
        pipeline_dtype=dtype,
        # The interleaved schedule over gloo is right only with overlapped p2p and without freeing the sent outputs.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=not (interleaved and device.type == "cpu"),
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def decoder_spec(
    config: RunConfig, core: TransformerConfig, soft_mask: SoftMask, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Layer specs of this pipeline stage (and model chunk): pre-norm attention and SwiGLU around our core attention."""
    column, row = import_te_linears() if config.model.spec == "te" else (ColumnParallelLinear, RowParallelLinear)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=partial(SoftMaskAttention, soft_mask=soft_mask, backend=config.attention.backend),
                    linear_proj=row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    num_layers = get_num_layers_to_build(core, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
